"""SAT-real: the 150 questions over real photographs of SAT's test part."""

from collections.abc import Iterator
from typing import Any

from .multiple_choice import shuffled_options
from .published_dataset import Unusable
from .published_questions import PublishedQuestions, UnusableItem, details_of, image_bytes, parquet_items
from .source_files import SourceFiles


class SATRealQuestions(PublishedQuestions):
    """Items of `SAT_test.parquet` (150 questions, 196 pictures), each with two options. `category` is the question's type.

    The right answer often stands first in the source, so the options are shuffled by the item's id, which is its row
    number; `details["answers"]` has their published order. Accuracy over these rows is one pass over 150 items; the paired
    score needs both orders, [`SATRealBothOrders`].
    """

    HUB_ID = "array/SAT"
    BENCHMARK = "sat_real"
    LICENSE = "MIT"
    DESCRIPTION = "SAT, test part of real photographs."
    REMEDY = "Download SAT_test.parquet of array/SAT from the Hub to a folder, then give location=, that folder."

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any]]:
        for index, item in enumerate(parquet_items(source.annotations("SAT_test.parquet"))):
            yield {**item, "id": str(index)}

    @classmethod
    def question(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        options = item["answers"] or []
        if len(options) != 2:
            raise UnusableItem("there are not two options", repr(options))
        return {
            "category": item["question_type"],
            "question": item["question"],
            "options": shuffled_options(options, item["id"]),
            "answer": item["correct_answer"],
            "answer_kind": "choice",
            "images": image_bytes(item["image_bytes"]),
            "details": {**details_of(item, "id", "image_bytes", "question", "question_type"), "pair": item["id"]},
        }


class SATRealBothOrders(SATRealQuestions):
    """Each question twice, with its options in one order and in the other: 300 rows, of which the second of a pair has an
    id that ends in "-reversed"; `details["pair"]` is the same. A pair is right if both are."""

    DESCRIPTION = "SAT, test part of real photographs, each question with both orders of its options."

    @classmethod
    def read(cls, source: SourceFiles) -> Iterator[dict[str, Any] | Unusable]:
        for row in super().read(source):
            yield row
            if not isinstance(row, Unusable):
                yield {**row, "id": f"{row['id']}-reversed", "options": row["options"][::-1]}
