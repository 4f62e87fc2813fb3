"""VSTI-Bench's score as an `evaluate` metric: relative accuracy of numbers, accuracy of choices, both of its averages."""

import math
from collections.abc import Mapping, Sequence

import datasets
import evaluate
import numpy as np

# `evaluate` brings along only the files that this one names, and choice_scoring needs the other two.
from .answer_parsing import LETTERS, compact, parse_letter_or_value, parse_number
from .choice_scoring import RowReferences, checked_references, correct_letters, plain_reference
from .intervals import bootstrap_interval, mean_interval, percent, wilson_interval

# The official arithmetic: 0.9 is written 0.8999999999999999 there, and errors on a threshold fall as they do in it.
THRESHOLDS = np.linspace(0.5, 0.95, 10)
UNIT = "m"  # of every number in VSTI-Bench

# Group -> question types. The task's code averages the nine types, the papers' tables the five groups.
GROUPS = {
    "camera-object absolute distance": ("camera_obj_abs_dist",),
    "camera displacement": ("camera_displacement",),
    "camera movement direction": ("camera_movement_direction",),
    "object-object relative position": (
        "obj_obj_relative_pos_nf",
        "obj_obj_relative_pos_lr",
        "obj_obj_relative_pos_ud",
    ),
    "camera-object relative distance": (
        "camera_obj_rel_dist_v1",
        "camera_obj_rel_dist_v2",
        "camera_obj_rel_dist_v3",
    ),
}
QUESTION_TYPES = tuple(question_type for types in GROUPS.values() for question_type in types)
SCORINGS = ("first_token", "letter_or_value")
INTERVAL_METHOD = (
    "95 %. Choices: Wilson score. Numbers and mean_of_items: percentile bootstrap over items, 2,000 resamples; Wilson score "
    "where all items score the same. Means of types and groups: MOVER of these (Zou and Donner, 2008)"
)

_DESCRIPTION = "Score on VSTI-Bench: mean relative accuracy of distances, accuracy of choices, by question type."
_CITATION = (
    "VSTI-Bench was introduced with VLM-3R, arXiv:2505.20279; mean relative accuracy with VSI-Bench, arXiv:2412.14171."
)
_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): whole replies of the model, one an item.
    references (`list[dict]`): the items in the same order. Other fields are ignored:
        `id` (str or int): unique; an item that comes twice, as padding samplers produce it, is an error.
        `category` (str): the question type; one that is none of VSTI-Bench's nine is reported under `other` and counts
            nowhere else.
        `options` (list): of a choice, 2 to 26 in the order that the model saw; empty or None where a number is asked for.
        `answer`: of a choice the right option's text, or its letter where no option has that text; else the number, in
            metres (str, int or float).
    scoring (`str`, defaults to `"letter_or_value"`): what the headline counts; both are always reported in full.
        `"first_token"`: the official rule. What stands before the first space, without final periods, is the answer: a
            letter of any case, or a number without a unit.
        `"letter_or_value"`: the whole reply is read: a letter or an option's text; a number, converted to metres.
    seed (`int`, defaults to 0): of the bootstrap.
    return_items (`bool`, defaults to `False`): adds `items`, one record a question.
Returns: a dict with
    `mean_of_types`, `mean_of_groups`, `mean_of_items`: percent, or `None` without items: the unweighted mean of the nine
        question types, that of the five groups (three types of relative position and three of relative distance are one
        group each, the mean of its types), and that of all items. `num_types`, `num_groups`: those that have items.
    `interval`: each of these three -> `[low, high]` in percent; `interval_method` names the methods.
    `types`: question type -> `{"n", "score", "interval", "unparsable"}`; `groups`: group -> `{"n", "score", "interval",
        "unparsable"}`. A score is percent, `None` without items.
    `n`: number of items of the nine types; `unparsable`: those whose reply gave no answer; they score 0.
    `scoring`: the headline's. `first_token`, `letter_or_value`: all of the above of each scoring.
    `other`: question type -> `{"n", "score", "interval", "unparsable"}` of the headline's scoring.
    `items`, on request: `{"id", "category", "parsed", "rule", "score", "scorings"}`: the letter or number that was read
        and its score from 0 to 1, of the headline; `scorings` has them for both.
The score of a number p for the truth t is the share of the thresholds 0.50, 0.55, ..., 0.95 for which |p - t| / |t| is at
    most 1 - threshold. For t = 0, where that is undefined, it is 1 if p is 0, too, and else 0.
Examples:
    >>> metric = MeanRelativeAccuracy(keep_in_memory=True)
    >>> item = {"id": 1, "category": "camera_displacement", "options": [], "answer": "2.0"}
    >>> metric.compute(predictions=["about 1.6 meters"], references=[item])["mean_of_types"]
    70.0
"""


def relative_accuracy(predicted: float, true: float) -> float:
    """Mean relative accuracy of one number: the share of the ten thresholds that it holds, 0 to 1."""
    if true == 0:
        return float(predicted == 0)
    return float(np.mean(abs(predicted - true) / abs(true) <= 1 - THRESHOLDS))


def _plain(reference: Mapping) -> dict:
    """The item as strings; a choice's answer becomes its option's text, a number is checked."""
    plain = plain_reference(
        {**reference, "options": [] if reference.get("options") is None else reference["options"]},
        ("id", "category", "options", "answer"),
    )
    options, answer = plain["options"], plain["answer"].strip()
    if options:
        letters = LETTERS[: len(options)]
        if len(answer) == 1 and answer in letters and compact(answer) not in map(compact, options):
            plain["answer"] = options[letters.index(answer)]
    else:
        try:
            finite = math.isfinite(float(answer))
        except ValueError:
            finite = False
        if not finite:
            raise ValueError(f"item {plain['id']}: the answer {answer!r} is no number, and there are no options")
    return plain


def _first_token(reply: str, options: Sequence[str]) -> tuple[str | float | None, str]:
    """The official reading: a letter or a number, or `None`."""
    token = reply.split(" ")[0].rstrip(".").strip()
    if options:
        letter = token.upper()
        return (letter, "first_token") if len(letter) == 1 and letter in LETTERS[: len(options)] else (None, "none")
    try:
        number = float(token)
    except ValueError:
        return None, "none"
    return (number, "first_token") if math.isfinite(number) else (None, "none")


def _whole_reply(reply: str, options: Sequence[str]) -> tuple[str | float | None, str]:
    """Our reading, by the rules of `answer_parsing.py`."""
    if options:
        choice = parse_letter_or_value(reply, list(options))
        return choice.letter, choice.rule
    number = parse_number(reply, UNIT)
    return number.number, number.rule


def _item_record(reply: str, reference: Mapping, scoring: str) -> dict:
    options = reference["options"]
    right = correct_letters(reference) if options else float(reference["answer"])
    scorings = {}
    for name, read in zip(SCORINGS, (_first_token, _whole_reply), strict=True):
        parsed, rule = read(reply, options)
        if parsed is None:
            reached = 0.0
        else:
            reached = float(parsed in right) if options else relative_accuracy(parsed, right)
        scorings[name] = {"parsed": parsed, "rule": rule, "score": reached}
    return {
        "id": reference["id"],
        "category": reference["category"],
        **scorings[scoring],
        "scorings": scorings,
        "is_choice": bool(options),
    }


def _tally(records: Sequence[Mapping], scoring: str, seed: int) -> dict:
    """`n`, score and interval (fractions) and unparsable of some items."""
    scores = [record["scorings"][scoring]["score"] for record in records]
    n = len(scores)
    binary = all(record["is_choice"] for record in records)
    return {
        "n": n,
        "score": math.fsum(scores) / n if n else None,
        "interval": wilson_interval(sum(scores), n) if binary else bootstrap_interval(scores, seed),
        "unparsable": sum(record["scorings"][scoring]["parsed"] is None for record in records),
    }


def _mean(tallies: Sequence[Mapping]) -> dict:
    """The unweighted mean of those tallies that have items, with its interval."""
    filled = [tally for tally in tallies if tally["n"]]
    return {
        "n": sum(tally["n"] for tally in filled),
        "score": math.fsum(tally["score"] for tally in filled) / len(filled) if filled else None,
        "interval": mean_interval([(tally["score"], tally["interval"]) for tally in filled]),
        "unparsable": sum(tally["unparsable"] for tally in filled),
    }


def _in_percent(tally: Mapping) -> dict:
    score = tally["score"]
    return {**tally, "score": None if score is None else 100.0 * score, "interval": percent(tally["interval"])}


def _under(records: Sequence[Mapping], scoring: str, seed: int) -> dict:
    """Everything that is reported of one scoring."""
    types = {t: _tally([r for r in records if r["category"] == t], scoring, seed) for t in QUESTION_TYPES}
    groups = {group: _mean([types[t] for t in members]) for group, members in GROUPS.items()}
    means = {
        "mean_of_types": _mean(list(types.values())),
        "mean_of_groups": _mean(list(groups.values())),
        "mean_of_items": _tally([r for r in records if r["category"] in QUESTION_TYPES], scoring, seed),
    }
    means = {name: _in_percent(mean) for name, mean in means.items()}
    return {
        **{name: mean["score"] for name, mean in means.items()},
        "interval": {name: mean["interval"] for name, mean in means.items()},
        "unparsable": means["mean_of_items"]["unparsable"],
        "types": {name: _in_percent(tally) for name, tally in types.items()},
        "groups": {name: _in_percent(tally) for name, tally in groups.items()},
    }


def score(
    predictions: Sequence[str],
    references: Sequence[Mapping],
    scoring: str = "letter_or_value",
    seed: int = 0,
    return_items: bool = False,
) -> dict:
    """Scores replies; arguments and returned keys are those of [`MeanRelativeAccuracy`]'s `compute`.

    Raises: `ValueError` for an unknown scoring, lists of different length, an id that comes twice, a missing field, an
        answer that is no option, or one without options that is no number; the message names the item.
    """
    if scoring not in SCORINGS:
        raise ValueError(f"scoring must be one of {', '.join(SCORINGS)}, not {scoring!r}")
    references = checked_references(predictions, references, _plain)
    records = [_item_record(reply, ref, scoring) for reply, ref in zip(predictions, references, strict=True)]
    blocks = {name: _under(records, name, seed) for name in SCORINGS}
    others = sorted({record["category"] for record in records} - set(QUESTION_TYPES))
    types, groups = blocks[scoring]["types"], blocks[scoring]["groups"]
    result = {
        **blocks[scoring],
        "n": sum(tally["n"] for tally in types.values()),
        "num_types": sum(tally["n"] > 0 for tally in types.values()),
        "num_groups": sum(tally["n"] > 0 for tally in groups.values()),
        "scoring": scoring,
        "interval_method": INTERVAL_METHOD,
        **blocks,
        "other": {t: _in_percent(_tally([r for r in records if r["category"] == t], scoring, seed)) for t in others},
    }
    if return_items:
        result["items"] = [{key: value for key, value in r.items() if key != "is_choice"} for r in records]
    return result


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class MeanRelativeAccuracy(RowReferences, evaluate.Metric):
    """`evaluate.load("metrics_rgpt4d/mean_relative_accuracy")`, or this class without dynamic loading."""

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
                        "category": datasets.Value("string"),
                        "options": datasets.List(datasets.Value("string")),
                        "answer": datasets.Value("string"),
                    },
                }
            ),
            reference_urls=["https://arxiv.org/abs/2505.20279"],
        )

    def _compute(self, predictions, references, scoring="letter_or_value", seed=0, return_items=False):
        return score(list(predictions), list(references), scoring, seed, return_items)
