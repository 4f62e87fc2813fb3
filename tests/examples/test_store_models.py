"""What examples/store_models.py writes, from a student and a teacher with random weights and records made by hand."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from examples.make_small_model import build_model
from metrics_rgpt4d.r4d_bench import r4d_bench
from modeling_rgpt4d import L4PConfig, L4PModel, PerceptionDecoder, PerceptionDecoderConfig

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
CODE = EXAMPLES.parent / "modeling_rgpt4d"


def scores(right: int):
    """`right` of 40 questions."""
    questions = [{"id": i, "task": "Counting", "options": ["3", "5"], "answer": "3"} for i in range(40)]
    return r4d_bench.score(["A"] * right + ["B"] * (40 - right), questions)


def write(file: Path, content: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def settings(**changed) -> dict:
    row = {"start": "base", "data": "train", "max_steps": 1500, "num_frames": 4}
    return {**row, "signals": ["depth"], "alpha": 0.5, "beta": 0.1, **changed}


def of_depth(mean: float) -> dict:
    return {"mean": mean, "low": mean - 0.01, "high": mean + 0.01, "n": 7}


@pytest.fixture
def folder(tmp_path, tiny_tokenizer):
    """`runs/` as examples/study.py leaves it, `study/` with its records, `eval/` as examples/run_eval.py leaves it."""
    torch.manual_seed(0)
    student, runs, study = tmp_path / "runs" / "models" / "p4d-1", tmp_path / "runs", tmp_path / "study"
    model, processor = build_model(tiny_tokenizer, image_size=28, patch_size=7, width=32, layers=1)
    model.save_pretrained(student)
    processor.save_pretrained(student)
    sizes = {"image_size": 16, "patch_size": 8, "num_frames": 4, "hidden_size": 24, "intermediate_size": 48}
    layers = {"num_hidden_layers": 4, "num_attention_heads": 2, "taps": (1, 2, 3, 4), "layer_dims": (8, 8, 8, 8)}
    teacher = L4PModel(L4PConfig(**sizes, **layers, feature_dim=8, last_dim=8))
    teacher.save_pretrained(runs / "teacher")
    decoder = PerceptionDecoderConfig(model.config.text_config.hidden_size, teacher.config.latent_shape, hidden_size=16)
    PerceptionDecoder(decoder).save_pretrained(student / "perception_decoder")

    common = {"versions": {"torch": "2.13.0"}, "device": "cpu", "parameters": 5_100_000}
    base = {"row": "base", "seed": 0, "settings": settings(start="initial", data="base", max_steps=4000)}
    write(study / "records" / "base-0.json", {**common, **base})
    for seed, right in ((0, 30), (1, 28)):
        record = {"row": "p4d", "seed": seed, "settings": settings(), "tests": {"test": {"scores": scores(right)}}}
        perception = {"student": {"depth_abs_rel": [0.25, 0.35]}, "teacher": {"depth_abs_rel": [0.1, None]}}
        write(study / "records" / f"p4d-{seed}.json", {**common, **record, "perception": perception})
    write(
        study / "items.json",
        {"data": {"train_clips": 12_000, "base_clips": 9_000, "test_clips": 700}, "sha256": "abcdef0123456789"},
    )
    errors = {"depth_abs_rel": {"teacher": of_depth(0.05), "baseline": of_depth(0.16)}}
    of_teacher = {"world4d": "tiny", "steps": 9, "seed": 0, "num_frames": 4, "image_size": 16}
    told = {"command": "examples/train_teacher.py", "clips_shown": 18, "training_seconds": 2.0, "evaluated_on": "clips"}
    write(runs / "teacher" / "teacher_errors.json", {**common, **told, "settings": of_teacher, "errors": errors})
    write(tmp_path / "eval" / "scores.json", {"world4d": scores(26)})
    evaluated = {"model": str(student), "num_frames": 4, "generation": {"max_new_tokens": 24}}
    data = {"world4d": {"location": "runs/world4d", "revisions": ["sha256:12ab"]}}
    write(tmp_path / "eval" / "settings.json", {**evaluated, "benchmarks": data})
    return tmp_path


def store(folder: Path, *options) -> subprocess.CompletedProcess:
    command = [sys.executable, EXAMPLES / "store_models.py", "--work", folder / "runs", "--output", folder / "study"]
    return subprocess.run([*map(str, [*command, "--seed", "1", *options])], capture_output=True, text=True)


def test_cards_tell_every_run_score_and_error_and_the_folder_loads_without_a_warning(folder, run_as_stranger):
    done = store(folder, "--evaluation", folder / "eval")
    assert done.returncode == 0, done.stderr
    card = (folder / "study" / "student" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "| steps | 4,000 (base), then 1,500 (p4d) |" in card  # the weights that it started from are told
    assert "seed 1, 9,000 clips" in card and "seed 0, 12,000 clips" in card
    assert "| Avg | 40 | 65.0 |" in card and "| Avg | 40 | 70.0 |" in card  # video files, and the study's frames
    assert "sha256:12ab" in card and "--max-new-tokens 24" in card
    assert "75.0 (seed 0), 70.0 (seed 1). This is seed 1." in card
    assert "| depth_abs_rel | 2 | 0.300 [0.250, 0.350] | 0.100 [0.100, 0.100] |" in card
    assert "| depth_abs_rel | 7 | 0.050 [0.040, 0.060] |" in (folder / "study" / "teacher" / "README.md").read_text()
    for weights in (folder / "study").rglob("*.safetensors"):
        assert weights.stat().st_mode & 0o777 == 0o644
    code = [*(folder / "study").rglob("*.py")]
    assert code and all(file.is_symlink() and file.samefile(CODE / file.name) for file in code)
    loaded = run_as_stranger(
        """
import logging, sys, warnings
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor
told = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: told.append(record.getMessage())
warnings.simplefilter("always")
logging.captureWarnings(True)
for name in ("transformers", "py.warnings"):
    logging.getLogger(name).addHandler(handler)
student, teacher = sys.argv[1:]
AutoProcessor.from_pretrained(student, trust_remote_code=True)
AutoModelForImageTextToText.from_pretrained(student, trust_remote_code=True)
AutoModel.from_pretrained(teacher, trust_remote_code=True)
print(told)
""",
        folder / "study" / "student",
        folder / "study" / "teacher",
    )
    assert loaded.strip() == "[]"
    PerceptionDecoder.from_pretrained(folder / "study" / "student", subfolder="perception_decoder")


def test_scores_of_another_model_and_missing_records_are_refused(folder):
    evaluated = json.loads((folder / "eval" / "settings.json").read_text())
    write(folder / "eval" / "settings.json", {**evaluated, "model": str(folder / "other")})
    assert "not " + str(folder / "runs" / "models" / "p4d-1") in store(folder, "--evaluation", folder / "eval").stderr
    (folder / "study" / "records" / "base-0.json").unlink()
    refused = store(folder)
    assert refused.returncode != 0 and "base-0.json" in refused.stderr
    assert not (folder / "study" / "student").exists()


def test_what_fails_leaves_the_stored_model_and_no_rest(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import store_models

    monkeypatch.setattr(store_models, "MAX_BYTES", 3)
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "kept").touch()

    def fill(folder):
        (folder / "perception_decoder").mkdir()
        (folder / "perception_decoder" / "model.safetensors").write_bytes(b"1234")

    with pytest.raises(SystemExit, match=r"student/perception_decoder/model.safetensors has .* train a smaller model"):
        store_models.write_whole_folder(tmp_path / "student", fill)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    assert (tmp_path / "student" / "kept").exists()
