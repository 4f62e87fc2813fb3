"""The two schemas that every data set of the project has: conversations to train on, and questions to evaluate on.

Media are columns of their own (`images`, `videos`), so that `datasets` embeds them in parquet and the Hub shows them; a
message refers to them in their order, by blocks `{"type": "image"}` and `{"type": "video"}`. Nothing is decoded here.
"""

import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from datasets import Features, Image, List, Value, Video
from PIL import Image as PILImage

ANSWER_KINDS = ("choice", "number", "text")

_MEDIA = {"images": List(Image(decode=False)), "videos": List(Video(decode=False))}
_REGIONS = List({"video": Value("int32"), "name": Value("string"), "box": List(Value("float32"), length=4)})

TRAINING_FEATURES = Features(
    {
        "id": Value("string"),  # unique in its source
        "source": Value("string"),  # the data set: vsti, wolf, robofac, sat, world4d
        "subset": Value("string"),  # its own category, by which mixtures choose; "" where it has none
        "revision": Value("string"),  # commit of the Hub repository, or sha256 of the local annotation files
        "messages": List(
            {"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}
        ),
        **_MEDIA,
        "regions": _REGIONS,  # marked in video number `video`: box in pixels of its first frame, x0, y0, x1, y1
    }
)

EVALUATION_FEATURES = Features(
    {
        "id": Value("string"),  # unique in its benchmark
        "benchmark": Value("string"),
        "category": Value("string"),
        "revision": Value("string"),
        **_MEDIA,  # images stand before videos
        "regions": _REGIONS,
        "question": Value("string"),  # as published, without prompt or option list
        "options": List(Value("string")),  # texts in the order shown; empty unless answer_kind is "choice"
        "answer": Value("string"),  # the text of the right option, the number, or the reference text
        "answer_kind": Value("string"),  # one of ANSWER_KINDS
        "time_start": Value("float64"),  # seconds; the interval that the question is about, where the data give one
        "time_end": Value("float64"),
        "details": Value("string"),  # JSON object: what else the source says of this item
    }
)


def _media(paths: Sequence[Any]) -> list[dict[str, Any]]:
    return [dict(one) if isinstance(one, Mapping) else {"path": str(one), "bytes": None} for one in paths]


def training_row(
    id: str,
    source: str,
    subset: str,
    revision: str,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    regions: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """A checked row of `TRAINING_FEATURES`. Media are paths, or dicts with `path` and `bytes`.

    Raises: `ValueError` if the roles do not alternate from user to assistant, a text is empty, or the messages do not
        name exactly the images and videos that are given.
    """
    roles = [message["role"] for message in messages]
    wanted = ["user", "assistant"] * (len(roles) // 2)
    if not roles or roles[roles[0] == "system" :] != wanted:
        raise ValueError(f"{source} {id}: roles must alternate user, assistant (a system turn may lead), got {roles}.")
    blocks = [block for message in messages for block in message["content"]]
    for kind, media in (("image", images), ("video", videos)):
        count = sum(block["type"] == kind for block in blocks)
        if count != len(media):
            raise ValueError(f"{source} {id}: the messages name {count} {kind}s, but {len(media)} are given.")
    if any(block["type"] == "text" and not block["text"].strip() for block in blocks) or not all(
        any(block["type"] == "text" for block in message["content"]) for message in messages
    ):
        raise ValueError(f"{source} {id}: a message has no text.")
    return {
        "id": str(id),
        "source": source,
        "subset": subset,
        "revision": revision,
        "messages": [
            {
                "role": message["role"],
                "content": [{"type": block["type"], "text": block.get("text")} for block in message["content"]],
            }
            for message in messages
        ],
        "images": _media(images),
        "videos": _media(videos),
        "regions": [dict(region) for region in regions],
    }


def evaluation_row(
    id: Any,
    benchmark: str,
    category: str,
    revision: str,
    question: str,
    answer: Any,
    answer_kind: str,
    options: Sequence[Any] = (),
    images: Sequence[Any] = (),
    videos: Sequence[Any] = (),
    regions: Sequence[Mapping[str, Any]] = (),
    time_start: float | None = None,
    time_end: float | None = None,
    details: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """A checked row of `EVALUATION_FEATURES`. Options and answer may be of any type, 0 and `None` too: they become
    `str(...)`, which is what the model reads.

    Raises: `ValueError` for an unknown `answer_kind`, an answer that is none of the options (outer spaces aside), options of
        a question that is not a choice, a number that cannot be read, or no media.
    """
    options, answer = [str(option).strip() for option in options], str(answer).strip()
    if answer_kind not in ANSWER_KINDS:
        raise ValueError(f"{benchmark} {id}: answer_kind must be one of {ANSWER_KINDS}, got {answer_kind!r}.")
    if answer_kind == "choice" and answer not in options:
        raise ValueError(f"{benchmark} {id}: the answer {answer!r} is none of the options {options}.")
    if answer_kind != "choice" and options:
        raise ValueError(
            f"{benchmark} {id}: a question with answer_kind {answer_kind!r} has no options, got {options}."
        )
    if answer_kind == "number":
        float(answer)
    if not images and not videos:
        raise ValueError(f"{benchmark} {id}: the question has neither images nor videos.")
    return {
        "id": str(id),
        "benchmark": benchmark,
        "category": category,
        "revision": revision,
        "images": _media(images),
        "videos": _media(videos),
        "regions": [dict(region) for region in regions],
        "question": question,
        "options": options,
        "answer": answer,
        "answer_kind": answer_kind,
        "time_start": time_start,
        "time_end": time_end,
        "details": json.dumps(details or {}, sort_keys=True, ensure_ascii=False),
    }


def media_blocks(row: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The row's media as blocks of a chat message: `{"image": [...], "video": [...]}`; videos carry their regions.

    An image is opened (its pixels are read later); a video stays `{"path", "bytes"}`, which `RGPT4DProcessor` decodes.
    """
    images = [
        {"type": "image", "image": PILImage.open(one["path"] if one["bytes"] is None else BytesIO(one["bytes"]))}
        for one in row["images"]
    ]
    videos = []
    for index, video in enumerate(row["videos"]):
        regions = [
            {"name": region["name"], "box": list(region["box"])}
            for region in row["regions"]
            if region["video"] == index
        ]
        videos.append({"type": "video", "video": dict(video), **({"regions": regions} if regions else {})})
    return {"image": images, "video": videos}


def training_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row of `TRAINING_FEATURES` with its media in their places, as `P4DCollator` takes them."""
    blocks = {kind: iter(found) for kind, found in media_blocks(row).items()}
    return [
        {
            "role": message["role"],
            "content": [
                {"type": "text", "text": block["text"]} if block["type"] == "text" else next(blocks[block["type"]])
                for block in message["content"]
            ],
        }
        for message in row["messages"]
    ]
