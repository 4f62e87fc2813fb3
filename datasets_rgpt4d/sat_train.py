"""The training parts of SAT: spatial questions on one or two simulated pictures."""

from collections.abc import Iterator
from typing import Any, ClassVar

from .multiple_choice import shuffled_options
from .published_conversations import PublishedConversations, chat_messages, question_and_answer
from .published_questions import UnusableItem, found_media, image_bytes, json_items, parquet_items
from .source_files import SourceFiles


class SATTrain(PublishedConversations):
    """Rows of `SAT_train.parquet` (175,000, of which the first 160,000 or so ask about a still scene), as Fig. A4 of the
    paper shows them: the question with " Options: ['...', '...']", the text of the right one with a full stop as the answer.
    The subset is the type of question.

    The right answer often stands first in the file, so the options are shuffled by the row's id, which is its number. Of a
    folder with `sft.json`, the layout that the paper's authors train on, the conversations are taken as they are.
    """

    HUB_ID = "array/SAT"
    SOURCE = "sat"
    LICENSE = "MIT"
    DESCRIPTION = "SAT, training part."
    FILES: ClassVar[tuple[str, ...]] = ("SAT_train.parquet", "sft.json")  # the former is one row group of gigabytes
    REMEDY = (
        "Download SAT_train.parquet of array/SAT (4.56 GB; `hf download array/SAT SAT_train.parquet --repo-type dataset "
        "--local-dir FOLDER`), then give location=FOLDER. Pictures of an sft.json lie beside it, or in the folder that media= "
        "names."
    )

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any]]:
        path = source.annotations(*cls.FILES)
        stem = path.stem.removeprefix("SAT_")
        for index, item in enumerate(json_items(path) if path.suffix == ".json" else parquet_items(path)):
            yield {"id": f"{stem}-{index}", **item}

    @classmethod
    def conversation(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        if "conversations" in item:
            names = item["image"] if isinstance(item["image"], list) else [item["image"]]
            return {
                "subset": str(item.get("question_type") or ""),
                "messages": chat_messages(item["conversations"], num_images=len(names)),
                "images": [found_media(source, "image", name, str(name).removeprefix("SAT/")) for name in names],
            }
        images = image_bytes(item["image_bytes"])
        options = [str(option).strip() for option in item["answers"] or []]
        answer = "" if item["correct_answer"] is None else str(item["correct_answer"]).strip()
        if not answer:
            raise UnusableItem("the answer is empty", repr(item["correct_answer"]))
        if len(options) < 2:
            raise UnusableItem("there are fewer than two options", repr(options))
        if options.count(answer) != 1:
            raise UnusableItem("the answer is not one of the options", f"{answer!r} of {options}")
        question = f"{str(item['question']).strip()} Options: {shuffled_options(options, item['id'])}"
        return {
            "subset": str(item["question_type"] or ""),
            "messages": question_and_answer(question, f"{answer.removesuffix('.')}.", num_images=len(images)),
            "images": images,
        }


class SATStatic(SATTrain):
    """Rows of `SAT_static.parquet` (127,000 on still scenes). Whether they are in `SAT_train.parquet`, too, is not
    established, and the paper's 170,000 pairs fit the latter alone: mix the two only after a look."""

    DESCRIPTION = "SAT, training part on still scenes."
    FILES = ("SAT_static.parquet",)
    REMEDY = SATTrain.REMEDY.replace("SAT_train", "SAT_static").replace("4.56", "2.63")
