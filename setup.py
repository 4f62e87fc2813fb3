from pathlib import Path

from setuptools import find_packages, setup

ROOMS = ["modeling_rgpt4d", "trainer", "datasets_rgpt4d", "metrics_rgpt4d", "hub_cards"]
README = Path(__file__).parent / "README.md"

# Lower bounds are versions on which the tests ran; that of torch is transformers' own.
# Training needs the assistant masks of transformers 5.23; inference runs on 5.17 too.
TRAIN = ["accelerate", "datasets>=5.2", "matplotlib", "peft", "transformers>=5.23", "trl>=1.16"]
EVAL = ["accelerate", "datasets>=5.2", "evaluate>=0.4.6", "scipy>=1.15"]
DEMO = ["matplotlib"]
CURATION = ["datasets>=5.2"]  # the marks and the schema of R4D-Bench's rows; its tools come with their code
SERVE = ["accelerate", "fastapi", "openai", "transformers>=5.23", "uvicorn"]
QUANTIZE = ["accelerate", "bitsandbytes>=0.50"]
DEV = ["parameterized", "pytest", "pytest-xdist", "ruff>=0.17,<0.18", "setuptools>=77"]

setup(
    name="rgpt4d",
    version="0.1.0",
    description="4D-RGPT for Hugging Face transformers 5: region-level 4D video question answering by distillation",
    long_description=README.read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=[pattern for room in ROOMS for pattern in (room, f"{room}.*")]),
    package_data={
        "hub_cards": ["templates/*.md"],
        "metrics_rgpt4d": ["*/README.md", "lmms_eval_plugin/tasks/*"],
        "modeling_rgpt4d": ["PARITY.md"],
    },
    entry_points={"lmms_eval.models": ["rgpt4d = metrics_rgpt4d.lmms_eval_plugin:manifest"]},
    install_requires=[
        "av",
        "huggingface_hub",
        "jinja2",
        "numpy",
        "pillow",
        "safetensors",
        "torch>=2.6",
        "transformers>=5.17",
    ],
    extras_require={
        "train": TRAIN,
        "eval": EVAL,
        "demo": DEMO,
        "curation": CURATION,
        "serve": SERVE,
        "quantize": QUANTIZE,
        "dev": sorted({*TRAIN, *EVAL, *DEMO, *CURATION, *SERVE, *QUANTIZE, *DEV}),
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
