import os
import runpy
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers and datasets are imported: no test needs the network

import pytest

from examples.make_small_model import build_tokenizer


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """A byte-level BPE of about 400 tokens with the chat and placeholder tokens of `RGPT4DProcessor`."""
    return build_tokenizer(
        ["How fast is <obj_1> moving relative to <obj_2>?", "Options:\n(A) left\n(B) right"] * 2, 400
    )


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder with reference tensors and real assets, which are used in place and not part of the project."""
    root = Path(os.environ.get("RGPT4D_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not (root / "parity").is_dir():
        pytest.skip("reference tensors and assets are not here; set RGPT4D_SHARED to their folder to run this test")
    return root


# Hides a project that is installed in editable mode, which puts a finder of its own before all others.
HIDE_PROJECT = """
import importlib.util, sys
sys.meta_path[:] = [f for f in sys.meta_path if not getattr(f, "__module__", "").startswith("__editable__")]
assert importlib.util.find_spec("modeling_rgpt4d") is None, "the project must not be on the path here"
"""


@pytest.fixture
def run_as_stranger(tmp_path):
    """Call it with a script and its arguments: a fresh process that has the libraries, but not this project, no network
    and no cache, started in another folder. Returns what it printed; a failure fails the test with its messages."""

    def run(script: str, *arguments: str | os.PathLike) -> str:
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        hidden = ("PYTHONPATH", "HF_MODULES_CACHE", "HF_HUB_CACHE")
        environment = {name: value for name, value in os.environ.items() if name not in hidden}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-c", HIDE_PROJECT + script, *map(str, arguments)]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def run_script(monkeypatch, capsys):
    """Call it with the file of a script and its options: runs in this process, which has imported the libraries, as if it
    were the main one; returns what it printed."""

    def run(script: Path, *options) -> str:
        monkeypatch.syspath_prepend(script.parent)
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, options)])
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return run


@pytest.fixture
def help_of(run_script, capsys):
    """Call it with the file of a script: returns what `--help` prints."""

    def run(script: Path) -> str:
        with pytest.raises(SystemExit) as ended:
            run_script(script, "--help")
        assert not ended.value.code
        return capsys.readouterr().out

    return run


def pytest_addoption(parser):
    parser.addoption(
        "--record-trajectories",
        action="store_true",
        help="write the losses of the trajectory tests instead of checking them",
    )
