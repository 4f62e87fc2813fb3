"""Where the time of a training step of the study goes: kernels of the GPU by profile, and the step of a run that has it alone.

Several runs share a GPU, so what a step costs is the sum of its kernels; a run alone mostly waits for them to be launched. Each row
of examples/study.yaml is measured as the study runs it and, with --plain, without compilation and folded convolutions, too.

    python benchmarks/study_step.py --output runs/study_step.json
    python benchmarks/study_step.py --rows ld tune_llm --plain --output runs/study_step.json

Copies between host and device are counted apart: they run beside other runs' kernels. On a CPU only the whole step is measured.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from datasets_rgpt4d.whole_files import write_text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "examples"))  # scripts of that folder import each other by their bare names

from study_run import Run  # noqa: E402

import study  # noqa: E402

COPIES = "Memcpy HtoD", "Memcpy DtoH"


class Steps(TrainerCallback):
    """Times steps after a warm-up, then profiles as many, the last of the training."""

    def __init__(self, warm_up: int, count: int):
        self.warm_up, self.count, self.milliseconds, self.profile = warm_up, count, [], None

    def on_train_begin(self, args, state, control, **kwargs):
        self.before = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now, done = time.perf_counter(), state.global_step - self.warm_up
        if 0 < done <= self.count:
            self.milliseconds.append(1000 * (now - self.before))
        if done == self.count and torch.cuda.is_available():
            self.profile = profile(activities=[ProfilerActivity.CUDA])
            self.profile.start()
        elif done == 2 * self.count and self.profile is not None:
            self.profile.stop()
        self.before = time.perf_counter()

    def told(self) -> dict[str, Any]:
        found = {"step_ms": {"median": statistics.median(self.milliseconds), "n": self.count}}
        if self.profile is None:
            return found
        kernels = [event for event in self.profile.key_averages() if event.self_device_time_total]
        copies = sum(event.self_device_time_total for event in kernels if event.key.startswith(COPIES))
        total = sum(event.self_device_time_total for event in kernels)
        longest = sorted(kernels, key=lambda event: -event.self_device_time_total)[:15]
        per_step = 1000 * self.count  # microseconds of all -> milliseconds of one
        return {
            **found,
            "kernels_ms": (total - copies) / per_step,
            "copies_ms": copies / per_step,
            "kernels": sum(event.count for event in kernels) / self.count,
            "longest_ms": {event.key[:120]: event.self_device_time_total / per_step for event in longest},
        }


def measure(config: dict[str, Any], work: Path, row: str, compiled: bool, warm_up: int, count: int) -> dict[str, Any]:
    steps = Steps(warm_up, count)
    Run(config, work, row, 0, compiled=compiled).train([steps])
    torch.compiler.reset()
    return steps.told()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", default=["sft", "p4d"], help="rows of the study (default: %(default)s)")
    parser.add_argument("--plain", action="store_true", help="measure each without compilation, too")
    parser.add_argument("--clips", type=int, default=320, help="clips to train on (default: %(default)s)")
    parser.add_argument("--warm-up", type=int, default=20, help="steps that do not count (default: %(default)s)")
    parser.add_argument(
        "--steps", type=int, default=10, help="steps that are timed, then profiled (default: %(default)s)"
    )
    parser.add_argument("--batch", type=int, help="clips of a step (default: the study's)")
    parser.add_argument("--output", type=Path, required=True, help="file of the result, JSON")
    args = parser.parse_args()
    config = yaml.safe_load(study.CONFIG.read_text(encoding="utf-8"))
    config["training"] |= {"max_steps": args.warm_up + 2 * args.steps, "bf16": torch.cuda.is_available()}
    if args.batch:
        config["training"]["per_device_train_batch_size"] = args.batch
    for row in config["rows"].values():
        for name in ("picture_steps", "max_steps"):
            (row or {}).pop(name, None)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        study.take_stored(work, work / "told")
        config["data"] |= {"train_clips": args.clips, "test_clips": 2}
        with ProcessPoolExecutor(os.cpu_count(), study.PROCESSES) as pool:
            study.prepare(config, work, args.rows, pool)
        for row in args.rows:
            for compiled in (True, False) if args.plain else (True,):
                name = row if compiled else f"{row}, plain"
                found[name] = measure(config, work, row, compiled, args.warm_up, args.steps)
                shown = {key: round(value, 2) for key, value in found[name].items() if isinstance(value, float)}
                print(f"{name}: step {found[name]['step_ms']['median']:.1f} ms, {shown}", flush=True)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    args.output.parent.mkdir(parents=True, exist_ok=True)
    content = {"device": device, "torch": torch.__version__, "rows": found}
    write_text(args.output, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
