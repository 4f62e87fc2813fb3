"""RoboFAC: what a robot arm does, and what goes wrong, in simulated and real videos."""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any

from .published_conversations import PublishedConversations, chat_messages
from .published_questions import found_media, json_items
from .source_files import SourceFiles

# What the authors' wordings of each type have and those of no other type: a question that fits two is of none.
QUESTION_TYPES = {
    "Task identification": r"what task|describe its task|what is the robot doing",
    "Task planning": r"sequence of subtasks|break down its execution",
    "Failure detection": r"\b(?:did|has|is|was)\b[^.?]*\bsuccess\w*\?",
    "Failure identification": r"which failure|(?:what|which) (?:type|kind) of (?:failure|error)|options: \[.*(?:deviation|error)",
    "Failure locating": r"(?:which|what) (?:subtask|stage|step)\b.*(?:fail|error|wrong)",
    "Failure explanation": r"reason for the (?:task )?failure|why did .* fail",
    "High-level correction": r"high-level",
    "Low-level correction": r"low-level|which direction .*how much",
}
RENAMED_FOLDERS = {"dataset_success_cleaned": "success_data", "dataset_failure_cleaned": "failure_data"}
RENAMED_TASKS = {"Rotation": "SpinStack", "Rotation2": "SpinPullStack"}


class RoboFAC(PublishedConversations):
    """Rows of `training_qa.json`. The subset is the type of question, of [`QUESTION_TYPES`], where its words tell it, else
    the scenario, the folder of the video.

    The file's ids are those of videos, so that the questions of one share it: ids here end with the question's number. Its
    paths are partly of before the folders were renamed; both are found, also below `simulation_data`.
    """

    HUB_ID = "MINT-SJTU/RoboFAC-dataset"
    SOURCE = "robofac"
    LICENSE = "not established for the data; the authors' code is MIT"
    DESCRIPTION = "RoboFAC, training part."
    REMEDY = (
        "Download MINT-SJTU/RoboFAC-dataset (25.8 GB; `hf download MINT-SJTU/RoboFAC-dataset --repo-type dataset --local-dir "
        "FOLDER`), unpack its zip archives, if there are any, in that folder, and give location=FOLDER: training_qa.json with "
        "simulation_data/<task>/<scenario>/*.mp4 beside it. Videos that lie elsewhere are named with media=."
    )

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any]]:
        items = json_items(source.annotations("training_qa.json"))
        if source.media_folder is None and not source.names("**/*.mp4"):
            source.unpack("**/*.zip", "simulation_data", "realworld_data", *RENAMED_FOLDERS.values())
        seen = Counter()
        for item in items:
            if item.get("id") is not None:
                seen[item["id"]] += 1
                item["id"] = f"{item['id']}-{seen[item['id']] - 1}"
            yield item

    @classmethod
    def conversation(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        name = str(item["video"])
        messages = chat_messages(item["conversations"], num_videos=1)
        questions = [message["content"][-1]["text"] for message in messages if message["role"] == "user"]
        return {
            "subset": question_type(" ".join(questions[:1])) or PurePosixPath(name).parent.name,
            "messages": messages,
            "videos": [found_media(source, "video", name, *_renamed(name))],
        }


def question_type(question: str) -> str | None:
    """The one of [`QUESTION_TYPES`] that the words of a question name, or `None` if they name none or several."""
    types = [name for name, words in QUESTION_TYPES.items() if re.search(words, question, re.IGNORECASE)]
    return types[0] if len(types) == 1 else None


def _renamed(name: str) -> Sequence[str]:
    """Where a video may lie whose row has the path of before the folders were renamed."""
    top, _, rest = name.partition("/")
    folder, _, scenario_and_file = rest.partition("/")
    task, dash, variant = folder.partition("-")
    renamed = f"{RENAMED_TASKS.get(task, task)}{dash}{variant}/{scenario_and_file}"
    paths = [f"{first}/{path}" for path in (rest, renamed) for first in (RENAMED_FOLDERS.get(top, top), top)]
    return [f"{root}{path}" for root in ("", "simulation_data/") for path in (*paths, rest, renamed)]
