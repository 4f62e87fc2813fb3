"""Two processes train as one does on the same batch: copies of the model (DDP), and weights spread over both (FSDP2, ZeRO-3).

This file is also the program of those processes, which talk by gloo on a CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file

from modeling_rgpt4d import (
    L4PModel,
    RGPT4DForConditionalGeneration,
    RGPT4DImageProcessor,
    RGPT4DProcessor,
    RGPT4DVideoProcessor,
)
from tests.modeling_rgpt4d.test_modeling_l4p import tiny_config
from trainer import GroundTruthTeacher, L4PTeacher, P4DCollator, P4DConfig, P4DTrainer
from trainer.sharded_modules import is_sharded

pytestmark = pytest.mark.slow

NUM_FRAMES = 4
CONFIGS = Path(__file__).parents[2] / "examples" / "configs" / "accelerate"
PATIENCE = 120  # seconds after which processes that wait for each other are ended
COUNTED_ANEW = ("num_tokens",)  # by TRL 1.16 after a resumption

# Settings of a run by one process. Of two, each has half of `per_device_train_batch_size`: rows go first to one, then to the other.
# Rows 0 to 3 have a video, 4 and 5 text alone, 6 and 7 an image, 8 a video that is too short for the teacher.
CASES = {
    "lora": {"order": [0, 1, 4, 5, 6, 7, 2, 3], "llm_lora": True, "trainable": ["projector", "llm"]},
    "videos": {"order": [0, 1, 2, 3, 1, 0, 3, 2]},
    "one process has text alone": {"order": [0, 1, 4, 5, 5, 4, 2, 3]},
    "one process has an image alone": {"order": [0, 4, 6, 5, 7, 4, 2, 3]},
    "one process has nothing to distil": {"order": [0, 6, 1, 8, 8, 4, 2, 7]},  # row 8 has a video of 3 frames
    "no process has a video": {"order": [4, 5, 5, 4, 6, 4, 5, 7]},
    "accumulated": {"order": [0, 4, 6, 1, 5, 2, 3, 7] * 2, "gradient_accumulation_steps": 2},
    "checkpointed": {"order": [0, 1, 4, 5, 6, 7, 2, 3], "gradient_checkpointing": True},
    "frozen tower": {"order": [0, 1, 4, 5, 6, 7, 2, 3], "trainable": ["projector", "llm"]},
    "truth": {"order": [0, 1, 4, 5, 6, 7, 2, 3], "truth": True},
}


# --------------------------------------------------------------------------------------------------------- one process


def exact_signals(row, video, seconds):
    shapes = {"depth": (1, 4, 32, 32), "flow": (2, 4, 32, 32), "motion": (1, 4, 32, 32), "camray": (6, 4, 4, 4)}
    start = float(seconds[0]) + len(row["messages"][0]["content"][1]["text"]) / 100  # another truth for each row
    return {name: torch.linspace(start, 1, int(np.prod(shape))).view(shape) for name, shape in shapes.items()}


def make_trainer(folder: Path, output_dir: Path, case: dict, num_processes: int, **settings) -> P4DTrainer:
    case = {"gradient_accumulation_steps": 1, "per_device_train_batch_size": 4 // num_processes, **case, **settings}
    case["per_device_train_batch_size"] //= case["gradient_accumulation_steps"]
    rows = json.loads((folder / "rows.json").read_text())
    rows = [rows[index] for index in case.pop("order")]
    truth = exact_signals if case.pop("truth", False) else None
    teacher = L4PTeacher(L4PModel.from_pretrained(folder / "l4p"), depth_scale="metric")
    if truth is not None:
        teacher, case["distill_latent"] = GroundTruthTeacher(teacher), False
    processor = RGPT4DProcessor.from_pretrained(folder / "model")
    defaults = {
        "output_dir": str(output_dir),
        "max_steps": 2,
        "optim": "sgd",  # its weights move in proportion to the gradients, where Adam's would hide a wrong factor
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "trainable": ["vision", "projector", "llm"],
        "lora_r": 2,
        "lora_dropout": 0.0,
        "decoder_hidden_size": 16,
        "gradient_checkpointing": False,
        "bf16": False,
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "ddp_timeout": PATIENCE // 2,
    }
    args = P4DConfig(**{**defaults, **case})
    collate = P4DCollator(processor, NUM_FRAMES, truth)
    dataset = Dataset.from_dict({"index": range(len(rows))})
    return P4DTrainer(
        RGPT4DForConditionalGeneration.from_pretrained(folder / "model"),
        args,
        teacher=teacher,
        train_dataset=dataset.with_transform(lambda batch: {"row": [rows[index] for index in batch["index"]]}),
        processing_class=processor,
        data_collator=lambda examples: collate([example["row"] for example in examples]),
    )


def run_case(folder: Path, output_dir: Path, case: dict, num_processes: int, resume=None, **settings) -> P4DTrainer:
    trainer = make_trainer(folder, output_dir, case, num_processes, **settings)
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    if trainer.is_world_process_zero():
        (output_dir / "log.json").write_text(json.dumps(trainer.state.log_history))
    return trainer


def main(folder: Path, kind: str, names: list[str]) -> None:
    if kind != "ddp":
        # accelerate 1.15 spreads weights over GPUs alone; told to use a CPU, it takes DDP instead without a word
        PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU

    def run(output_dir: Path, case: dict, **settings) -> None:
        if kind == "ddp":
            settings["use_cpu"] = True
        else:
            settings["accelerator_config"] = {"use_configured_state": True}
        if kind == "zero3":
            AcceleratorState._reset_state()  # it holds DeepSpeed's settings of the run before
        trainer = run_case(folder, output_dir, case, 2, **settings)
        assert trainer.accelerator.num_processes == 2 and is_sharded(trainer.model_wrapped) == (kind != "ddp")

    for name in names:
        run(folder / kind / name, CASES[name], save_strategy="steps", save_steps=1)
    # Adam has states to go on with, where SGD has none
    name, case = names[-1], {**CASES[names[-1]], "optim": "adamw_torch", "learning_rate": 1e-3}
    unbroken, resumed = folder / kind / "unbroken", folder / kind / "resumed"
    run(unbroken, case, save_strategy="steps", save_steps=1)
    run(resumed, case, resume=str(unbroken / "checkpoint-1"))
    torch.distributed.destroy_process_group()


# ------------------------------------------------------------------------------------------------------- two processes


def launch(folder: Path, kind: str, names: list[str]) -> Path:
    """This file in two processes, as a config of examples/configs/accelerate has it. All of both has ended at the return."""
    config = CONFIGS / f"{'cpu' if kind == 'ddp' else kind}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--main_process_port", "0", __file__, folder, kind, *names]
    environment = {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(list(map(str, command)), env=environment, **pipes) as launcher:
        try:
            printed, _ = launcher.communicate(timeout=PATIENCE)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends the two; after a kill they would stay
            printed, _ = launcher.communicate()
    assert launcher.returncode == 0, printed[-8000:]
    return folder / kind


@pytest.fixture(scope="module")
def folder(tmp_path_factory, make_model, tiny_tokenizer):
    """A folder with a tiny model, a tiny L4P, and nine conversations: about videos, text alone, images, a short video."""
    folder = tmp_path_factory.mktemp("distributed")
    make_model().save_pretrained(folder / "model")
    size = {"height": 28, "width": 28}
    processor = RGPT4DProcessor(
        RGPT4DImageProcessor(size=size), RGPT4DVideoProcessor(size=size), tiny_tokenizer, frame_grid=2
    )
    processor.save_pretrained(folder / "model")
    torch.manual_seed(1)
    L4PModel(tiny_config()).save_pretrained(folder / "l4p")
    random, rows = np.random.default_rng(0), []
    for index, kind in enumerate(["video"] * 4 + ["text"] * 2 + ["image"] * 2 + ["short"]):
        content = [{"type": "text", "text": "Which way does it go? " * (1 + index % 3)}]
        frames = [Image.fromarray(frame) for frame in random.integers(0, 256, (6, 20, 24, 3), dtype=np.uint8)]
        if kind == "image":
            frames[0].save(folder / f"{index}.png")
            content.insert(0, {"type": "image", "image": str(folder / f"{index}.png")})
        elif kind != "text":
            (folder / str(index)).mkdir()
            for number, frame in enumerate(frames[: 3 if kind == "short" else 6]):
                frame.save(folder / str(index) / f"{number}.png")
            content.insert(0, {"type": "video", "video": str(folder / str(index)), "fps": 2.0 + index})
        answer = [{"type": "text", "text": ["left", "to the right", "up"][index % 3]}]
        rows.append({"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


@pytest.fixture(scope="module")
def run_alone(folder):
    """Call it with a name of `CASES`: the folder of that run by one process."""

    def run(name: str) -> Path:
        output_dir = folder / "alone" / name
        if not output_dir.exists():
            run_case(folder, output_dir, CASES[name], 1, use_cpu=True)
        return output_dir

    return run


def check_equal(found: Path, expected: Path, rtol: float = 1e-4, leave_out: tuple[str, ...] = ()) -> None:
    """Losses, gradient norms and counts of each step, and the trained weights, of two runs."""
    logs = [json.loads((run / "log.json").read_text()) for run in (found, expected)]
    ours, theirs = ([entry for entry in log if "loss" in entry] for log in logs)
    assert len(ours) == len(theirs) == 2
    for our, their in zip(ours, theirs, strict=True):
        names = {name for name in their if not name.startswith("grad_norm_")}
        assert {name for name in our if not name.startswith("grad_norm_")} == names
        for name in names - {"epoch", *leave_out}:
            assert our[name] == pytest.approx(their[name], rel=rtol), name
    (model,) = (file.name for file in expected.glob("*.safetensors"))
    files = [model, "perception_decoder/model.safetensors"]
    for file in files:
        weights, wanted = load_file(found / file), load_file(expected / file)
        assert set(weights) == set(wanted)
        for name in wanted:
            torch.testing.assert_close(weights[name], wanted[name], rtol=rtol, atol=1e-6, msg=lambda m: f"{name}: {m}")  # noqa: B023


@pytest.fixture(scope="module")
def ddp(folder):
    return launch(folder, "ddp", list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_two_copies_train_as_one_process_does(ddp, run_alone, name):
    check_equal(ddp / name, run_alone(name))


def test_two_copies_resume_as_the_unbroken_run(ddp):
    check_equal(ddp / "resumed", ddp / "unbroken", rtol=0, leave_out=COUNTED_ANEW)


@pytest.fixture(scope="module")
def fsdp2(folder):
    return launch(folder, "fsdp2", list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_weights_spread_by_fsdp2_train_as_one_process_does(fsdp2, run_alone, name):
    check_equal(fsdp2 / name, run_alone(name))


def test_fsdp2_resumes_as_the_unbroken_run(fsdp2):
    check_equal(fsdp2 / "resumed", fsdp2 / "unbroken", rtol=0, leave_out=COUNTED_ANEW)


@pytest.fixture(scope="module")
def zero3(folder):
    pytest.importorskip("deepspeed", reason="needs deepspeed: pip install deepspeed")
    return launch(folder, "zero3", list(CASES))


@pytest.mark.parametrize("name", CASES)
def test_weights_spread_by_zero3_train_as_one_process_does(zero3, run_alone, name):
    check_equal(zero3 / name, run_alone(name))


def test_zero3_resumes_as_the_unbroken_run(zero3):
    check_equal(zero3 / "resumed", zero3 / "unbroken", rtol=0, leave_out=COUNTED_ANEW)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
