"""R4D-Bench accuracy as an `evaluate` metric: 12 columns with their n and intervals, no guessing, nothing skipped."""

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
    tally,
)
from .intervals import INTERVAL_METHOD

# Column -> task name in the data. Static and dynamic go by category, as the benchmark's reports do.
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
# The data card counts static and dynamic by source instead (388 / 1,031 items), which is another partition.
SOURCES = {"Sta": "stibench", "Dyn": "vlm4d"}

_DESCRIPTION = "Accuracy on R4D-Bench (arXiv 2512.17012): region-level 4D questions in nine categories."
_CITATION = "R4D-Bench was introduced with 4D-RGPT, arXiv:2512.17012."
_KWARGS_DESCRIPTION = """
Args:
    predictions (`list[str]`): whole replies of the model, one an item.
    references (`list[dict]`): the items in the same order. Other fields are ignored:
        `id` (str or int): unique; an item that comes twice, as padding samplers produce it, is an error.
        `task` (str): one of the nine task names; any other name is reported under `other` and counts nowhere else.
        `options` (list of 2 to 26): in the order that the model saw; str, int, float or None, read as `str(option)`.
        `answer`: the text of the right option, read as `str(answer)`; 0 and None are answers too.
        `benchmark` (str, optional): where the item comes from; `"stibench"` and `"vlm4d"` are told apart.
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
    `by_source`: `Sta` and `Dyn` by source, as the data card counts them: STI-Bench and VLM4D. Each is `{"n", "accuracy",
        "interval", "correct", "unparsable"}` and the last four under each scoring; `unknown`: items of the nine
        categories whose `benchmark` names neither. `None` if that is all of them.
    `other`: task -> `{"n", "accuracy", "interval", "correct", "unparsable"}`, and the last four under each scoring too.
    `items`, on request: `{"id", "task", "letter", "rule", "correct_letter", "correct", "scorings"}`; letter, rule and
        correct are the headline's; `scorings` has them for both; correct_letter: the first option with the right text.
Examples:
    >>> metric = R4DBench(keep_in_memory=True)
    >>> item = {"id": 1, "task": "Counting", "options": [1, 2, 3, 0], "answer": 0}
    >>> metric.compute(predictions=["(D) 0"], references=[item])["C"]
    100.0
"""


def _plain(reference: dict) -> dict:
    return plain_reference(reference, ("id", "task", "options", "answer"), ("benchmark",))


def score(
    predictions: list[str], references: list[dict], scoring: str = "letter_or_value", return_items: bool = False
) -> dict:
    """Scores replies; arguments and returned keys are those of [`R4DBench`]'s `compute`.

    Raises: `ValueError` for an unknown scoring, lists of different length, an id that comes twice, a missing field, or
        an answer that is no option; the message names the item.
    """
    require_scoring(scoring)
    references = checked_references(predictions, references, _plain)
    records = [
        {**item_record(reply, reference, scoring), "task": reference["task"]}
        for reply, reference in zip(predictions, references, strict=True)
    ]
    source = {reference["id"]: reference["benchmark"] for reference in references}

    in_task = {column: [r for r in records if r["task"] == task] for column, task in CATEGORIES.items()}
    in_column = in_task | {
        "Avg": [r for r in records if r["task"] in CATEGORIES.values()],
        "Sta": [r for r in records if r["task"] in STATIC.values()],
        "Dyn": [r for r in records if r["task"] in DYNAMIC.values()],
    }
    filled = [column for column in CATEGORIES if in_column[column]]

    def under(name: str) -> dict:
        tallies = {column: tally(in_column[column], name) for column in COLUMNS}
        block = {key: {column: tallies[column][key] for column in COLUMNS} for key in tallies["Avg"]}
        mean = macro([(tallies[c]["correct"], len(in_column[c])) for c in filled])
        block["accuracy"]["macro"], block["interval"]["macro"] = mean["macro"], mean["macro_interval"]
        return block

    blocks = {name: under(name) for name in PARSERS}
    other: dict[str, dict] = {}
    for task in dict.fromkeys(r["task"] for r in records if r["task"] not in CATEGORIES.values()):
        other[task] = both_tallies([r for r in records if r["task"] == task], scoring)
    from_source = {key: [r for r in in_column["Avg"] if source[r["id"]] == name] for key, name in SOURCES.items()}
    unknown = len(in_column["Avg"]) - sum(map(len, from_source.values()))
    by_source = {key: both_tallies(rows, scoring) for key, rows in from_source.items()} | {"unknown": unknown}

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
        "by_source": by_source if any(from_source.values()) else None,
        "other": other,
    }
    return result | {"items": records} if return_items else result


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class R4DBench(RowReferences, evaluate.Metric):
    """`evaluate.load("metrics_rgpt4d/r4d_bench")`, or this class without dynamic loading."""

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
                        "task": datasets.Value("string"),
                        "options": datasets.List(datasets.Value("string")),
                        "answer": datasets.Value("string"),
                        "benchmark": datasets.Value("string"),
                    },
                }
            ),
            reference_urls=["https://arxiv.org/abs/2512.17012"],
        )

    def _compute(self, predictions, references, scoring="letter_or_value", return_items=False):
        return score(list(predictions), list(references), scoring, return_items)
