"""R4D-Bench accuracy as an `evaluate` metric: 12 columns with their n and intervals, no guessing, nothing skipped."""

import math
from statistics import NormalDist

import datasets
import evaluate

from .answer_parsing import LETTERS, compact, parse_letter, parse_letter_or_value

# Column -> task name in the data. Static and dynamic go by category, as the benchmark's reports do; its card's
# 388 / 1,031 counts by source instead (STI-Bench / VLM4D) and is another partition.
STATIC = {"VG": "3D Video Grounding", "DM": "Dimensional Measurement", "SR": "Spatial Relation"}
DYNAMIC = {
    "R": "Rotational",
    "C": "Counting",
    "T": "Translational",
    "FP": "False Positives",
    "SA": "Speed & Acceleration",
    "DP": "Displacement & Path Length",
}
CATEGORIES = {**STATIC, **DYNAMIC}
COLUMNS = ("Avg", "Sta", "Dyn", *CATEGORIES)
PARSERS = {"letter": parse_letter, "letter_or_value": parse_letter_or_value}
CONFIDENCE = 0.95
INTERVAL_METHOD = "Wilson score, 95 %; macro: MOVER of the categories' Wilson intervals (Zou and Donner, 2008)"

_DESCRIPTION = "Accuracy on R4D-Bench (arXiv 2512.17012): region-level 4D questions in nine categories."
_CITATION = "R4D-Bench was introduced with 4D-RGPT, arXiv:2512.17012."
_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): whole replies of the model, one an item.
    references (`list[dict]`): the items in the same order. Fields beside these four are ignored:
        `id` (str or int): unique; an item that comes twice, as padding samplers produce it, is an error.
        `task` (str): one of the nine task names; any other name is reported under `other` and counts nowhere else.
        `options` (list of 2 to 26): in the order that the model saw; str, int, float or None, read as `str(option)`.
        `answer`: the text of the right option, read as `str(answer)`; 0 and None are answers too.
    scoring (`str`, defaults to `"letter_or_value"`): what the headline counts. `"letter"`: only a letter;
        `"letter_or_value"`: a reply without a letter may repeat an option's value. Both are always reported in full.
    return_items (`bool`, defaults to `False`): adds `items`, one record a question.
Returns: a dict with
    `Avg`, `Sta`, `Dyn`, `VG`, `DM`, `SR`, `R`, `C`, `T`, `FP`, `SA`, `DP`: percent of right answers, `None` where there
        is no item. Avg, Sta and Dyn are micro averages: over items, not over categories.
    `macro`: percent, the mean of those of the nine categories that have items; `num_categories`: how many these are.
    `scoring`: the headline's. `n`: column -> number of items.
    `interval`: column or `macro` -> `[low, high]` in percent or `None`; `interval_method` names the method.
    `unparsable`: items of the nine categories whose reply chose nothing; they count as wrong.
    `letter`, `letter_or_value`: each `{"accuracy", "interval", "correct", "unparsable"}`, each of these by column;
        accuracy and interval also have `macro`.
    `other`: task -> `{"n", "accuracy", "interval", "correct", "unparsable"}`, and the last four under each scoring too.
    `items`, on request: `{"id", "task", "letter", "rule", "correct_letter", "correct", "scorings"}`; letter, rule and
        correct are the headline's; `scorings` has them for both; correct_letter: the first option with the right text.
Examples:
    >>> metric = R4DBench(keep_in_memory=True)
    >>> item = {"id": 1, "task": "Counting", "options": [1, 2, 3, 0], "answer": 0}
    >>> metric.compute(predictions=["(D) 0"], references=[item])["C"]
    100.0
"""


def wilson_interval(correct: int, n: int, confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Wilson's score interval of a proportion (Wilson, 1927), as fractions; `None` for n = 0.

    It stays inside [0, 1] and keeps its coverage for small n, where the normal approximation fails: R4D-Bench's
    smallest category has 24 items.
    """
    if n == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    p = correct / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half_width = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n the exact ends are 0 and 1; the sum above misses them by a rounding error.
    return (0.0 if correct == 0 else centre - half_width, 1.0 if correct == n else centre + half_width)


def macro_interval(counts: list[tuple[int, int]]) -> tuple[float, float] | None:
    """Interval of an unweighted mean of independent proportions, from each one's Wilson interval.

    The distances from each proportion to its two limits add in quadrature (MOVER; Zou and Donner, Statistics in
    Medicine 27, 2008).

    Args:
        counts (`list[tuple[int, int]]`): (correct, n) of each category, every n > 0.
    """
    if not counts:
        return None
    mean = sum(correct / n for correct, n in counts) / len(counts)
    limits = [(correct / n, *wilson_interval(correct, n)) for correct, n in counts]
    below = math.sqrt(sum((p - low) ** 2 for p, low, _ in limits)) / len(counts)
    above = math.sqrt(sum((high - p) ** 2 for p, _, high in limits)) / len(counts)
    return mean - below, mean + above


def plain_reference(reference: dict) -> dict:
    """An item with the four fields that are scored, as strings, so that ints, 0 and None in the data survive.

    Raises: `ValueError` if a field is missing or the options are no list.
    """
    missing = [field for field in ("id", "task", "options", "answer") if field not in reference]
    if missing:
        raise ValueError(
            f"the reference with id {reference.get('id')!r} lacks {', '.join(missing)}; give id, task, options, answer"
        )
    options = reference["options"]
    if not isinstance(options, (list, tuple)):
        raise ValueError(
            f"item {reference['id']}: options must be a list in the order shown, not {type(options).__name__}"
        )
    return {
        "id": str(reference["id"]),
        "task": str(reference["task"]),
        "options": [str(option) for option in options],
        "answer": str(reference["answer"]),
    }


def _require_text(reply, reference: dict) -> None:
    if not isinstance(reply, str):
        raise ValueError(f"item {reference['id']}: the prediction must be the reply as str, not {type(reply).__name__}")


def correct_letters(reference: dict) -> str:
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


def _item_record(reply: str, reference: dict, scoring: str) -> dict:
    right = correct_letters(reference)

    scorings = {}
    for name, parse in PARSERS.items():
        parsed = parse(reply, reference["options"])
        correct = parsed.letter is not None and parsed.letter in right
        scorings[name] = {"letter": parsed.letter, "rule": parsed.rule, "correct": correct}
    return {
        "id": reference["id"],
        "task": reference["task"],
        **scorings[scoring],
        "correct_letter": right[0],
        "scorings": scorings,
    }


def _percent(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else [100.0 * end for end in interval]


def _tally(records: list[dict], scoring: str) -> dict:
    """Accuracy, interval, correct and unparsable of some items under one scoring."""
    n = len(records)
    correct = sum(record["scorings"][scoring]["correct"] for record in records)
    return {
        "accuracy": 100.0 * correct / n if n else None,
        "interval": _percent(wilson_interval(correct, n)),
        "correct": correct,
        "unparsable": sum(record["scorings"][scoring]["letter"] is None for record in records),
    }


def score(
    predictions: list[str], references: list[dict], scoring: str = "letter_or_value", return_items: bool = False
) -> dict:
    """Scores replies; arguments and returned keys are those of [`R4DBench`]'s `compute`.

    Raises: `ValueError` for an unknown scoring, lists of different length, an id that comes twice, a missing field, or
        an answer that is no option; the message names the item.
    """
    if scoring not in PARSERS:
        raise ValueError(f"scoring must be one of {', '.join(PARSERS)}, not {scoring!r}")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one reply an item")
    references = [plain_reference(reference) for reference in references]
    seen: set[str] = set()
    for reference, reply in zip(references, predictions, strict=True):
        if reference["id"] in seen:
            raise ValueError(f"item {reference['id']} comes twice; drop what a sampler padded, or make the ids unique")
        _require_text(reply, reference)
        seen.add(reference["id"])
    records = [_item_record(reply, ref, scoring) for reply, ref in zip(predictions, references, strict=True)]

    in_task = {column: [r for r in records if r["task"] == task] for column, task in CATEGORIES.items()}
    in_column = in_task | {
        "Avg": [r for r in records if r["task"] in CATEGORIES.values()],
        "Sta": [r for r in records if r["task"] in STATIC.values()],
        "Dyn": [r for r in records if r["task"] in DYNAMIC.values()],
    }
    filled = [column for column in CATEGORIES if in_column[column]]

    def under(name: str) -> dict:
        tallies = {column: _tally(in_column[column], name) for column in COLUMNS}
        block = {key: {column: tallies[column][key] for column in COLUMNS} for key in tallies["Avg"]}
        block["accuracy"]["macro"] = sum(tallies[c]["accuracy"] for c in filled) / len(filled) if filled else None
        counts = [(tallies[c]["correct"], len(in_column[c])) for c in filled]
        block["interval"]["macro"] = _percent(macro_interval(counts))
        return block

    blocks = {name: under(name) for name in PARSERS}
    other: dict[str, dict] = {}
    for task in dict.fromkeys(r["task"] for r in records if r["task"] not in CATEGORIES.values()):
        rows = [r for r in records if r["task"] == task]
        tallies = {name: _tally(rows, name) for name in PARSERS}
        other[task] = {"n": len(rows)} | tallies[scoring] | tallies

    head = blocks[scoring]
    result = {
        **head["accuracy"],
        "num_categories": len(filled),
        "scoring": scoring,
        "n": {column: len(in_column[column]) for column in COLUMNS},
        "interval": head["interval"],
        "interval_method": INTERVAL_METHOD,
        "unparsable": head["unparsable"]["Avg"],
        **blocks,
        "other": other,
    }
    return result | {"items": records} if return_items else result


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class R4DBench(evaluate.Metric):
    """`evaluate.load("metrics_rgpt4d/r4d_bench")`, or this class without dynamic loading."""

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
                        "task": datasets.Value("string"),
                        "options": datasets.List(datasets.Value("string")),
                        "answer": datasets.Value("string"),
                    },
                }
            ),
            reference_urls=["https://arxiv.org/abs/2512.17012"],
        )

    # Arrow refuses a list of mixed types and drops None, so items become strings before `evaluate` stores them.
    def add_batch(self, *, predictions=None, references=None, **kwargs):
        """Adds a batch of replies and items; ints, None and further fields in the items are allowed."""
        if predictions is None or references is None:
            raise ValueError("give both predictions and references")
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references; give one reply an item")
        references = [plain_reference(reference) for reference in references]
        for reference, reply in zip(references, predictions, strict=True):
            _require_text(reply, reference)
        super().add_batch(predictions=list(predictions), references=references, **kwargs)

    def add(self, *, prediction=None, reference=None, **kwargs):
        """Adds one reply and its item."""
        if reference is None:
            raise ValueError("give a reference with id, task, options and answer")
        reference = plain_reference(reference)
        _require_text(prediction, reference)
        super().add(prediction=prediction, reference=reference, **kwargs)

    def _compute(self, predictions, references, scoring="letter_or_value", return_items=False):
        return score(list(predictions), list(references), scoring, return_items)
