"""MMSI-Bench: questions over several pictures."""

import re
from collections.abc import Iterator
from string import ascii_uppercase
from typing import Any

from .published_questions import (
    PublishedQuestions,
    UnusableItem,
    details_of,
    image_bytes,
    option_at,
    parquet_items,
)
from .source_files import SourceFiles


class MMSIBenchQuestions(PublishedQuestions):
    """Items of `MMSI_Bench.parquet` (1,000), each with several pictures, all of which are shown. `category` is the type.

    The authors write the options into the question. Here they are taken out of it into `options`, and
    `details["published_question"]` has the whole, which the prompt shows instead of listing the options again.
    """

    HUB_ID = "RunsenXu/MMSI-Bench"
    BENCHMARK = "mmsi_bench"
    LICENSE = "CC BY-NC 4.0"
    DESCRIPTION = "MMSI-Bench, spatial questions over several pictures."
    REMEDY = (
        "Download MMSI_Bench.parquet of RunsenXu/MMSI-Bench from the Hub to a folder, then give location=, that folder."
    )

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any]]:
        yield from parquet_items(source.annotations("MMSI_Bench.parquet"))

    @classmethod
    def question(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        question, options = split_inline_options(item["question"])
        return {
            "category": item["question_type"],
            "question": question,
            "options": options,
            "answer": option_at(options, item["answer"]),
            "answer_kind": "choice",
            "images": image_bytes(item["images"]),
            "details": {
                "published_question": item["question"],
                **details_of(item, "id", "images", "question", "question_type"),
            },
        }


def split_inline_options(question: str) -> tuple[str, list[str]]:
    """ "Where?\\nOptions: A: left, B: right" as ("Where?", ["left", "right"]). Raises: [`UnusableItem`] without options."""
    stem, found, listed = question.rpartition("Options:")
    starts = []
    for letter in ascii_uppercase:
        match = re.compile(rf"(?:^|[\s,;]){letter}\s*:").search(listed, starts[-1][1] if starts else 0)
        if match is None:
            break
        starts.append(match.span())
    if not found or len(starts) < 2:
        raise UnusableItem("the options cannot be read", question)
    ends = [start for start, _ in starts[1:]] + [len(listed)]
    return stem.strip(), [listed[s:e].strip(" \t\r\n,;") for (_, s), e in zip(starts, ends, strict=True)]
