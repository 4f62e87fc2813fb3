import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers and datasets are imported: no test needs the network

import pytest

from examples.make_small_model import build_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE of about 400 tokens with the chat and placeholder tokens of `RGPT4DProcessor`."""
    return build_tokenizer(["How fast is <obj_1> moving relative to <obj_2>?", "Options:\n(A) left\n(B) right"] * 2, 400)


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with reference tensors and real assets, which are used in place and not part of the project."""
    root = Path(os.environ.get("RGPT4D_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "parity").is_dir():
        pytest.skip("reference tensors and assets are not here; set RGPT4D_SHARED to their folder to run this test")
    return root


def pytest_addoption(parser):
    parser.addoption(
        "--record-trajectories", action="store_true", help="write the losses of the trajectory tests instead of checking them"
    )
