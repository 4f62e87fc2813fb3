"""Accuracy on any multiple-choice benchmark as an `evaluate` metric: both scorings, by category, micro and macro."""

from collections.abc import Mapping, Sequence

import datasets
import evaluate

# `evaluate` brings along only the files that this one names: all three of choice_scoring's.
from .answer_parsing import PARSERS
from .choice_scoring import (
    RowReferences,
    both_tallies,
    checked_references,
    item_record,
    macro,
    plain_reference,
    require_scoring,
)
from .intervals import INTERVAL_METHOD

_DESCRIPTION = """Accuracy on multiple-choice questions such as those of STI-Bench, VLM4D, OmniSpatial, MMSI-Bench and SAT,
by category and with both averages."""
_CITATION = "The intervals: Wilson (1927); Zou and Donner, Statistics in Medicine 27 (2008)."
_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): whole replies of the model, one an item.
    references (`list[dict]`): the items in the same order. Other fields are ignored:
        `id` (str or int): unique; an item that comes twice, as padding samplers produce it, is an error.
        `category` (str): what the macro average averages over.
        `options` (list of 2 to 26): in the order that the model saw; str, int, float or None, read as `str(option)`.
        `answer`: the text of the right option, read as `str(answer)`; 0 and None are answers too.
        `benchmark` (str, optional): all items of a call must name the same one.
        `pair` (str or int, optional): items with the same pair, such as one question with its options in both orders,
            are right under `pairs` only if all of them are.
    scoring (`str`, defaults to `"letter_or_value"`): what the headline counts. `"letter"`: only a letter;
        `"letter_or_value"`: a reply without a letter may repeat an option's value. Both are always reported in full.
    category_groups (`dict[str, list[str]]`, *optional*): group -> categories; adds each group under `groups`.
    return_items (`bool`, defaults to `False`): adds `items`, one record a question.
Returns: a dict with
    `accuracy`: percent of right answers (the micro average: over items), `None` without items; `interval`: `[low, high]`
        in percent; `correct`: number of right answers; `unparsable`: replies that chose nothing; they count as wrong.
    `macro`: percent, the mean over categories; `macro_interval`: its interval; `num_categories`: how many these are.
    `n`: number of items. `scoring`: the headline's. `interval_method` names the method.
    `letter`, `letter_or_value`: `{"accuracy", "interval", "correct", "unparsable", "macro", "macro_interval"}` of each.
    `categories`: category -> `{"n", "accuracy", "interval", "correct", "unparsable"}`, and the last four under each
        scoring too.
    `groups`: group -> the same with `macro`, `macro_interval` and `num_categories`; categories that have no item count in
        no average.
    `pairs`: the same as a category, with pairs for items, and `incomplete`: pairs of which only one item came, which are
        not in `n`. `None` where no pair has two items.
    `items`, on request: `{"id", "category", "letter", "rule", "correct_letter", "correct", "scorings"}`; letter, rule and
        correct are the headline's; `scorings` has them for both; correct_letter: the first option with the right text.
Examples:
    >>> metric = ChoiceAccuracy(keep_in_memory=True)
    >>> item = {"id": 1, "category": "ego", "options": ["left", "right"], "answer": "right"}
    >>> metric.compute(predictions=["(B)"], references=[item])["accuracy"]
    100.0
"""


def _plain(reference: Mapping) -> dict:
    return plain_reference(reference, ("id", "category", "options", "answer"), ("benchmark", "pair"))


def _summary(by_category: Mapping[str, list[dict]], scoring: str) -> dict:
    """The tallies of some categories together, with their macro averages."""
    by_category = {category: records for category, records in by_category.items() if records}
    summary = both_tallies([record for records in by_category.values() for record in records], scoring)
    for name in PARSERS:
        right = {c: sum(r["scorings"][name]["correct"] for r in records) for c, records in by_category.items()}
        summary[name] |= macro([(right[c], len(records)) for c, records in by_category.items()])
    return summary | summary[scoring] | {"num_categories": len(by_category)}


def _pair_record(records: list[dict]) -> dict:
    """Several orders of one question as one item: right if all are, unparsable if any is."""
    scorings = {}
    for name in PARSERS:
        chosen = [record["scorings"][name] for record in records]
        parsed = all(choice["letter"] is not None for choice in chosen)
        scorings[name] = {"letter": "" if parsed else None, "correct": all(choice["correct"] for choice in chosen)}
    return {"scorings": scorings}


def score(
    predictions: Sequence[str],
    references: Sequence[Mapping],
    scoring: str = "letter_or_value",
    category_groups: Mapping[str, Sequence[str]] | None = None,
    return_items: bool = False,
) -> dict:
    """Scores replies; arguments and returned keys are those of [`ChoiceAccuracy`]'s `compute`.

    Raises: `ValueError` for an unknown scoring, lists of different length, an id that comes twice, a missing field, an
        answer that is no option, or items of several benchmarks; the message names the item.
    """
    require_scoring(scoring)
    references = checked_references(predictions, references, _plain)
    benchmarks = sorted({reference["benchmark"] for reference in references})
    if len(benchmarks) > 1:
        raise ValueError(f"the references are of several benchmarks, {', '.join(benchmarks)}; score each of them alone")
    by_category: dict[str, list[dict]] = {}
    pairs: dict[str, list[dict]] = {}
    records = []
    for reply, reference in zip(predictions, references, strict=True):
        record = {**item_record(reply, reference, scoring), "category": reference["category"]}
        records.append(record)
        by_category.setdefault(reference["category"], []).append(record)
        if reference["pair"]:
            pairs.setdefault(reference["pair"], []).append(record)
    groups = {
        group: _summary({category: by_category.get(category, []) for category in categories}, scoring)
        for group, categories in (category_groups or {}).items()
    }
    whole = [_pair_record(items) for items in pairs.values() if len(items) > 1]
    result = {
        **_summary(by_category, scoring),
        "scoring": scoring,
        "interval_method": INTERVAL_METHOD,
        "categories": {category: both_tallies(by_category[category], scoring) for category in sorted(by_category)},
        "groups": groups,
        "pairs": both_tallies(whole, scoring) | {"incomplete": len(pairs) - len(whole)} if whole else None,
    }
    return result | {"items": records} if return_items else result


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class ChoiceAccuracy(RowReferences, evaluate.Metric):
    """`evaluate.load("metrics_rgpt4d/choice_accuracy")`, or this class without dynamic loading."""

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
                        "benchmark": datasets.Value("string"),
                        "pair": datasets.Value("string"),
                    },
                }
            ),
        )

    def _compute(self, predictions, references, scoring="letter_or_value", category_groups=None, return_items=False):
        return score(list(predictions), list(references), scoring, category_groups, return_items)
