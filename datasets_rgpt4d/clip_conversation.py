import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from .multiple_choice import AnswerWith, to_messages

REGION_TOKEN = re.compile(r"<(obj_\d+)>")


def clip_conversation(rows: Sequence[Mapping[str, Any]], answer_with: AnswerWith = "text") -> list[dict[str, Any]]:
    """All questions about one clip as one conversation: the video stands in the first turn, and is encoded once for all.

    In separate rows the names start again, so <obj_1> may be another object in each. Here an object keeps one name in
    all turns; objects are told apart by their boxes. The turns come in an order drawn from the first row's id, since
    in their usual order one kind of question would always come first.

    Args:
        rows: questions of the same clip in R4D-Bench's schema, see `to_messages`.
        answer_with: what the assistant says, the option's letter or its text.

    Raises: `ValueError` if there is no row, or the rows are about different clips.
    """
    if not rows:
        raise ValueError("a conversation needs at least one question")
    if len({row["scene"] for row in rows}) != 1:
        raise ValueError(f"rows {[row['id'] for row in rows]} are about different clips; give those of one")
    rows = random.Random(rows[0]["id"]).sample(list(rows), len(rows))
    name_of_box: dict[tuple[float, ...], str] = {}
    messages = []
    for row in rows:
        names = {}
        for region in row["regions"]:
            box = tuple(region["box"])
            names[region["name"]] = name_of_box.setdefault(box, f"obj_{len(name_of_box) + 1}")

        def rename(text: str, names: dict[str, str] = names) -> str:
            return REGION_TOKEN.sub(lambda match: f"<{names[match[1]]}>", text)

        renamed = {
            **row,
            "question": rename(row["question"]),
            "options": [rename(option) for option in row["options"]],
            "answer": rename(row["answer"]),
        }
        messages += to_messages(renamed, answer_with)
    regions = [{"name": name, "box": list(box)} for box, name in name_of_box.items()]
    for message in messages[2::2]:
        message["content"] = [block for block in message["content"] if block["type"] != "video"]
    messages[0]["content"][0]["regions"] = regions
    return messages
