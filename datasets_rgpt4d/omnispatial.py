"""OmniSpatial: spatial reasoning in single pictures."""

from collections.abc import Iterator
from typing import Any

from .published_questions import PublishedQuestions, UnusableItem, details_of, found_media, json_items, option_at
from .source_files import SourceFiles


class OmniSpatialQuestions(PublishedQuestions):
    """The test part: 1,533 items over 1,387 pictures. `category` is "task_type/sub_task_type", because the name of a
    sub-task alone may hang under two tasks; `id` is "task_type/id", because pictures are counted within a task.
    """

    HUB_ID = "qizekun/OmniSpatial"
    BENCHMARK = "omnispatial"
    LICENSE = "CC BY-NC 4.0"
    DESCRIPTION = "OmniSpatial, test part."
    REMEDY = (
        "Download OmniSpatial-test.zip of qizekun/OmniSpatial from the Hub to a folder and unpack it there, then give "
        "location=, that folder."
    )

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any]]:
        source.unpack("OmniSpatial-test.zip", "OmniSpatial-test", "Dynamic_Reasoning")
        yield from json_items(source.annotations("OmniSpatial-test/data.json", "data.json"))

    @classmethod
    def item_id(cls, item: dict[str, Any], index: int) -> str:
        return f"{item.get('task_type')}/{super().item_id(item, index)}"

    @classmethod
    def question(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        options = item["options"]
        if not isinstance(options, list):
            raise UnusableItem("the options cannot be read", repr(options))
        image = f"{item['task_type']}/{str(item['id']).partition('_')[0]}.png"
        return {
            "category": f"{item['task_type']}/{item['sub_task_type']}",
            "question": item["question"],
            "options": options,
            "answer": option_at(options, item["answer"]),  # an index
            "answer_kind": "choice",
            "images": [found_media(source, "image", f"OmniSpatial-test/{image}", image)],
            "details": details_of(item, "question", "options"),
        }
