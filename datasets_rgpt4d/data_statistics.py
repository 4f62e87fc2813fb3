"""How much there is to train on: rows, questions, videos, images and tokens, as section A1.2 of the paper counts them."""

import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset

MEDIA_COLUMNS = ("images", "videos")
ALL = "all"
ROWS_AT_ONCE = 256


def media_of(rows: Dataset) -> Iterator[tuple[int, str, int, str | None, pa.Scalar]]:
    """`(row, column, position in the row, path, bytes)` of every medium; bytes are a scalar of Arrow, not yet copied."""
    start = 0
    for table in rows.select_columns(list(MEDIA_COLUMNS)).with_format("arrow").iter(ROWS_AT_ONCE):
        for column in MEDIA_COLUMNS:
            lists = table[column].combine_chunks()
            if isinstance(lists, pa.ChunkedArray):  # an empty table
                continue
            flat, position, before = lists.flatten(), 0, None
            parents = pc.list_parent_indices(lists).to_pylist()
            paths = flat.field("path").to_pylist()
            contents = flat.field("bytes")
            for index, parent in enumerate(parents):
                position = position + 1 if parent == before else 0
                before = parent
                yield start + parent, column, position, paths[index], contents[index]
        start += table.num_rows


def _identity(path: str | None, content: pa.Scalar) -> str:
    """Equal for equal media: the path of a file, the content of bytes."""
    return str(path) if not content.is_valid else hashlib.sha256(content.as_buffer()).hexdigest()


def _tally() -> dict[str, Any]:
    return {"rows": 0, "questions": 0, "videos": set(), "images": set(), "question_tokens": 0, "answer_tokens": 0}


def data_statistics(rows: Dataset, tokenizer=None) -> dict[str, dict[str, dict[str, int | None]]]:
    """Counts of rows of `TRAINING_FEATURES`, by source and subset.

    Args:
        rows: a row that stands there twice counts twice.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): counts the tokens of the texts: without chat template, images
            and videos.

    Returns: source -> subset -> counts; the source "all" has all sources together, the subset "all" all subsets. Counts are
        `rows`; `questions`, turns of the user; `videos` and `images`, different files or contents; `question_tokens` (those
        of system and user) and `answer_tokens`, `None` without a tokenizer.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {ALL: {ALL: _tally()}}
    tallies = []  # of each row: those that it adds to
    for source, subset in zip(rows["source"][:], rows["subset"][:], strict=True):
        of_source = found.setdefault(source, {ALL: _tally()})
        tallies.append((found[ALL][ALL], of_source[ALL], of_source.setdefault(subset or "-", _tally())))
    for row, column, _, path, content in media_of(rows):
        identity = _identity(path, content)
        for tally in tallies[row]:
            tally[column].add(identity)
    start = 0
    for batch in rows.select_columns(["messages"]).iter(ROWS_AT_ONCE):
        texts: list[str] = []
        places: list[tuple[int, str]] = []
        for index, messages in enumerate(batch["messages"], start):
            questions = sum(message["role"] == "user" for message in messages)
            for tally in tallies[index]:
                tally["rows"] += 1
                tally["questions"] += questions
            for message in messages:
                what = "answer_tokens" if message["role"] == "assistant" else "question_tokens"
                for block in message["content"]:
                    if block["type"] == "text":
                        texts.append(block["text"])
                        places.append((index, what))
        if tokenizer is not None and texts:
            encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
            for (index, what), ids in zip(places, encoded, strict=True):
                for tally in tallies[index]:
                    tally[what] += len(ids)
        start += len(batch["messages"])
    for of_source in found.values():
        for tally in of_source.values():
            tally |= {column: len(tally[column]) for column in MEDIA_COLUMNS}
            if tokenizer is None:
                tally |= {"question_tokens": None, "answer_tokens": None}
    return {source: dict(sorted(found[source].items())) for source in sorted(found)}


def statistics_table(statistics: dict[str, dict[str, dict[str, int | None]]]) -> str:
    """The counts as a table in Markdown, a line for each source and subset; "all" stands last."""
    columns = ["rows", "questions", "videos", "images", "question_tokens", "answer_tokens"]
    columns = [name for name in columns if statistics[ALL][ALL][name] is not None]
    lines = [
        "| source | subset | " + " | ".join(name.replace("_", " ") for name in columns) + " |",
        "|---|---|" + "---:|" * len(columns),
    ]

    def last(name: str) -> tuple[bool, str]:
        return name == ALL, name

    for source in sorted(statistics, key=last):
        subsets = [name for name in statistics[source] if name != ALL]
        for subset in sorted([*subsets, ALL] if len(subsets) > 1 else [ALL], key=last):
            counts = statistics[source][subset]
            lines.append(f"| {source} | {subset} | " + " | ".join(f"{counts[name]:,}" for name in columns) + " |")
    return "\n".join(lines) + "\n"
