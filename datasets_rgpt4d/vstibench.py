"""VSTI-Bench (VLM-3R): camera and object geometry over time, in numbers and in choices."""

import json
import math
import re
from collections.abc import Iterator
from typing import Any

from datasets.utils.logging import get_logger

from .published_questions import PublishedQuestions, UnusableItem, details_of, found_media, json_items, option_at
from .source_files import SourceFiles

logger = get_logger(__name__)

DROPPED_ITEMS = "erratum_dropped_items.json"
NUM_BEFORE, NUM_AFTER = 6042, 5736  # rows of test.json before and after the erratum
BEFORE, AFTER, UNKNOWN = "before_erratum", "after_erratum", "unknown"


class VSTIBenchQuestions(PublishedQuestions):
    """Items of `test.json`. `category` is the question's type (nine of them); numbers are metres.

    The erratum of 13 July 2026 removed 306 of 6,042 items and changed labels of distances and displacements: scores before
    and after it do not compare. `details["revision_of_labels"]` says which labels these are: `before_erratum`,
    `after_erratum` or `unknown`. It is told by `erratum_dropped_items.json`, where that is there (its items are in the file
    before the erratum only), else by the number of rows.

    Questions speak of "frame k of 32" of the authors' sampling, whatever number of frames the model sees.
    """

    HUB_ID = "Journey9ni/vstibench"
    BENCHMARK = "vstibench"
    LICENSE = "not established; ScanNet's terms bind the videos"
    DESCRIPTION = "VSTI-Bench, test part."
    REMEDY = (
        "Download Journey9ni/vstibench from the Hub to a folder and unpack its zip of videos there, so that a path such as "
        "scannet/videos/scene0011_00.mp4 exists beside test.json; then give location=, that folder."
    )

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any]]:
        items = json_items(source.annotations("test.json"))
        revision = revision_of_labels(items, source)
        if revision != AFTER:
            logger.warning(
                f"VSTI-Bench: the labels of {source.location} are of revision {revision!r} ({len(items)} rows); scores do not "
                f"compare with those on the corrected {NUM_AFTER}."
            )
        source.unpack("*.zip", "scannet", "videos", "vstibench")
        for item in items:
            yield {**item, "revision_of_labels": revision}

    @classmethod
    def question(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        name = item["video_path"]
        fields = {
            "category": item["question_type"],
            "question": item["question"],
            "videos": [found_media(source, "video", name, f"videos/{name}", f"vstibench/{name}")],
            "details": details_of(item, "id", "question_type", "question"),
        }
        truth = str(item["ground_truth"]).strip()
        if item.get("options"):
            options = [re.sub(r"^[A-Z]\.\s*", "", option.strip()) for option in item["options"]]
            answer = option_at(options, item["mc_answer"])
            named = [option for option in options if option.lower() == truth.lower()]
            if named and answer not in named:
                raise UnusableItem("two fields name different options", f"{item['mc_answer']!r} and {truth!r}")
            return {**fields, "options": options, "answer": answer, "answer_kind": "choice"}
        try:
            is_number = math.isfinite(float(truth))
        except ValueError:
            is_number = False
        if not is_number:
            raise UnusableItem("the answer is no number", repr(item["ground_truth"]))
        return {**fields, "answer": truth, "answer_kind": "number"}


def revision_of_labels(items: list[dict[str, Any]], source: SourceFiles) -> str:
    """Whether the rows of `test.json` are of before or after the erratum; see [`VSTIBenchQuestions`]."""
    if source.has(DROPPED_ITEMS):
        dropped = json.loads(source.annotations(DROPPED_ITEMS).read_text(encoding="utf-8"))
        ids = {str(one["id"]) if isinstance(one, dict) else str(one) for one in dropped}  # rows, ids, or a dict by id
        return BEFORE if any(str(item.get("id")) in ids for item in items) else AFTER
    return {NUM_BEFORE: BEFORE, NUM_AFTER: AFTER}.get(len(items), UNKNOWN)
