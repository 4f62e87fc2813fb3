"""What the builders of training sets share: from an item as its authors publish it to a row of `TRAINING_FEATURES`."""

import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from datasets import Split

from .published_dataset import PublishedDataset, Unusable
from .published_questions import UnusableItem
from .schema import TRAINING_FEATURES, training_row
from .source_files import SourceFiles

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
MEDIA_TOKEN = re.compile(" ?<(?:image|video)>")


class PublishedConversations(PublishedDataset):
    """Base of the training sets' builders, for example `RoboFAC(location="folder")`.

    A subclass gives `SOURCE`, `items`, the records of the data set's files, and `conversation`, which turns one into the
    arguments of [`training_row`], or raises [`UnusableItem`].
    """

    FEATURES = TRAINING_FEATURES
    SPLIT = Split.TRAIN
    SOURCE: ClassVar[str]

    @classmethod
    @abstractmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any] | Unusable]:
        """The records. All annotation files are asked for before the first one, so that the revision covers them."""

    @classmethod
    @abstractmethod
    def conversation(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        """Arguments of [`training_row`] for a record. Raises: [`UnusableItem`]."""

    @classmethod
    def revision(cls, source: SourceFiles) -> str:
        return source.revision

    @classmethod
    def read(cls, source: SourceFiles) -> Iterator[dict[str, Any] | Unusable]:
        revision = None
        for index, item in enumerate(cls.items(source)):
            if isinstance(item, Unusable):
                yield item
                continue
            revision = revision or cls.revision(source)  # once: it hashes the annotation files
            id = str(index if item.get("id") is None else item["id"])
            try:
                row = training_row(id=id, source=cls.SOURCE, revision=revision, **cls.conversation(item, source))
            except UnusableItem as error:
                row = Unusable(id, *error.args)
            except KeyError as error:
                row = Unusable(id, "a field is missing", str(error))
            except ValueError as error:
                row = Unusable(id, "the turns do not fit together", str(error))
            yield row


def chat_messages(turns: Any, num_images: int = 0, num_videos: int = 0) -> list[dict[str, Any]]:
    """Turns `{"from": "human", "value": "<video>\\n..."}` as chat messages, with blocks for the media in front of the first
    turn of the user, images before videos.

    The tokens `<image>` and `<video>` are taken out wherever they stand, as the paper's loader does. Either stands for
    either: VSTI-Bench writes `<image>` for a video.

    Raises: [`UnusableItem`] for an unknown role, a turn without text, or another number of tokens than of media.
    """
    if not isinstance(turns, Sequence) or not all(isinstance(turn, Mapping) for turn in turns):
        raise UnusableItem("the conversation cannot be read", repr(turns))
    messages, tokens = [], 0
    for turn in turns:
        role = ROLES.get(turn["from"])
        if role is None:
            raise UnusableItem("unknown role", repr(turn["from"]))
        text, found = MEDIA_TOKEN.subn("", "" if turn["value"] is None else str(turn["value"]))
        tokens += found
        text = text.strip()
        if not text:
            raise UnusableItem("the answer is empty" if role == "assistant" else "a turn is empty", f"role {role}")
        messages.append({"role": role, "content": [{"type": "text", "text": text}]})
    if tokens != num_images + num_videos:
        raise UnusableItem(
            "the media tokens do not fit the media",
            f"{tokens} <image> or <video>, but {num_images} images and {num_videos} videos",
        )
    media = [{"type": "image"}] * num_images + [{"type": "video"}] * num_videos
    for message in messages:
        if message["role"] == "user":
            message["content"] = media + message["content"]
            break
    return messages


def question_and_answer(question: Any, answer: Any, num_images: int = 0, num_videos: int = 0) -> list[dict[str, Any]]:
    """[`chat_messages`] of one question, which names its media by no tokens, and its answer."""
    tokens = "<image>" * num_images + "<video>" * num_videos
    question = "" if question is None else question
    turns = [{"from": "human", "value": f"{tokens}\n{question}"}, {"from": "gpt", "value": answer}]
    return chat_messages(turns, num_images, num_videos)
