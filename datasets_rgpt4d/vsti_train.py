"""The training part of VSTI-Bench (VLM-3R): camera and object geometry over time, in videos of ScanNet."""

import json
from collections.abc import Iterator
from typing import Any

from datasets.utils.logging import get_logger

from .published_conversations import PublishedConversations, chat_messages
from .published_dataset import Unusable
from .published_questions import found_media, json_items
from .source_files import MissingDataError, SourceFiles
from .vstibench import AFTER, BEFORE, DROPPED_ITEMS

logger = get_logger(__name__)

FOLDER = "vstibench_train"


class VSTITrain(PublishedConversations):
    """Rows of `vstibench_train/qa_*.json`, one file a type of question, which is the subset. Numbers are metres; choices are
    answered by their letter alone.

    The erratum of 13 July 2026 dropped rows and changed the labels of distances and displacements. `revision` ends with
    `before_erratum` where the data have no `erratum_dropped_items.json`, else with `after_erratum`; rows that it names and
    that are in the files all the same are unusable.

    Questions speak of "frame k of 32" of the authors' sampling, whatever number of frames the model sees.
    """

    HUB_ID = "Journey9ni/VLM-3R-DATA"
    SOURCE = "vsti"
    LICENSE = "not established; ScanNet's terms bind the videos"
    DESCRIPTION = "VSTI-Bench, training part."
    REMEDY = (
        "The annotations are in Journey9ni/VLM-3R-DATA on the Hub, files vstibench_train/*.json (`hf download "
        "Journey9ni/VLM-3R-DATA --repo-type dataset --include 'vstibench_train/*' --local-dir FOLDER`). The videos are not "
        "distributed: accept ScanNet's terms of use (www.scan-net.org), get the .sens files of its training scenes, write "
        "the colour frames of each as scannet/videos/<scene>.mp4, for example scannet/videos/scene0191_00.mp4, beside "
        "vstibench_train, or anywhere and name that folder with media=."
    )

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any] | Unusable]:
        names = source.names(f"{FOLDER}/qa_*.json") or source.names("qa_*.json")
        if not names:
            raise MissingDataError(f"{source.location} has no {FOLDER}/qa_*.json. {source.remedy}")
        paths = [source.annotations(name) for name in names]
        dropped = _dropped_items(source)
        if dropped is None:
            logger.warning(
                f"VSTI-Bench: {source.location} has no {DROPPED_ITEMS}: its labels are of before the erratum of 13 July 2026, "
                "which corrected distances and displacements. Its authors advise to train on the corrected release."
            )
        for path in paths:
            for item in json_items(path):
                if dropped is not None and str(item.get("id")) in dropped:
                    yield Unusable(str(item["id"]), "dropped by the erratum of 2026-07-13", dropped[str(item["id"])])
                else:
                    yield {"question_type": path.stem.removeprefix("qa_"), **item}

    @classmethod
    def conversation(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        name = str(item["video"])
        shorter = name.removeprefix("scannet/")
        return {
            "subset": item["question_type"],
            "messages": chat_messages(item["conversations"], num_videos=1),
            "videos": [found_media(source, "video", name, shorter, shorter.removeprefix("videos/"))],
        }

    @classmethod
    def revision(cls, source: SourceFiles) -> str:
        return f"{source.revision} {BEFORE if _dropped_items_name(source) is None else AFTER}"


def _dropped_items_name(source: SourceFiles) -> str | None:
    return next((name for name in (f"{FOLDER}/{DROPPED_ITEMS}", DROPPED_ITEMS) if source.has(name)), None)


def _dropped_items(source: SourceFiles) -> dict[str, str] | None:
    """Ids that the erratum dropped, with what it says of each, or `None` if the data have no such file. The file holds
    objects with an `id`, ids, or one object by id."""
    name = _dropped_items_name(source)
    if name is None:
        return None
    path = source.annotations(name)
    items = json.loads(path.read_text(encoding="utf-8"))
    if isinstance(items, dict):
        named = list(items.items())
    else:
        named = [(one.get("id") if isinstance(one, dict) else one, one) for one in items]
    if not all(isinstance(id, str) and not isinstance(one, list) for id, one in named):
        raise ValueError(f"{path} must hold a list of ids or of objects with an id, or one object by id.")
    return {id: json.dumps(one, ensure_ascii=False) for id, one in named}
