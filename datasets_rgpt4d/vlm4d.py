"""VLM4D: motion in real and synthetic video."""

import re
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from .published_questions import PublishedQuestions, details_of, found_media, json_items, options_by_letter
from .source_files import SourceFiles


class VLM4DQuestions(PublishedQuestions):
    """The real part, which the paper's table reports: 1,371 items over 600 videos. `category`: `exo` or `ego` (Ego4D).

    Ids are the authors' ("validation_1"). Where a text stands twice among the options (validation_633), both are right.
    """

    HUB_ID = "shijiezhou/VLM4D"
    BENCHMARK = "vlm4d"
    LICENSE = "MIT (the authors' repository); the terms of DAVIS, YouTube-VOS and Ego4D bind the videos"
    DESCRIPTION = "VLM4D, real videos."
    REMEDY = (
        "Download shijiezhou/VLM4D from the Hub to a folder (videos_real/, videos_synthetic/); if its QA/ lacks "
        "real_mc.json or synthetic_mc.json, take them from data/ of the authors' GitHub repository; then give location=."
    )
    PART = "real"

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any]]:
        name = f"{cls.PART}_mc.json"
        yield from json_items(source.annotations(f"QA/{name}", f"data/{name}", name))

    @classmethod
    def category(cls, item: dict[str, Any]) -> str:
        return "ego" if "/ego4d/" in item["video"] else "exo"

    @classmethod
    def question(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        # `video` is an address on the Hub; what follows the revision is the file's name in the repository.
        name = unquote(re.sub(r"^https?://.*/resolve/[^/]+/", "", item["video"] or ""))
        return {
            "category": cls.category(item),
            "question": item["question"],
            "options": options_by_letter(item["choices"]),
            "answer": item["answer"],  # a text, an integer, 0 too
            "answer_kind": "choice",
            "videos": [found_media(source, "video", name)],
            "details": {"part": cls.PART, **details_of(item, "id", "question", "choices", "answer")},
        }


class VLM4DSyntheticQuestions(VLM4DQuestions):
    """The synthetic part: 445 items over 400 videos. `category`: `false_positive` where the right answer is that the thing
    is not there ("no ..."), else `directional`. The authors count ids from 1 again; here they begin with "synthetic_".
    """

    DESCRIPTION = "VLM4D, synthetic videos."
    PART = "synthetic"

    @classmethod
    def item_id(cls, item: dict[str, Any], index: int) -> str:
        return f"synthetic_{super().item_id(item, index)}"

    @classmethod
    def category(cls, item: dict[str, Any]) -> str:
        answer = str(item["answer"]).strip().lower()
        return "false_positive" if answer == "no" or answer.startswith("no ") else "directional"
