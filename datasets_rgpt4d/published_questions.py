"""What the builders of benchmarks share: from an item as its authors publish it to a row of `EVALUATION_FEATURES`."""

import json
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any, ClassVar

import pyarrow.parquet
from datasets import Split

from .published_dataset import PublishedDataset, Unusable
from .schema import EVALUATION_FEATURES, evaluation_row
from .source_files import SourceFiles

PARQUET_ROWS = 16  # read at a time: rows with pictures are large, and so are the row groups
READ_BYTES = 2**20


class UnusableItem(ValueError):
    """Raised where an item is read; the builder turns it into [`Unusable`]."""

    def __init__(self, reason: str, detail: Any):
        super().__init__(reason, str(detail))


class PublishedQuestions(PublishedDataset):
    """Base of the benchmarks' builders, for example `VLM4DQuestions(location="folder")`.

    A subclass gives `BENCHMARK`, `items`, the records of the benchmark's files, and `question`, which turns one into the
    arguments of [`evaluation_row`], or raises [`UnusableItem`].
    """

    FEATURES = EVALUATION_FEATURES
    SPLIT = Split.TEST
    BENCHMARK: ClassVar[str]

    @classmethod
    @abstractmethod
    def items(cls, source: SourceFiles) -> Iterator[dict[str, Any]]:
        """The records of the benchmark's files."""

    @classmethod
    @abstractmethod
    def question(cls, item: dict[str, Any], source: SourceFiles) -> dict[str, Any]:
        """Arguments of [`evaluation_row`] for a record. Raises: [`UnusableItem`]."""

    @classmethod
    def item_id(cls, item: Mapping[str, Any], index: int) -> str:
        return str(item["id"]) if item.get("id") is not None else str(index)

    @classmethod
    def read(cls, source: SourceFiles) -> Iterator[dict[str, Any] | Unusable]:
        revision = None
        for index, item in enumerate(cls.items(source)):
            revision = revision or source.revision  # once, and only when the annotations were opened
            id = cls.item_id(item, index)
            try:
                fields = cls.question(item, source)
                row = evaluation_row(id=id, benchmark=cls.BENCHMARK, revision=revision, **fields)
            except UnusableItem as error:
                row = Unusable(id, *error.args)
            except KeyError as error:
                row = Unusable(id, "a field is missing", str(error))
            except ValueError as error:
                row = Unusable(id, "the answer does not fit the question", str(error))
            yield row


def json_items(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON file that holds a list of them. Raises: `ValueError` if it does not."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): is it whole?") from error
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{path} must hold a list of objects, one a question.")
    return items


def parquet_items(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a parquet file, few in memory at a time. Pictures stay bytes."""
    # By default a whole row group is fetched ahead, and files such as SAT's are one row group of gigabytes.
    with pyarrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=READ_BYTES) as opened:
        for batch in opened.iter_batches(batch_size=PARQUET_ROWS):
            yield from batch.to_pylist()


def found_media(source: SourceFiles, kind: str, name: Any, *others: str) -> Path:
    """The file `name`, or the first of `others`. Raises: [`UnusableItem`] with the reason "the `kind` is missing"."""
    if not isinstance(name, str) or not name.strip():
        raise UnusableItem(f"no {kind} is named", repr(name))
    path = source.media(name, *others)
    if path is None:
        raise UnusableItem(f"the {kind} is missing", name)
    return path


def image_bytes(images: Sequence[Any] | None) -> list[dict[str, Any]]:
    """Pictures of a parquet cell, plain bytes or dicts with `bytes`, as `evaluation_row` takes them; not decoded."""
    contents = [image["bytes"] if isinstance(image, Mapping) else image for image in images or ()]
    if not contents or not all(isinstance(content, bytes) and content for content in contents):
        raise UnusableItem("an image is missing", f"{len(contents)} images, of which some are empty or no bytes")
    return [{"path": None, "bytes": content} for content in contents]


def option_text(option: Any) -> str:
    """An option as the model reads it: what is no string, as 3D boxes are, in JSON."""
    return json.dumps(option, ensure_ascii=False) if isinstance(option, Mapping | list) else str(option)


def options_by_letter(choices: Any) -> list[str]:
    """Texts of options A, B, C, ... of a dict, or of its JSON. The answer "C" is then `options[letter_index("C", ...)]`.

    Raises: [`UnusableItem`] if the letters have a gap, or it is no dict.
    """
    if isinstance(choices, str):
        try:
            choices = json.loads(choices)
        except ValueError:
            raise UnusableItem("the options cannot be read", choices) from None
    else:
        # A parquet struct has all its letters in every row: those that this question lacks are null.
        choices = _without_trailing_nulls(choices) if isinstance(choices, Mapping) else choices
    if not isinstance(choices, Mapping) or sorted(choices) != list(ascii_uppercase[: len(choices)]):
        raise UnusableItem("the options cannot be read", repr(choices))
    return [option_text(choices[letter]) for letter in sorted(choices)]


def _without_trailing_nulls(choices: Mapping[str, Any]) -> dict[str, Any]:
    letters = sorted(choices)
    while letters and choices[letters[-1]] is None:
        letters.pop()
    return {letter: choices[letter] for letter in letters}


def option_at(options: Sequence[str], answer: Any) -> str:
    """The option that a letter ("C", "c ", "(C)") or a zero-based index (0, "2") names.

    Raises: [`UnusableItem`] if there is no such option.
    """
    text = str(answer).strip().strip("().").upper()
    index = int(text) if text.isdecimal() else ascii_uppercase.find(text) if len(text) == 1 else -1
    if not 0 <= index < len(options):
        raise UnusableItem("the answer names no option", f"{answer!r} of {list(options)}")
    return options[index]


def seconds(value: Any) -> float | None:
    """A time that may be a number, a string, empty, NaN or absent."""
    if value is None or value == "":
        return None
    try:
        value = float(value)
    except (TypeError, ValueError):
        raise UnusableItem("a time cannot be read", repr(value)) from None
    return value if math.isfinite(value) else None


def details_of(item: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """What the source says of an item beside the fields `used`, for the column `details`; bytes are left out."""
    return {name: value for name, value in item.items() if name not in used and not isinstance(value, bytes)}
