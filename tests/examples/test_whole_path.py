"""The commands of the README from the first to the last, each as small as it can be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

EXAMPLES = Path(__file__).parents[2] / "examples"


def run_example(script: str, *options, launcher: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(EXAMPLES.parent)}
    command = [sys.executable, *launcher, str(EXAMPLES / script), *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def checked(done: subprocess.CompletedProcess) -> str:
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_options(folder: Path, output: str, *more) -> list:
    options = [
        "--config",
        EXAMPLES / "configs" / "small.yaml",
        "--model",
        folder / "small",
        "--data",
        folder / "world4d",
    ]
    options += [
        "--output_dir",
        folder / output,
        "--num_frames",
        4,
        "--per_device_train_batch_size",
        2,
        "--use_cpu",
        "true",
    ]
    options += [
        "--decoder_hidden_size",
        16,
        "--dataloader_num_workers",
        0,
        "--logging_steps",
        1,
        "--disable_tqdm",
        "true",
    ]
    return [*options, *more]


ACCELERATE = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
ACCELERATE += ("--mixed_precision", "no", "--dynamo_backend", "no")


@pytest.fixture(scope="module")
def path(tmp_path_factory, request):
    """A folder in which everything up to the two trained students has been made."""
    folder = tmp_path_factory.mktemp("path")
    monkeypatch = pytest.MonkeyPatch()
    monkeypatch.setenv("HF_HOME", str(folder / "home"))  # nothing of the tests stays in the user's caches
    request.addfinalizer(monkeypatch.undo)
    clips = ["--train-clips", 2, "--validation-clips", 1, "--test-clips", 1, "--size-px", 32, "--num-proc", 1]
    checked(run_example("render_world4d.py", "--output", folder / "world4d", *clips))
    size = ["--num-frames", 4, "--image-size", 16, "--hidden-size", 16, "--layers", 4, "--heads", 2, "--feature-dim", 8]
    teacher = ["--output-dir", folder / "teacher", "--steps", 2, "--batch-size", 2, "--eval-clips", 2]
    checked(run_example("train_teacher.py", *teacher, *size))
    small = ["--data", folder / "world4d", "--output", folder / "small", "--image-size", 16, "--patch-size", 4]
    checked(run_example("make_small_model.py", *small, "--width", 32, "--layers", 1, "--vocab-size", 512))
    checked(run_example("train.py", *train_options(folder, "sft", "--max_steps", 2), launcher=ACCELERATE))
    distil = ["--teacher", folder / "teacher", "--picture_steps", 0, 4, "--perception_clips", 1]
    p4d = train_options(folder, "p4d", *distil, "--max_steps", 4, "--save_steps", 2)
    checked(run_example("train.py", *p4d, launcher=ACCELERATE))
    return folder


def test_training_leaves_model_decoder_pictures_and_record(path):
    record = json.loads((path / "p4d" / "run.json").read_text())
    terms = [entry for entry in record["log"] if "loss_ld" in entry]
    assert len(terms) == 4 and all(entry["loss_ld"] > 0 and entry["loss_ed"] > 0 for entry in terms)
    assert set(record["perception"]) == {"student", "teacher"}
    assert record["perception"]["student"]["depth_abs_rel"]["n"] == 1
    assert {p.name for p in (path / "p4d" / "pictures").iterdir()} == {
        "perception_step_000000.png",
        "perception_step_000004.png",
    }
    names = [set(safe_open(path / run / "model.safetensors", "pt").keys()) for run in ("small", "sft", "p4d")]
    assert names[0] == names[1] == names[2]
    assert (path / "p4d" / "perception_decoder" / "model.safetensors").exists()


def test_finished_run_is_left_alone_and_other_settings_are_refused(path):
    before = (path / "sft" / "run.json").stat().st_mtime_ns
    assert "already" in checked(run_example("train.py", *train_options(path, "sft", "--max_steps", 2)))
    assert (path / "sft" / "run.json").stat().st_mtime_ns == before
    for other in (["--max_steps", 3], ["--max_steps", 2, "--learning_rate", 0.5]):
        refused = run_example("train.py", *train_options(path, "sft", *other))
        assert refused.returncode != 0 and "other settings" in refused.stderr


def test_interrupted_run_goes_on_from_its_checkpoint(path, tmp_path):
    (path / "p4d-again").mkdir()
    (path / "p4d" / "checkpoint-4").rename(path / "p4d-again" / "checkpoint-4")
    distil = ["--teacher", path / "teacher", "--perception_clips", 1]
    checked(run_example("train.py", *train_options(path, "p4d-again", *distil, "--max_steps", 6, "--save_steps", 2)))
    record = json.loads((path / "p4d-again" / "run.json").read_text())
    assert [entry["step"] for entry in record["log"] if "loss_ld" in entry] == [1, 2, 3, 4, 5, 6]
    first = json.loads((path / "p4d" / "run.json").read_text())
    assert record["log"][0]["loss"] == first["log"][0]["loss"]


def test_evaluation_goes_on_where_it_stopped_and_asking_works(path):
    options = ["--benchmarks", "world4d", "--world4d", path / "world4d", "--num-frames", 4, "--max-new-tokens", 4]
    checked(run_example("run_eval.py", "--model", path / "p4d", "--output", path / "eval-p4d", *options))
    answers = path / "eval-p4d" / "answers.jsonl"
    scores = json.loads((path / "eval-p4d" / "scores.json").read_text())["world4d"]
    lines = answers.read_text().splitlines(keepends=True)
    assert scores["n"]["Avg"] + sum(other["n"] for other in scores["other"].values()) == len(lines)
    as_they_came = path / "eval-p4d" / "answers-0.jsonl"
    whole = as_they_came.read_text().splitlines(keepends=True)
    as_they_came.write_text("".join(whole[:2]) + whole[2][:10])  # as a kill leaves it
    checked(run_example("run_eval.py", "--model", path / "p4d", "--output", path / "eval-p4d", *options))
    replies = [json.loads(line)["reply"] for line in answers.read_text().splitlines()]
    assert replies == [json.loads(line)["reply"] for line in lines]
    again = json.loads((path / "eval-p4d" / "scores.json").read_text())["world4d"]
    assert again["n"] == scores["n"] and again["Avg"] == scores["Avg"]

    (clip,) = (path / "world4d" / "videos" / "test").glob("*.mp4")
    ask = ["--video", clip, "--region", "obj_1:4,4,20,20", "--num-frames", 4, "--max-new-tokens", 4]
    printed = checked(
        run_example("generate.py", "--model", path / "p4d", *ask, "--question", "Is <obj_1> red?", "--json")
    )
    asked = json.loads(printed.splitlines()[-1])
    assert asked["model_class"].startswith("transformers_modules.") and len(asked["timestamps"]) == 4
    wrong = run_example("generate.py", "--model", path / "p4d", *ask, "--question", "Is <obj_2> red?")
    assert wrong.returncode != 0 and "obj_2" in wrong.stderr

    export = ["--run", path / "p4d", "--evaluation", path / "eval-p4d", "--from-scratch", "--name", "tiny"]
    checked(run_example("publish.py", *export, "--output", path / "export"))
    card = (path / "export" / "README.md").read_text()
    assert "license: apache-2.0" in card and f"of {scores['n']['Avg']} replies" in card
    assert not [file for file in (path / "export").rglob("*") if file.suffix in (".bin", ".pt")]
    assert asked["answer"] in checked(
        run_example("generate.py", "--model", path / "export", *ask, "--question", "Is <obj_1> red?")
    )

    from examples.demo_report import Stored, Trained, write_report

    checked(run_example("run_eval.py", "--model", path / "sft", "--output", path / "eval-sft", *options))
    runs = {kind: path / kind for kind in ("sft", "p4d")}
    record = {"title": "a step", "seconds": 1.5, "peak_mib": 100.0, "reused": False}
    picture = min((path / "p4d" / "pictures").glob("*.png"))

    def report(stored, trained):
        write_report(
            path / "report.html",
            records=[record],
            settings={"steps": 4},
            video=clip,
            region="obj_1:4,4,20,20",
            question="Is <obj_1> red?",
            options=["yes", "no"],
            asked=asked,
            stored=stored,
            trained=trained,
        )
        return (path / "report.html").read_text()

    of_frames = 1 + len(asked["timestamps"])
    first = report(Stored(path / "eval-p4d", picture), None)
    assert "&lt;obj_1&gt;" in first and first.count("data:image/png;base64,") == 1 + of_frames
    assert "the stored model" in first and "It goes on" in first and "<th>TimeBench</th>" in first
    whole = report(Stored(path / "eval-p4d", picture), Trained(runs, {kind: path / f"eval-{kind}" for kind in runs}))
    assert whole.count("data:image/png;base64,") == 1 + of_frames + 1 + 2 and "the stored model" in whole
    for column in ("Avg", "VG", "TimeBench", "SFT alone", "SFT + P4D"):
        assert f"<th>{column}</th>" in whole
    assert "McNemar" in whole and "It goes on" not in whole


@pytest.mark.parametrize(
    "script",
    sorted(path.name for path in EXAMPLES.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()),
)
def test_help_suffices(script, help_of):
    assert "--" in help_of(EXAMPLES / script)
