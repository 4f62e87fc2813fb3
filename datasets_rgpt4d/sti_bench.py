"""STI-Bench: quantities and poses in indoor, outdoor and desktop video."""

from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from .published_questions import (
    PublishedQuestions,
    details_of,
    found_media,
    option_at,
    options_by_letter,
    parquet_items,
    seconds,
)
from .source_files import SourceFiles


class STIBenchQuestions(PublishedQuestions):
    """Items of `qa.parquet` (2,064). `category` is the task; `details` has `scene`: indoor, outdoor or desktop.

    The interval that a question is about is in `time_start` and `time_end`, and no part of `question`; the prompt tells it.
    The whole video is shown, as in the authors' scripts.
    """

    HUB_ID = "MINT-SJTU/STI-Bench"
    BENCHMARK = "sti_bench"
    LICENSE = "MIT (the authors' repository); the videos are of Waymo, ScanNet and Omni6DPose"
    DESCRIPTION = "STI-Bench, spatial-temporal quantities in real video."
    REMEDY = (
        "Download MINT-SJTU/STI-Bench from the Hub to a folder and unpack its video.zip there (qa.parquet beside videos/ or "
        "video/), then give location=, that folder."
    )

    @classmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any]]:
        annotations = source.annotations("qa.parquet")
        source.unpack("video.zip", "videos", "video")
        yield from parquet_items(annotations)

    @classmethod
    def item_id(cls, item: dict[str, Any], index: int) -> str:
        # `ID` counts within a video in the authors' own results, where video and ID together name an item.
        return f"{item.get('Video')}/{item.get('ID')}" if item.get("ID") is not None else str(index)

    @classmethod
    def question(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        options = options_by_letter(item["Candidates"])
        name = item["Video"] if not item["Video"] or PurePosixPath(item["Video"]).suffix else f"{item['Video']}.mp4"
        used = ("time_start", "time_end", "Question", "Candidates", "Task")
        return {
            "category": item["Task"],
            "question": item["Question"],
            "options": options,
            "answer": option_at(options, item["Answer"]),
            "answer_kind": "choice",
            "videos": [found_media(source, "video", name, f"videos/{name}", f"video/{name}")],
            "time_start": seconds(item.get("time_start")),
            "time_end": seconds(item.get("time_end")),
            "details": {"scene": scene_of(name), **details_of(item, *used)},
        }


def scene_of(video: str) -> str:
    """Kind of scene by the video's name: Waymo's names say camera, ScanNet's begin with scene, Omni6DPose's are six digits."""
    path = PurePosixPath(video)
    if "camera" in path.name:
        return "outdoor"
    if path.name.startswith("scene"):
        return "indoor"
    return "desktop" if path.stem.isdecimal() and len(path.stem) == 6 else "unknown"
