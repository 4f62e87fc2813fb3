"""A run of examples/train.py that is killed and started again ends as if it had never been."""

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from trainer import last_complete_checkpoint

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[2] / "examples"
STEPS = 6


def start(script: str, *options, log: Path) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    with open(log, "w") as file:
        command = [sys.executable, str(EXAMPLES / script), *map(str, options)]
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def finish(script: str, *options, log: Path) -> None:
    assert start(script, *options, log=log).wait(timeout=300) == 0, log.read_text()[-4000:]


def train_options(folder: Path, output: str) -> list:
    options = ["--config", EXAMPLES / "configs" / "small.yaml", "--model", folder / "small", "--use_cpu", "true"]
    options += ["--data", folder / "world4d", "--teacher", folder / "teacher", "--output_dir", folder / output]
    options += ["--num_frames", 4, "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2]
    options += ["--decoder_hidden_size", 16, "--perception_clips", 1, "--disable_tqdm", "true"]
    return [*options, "--max_steps", STEPS, "--logging_steps", 1, "--save_steps", 1, "--save_total_limit", 2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, request):
    """A folder with clips, a teacher, a small model, and a run in `unbroken` that nobody disturbed."""
    folder = tmp_path_factory.mktemp("interrupted")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("HF_HOME", str(folder / "home"))
    request.addfinalizer(monkeypatch.undo)
    log = folder / "log.txt"
    clips = ["--train-clips", 3, "--validation-clips", 1, "--test-clips", 1, "--size-px", 32, "--num-proc", 1]
    finish("render_world4d.py", "--output", folder / "world4d", *clips, log=log)
    size = ["--num-frames", 4, "--image-size", 16, "--hidden-size", 16, "--layers", 4, "--heads", 2, "--feature-dim", 8]
    teacher = ["--output-dir", folder / "teacher", "--steps", 1, "--batch-size", 1, "--eval-clips", 1]
    finish("train_teacher.py", *teacher, *size, log=log)
    small = ["--data", folder / "world4d", "--output", folder / "small", "--image-size", 16, "--patch-size", 4]
    finish("make_small_model.py", *small, "--width", 32, "--layers", 1, "--vocab-size", 512, log=log)
    finish("train.py", *train_options(folder, "unbroken"), log=log)
    return folder


def kill_while_it_writes(options: list, checkpoint: Path, seconds: float, log: Path) -> None:
    """SIGKILL, `seconds` after the folder `checkpoint` appears."""
    process = start("train.py", *options, log=log)
    end = time.monotonic() + 120
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < end, log.read_text()[-4000:]
        time.sleep(0.001)
    time.sleep(seconds)
    process.kill()
    process.wait()


def losses(run: Path) -> list[dict]:
    log = json.loads((run / "run.json").read_text())["log"]
    return [
        {k: v for k, v in entry.items() if k != "num_tokens"} for entry in log if "loss" in entry
    ]  # TRL counts anew


@pytest.mark.parametrize("seed", [0])
def test_killed_run_ends_as_the_unbroken_one(folder, seed):
    draw = random.Random(seed)
    name, log = f"killed-{seed}", folder / f"killed-{seed}.txt"
    options = train_options(folder, name)
    for step in sorted(draw.sample(range(1, STEPS), 2)):
        kill_while_it_writes(options, folder / name / f"checkpoint-{step}", draw.uniform(0, 0.05), log)
        assert not (folder / name / "run.json").exists()
    finish("train.py", *options, log=log)
    assert [entry["step"] for entry in losses(folder / name)] == list(range(1, STEPS + 1))
    assert losses(folder / name) == losses(folder / "unbroken")
    for file in ("model.safetensors", "perception_decoder/model.safetensors"):
        found, expected = load_file(folder / name / file), load_file(folder / "unbroken" / file)
        assert set(found) == set(expected)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_checkpoint_cut_off_at_any_file_is_passed_over(folder, tmp_path):
    before, whole = (folder / "unbroken" / f"checkpoint-{step}" for step in (STEPS - 1, STEPS))
    files = sorted((p for p in whole.rglob("*") if p.is_file()), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) > 8
    shutil.copytree(before, tmp_path / before.name)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / before.name)
    for number, cut in enumerate(files):
        shutil.rmtree(tmp_path / whole.name, ignore_errors=True)
        (tmp_path / whole.name).mkdir()
        for file in files[: number + 1]:
            there = tmp_path / whole.name / file.relative_to(whole)
            there.parent.mkdir(exist_ok=True)
            content = file.read_bytes()
            there.write_bytes(content[: len(content) // 2] if file == cut else content)
        assert last_complete_checkpoint(tmp_path) == str(tmp_path / before.name), cut
    shutil.rmtree(tmp_path / whole.name)
    shutil.copytree(whole, tmp_path / whole.name)
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / whole.name)


def test_there_is_no_checkpoint_in_a_new_or_foreign_folder(tmp_path):
    assert last_complete_checkpoint(tmp_path / "new") is None
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "checkpoint-9").write_text("a file")
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-10").mkdir()
    for step in (7, 10):
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")  # numbers, not letters
