"""Questions on the driving videos of Wolf (nuScenes), made from its captions."""

import json
from collections.abc import Iterator
from typing import Any

from .published_conversations import PublishedConversations, chat_messages, question_and_answer
from .published_dataset import Unusable
from .published_questions import found_media, json_items
from .source_files import SourceFiles


class WolfQA(PublishedConversations):
    """Rows of `wolf_qa.jsonl` (or a list, `wolf_qa.json`): `id`, `video`, and `conversations` or `question` and `answer`;
    `question_type`, where a row has it, is the subset.

    The paper's 15,000 pairs, their templates and the list of clips were never published: what is read here was made
    again, and is **not** the paper's data.
    """

    SOURCE = "wolf"
    LICENSE = "cc-by-nc-sa-4.0 (nuScenes); the terms of Wolf's captions are not established"
    DESCRIPTION = "Questions and answers on Wolf's nuScenes clips, made from captions; not the paper's own."
    REMEDY = (
        "Make wolf_qa.jsonl from captions with examples/make_wolf_questions.py, or write one {id, video, question, answer} a "
        "line yourself. The videos are cuts of 5 s from the "
        "front camera of nuScenes (www.nuscenes.org, with an account there): put them where `video` says, beside "
        "wolf_qa.jsonl or below the folder that media= names."
    )

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any] | Unusable]:
        path = source.annotations("wolf_qa.jsonl", "wolf_qa.json")
        if path.suffix == ".json":
            yield from json_items(path)
            return
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    item = json.loads(line)
                except ValueError as error:
                    item = error
                yield (
                    item
                    if isinstance(item, dict)
                    else Unusable(f"line {number}", "the line is no JSON object", str(item))
                )

    @classmethod
    def conversation(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        if "conversations" in item:
            messages = chat_messages(item["conversations"], num_videos=1)
        else:
            messages = question_and_answer(item["question"], item["answer"], num_videos=1)
        return {
            "subset": str(item.get("question_type") or ""),
            "messages": messages,
            "videos": [found_media(source, "video", item["video"])],
        }
