"""R4D-Bench (arXiv 2512.17012): region-level 4D questions over clips of STI-Bench and VLM4D."""

from collections.abc import Iterator
from typing import Any

from .published_questions import PublishedQuestions, UnusableItem, details_of, found_media, json_items, seconds
from .source_files import SourceFiles


class R4DBenchQuestions(PublishedQuestions):
    """Items of `test.json`: 1,419 in the release, 1,517 in the paper's body. `category` is the benchmark's `task`.

    The set-of-mark picture comes first in `images`; an item without one has none, and an item whose picture is named but
    absent is unusable. So is an item whose clip is absent: the untrimmed video would begin with another frame than the one
    that is marked, and is never shown in its place. The release gives no boxes that could be drawn on the clip.
    `details` has `benchmark` (stibench or vlm4d), by which the card's static and dynamic parts are told apart.
    """

    HUB_ID = "nvidia/R4D-Bench"
    BENCHMARK = "r4d_bench"
    LICENSE = "nvidia-noncommercial-license; gated"
    DESCRIPTION = "R4D-Bench, region-level 4D question answering (arXiv 2512.17012)."
    REMEDY = (
        "Accept the terms of nvidia/R4D-Bench on the Hub and download it to a folder; put STI-Bench's videos into its "
        "videos/stibench and VLM4D's into its videos/vlm4d; cut the clips with `python helpers.py --clip` there; then give "
        "location=, that folder."
    )

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any]]:
        yield from json_items(source.annotations("test.json"))

    @classmethod
    def question(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        if not isinstance(item["options"], list):
            raise UnusableItem("the options cannot be read", repr(item["options"]))
        is_marked = item.get("som_image") not in (None, "")
        used = ("id", "task", "question", "options", "answer", "time_start", "time_end")
        return {
            "category": item["task"],
            "question": item["question"] if "question" in item else item["question_new"],  # older copies
            "options": item["options"],
            "answer": item["answer"],  # may be 0, or null where an option is null
            "answer_kind": "choice",
            "images": [found_media(source, "set-of-mark picture", item["som_image"])] if is_marked else [],
            "videos": [found_media(source, "clip", item["video"])],
            "time_start": seconds(item.get("time_start")),
            "time_end": seconds(item.get("time_end")),
            "details": details_of(item, *used),
        }
