"""Write a folder for lmms-eval's `--include_path`: the tasks, and the questions of the benchmarks that you have.

    python -m metrics_rgpt4d.lmms_eval_plugin.write_tasks --r4d_bench data/R4D-Bench --vlm4d data/VLM4D --output lmms_tasks

Media stay where they are. A question is in the folder as examples/run_eval.py asks it.
"""

import argparse
import shutil
from pathlib import Path

from datasets.exceptions import DatasetGenerationError

from datasets_rgpt4d import R4DBenchQuestions, STIBenchQuestions, VLM4DQuestions, VSTIBenchQuestions
from datasets_rgpt4d.source_files import MissingDataError

BUILDERS = {
    builder.BENCHMARK: builder for builder in (R4DBenchQuestions, STIBenchQuestions, VLM4DQuestions, VSTIBenchQuestions)
}
TASKS = Path(__file__).parent / "tasks"
COMMON = "_rgpt4d_common"


def write_task(benchmark: str, location: str, output: Path, skip_unusable: bool = False) -> str:
    """Write the task of a benchmark, its questions and what all tasks share to the folder `output`; returns the task's name.

    Args:
        location: folder as the authors publish it, or Hub id.
        skip_unusable: leave questions out whose media are missing; their number is printed.

    Raises: `ValueError`, or `MissingDataError` of the builder, that says what is missing.
    """
    if Path(location).is_dir():
        location = str(Path(location).resolve())  # lmms-eval may be started elsewhere
    builder = BUILDERS[benchmark](location=location, skip_unusable=skip_unusable)
    # Only a build tells what was left out; what lies in the cache does not.
    builder.download_and_prepare(download_mode="force_redownload" if skip_unusable else None)
    dataset = builder.as_dataset(split=builder.SPLIT)
    output.mkdir(parents=True, exist_ok=True)
    unfinished = output / f".{benchmark}.part"
    dataset.to_parquet(unfinished)
    unfinished.replace(output / f"{benchmark}.parquet")
    for name in (COMMON, f"{benchmark}_rgpt4d.yaml"):
        shutil.copyfile(TASKS / name, output / name)
    left_out = len(getattr(builder, "unusable", []))
    print(f"{benchmark}_rgpt4d: {len(dataset):,} questions" + (f", {left_out:,} left out" if left_out else ""))
    return f"{benchmark}_rgpt4d"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for benchmark, builder in BUILDERS.items():
        parser.add_argument(f"--{benchmark}", metavar="FOLDER_OR_ID", help=f"where {benchmark} lies ({builder.HUB_ID})")
    parser.add_argument("--output", required=True, type=Path, help="folder for --include_path")
    parser.add_argument("--skip-unusable", action="store_true", help="leave questions out whose media are missing")
    args = parser.parse_args()
    locations = {benchmark: getattr(args, benchmark) for benchmark in BUILDERS if getattr(args, benchmark) is not None}
    if not locations:
        parser.error(f"give at least one of {', '.join(f'--{benchmark}' for benchmark in BUILDERS)}")
    for benchmark, location in locations.items():
        try:
            write_task(benchmark, location, args.output, args.skip_unusable)
        except (DatasetGenerationError, MissingDataError, ValueError) as error:
            raise SystemExit(f"{benchmark}: {error.__cause__ or error}") from error


if __name__ == "__main__":
    main()
