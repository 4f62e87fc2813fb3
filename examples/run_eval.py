"""Answer and score benchmarks with a model, or with an OpenAI-compatible endpoint, on one process or many.

    python examples/run_eval.py --model runs/p4d --benchmarks world4d --world4d runs/world4d --num-frames 8 --output runs/p4d-eval
    accelerate launch examples/run_eval.py --model 4d-rgpt-8b --benchmarks r4d_bench,vlm4d --r4d_bench data/R4D-Bench --output eval
    python examples/run_eval.py --model some-model --base-url http://localhost:8000/v1 --benchmarks sti_bench --output eval

Each answer is written as it comes (answers-<process>.jsonl). A run that was interrupted goes on where it stopped, with any
number of processes; one that is finished is only scored again. Then answers.jsonl has every question with its reply and
score, scores.json the scores, and report.md the paper's tables beside the paper's own numbers. A question that fails is
recorded with its error and counts as wrong. Where a benchmark lies is told by the option of its name: a folder as its
authors publish it, or a Hub id, ID@REVISION if you like; without the option, the authors' own Hub id.
"""

import argparse
import hashlib
import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path, PurePath
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from answering import EndpointAnswerer, ModelAnswerer, Question
from datasets import Dataset, DownloadMode, load_dataset
from datasets.exceptions import DatasetGenerationError
from evaluation_report import read_jsonl, score_folder, write_report
from tqdm import tqdm

from datasets_rgpt4d import (
    MMSIBenchQuestions,
    OmniSpatialQuestions,
    R4DBenchQuestions,
    SATRealBothOrders,
    SATRealQuestions,
    STIBenchQuestions,
    TimeBenchQuestions,
    VLM4DQuestions,
    VLM4DSyntheticQuestions,
    VSTIBenchQuestions,
    evaluation_messages,
    to_messages,
)
from datasets_rgpt4d.schema import evaluation_row
from datasets_rgpt4d.source_files import MissingDataError, SourceFiles
from datasets_rgpt4d.whole_files import append_record, drop_partial_line, write_text

BUILDERS = {
    "r4d_bench": R4DBenchQuestions,
    "sti_bench": STIBenchQuestions,
    "vlm4d": VLM4DQuestions,
    "vlm4d_synthetic": VLM4DSyntheticQuestions,
    "omnispatial": OmniSpatialQuestions,
    "mmsi_bench": MMSIBenchQuestions,
    "sat_real": SATRealQuestions,
    "sat_real_both_orders": SATRealBothOrders,
    "vstibench": VSTIBenchQuestions,
    "timebench": TimeBenchQuestions,
}
BENCHMARKS = (*BUILDERS, "world4d")
WORLD4D_REMEDY = "Make World4D with examples/render_world4d.py."
ROW_KEYS = ("category", "question", "options", "answer", "answer_kind", "details")


@dataclass
class Benchmark:
    """Questions of one benchmark; `row(index)` gives one of `EVALUATION_FEATURES`, `messages(index)` its chat."""

    name: str
    ids: list[str]
    row: Callable[[int], dict[str, Any]]
    messages: Callable[[int], list[dict[str, Any]]]
    settings: dict[str, Any]

    def facts(self, index: int) -> dict[str, Any]:
        """What of the row is kept beside the reply: enough to score it, and what it has in common with others."""
        row = self.row(index)
        first = (row["videos"] or row["images"])[0]
        group = hashlib.sha256(first["bytes"]).hexdigest()[:16] if first["path"] is None else first["path"]
        return {**{key: row[key] for key in ROW_KEYS}, "group": "/".join(PurePath(group).parts[-2:])}


def load_benchmark(name: str, location: str | None, skip_unusable: bool, rebuild: bool) -> Benchmark:
    """Raises: `MissingDataError` or `ValueError` that says what is missing or wrong, and what to do."""
    told, revision = location, None
    if location is not None and not os.path.isdir(location):
        location, _, revision = location.partition("@")
    if name == "world4d":
        return _load_world4d(location, revision)
    builder = BUILDERS[name](location=location, revision=revision or None, skip_unusable=skip_unusable)
    # Only a build tells what was left out; what lies in the cache does not.
    mode = DownloadMode.FORCE_REDOWNLOAD if rebuild else DownloadMode.REUSE_DATASET_IF_EXISTS
    builder.download_and_prepare(download_mode=mode)
    dataset: Dataset = builder.as_dataset(split=BUILDERS[name].SPLIT)
    settings = {
        "location": told or BUILDERS[name].HUB_ID,
        "revisions": sorted(set(dataset["revision"])),
        "questions": len(dataset),
        "left_out": len(getattr(builder, "unusable", [])),
    }
    return Benchmark(
        name, list(dataset["id"]), dataset.__getitem__, lambda index: evaluation_messages(dataset[index]), settings
    )


def _load_world4d(location: str | None, revision: str | None) -> Benchmark:
    """World4D's test split; its questions are asked as it trains them."""
    if location is None:
        raise ValueError(f"World4D is on no Hub: give --world4d FOLDER. {WORLD4D_REMEDY}")
    source = SourceFiles(location, WORLD4D_REMEDY, revision or None)
    source.annotations("world4d.json")
    dataset = load_dataset(location, split="test", revision=revision or None)

    def row(index: int) -> dict[str, Any]:
        found = dataset[index]
        return evaluation_row(
            id=found["id"],
            benchmark="world4d",
            category=found["task"],
            revision=source.revision,
            question=found["question"],
            answer=found["answer"],
            answer_kind="choice",
            options=found["options"],
            videos=[found["video"]],
        )

    settings = {"location": location, "revisions": [source.revision], "questions": len(dataset), "left_out": 0}

    def messages(index: int) -> list[dict[str, Any]]:
        return to_messages(dataset[index], with_answer=False)

    return Benchmark("world4d", list(dataset["id"]), row, messages, settings)


# ----- answers on disk


def read_answers(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The answers of all processes by benchmark and id. A question that has several counts once: an answer to it goes
    before an error, the earlier before the later."""
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    for path in sorted(folder.glob("answers-*.jsonl")):
        for answer in read_jsonl(path):
            key = (answer["benchmark"], answer["id"])
            if key not in answers or (answers[key]["error"] is not None and answer["error"] is None):
                answers[key] = answer
    return answers


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write settings.json, or compare it: answers of other settings must not be mixed."""
    settings = json.loads(json.dumps(settings))
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differ = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        if differ:
            told = "; ".join(f"{key}: {before.get(key)!r} there, {settings.get(key)!r} now" for key in differ)
            raise SystemExit(f"{folder} holds answers from other settings ({told}); choose another --output.")
    elif any(folder.glob("answers*.jsonl")):
        raise SystemExit(f"{folder} holds answers, but no settings.json; choose another --output.")
    else:
        write_text(path, json.dumps(settings, indent=1))


# ----- the run


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", required=True, help="folder or Hub id, or what the endpoint calls it")
    parser.add_argument("--benchmarks", required=True, help=f"separated by commas: {', '.join(BENCHMARKS)}")
    for name in BENCHMARKS:
        default = getattr(BUILDERS.get(name), "HUB_ID", None)
        told = f"(default: {default})" if default else "(needed: it is on no Hub)"
        parser.add_argument(f"--{name}", metavar="FOLDER_OR_ID", help=f"where {name} lies {told}")
    parser.add_argument("--output", required=True, type=Path, help="folder for answers, scores and report")
    parser.add_argument(
        "--compare", type=Path, help="output of another run on the same questions, to compare with in pairs"
    )
    parser.add_argument("--skip-unusable", action="store_true", help="leave questions out whose media are missing")
    parser.add_argument("--retry-errors", action="store_true", help="ask questions again that failed before")
    parser.add_argument(
        "--num-frames", type=int, default=16, help="frames sampled from each video (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, help="longest reply (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=8, help="questions at once, a process (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="of the weights (default: the checkpoint's)")
    parser.add_argument(
        "--seed", type=int, default=0, help="seed, for models that draw something (default: %(default)s)"
    )
    parser.add_argument("--trust-remote-code", action="store_true", help="run code that comes with the model")
    parser.add_argument("--teacher", help="folder or Hub id of the L4P model, for a 4D-RGPT that fuses its latents")
    parser.add_argument("--fast", action="store_true", help="4D-RGPT on CUDA: compile, and decode by a CUDA graph")
    parser.add_argument("--base-url", help="of an OpenAI-compatible endpoint; its key is in OPENAI_API_KEY")
    parser.add_argument(
        "--concurrency", type=int, default=8, help="requests to the endpoint at once (default: %(default)s)"
    )
    parser.add_argument(
        "--retries", type=int, default=6, help="of a request that may pass later (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature",
        type=lambda text: None if text == "none" else float(text),
        default=0.0,
        help='of the endpoint; "none" leaves it out, for models that refuse it (default: %(default)s)',
    )
    args = parser.parse_args()
    args.benchmarks = list(dict.fromkeys(args.benchmarks.split(",")))
    unknown = [name for name in args.benchmarks if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmarks {', '.join(unknown)}; known are {', '.join(BENCHMARKS)}")
    for name in ("num_frames", "max_new_tokens", "batch_size", "concurrency"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    if args.compare is not None and not (args.compare / "answers.jsonl").exists():
        parser.error(f"there is no {args.compare / 'answers.jsonl'} to compare with; finish that run first")
    return args


def make_answerer(args: argparse.Namespace, device: torch.device) -> ModelAnswerer | EndpointAnswerer:
    if args.base_url is None:
        return ModelAnswerer(
            args.model,
            device,
            num_frames=args.num_frames,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            dtype=args.dtype,
            teacher=args.teacher,
            fast=args.fast,
            trust_remote_code=args.trust_remote_code,
        )
    return EndpointAnswerer(
        args.model,
        args.base_url,
        num_frames=args.num_frames,
        max_new_tokens=args.max_new_tokens,
        concurrency=args.concurrency,
        retries=args.retries,
        temperature=args.temperature,
    )


def main() -> None:
    args = parse_arguments()
    # A process that is done early waits for the others, which may take days longer.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=30))
    # Not told that it is on a CPU, accelerate takes each of several processes there for the only one.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])
    set_seed(args.seed)
    benchmarks = {}
    with accelerator.main_process_first():
        for name in args.benchmarks:
            try:
                benchmarks[name] = load_benchmark(
                    name,
                    getattr(args, name),
                    args.skip_unusable,
                    rebuild=args.skip_unusable and accelerator.is_main_process,
                )
            except (DatasetGenerationError, MissingDataError, ValueError) as error:
                raise SystemExit(f"{name}: {error.__cause__ or error}") from error
    answerer = make_answerer(args, accelerator.device)
    is_cuda = accelerator.device.type == "cuda" and args.base_url is None
    packages = ["accelerate", "av", "datasets", "torch", "transformers", *(["openai"] if args.base_url else [])]
    settings = {
        **answerer.settings,
        "seed": args.seed,
        "device": torch.cuda.get_device_name(accelerator.device) if is_cuda else platform.machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "benchmarks": {name: benchmark.settings for name, benchmark in benchmarks.items()},
    }
    if accelerator.is_main_process:
        args.output.mkdir(parents=True, exist_ok=True)
        check_settings(args.output, settings)
        for path in args.output.glob("answers-*.jsonl"):
            drop_partial_line(path)
    accelerator.wait_for_everyone()
    done = read_answers(args.output)
    if args.retry_errors:
        done = {key: answer for key, answer in done.items() if answer["error"] is None}
    # Every process must have read the same before one writes, or they would divide different questions among them.
    accelerator.wait_for_everyone()
    places = [(benchmark, index) for benchmark in benchmarks.values() for index in range(len(benchmark.ids))]
    waiting = [place for place in places if (place[0].name, place[0].ids[place[1]]) not in done]
    own = waiting[accelerator.process_index :: accelerator.num_processes]
    questions = (
        Question(benchmark.name, benchmark.ids[index], lambda b=benchmark, i=index: b.messages(i))
        for benchmark, index in own
    )
    share = f" of process 0 of {accelerator.num_processes}" if accelerator.num_processes > 1 else ""
    file = os.open(
        args.output / f"answers-{accelerator.process_index}.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644
    )
    try:
        with tqdm(
            total=len(own), desc=f"Answers{share}", unit="question", disable=not accelerator.is_main_process
        ) as progress:
            for answer in answerer.answers(questions):
                append_record(file, asdict(answer))
                if answer.error is not None:
                    tqdm.write(f"{answer.benchmark} {answer.id} failed: {answer.error}", file=sys.stderr)
                progress.update()
    finally:
        os.close(file)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        done = read_answers(args.output)
        records = [
            {**done[benchmark.name, benchmark.ids[index]], **benchmark.facts(index)} for benchmark, index in places
        ]
        scores = score_folder(args.output, records)
        print(write_report(args.output, scores, args.compare))
        errors = sum(record["error"] is not None for record in records)
        if errors:
            print(f"{errors} of {len(records)} questions failed and count as wrong; --retry-errors asks them again.")
    accelerator.end_training()


if __name__ == "__main__":
    main()
