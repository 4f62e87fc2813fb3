"""Put training data together: read each source, check its media, and write parquet files that training reads.

    python examples/prepare_data.py --mixture V+W+R+S --vsti data/vsti --wolf data/wolf --robofac data/robofac \\
        --sat array/SAT --output runs/data
    accelerate launch examples/train.py --data runs/data ...

--mixture is a row of the paper's Table A4 or a YAML file (datasets_rgpt4d.Mixture.from_yaml); --sources takes all rows of
some sources once. The folder appears when it is whole, with README.md (the card), report.md, report.json, and unusable.jsonl;
until then work and reports are in OUTPUT.unfinished, and the same command goes on where an interrupted one stopped.

By default rows hold the paths of videos and images. --push-to-hub and --embed-media put the media's bytes into the
files instead. The status is 1 if rows are unusable and --skip-unusable is not given, or if a source has no usable row.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, DownloadMode, concatenate_datasets
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer

from datasets_rgpt4d import (
    Mixture,
    RoboFAC,
    SATTrain,
    SourceShare,
    VSTITrain,
    WolfQA,
    World4DTraining,
    data_statistics,
    statistics_table,
    unusable_media,
    write_training_shards,
)
from datasets_rgpt4d.published_dataset import PublishedDataset, Unusable, UnusableRowsError
from datasets_rgpt4d.schema import TRAINING_FEATURES
from datasets_rgpt4d.source_files import MissingDataError
from datasets_rgpt4d.whole_files import write_text
from hub_cards import LINEAGE, publish, training_data_card, training_overlaps, write_card

BUILDERS: dict[str, type[PublishedDataset]] = {
    "vsti": VSTITrain,
    "wolf": WolfQA,
    "robofac": RoboFAC,
    "sat": SATTrain,
    "world4d": World4DTraining,
}
COLUMNS = {
    "id": "unique in its source; a row that the mixture repeats keeps it",
    "source": "the data set that it comes from",
    "subset": "its category there, empty where it has none",
    "revision": "commit of the source on the Hub, or sha256 of its annotation files",
    "messages": "the conversation; blocks of type image and video stand for the media, in their order",
    "images": "path and bytes of each image",
    "videos": "path and bytes of each video",
    "regions": "marked boxes: number of the video, name, x0, y0, x1, y1 in pixels of its first frame",
}
REPORT = "report.json"
PROBLEMS_NAMED = 20  # in report.md; unusable.jsonl has all


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--mixture", help="V, V+W, V+W+R, V+W+R+S, or a YAML file")
    what.add_argument("--sources", nargs="+", choices=list(BUILDERS), help="all rows of these, once")
    for name, builder in BUILDERS.items():
        default = f"default: {builder.HUB_ID}" if builder.HUB_ID else "needed, it is on no Hub"
        add(f"--{name}", metavar="FOLDER_OR_ID", help=f"where {name} is; ID@REVISION pins a Hub id ({default})")
        add(f"--{name}-media", metavar="FOLDER", help="where its images and videos are, if not there")
    add("--output", type=Path, required=True, help="folder to write; must not exist, or hold the same data")
    add("--seed", type=int, help="of the order and of random choices (default: the YAML file's, or 0)")
    add(
        "--check-media",
        choices=["exists", "full"],
        default="full",
        help="full: images are decoded, and each video's first and last frame (default: %(default)s)",
    )
    add("--skip-unusable", action="store_true", help="leave out what cannot be used; the report says what and why")
    add("--num-proc", type=int, default=os.cpu_count(), help="processes that check media (default: one a core)")
    add("--tokenizer", help="folder or Hub id of a tokenizer, to count tokens for the report")
    add("--embed-media", action="store_true", help="put the bytes of media into the files")
    add("--push-to-hub", metavar="ID", help="upload to this private data set on the Hub, user/name; embeds media")
    args = parser.parse_args(argv)
    if args.num_proc < 1:
        parser.error(f"--num-proc must be at least 1, got {args.num_proc}")
    args.embed_media |= args.push_to_hub is not None
    return args


def mixture_of(args: argparse.Namespace) -> Mixture:
    if args.sources:
        return Mixture({name: SourceShare() for name in args.sources}, args.seed or 0)
    if args.mixture.endswith((".yaml", ".yml")):
        mixture = Mixture.from_yaml(args.mixture)
        unknown = sorted({*mixture.sources} - {*BUILDERS})
        if unknown:
            raise ValueError(f"{args.mixture}: unknown sources {unknown}; there are {list(BUILDERS)}.")
        return mixture if args.seed is None else Mixture(mixture.sources, args.seed)
    return Mixture.named(args.mixture, args.seed or 0)


# ------------------------------------------------------------------------------------------------------------- sources


def where(args: argparse.Namespace, name: str) -> dict[str, str | None]:
    """Arguments of the source's builder: `location`, `revision` and `media`."""
    given, media = getattr(args, name), getattr(args, f"{name}_media")
    media = None if media is None else os.path.abspath(media)
    if given is None or os.path.isdir(given):
        return {"location": None if given is None else os.path.abspath(given), "revision": None, "media": media}
    location, _, revision = given.partition("@")
    return {"location": location, "revision": revision or None, "media": media}


def find_sources(args: argparse.Namespace, mixture: Mixture) -> dict[str, str]:
    """Source -> what changes when its files do. Ends with a list of everything that is missing."""
    found, problems = {}, []
    for name in mixture.sources:
        try:
            found[name] = BUILDERS[name].source(**where(args, name)).fingerprint
        except (MissingDataError, ValueError) as error:
            problems.append(f"{name} (--{name}): {error}")
    if problems:
        raise SystemExit("error: data are missing.\n" + "\n".join(problems))
    return found


def read_source(args: argparse.Namespace, name: str, work: Path) -> tuple[Dataset, list[Unusable], dict[str, Any]]:
    """Its rows, the rows that the builder refuses, and what the report says of it."""
    builder = BUILDERS[name](cache_dir=str(work / "cache"), skip_unusable=True, **where(args, name))
    refused_file = work / f"{name}-refused.json"
    again = DownloadMode.REUSE_DATASET_IF_EXISTS if refused_file.exists() else DownloadMode.FORCE_REDOWNLOAD
    try:
        builder.download_and_prepare(download_mode=again)
        num_rows = builder.info.splits[builder.SPLIT].num_examples
    except DatasetGenerationError as error:
        if not isinstance(error.__cause__, UnusableRowsError):
            raise ValueError(f"{name}: {error.__cause__ or error}") from error
        num_rows = 0
    if not refused_file.exists():
        write_json(refused_file, [asdict(one) for one in builder.unusable])
    refused = [Unusable(**one) for one in json.loads(refused_file.read_text(encoding="utf-8"))]
    # `datasets` cannot read a split without rows
    nothing = Dataset.from_dict({name: [] for name in TRAINING_FEATURES}, features=TRAINING_FEATURES)
    rows = builder.as_dataset(split=builder.SPLIT) if num_rows else nothing
    location = where(args, name)["location"] or builder.HUB_ID
    is_folder = os.path.isdir(location)
    record = {
        "name": name,
        "builder": type(builder).__name__,
        "id": f"local folder {Path(location).name}" if is_folder else location,
        "revision": ", ".join(sorted({*rows["revision"][:]})) or "none was read",
        "license": builder.LICENSE,
        "lineage": LINEAGE[name],
        "read": len(rows) + len(refused),
    }
    return rows, refused, record


def prepare_source(
    args: argparse.Namespace, mixture: Mixture, name: str, work: Path
) -> tuple[Dataset, list[Unusable], dict[str, Any]]:
    """What an epoch holds of the source, shuffled; what is unusable; and what the report says of it."""
    print(f"{name}: reading", flush=True)
    rows, refused, record = read_source(args, name, work)
    chosen = mixture.chosen(name, rows) if len(rows) else rows
    known = work / f"{name}-media-{args.check_media}.jsonl"
    print(f"{name}: checking the media of {len(chosen):,} rows", flush=True)
    bad = unusable_media(chosen, args.check_media, known, args.num_proc, progress=True)
    good = chosen.select([index for index in range(len(chosen)) if index not in bad])
    unusable = [*refused, *bad.values()]
    share = mixture.sources[name]
    if len(good):
        alone = Mixture({name: SourceShare(share.weight)}, mixture.seed)  # subsets and cap are chosen already
        good = alone.epoch({name: good})
    record |= {
        "not_chosen": len(rows) - len(chosen),
        "unusable": dict(Counter(one.reason for one in unusable).most_common()),
        "rows": len(good),
    }
    return good, unusable, record


# -------------------------------------------------------------------------------------------------------------- report


def write_json(file: Path, content: Any) -> None:
    write_text(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def command_of(args: argparse.Namespace) -> str:
    """The command without this machine's folders, which the report may leave with the data."""
    words = ["python", "examples/prepare_data.py"]
    words += ["--sources", *args.sources] if args.sources else ["--mixture", Path(args.mixture).name]
    for name in BUILDERS:
        given = getattr(args, name)
        if given is not None:
            words += [f"--{name}", Path(given).name if os.path.isdir(given) else given]
    words += ["--output", args.output.name, "--check-media", args.check_media]
    words += ["--seed", str(args.seed)] if args.seed is not None else []
    words += [flag for flag in ("--skip-unusable", "--embed-media") if getattr(args, flag[2:].replace("-", "_"))]
    return shlex.join(words)


def make_report(
    args: argparse.Namespace, mixture: Mixture, key: str, records: list[dict[str, Any]], rows: Dataset | None
) -> dict[str, Any]:
    tokenizer = None if args.tokenizer is None else AutoTokenizer.from_pretrained(args.tokenizer)
    statistics = None if rows is None else data_statistics(rows, tokenizer)
    return {
        "key": key,
        "name": args.output.name,
        "repo_id": args.push_to_hub or args.output.name,
        "summary": f"Training data for 4D-RGPT: {sum(one['rows'] for one in records):,} conversations about videos and "
        "images.",
        "command": command_of(args),
        "check_media": args.check_media,
        "embedded": args.embed_media,
        "mixture": yaml.safe_dump(mixture.to_dict(), sort_keys=False),
        "versions": {name: version(name) for name in ("rgpt4d", "datasets", "pyarrow", "av", "pillow")},
        "sources": records,
        "overlaps": training_overlaps([one["name"] for one in records]),
        "columns": COLUMNS,
        "tokenizer": args.tokenizer,
        "counts": statistics,
        "statistics": "" if statistics is None else statistics_table(statistics),
    }


def write_reports(
    folder: Path, report: dict[str, Any], unusable: dict[str, list[Unusable]], places: Iterable[str]
) -> None:
    """report.json, report.md and unusable.jsonl. Names of this machine's folders are left out of details."""

    def detail(text: str) -> str:
        for place in places:
            text = text.replace(f"{place}{os.sep}", "")
        return text

    lines = [
        {"source": source, "id": one.id, "reason": one.reason, "detail": detail(one.detail)}
        for source, some in unusable.items()
        for one in some
    ]
    write_text(folder / "unusable.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    text = [f"# What became of the sources of {report['name']}\n", report["statistics"], "## Sources\n"]
    for one in report["sources"]:
        text.append(
            f"- **{one['name']}**: {one['id']}, revision {one['revision']}, license {one['license']}. {one['read']:,} rows read, "
            f"{one['not_chosen']:,} left out by the mixture, {sum(one['unusable'].values()):,} unusable, {one['rows']:,} rows in an "
            "epoch."
        )
    text.append(f"\n## Unusable rows ({len(lines):,}; all are in unusable.jsonl)\n")
    counts = [(one["name"], reason, n) for one in report["sources"] for reason, n in one["unusable"].items()]
    if counts:
        text += ["| source | reason | rows |", "|---|---|---:|"]
        text += [f"| {source} | {reason} | {n:,} |" for source, reason, n in counts]
        text += ["\nFor example:\n"]
        text += [
            f"- {line['source']} {line['id']}: {line['reason']} ({line['detail']})" for line in lines[:PROBLEMS_NAMED]
        ]
    else:
        text.append("None.")
    text.append(f"\nMedia were checked with --check-media {report['check_media']}.\n")
    text.append(f"```\n{report['command']}\n```\n")
    write_text(folder / "report.md", "\n".join(text))
    write_json(folder / REPORT, report)


# ----------------------------------------------------------------------------------------------------------------- run


def push(folder: Path, report: dict[str, Any], repo_id: str) -> None:
    write_card(training_data_card({**report, "repo_id": repo_id}), folder)
    print(publish(folder, repo_id, repo_type="dataset", commit_message="Training data put together with rgpt4d"))


def forget_other_rows(folder: Path, rows: Dataset, file: Path) -> None:
    """Remove files of an interrupted run that had other rows, for example because a video was mended since."""
    digest = hashlib.sha256("\n".join(rows["id"][:]).encode()).hexdigest()
    if folder.exists() and not (file.exists() and file.read_text(encoding="utf-8") == digest):
        shutil.rmtree(folder)
    write_text(file, digest)


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """Write the folder, unless it is there. Returns: its report. Ends where there is nothing that could be used."""
    mixture = mixture_of(args)
    fingerprints = find_sources(args, mixture)
    settings = {
        "mixture": mixture.to_dict(),
        "sources": {name: [where(args, name), fingerprint] for name, fingerprint in fingerprints.items()},
        "check_media": args.check_media,
        "embed_media": args.embed_media,
        "tokenizer": args.tokenizer,
        "rgpt4d": version("rgpt4d"),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    if args.output.exists():
        report_file = args.output / REPORT
        report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.is_file() else {}
        if report.get("key") != key:
            raise ValueError(
                f"{args.output} holds something else, or data put together in another way; choose another --output."
            )
        print(f"{args.output} holds these data already.")
        return report

    work = args.output.with_name(f"{args.output.name}.unfinished")
    work.mkdir(parents=True, exist_ok=True)
    key_file = work / "key"
    if not key_file.exists():
        if any(work.iterdir()):
            raise ValueError(f"{work} holds something else; remove it or choose another --output.")
        write_text(key_file, key)
    elif key_file.read_text(encoding="utf-8") != key:
        raise ValueError(
            f"{work} is what an interrupted run left that had other settings or other data; remove it or choose another --output."
        )

    rows, unusable, records = {}, {}, []
    for name in sorted(mixture.sources):
        rows[name], unusable[name], record = prepare_source(args, mixture, name, work)
        records.append(record)
    places = [
        place
        for name in rows
        for place in (where(args, name)["location"], where(args, name)["media"])
        if place is not None
    ]
    used = [some for some in rows.values() if len(some)]
    report = make_report(args, mixture, key, records, concatenate_datasets(used) if used else None)
    count = sum(map(len, unusable.values()))
    empty = [name for name, some in rows.items() if not len(some)]
    if empty or (count and not args.skip_unusable):
        write_reports(work, report, unusable, places)
        what = f"{', '.join(empty)} has no usable row" if empty else f"{count:,} rows cannot be used"
        remedy = "" if empty else " Mend them, or leave them out with --skip-unusable."
        raise SystemExit(f"error: {what}; {work / 'report.md'} says why.{remedy}")

    folder = work / "dataset"
    for record in records:
        print(f"{record['name']}: writing", flush=True)
        where_to = folder / "data" / record["name"]
        forget_other_rows(where_to, rows[record["name"]], work / f"{record['name']}-rows")
        names = write_training_shards(rows[record["name"]], where_to, args.embed_media, progress=True)
        record["data_files"] = [f"data/{record['name']}/{name}" for name in names]
    write_reports(folder, report, unusable, places)
    write_card(training_data_card(report), folder)
    folder.replace(args.output)
    shutil.rmtree(work)
    print(f"{report['statistics']}\n{count:,} rows were unusable. {args.output} is ready; its report.md says more.")
    return report


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    try:
        report = prepare(args)
        if args.push_to_hub:
            push(args.output, report, args.push_to_hub)
    except (MissingDataError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
