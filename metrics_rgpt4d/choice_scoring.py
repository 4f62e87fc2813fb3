"""Scoring of replies to multiple-choice questions: what `r4d_bench`, `choice_accuracy` and `timebench` share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .answer_parsing import LETTERS, PARSERS, compact
from .intervals import macro_interval, percent, wilson_interval


def plain_reference(
    reference: Mapping[str, Any], required: Sequence[str], optional: Sequence[str] = ()
) -> dict[str, Any]:
    """An item with the fields that are scored, as strings, so that ints, 0 and None in the data survive.

    Args:
        reference (`Mapping`): the item; fields that are not named are dropped.
        required (`Sequence[str]`): fields that it must have, `id` among them. `options` stays a list.
        optional (`Sequence[str]`): fields that it may lack or have as `None`; they are "" then.
    Raises: `ValueError` if a field is missing or the options are no list.
    """
    missing = [field for field in required if field not in reference]
    if missing:
        raise ValueError(
            f"the reference with id {reference.get('id')!r} lacks {', '.join(missing)}; give {', '.join(required)}"
        )
    options = reference["options"]
    if not isinstance(options, (list, tuple)):
        raise ValueError(
            f"item {reference['id']}: options must be a list in the order shown, not {type(options).__name__}"
        )
    plain = {field: str(reference[field]) for field in required}
    plain |= {field: "" if reference.get(field) is None else str(reference[field]) for field in optional}
    return plain | {"options": [str(option) for option in options]}


def _require_text(reply: Any, reference: Mapping[str, Any]) -> None:
    if not isinstance(reply, str):
        raise ValueError(f"item {reference['id']}: the prediction must be the reply as str, not {type(reply).__name__}")


def _require_as_many(predictions: Sequence, references: Sequence) -> None:
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one reply an item")


def checked_references(predictions: Sequence, references: Sequence, plain: Callable[[Mapping], dict]) -> list[dict]:
    """The plain references, once it is sure that every item comes once and has a reply.

    Raises: `ValueError` for lists of different length, an id that comes twice, or a reply that is no string.
    """
    _require_as_many(predictions, references)
    references = [plain(reference) for reference in references]
    seen: set[str] = set()
    for reference, reply in zip(references, predictions, strict=True):
        if reference["id"] in seen:
            raise ValueError(f"item {reference['id']} comes twice; drop what a sampler padded, or make the ids unique")
        _require_text(reply, reference)
        seen.add(reference["id"])
    return references


def correct_letters(reference: Mapping[str, Any]) -> str:
    """Letters of every option whose text is the answer; more than one where the data list a text twice.

    Texts are compared without outer spaces; only if none matches, without case, inner spaces, quotes and final period.
    """
    options, answer = reference["options"], reference["answer"]
    if not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"item {reference['id']}: {len(options)} options; a question has 2 to {len(LETTERS)}")
    same = [i for i, option in enumerate(options) if option.strip() == answer.strip()]
    same = same or [i for i, option in enumerate(options) if compact(option) == compact(answer)]
    if not same:
        raise ValueError(
            f"item {reference['id']}: the answer {answer!r} is none of the options {options}; "
            "give the right option's text, not its letter"
        )
    return "".join(LETTERS[i] for i in same)


def item_record(reply: str, reference: Mapping[str, Any], scoring: str) -> dict[str, Any]:
    """What one reply chose, under both scorings: `id`, `letter`, `rule`, `correct`, `correct_letter`, `scorings`."""
    right = correct_letters(reference)
    scorings = {}
    for name, parse in PARSERS.items():
        parsed = parse(reply, reference["options"])
        correct = parsed.letter is not None and parsed.letter in right
        scorings[name] = {"letter": parsed.letter, "rule": parsed.rule, "correct": correct}
    return {"id": reference["id"], **scorings[scoring], "correct_letter": right[0], "scorings": scorings}


def tally(records: Sequence[Mapping], scoring: str) -> dict[str, Any]:
    """Accuracy (percent), interval, correct and unparsable of some items under one scoring."""
    n = len(records)
    correct = sum(record["scorings"][scoring]["correct"] for record in records)
    return {
        "accuracy": 100.0 * correct / n if n else None,
        "interval": percent(wilson_interval(correct, n)),
        "correct": correct,
        "unparsable": sum(record["scorings"][scoring]["letter"] is None for record in records),
    }


def both_tallies(records: Sequence[Mapping], scoring: str) -> dict[str, Any]:
    """`n`, the tally of the headline's scoring, and the tallies of both under their names."""
    tallies = {name: tally(records, name) for name in PARSERS}
    return {"n": len(records), **tallies[scoring], **tallies}


def macro(counts: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Unweighted mean of accuracies, in percent, with its interval; counts are (correct, n), every n > 0."""
    return {
        "macro": sum(100.0 * correct / n for correct, n in counts) / len(counts) if counts else None,
        "macro_interval": percent(macro_interval(counts)),
    }


def require_scoring(scoring: str) -> None:
    """Raises a `ValueError` unless there is such a scoring."""
    if scoring not in PARSERS:
        raise ValueError(f"scoring must be one of {', '.join(PARSERS)}, not {scoring!r}")


class RowReferences:
    """Base beside `evaluate.Metric`: rows of a data set may be added as they are.

    Arrow refuses a list of mixed types and drops None, so items become strings before `evaluate` stores them. A
    subclass sets `plain`, the function that does it.
    """

    plain: Callable[[Mapping], dict]

    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds a batch of replies and items; ints, None and further fields in the items are allowed."""
        if predictions is None or references is None:
            raise ValueError("give both predictions and references")
        _require_as_many(predictions, references)
        references = [self.plain(reference) for reference in references]
        for reference, reply in zip(references, predictions, strict=True):
            _require_text(reply, reference)
        super().add_batch(predictions=list(predictions), references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one reply and its item."""
        if reference is None:
            raise ValueError("give a reference with the fields that the metric names")
        reference = self.plain(reference)
        _require_text(prediction, reference)
        super().add(prediction=prediction, reference=reference, **kwargs)
