"""Scores of a run of run_eval.py: the paper's tables beside the paper's own numbers, and two runs compared in pairs.

    python examples/evaluation_report.py runs/eval
    python examples/evaluation_report.py runs/eval --compare runs/other-eval

Reads answers.jsonl and settings.json of the folder, writes scores.json and report.md there. No model and no data are needed.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets_rgpt4d.whole_files import write_text
from metrics_rgpt4d import ChoiceAccuracy, MeanRelativeAccuracy, PairedComparison, R4DBench, TimeBench

PAPER = json.loads((Path(__file__).parent / "paper_scores.json").read_text(encoding="utf-8"))
NAMES = {
    "r4d_bench": "R4D",
    "sti_bench": "STI",
    "vlm4d": "V4D",
    "mmsi_bench": "MMSI",
    "omnispatial": "OS",
    "sat_real": "SAT",
    "vstibench": "VSTI",
    "timebench": "TimeBench",
}
# Why a number here and the paper's beside it are not of the same test.
NOTES = {
    "r4d_bench": "R4D: the paper's set had 1,517 questions; the one released has 1,419.",
    "sti_bench": "STI: a reply counts by its letter or by an option's value; models differ by which of them they give.",
    "vlm4d": "V4D: the real part.",
    "omnispatial": "OS: asked for a letter at once; with the authors' guidelines for a chain of thought scores differ by points.",
    "sat_real": "SAT: one pass over 150 questions with shuffled options; the paper does not say which of SAT's metrics it used.",
    "vstibench": "VSTI: mean of the nine types; the paper does not say which mean it used, and its labels are those before "
    "the erratum of July 2026.",
    "timebench": "TimeBench: made from your videos; the paper's set was not released.",
}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ----- scores


def score_benchmark(benchmark: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the benchmark's metric says of some records of answers.jsonl, with an item for each of them, and how many had
    an error (their reply is empty, which is wrong) or were cut off."""
    replies = [record["reply"] for record in records]
    references = []
    for record in records:
        details = json.loads(record["details"])
        fields = {key: record[key] for key in ("id", "category", "options", "answer")}
        if benchmark in ("r4d_bench", "world4d"):
            fields |= {"task": record["category"], "benchmark": details.get("benchmark")}
        if benchmark == "sat_real_both_orders":
            fields["pair"] = details["pair"]
        references.append(fields)
    metrics = {"r4d_bench": R4DBench, "world4d": R4DBench, "vstibench": MeanRelativeAccuracy, "timebench": TimeBench}
    metric = metrics.get(benchmark, ChoiceAccuracy)(keep_in_memory=True)
    scores = metric.compute(predictions=replies, references=references, return_items=True)
    return scores | {
        "errors": sum(record["error"] is not None for record in records),
        "truncated": sum(record["truncated"] for record in records),
    }


def add_scores(record: Mapping[str, Any], item: Mapping[str, Any]) -> dict[str, Any]:
    """A record with what the metric read in its reply: `parsed` (letter or number), `rule`, and `score` from 0 to 1."""
    parsed = item["parsed"] if "parsed" in item else item["letter"]
    score = item["score"] if "score" in item else float(item["correct"])
    return {**record, "parsed": parsed, "rule": item["rule"], "score": score}


def score_folder(folder: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Score `records`, and write answers.jsonl and scores.json (benchmark -> scores)."""
    by_benchmark: dict[str, list[Mapping[str, Any]]] = {}
    for record in records:
        by_benchmark.setdefault(record["benchmark"], []).append(record)
    scores, lines = {}, []
    for benchmark, rows in by_benchmark.items():
        scores[benchmark] = score_benchmark(benchmark, rows)
        scored = [add_scores(record, item) for record, item in zip(rows, scores[benchmark]["items"], strict=True)]
        lines += [json.dumps(record) + "\n" for record in scored]
    write_text(folder / "answers.jsonl", "".join(lines))
    write_text(folder / "scores.json", json.dumps(scores, indent=1))
    return scores


def headline(benchmark: str, scores: Mapping[str, Any]) -> dict[str, Any]:
    """The one number of a benchmark in percent, with `interval`, `n` and `unparsable`."""
    if benchmark in ("r4d_bench", "world4d"):
        value, interval, n = scores["Avg"], scores["interval"]["Avg"], scores["n"]["Avg"]
    elif benchmark == "vstibench":
        value, interval, n = scores["mean_of_types"], scores["interval"]["mean_of_types"], scores["n"]
    else:
        value, interval, n = scores["accuracy"], scores["interval"], scores["n"]
    return {"value": value, "interval": interval, "n": n, "unparsable": scores["unparsable"]}


# ----- tables


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _interval(ends: Sequence[float] | None) -> str:
    return "-" if ends is None else f"[{ends[0]:.1f}, {ends[1]:.1f}]"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown, with columns of even width, so that it can be read in a terminal, too."""
    rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (head, *rows)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def _beside_paper(
    columns: Sequence[str], names: Sequence[str], cells: Mapping[str, Mapping], tables: Sequence[str]
) -> str:
    """This run, its intervals and n, then the rows of the paper's `tables`; `columns` are keys of `cells` or missing."""
    empty = {"value": None, "interval": None, "n": None}
    own = [cells.get(column, empty) for column in columns]
    rows = [
        ["this run", *(_number(cell["value"]) for cell in own)],
        ["95 % interval", *(_interval(cell["interval"]) for cell in own)],
        ["n", *("-" if cell["n"] is None else f"{cell['n']:,}" for cell in own)],
    ]
    for name in tables:
        published = PAPER[name]
        at = [published["columns"].index(column) for column in columns]
        rows += [
            [f"{model} ({name})", *(_number(values[index]) for index in at)]
            for model, values in published["rows"].items()
            if any(values[index] is not None for index in at)
        ]
    return table(["%", *names], rows)


def report(settings: Mapping[str, Any], scores: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables in Markdown."""
    cells = {benchmark: headline(benchmark, found) for benchmark, found in scores.items()}
    parts = [
        f"# Evaluation of {settings['model']}",
        f"Revision {settings['revision']}; " + "; ".join(_told(settings)) + ".",
    ]
    overview = [
        [
            benchmark,
            *(_number(cell["value"]), _interval(cell["interval"]), f"{cell['n']:,}", cell["unparsable"]),
            *(scores[benchmark]["errors"], scores[benchmark]["truncated"]),
            ", ".join(settings["benchmarks"][benchmark]["revisions"]),
        ]
        for benchmark, cell in cells.items()
    ]
    head = ["benchmark", "%", "95 % interval", "n", "unparsable", "errors", "cut off", "revision of the data"]
    parts += ["## Scores", table(head, overview)]
    parts.append("Unparsable replies and errors are counted as wrong. A reply is cut off at `max_new_tokens`.")
    left_out = {name: told["left_out"] for name, told in settings["benchmarks"].items() if told["left_out"]}
    if left_out:
        told = ", ".join(f"{count:,} of {name}" for name, count in left_out.items())
        parts.append(f"**Left out, because the data lack or contradict something: {told}.** They are not in n.")
    for title, tables in (("Tables 2 and A1", ("Table 2", "Table A1")), ("Table A3: TimeBench", ("Table A3",))):
        columns = [column for column in PAPER[tables[0]]["columns"] if column in cells]
        if columns:
            names = [NAMES[column] for column in columns]
            parts += [f"## The paper's {title}", _beside_paper(columns, names, cells, tables)]
    if "vstibench" in scores:
        found = scores["vstibench"]
        value, interval = found["mean_of_groups"], found["interval"]["mean_of_groups"]
        parts.append(
            f"VSTI, mean of the five groups, as papers after VLM-3R report it: {_number(value)} {_interval(interval)}."
        )
    for benchmark in ("r4d_bench", "world4d"):
        if benchmark in scores:
            found = scores[benchmark]
            columns = {
                column: {"value": found[column], "interval": found["interval"][column], "n": n}
                for column, n in found["n"].items()
            }
            tables = ("Table 3", "Table A2") if benchmark == "r4d_bench" else ()
            title = "The paper's Tables 3 and A2: R4D-Bench" if tables else "World4D, in R4D-Bench's categories"
            parts += [f"## {title}", _beside_paper(list(columns), list(columns), columns, tables)]
    for benchmark, found in scores.items():
        categories = found.get("categories") or found.get("types") or found.get("other") or {}
        rows = [
            [name, _number(told.get("accuracy", told.get("score"))), _interval(told["interval"]), f"{told['n']:,}"]
            for name, told in categories.items()
        ]
        if rows:
            parts += [f"## {benchmark}, by category", table(["category", "%", "95 % interval", "n"], rows)]
        if found.get("pairs"):
            pairs = found["pairs"]
            told = f"{_number(pairs['accuracy'])} {_interval(pairs['interval'])}, n = {pairs['n']:,}"
            parts.append(f"{benchmark}, right only if right with the options in both orders: {told}.")
    notes = [NOTES[benchmark] for benchmark in scores if benchmark in NOTES]
    if notes:
        parts += ["## What to mind beside the paper", "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def _told(settings: Mapping[str, Any]) -> list[str]:
    shown = {key: value for key, value in settings.items() if key not in ("model", "revision", "benchmarks")}
    return [f"{key} {json.dumps(value) if isinstance(value, dict) else value}" for key, value in shown.items()]


# ----- two runs


def comparison(folder: Path, other: Path) -> str:
    """The run of `folder` against that of `other` on the benchmarks that both have, in pairs, in Markdown.

    Raises: `SystemExit` if they have no benchmark in common, or other questions or data in one.
    """
    runs, revisions = [], []
    for one in (other, folder):
        by_benchmark: dict[str, list[dict[str, Any]]] = {}
        for record in read_jsonl(one / "answers.jsonl"):
            by_benchmark.setdefault(record["benchmark"], []).append(record)
        runs.append(by_benchmark)
        told = json.loads((one / "settings.json").read_text(encoding="utf-8"))["benchmarks"]
        revisions.append({benchmark: told[benchmark]["revisions"] for benchmark in told})
    common = [benchmark for benchmark in runs[1] if benchmark in runs[0]]
    if not common:
        raise SystemExit(f"{folder} and {other} have no benchmark in common.")
    rows = []
    for benchmark in common:
        if revisions[0][benchmark] != revisions[1][benchmark]:
            raise SystemExit(
                f"{benchmark}: the runs have other revisions of the data, {revisions[0][benchmark]} in {other} and "
                f"{revisions[1][benchmark]} in {folder}."
            )
        metric = PairedComparison(keep_in_memory=True)
        try:
            found = metric.compute(predictions1=runs[0][benchmark], predictions2=runs[1][benchmark])
        except ValueError as error:
            raise SystemExit(f"{benchmark}: {error}") from error
        points = f"{found['difference']:+.1f}"
        rows.append(
            [
                *(benchmark, f"{found['n']:,}", f"{found['num_groups']:,}"),
                *(_number(found["second"]), _number(found["first"]), points, _interval(found["interval"])),
                *(found["only_second"], found["only_first"], f"{found['p_value']:.3g}"),
            ]
        )
    head = ["benchmark", "n", "videos", "this", "other", "difference", "95 % interval", "only this", "only other", "p"]
    return (
        f"## Compared with {other}\n\n{table(head, rows)}\n\n"
        "Means over questions in percent (of VSTI-Bench, too, whose headline is a mean over types). Questions about one "
        "video are not independent: interval (bootstrap) and p (exact sign test, not corrected for the number of benchmarks) "
        "are over videos, or pictures. Only this, only other: questions that this run alone, or the other alone, answers better.\n"
    )


def write_report(folder: Path, scores: Mapping[str, Mapping[str, Any]], other: Path | None = None) -> str:
    """Write report.md; with `other` also the comparison, which is returned as well."""
    settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    text = report(settings, scores) + (f"\n{comparison(folder, other)}" if other is not None else "")
    write_text(folder / "report.md", text)
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output of examples/run_eval.py")
    parser.add_argument("--compare", type=Path, help="output of another run on the same questions")
    args = parser.parse_args()
    for folder in filter(None, (args.folder, args.compare)):
        if not (folder / "answers.jsonl").exists():
            raise SystemExit(f"There is no {folder / 'answers.jsonl'}: finish the run with examples/run_eval.py first.")
    scores = score_folder(args.folder, read_jsonl(args.folder / "answers.jsonl"))
    print(write_report(args.folder, scores, args.compare))


if __name__ == "__main__":
    main()
