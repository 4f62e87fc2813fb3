"""The benchmarks run from end to end at small sizes. What they measure is not looked at: a test has no business with time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments) -> str:
    command = [sys.executable, ROOT / "benchmarks" / script, *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


# parity_probe.py is run by parity.py, and by interpreters without this project
@pytest.mark.parametrize("script", ["conversion.py", "inference.py", "parity.py", "study_step.py", "video_reading.py"])
def test_help_says_what_is_measured(script, help_of):
    assert "python benchmarks/" in help_of(ROOT / "benchmarks" / script)


def test_inference_measures_every_model_and_mode(tmp_path):
    sizes = ["--tiny", "--frames", 2, "--new-tokens", 3, "--batch", 2, "--repeats", 1]
    run("inference.py", *sizes, "--output", tmp_path / "record.json")
    models = json.loads((tmp_path / "record.json").read_text())["models"]
    assert {"default, batch 1", "static, batch 1", "fast, batch 1", "fast, batch 2"} <= models["ours"].keys()
    assert models["ours"]["with P4D's decoder"]["logits_equal"] and models["ours"]["with P4D's decoder"]["names_equal"]
    for name in ("llava_onevision", "qwen2_5_vl"):
        assert models[name]["default, batch 2"]["answer_ms"]["median"] > 0


def test_a_step_of_the_study_is_measured_with_and_without_compilation(tmp_path):
    sizes = ["--clips", 4, "--batch", 2, "--warm-up", 1, "--steps", 1]
    run("study_step.py", "--rows", "sft", "--plain", *sizes, "--output", tmp_path / "record.json")
    rows = json.loads((tmp_path / "record.json").read_text())["rows"]
    assert rows["sft"]["step_ms"]["median"] > 0 and rows["sft, plain"]["step_ms"]["median"] > 0


def test_conversion_is_measured(tmp_path):
    printed = run("conversion.py", "--gigabytes", 0.25, "--shard-megabytes", 100, "--folder", tmp_path)
    assert "for the conversion" in printed and not any(tmp_path.iterdir())


def test_parity_report_is_made_and_within_its_tolerance(shared_dir, tmp_path):
    report = tmp_path / "PARITY.md"
    printed = run("parity.py", "--references", shared_dir / "parity/nvila", "--output", report)
    assert "within the tolerance: True" in printed
    # the committed report has the same rows; their last digits are the machine's
    committed = (ROOT / "modeling_rgpt4d" / "PARITY.md").read_text()
    rows = [line for line in report.read_text().splitlines() if line.startswith("| model_")]
    assert len(rows) > 10
    for row in rows:
        start = " | ".join(row.split(" | ")[:2])
        assert start in committed, f"{start} is not in the committed report: run benchmarks/parity.py again"


def test_every_guard_that_the_report_names_is_a_test():
    committed = (ROOT / "modeling_rgpt4d" / "PARITY.md").read_text()
    guards = {word for word in committed.replace("`", " ").split() if word.startswith("test_")}
    tests = (ROOT / "tests" / "modeling_rgpt4d" / "test_transformers_5.py").read_text()
    assert len(guards) == 7
    for guard in guards:
        assert f"def {guard}(" in tests, guard
