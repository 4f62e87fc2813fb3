"""TimeBench as an `evaluate` metric: how many seconds passed, and by which factor do wrong answers miss?"""

import math
from collections.abc import Mapping, Sequence

import datasets
import evaluate

# `evaluate` brings along only the files that this one names: all three of choice_scoring's.
from .answer_parsing import LETTERS, PARSERS, quantity
from .choice_scoring import (
    RowReferences,
    both_tallies,
    checked_references,
    item_record,
    plain_reference,
    require_scoring,
)
from .intervals import INTERVAL_METHOD

MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the true duration: the five options of a question

_DESCRIPTION = "Accuracy on TimeBench (arXiv 2512.17012, appendix): which of five durations has passed in a video."
_CITATION = "TimeBench was introduced with 4D-RGPT, arXiv:2512.17012."
_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): whole replies of the model, one an item.
    references (`list[dict]`): the items in the same order. Other fields are ignored:
        `id` (str or int): unique; an item that comes twice, as padding samplers produce it, is an error.
        `options` (list): durations in the order that the model saw, numbers with or without a unit of time.
        `answer`: the right option's text, read as `str(answer)`; more than 0.
        `category` (str, optional): such as the frame rate or the source; adds each under `categories`.
    scoring (`str`, defaults to `"letter_or_value"`): what the headline counts. `"letter"`: only a letter;
        `"letter_or_value"`: a reply without a letter may repeat an option's value. Both are always reported in full.
    return_items (`bool`, defaults to `False`): adds `items`, one record a question.
Returns: a dict with
    `n`: number of items; `accuracy` (percent), `interval` (`[low, high]` in percent), `correct`, `unparsable` (they count
        as wrong); `scoring`, `interval_method`.
    `letter`, `letter_or_value`: `accuracy`, `interval`, `correct` and `unparsable` of each, and these, which stand above
        for the headline, too:
        `chosen`: `{"0.25x", "0.5x", "1x", "2x", "4x"}` -> items whose reply chose that multiple of the true duration.
            An option that is no such multiple is counted under its own, as "3x". The rest is unparsable.
        `too_short`, `too_long`: items whose reply chose less or more than the true duration.
        `mean_log2_multiple`: of the chosen ones, 0 for the true duration, -1 for half of it; `None` if none was chosen.
            Below 0 a model takes videos for shorter than they are.
    `categories`: category -> `n` and all of the above.
    `items`, on request: `{"id", "category", "letter", "rule", "correct_letter", "correct", "multiple", "scorings"}`;
        letter, rule, correct and multiple are the headline's; `scorings` has them for both.
Examples:
    >>> metric = TimeBench(keep_in_memory=True)
    >>> item = {"id": 1, "options": ["2.00", "16.00", "8.00", "32.00", "4.00"], "answer": "8.00"}
    >>> metric.compute(predictions=["E"], references=[item])["chosen"]["0.5x"]
    1
"""


def _plain(reference: Mapping) -> dict:
    return plain_reference(reference, ("id", "options", "answer"), ("category",))


def _multiples(reference: Mapping) -> list[float]:
    """Each option as a multiple of the answer. One that equals a standard multiple but for two decimals is that one."""
    seconds = []
    for text in (reference["answer"], *reference["options"]):
        amount = quantity(text)
        if amount is None or amount[1] not in ("", "s") or amount[0] <= 0:
            raise ValueError(f"item {reference['id']}: {text!r} is no duration; give a number of seconds above 0")
        seconds.append(amount[0])
    true, *options = seconds
    multiples = []
    for option in options:
        # Both are cut or rounded to two decimals: each is off by less than 0.01.
        standard = [m for m in MULTIPLES if abs(option - m * true) < 0.01 * (1 + m)]
        nearest = min(standard, key=lambda m: abs(option - m * true), default=option / true)
        multiples.append(nearest)
    return multiples


def _name(multiple: float) -> str:
    return f"{multiple:.3g}x"


def _under(records: Sequence[Mapping], name: str) -> dict:
    """What was chosen under one scoring."""
    multiples = [record["scorings"][name]["multiple"] for record in records]
    multiples = [multiple for multiple in multiples if multiple is not None]
    chosen = dict.fromkeys(map(_name, MULTIPLES), 0)
    for multiple in sorted(multiples):
        chosen[_name(multiple)] = chosen.get(_name(multiple), 0) + 1
    return {
        "chosen": chosen,
        "too_short": sum(multiple < 1 for multiple in multiples),
        "too_long": sum(multiple > 1 for multiple in multiples),
        "mean_log2_multiple": math.fsum(map(math.log2, multiples)) / len(multiples) if multiples else None,
    }


def _summary(records: Sequence[Mapping], scoring: str) -> dict:
    summary = both_tallies(records, scoring)
    for name in PARSERS:
        summary[name] |= _under(records, name)
    return summary | summary[scoring]


def score(
    predictions: Sequence[str],
    references: Sequence[Mapping],
    scoring: str = "letter_or_value",
    return_items: bool = False,
) -> dict:
    """Scores replies; arguments and returned keys are those of [`TimeBench`]'s `compute`.

    Raises: `ValueError` for an unknown scoring, lists of different length, an id that comes twice, a missing field, an
        answer that is no option, or an option that is no duration; the message names the item.
    """
    require_scoring(scoring)
    references = checked_references(predictions, references, _plain)
    records = []
    for reply, reference in zip(predictions, references, strict=True):
        record = item_record(reply, reference, scoring)
        multiples = _multiples(reference)
        for choice in record["scorings"].values():
            letter = choice["letter"]
            choice["multiple"] = None if letter is None else multiples[LETTERS.index(letter)]
        records.append(
            {**record, "multiple": record["scorings"][scoring]["multiple"], "category": reference["category"]}
        )
    categories = sorted({record["category"] for record in records} - {""})
    result = {
        **_summary(records, scoring),
        "scoring": scoring,
        "interval_method": INTERVAL_METHOD,
        "categories": {c: _summary([r for r in records if r["category"] == c], scoring) for c in categories},
    }
    return result | {"items": records} if return_items else result


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class TimeBench(RowReferences, evaluate.Metric):
    """`evaluate.load("metrics_rgpt4d/timebench")`, or this class without dynamic loading."""

    plain = staticmethod(_plain)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": {
                        "id": datasets.Value("string"),
                        "options": datasets.List(datasets.Value("string")),
                        "answer": datasets.Value("string"),
                        "category": datasets.Value("string"),
                    },
                }
            ),
            reference_urls=["https://arxiv.org/abs/2512.17012"],
        )

    def _compute(self, predictions, references, scoring="letter_or_value", return_items=False):
        return score(list(predictions), list(references), scoring, return_items)
