"""Rows of training data as parquet files that `load_dataset` reads, from a folder or from the Hub."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset
from tqdm import tqdm

from .data_statistics import MEDIA_COLUMNS, media_of
from .schema import TRAINING_FEATURES

ROWS_PER_COPY = 16  # rows of one video that stand together and share its bytes
GROUP_BYTES = 128 * 2**20  # of a row group when it is read: a video then stands in memory once for each of its rows
GROUP_ROWS = 1000
FILE_BYTES = 500 * 2**20
TEXT_BYTES = 1000  # of a row, about


@dataclass
class _Group:
    """A row group: its rows, their bytes when it is read, and those that it takes in the file."""

    rows: list[int] = field(default_factory=list)
    read_bytes: int = 0
    file_bytes: int = 0


def plan_shards(rows: Dataset, embed: bool) -> list[list[list[int]]]:
    """Files -> row groups -> numbers of rows.

    The order of rows is kept, but for this: where media are embedded, up to `ROWS_PER_COPY` rows that begin with the same
    medium stand together, at the place of the first, because parquet stores equal values of a row group once.
    """
    sizes: list[dict[str, int]] = [{} for _ in range(len(rows))]
    for row, column, position, path, content in media_of(rows):
        if content.is_valid:
            sizes[row][f"{path or row} {column} {position if path is None else ''}"] = len(content.as_buffer())
        elif embed:
            sizes[row][path] = os.path.getsize(path)

    bundles: list[list[int]] = []
    open_bundle: dict[str, list[int]] = {}
    for row, media in enumerate(sizes):
        first = next(iter(media), None)
        bundle = open_bundle.get(first) if first is not None else None
        if bundle is None or len(bundle) == ROWS_PER_COPY:
            bundles.append(bundle := [])
            open_bundle[first] = bundle
        bundle.append(row)

    files: list[list[_Group]] = [[_Group()]]
    for bundle in bundles:
        for row in bundle:
            group = files[-1][-1]
            size = sum(sizes[row].values()) + TEXT_BYTES
            if group.rows and (group.read_bytes + size > GROUP_BYTES or len(group.rows) == GROUP_ROWS):
                if sum(one.file_bytes for one in files[-1]) >= FILE_BYTES:
                    files.append([])
                files[-1].append(group := _Group())
            new = sizes[row] if not group.rows or sizes[row].keys() != sizes[group.rows[-1]].keys() else {}
            group.rows.append(row)
            group.read_bytes += size
            group.file_bytes += sum(new.values()) + TEXT_BYTES
    return [[group.rows for group in groups] for groups in files]


def write_training_shards(
    rows: Dataset, folder: str | Path, embed: bool, split: str = "train", progress: bool = False
) -> list[str]:
    """Write `<split>-NNNNN-of-NNNNN-<hash of the content>.parquet` into `folder`, and return the names.

    The hash is there because `load_dataset` caches a local folder that has a card by the names in it: rows of another
    content under an equal name would not be noticed. Files that an interrupted call left complete are kept; the folder must
    be of the same rows then.

    Args:
        rows: of `TRAINING_FEATURES`.
        embed: media become bytes in the rows, with the name of their file as path; otherwise rows hold absolute paths, and
            bytes only where they have no file.
        progress: draw a progress bar on stderr.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = plan_shards(rows, embed)
    names = []
    with tqdm(total=len(rows), unit="row", disable=not progress) as bar:
        for number, groups in enumerate(files):
            stem = f"{split}-{number:05d}-of-{len(files):05d}"
            there = next(iter(folder.glob(f"{stem}-*.parquet")), None)
            names.append(_write_shard(rows, groups, folder, stem, embed) if there is None else there.name)
            bar.update(sum(map(len, groups)))
    return names


def _write_shard(rows: Dataset, groups: Sequence[Sequence[int]], folder: Path, stem: str, embed: bool) -> str:
    partial = folder / f".{stem}.partial"
    schema = TRAINING_FEATURES.arrow_schema
    # A dictionary as large as the row group needs stores equal bytes once. Statistics would copy the least and the greatest
    # video into the footer.
    options: dict[str, Any] = dict(
        use_dictionary=True, dictionary_pagesize_limit=2**30, write_statistics=False, compression="zstd"
    )
    try:
        with pq.ParquetWriter(partial, schema, **options) as writer:
            for group in groups:
                contents: dict[str, bytes] = {}
                table = [_with_media(row, embed, contents) for row in rows.select(group).to_list()]
                writer.write_table(pa.Table.from_pylist(table, schema=schema), row_group_size=len(table))
        with partial.open("rb") as file:
            name = f"{stem}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}.parquet"
        os.replace(partial, folder / name)
        return name
    finally:
        partial.unlink(missing_ok=True)


def _with_media(row: dict[str, Any], embed: bool, contents: dict[str, bytes]) -> dict[str, Any]:
    def one(medium: dict[str, Any]) -> dict[str, Any]:
        path, content = medium["path"], medium["bytes"]
        if content is not None:
            return {"bytes": content, "path": None if path is None else os.path.basename(path)}
        if not embed:
            return {"bytes": None, "path": os.path.abspath(path)}
        if path not in contents:
            contents[path] = Path(path).read_bytes()
        return {"bytes": contents[path], "path": os.path.basename(path)}

    return {**row, **{column: [one(medium) for medium in row[column]] for column in MEDIA_COLUMNS}}
