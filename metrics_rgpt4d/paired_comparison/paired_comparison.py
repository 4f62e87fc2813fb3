"""Two runs on the same items as an `evaluate` comparison: exact paired test, paired bootstrap of the difference."""

from collections.abc import Iterable
from numbers import Real

import datasets
import evaluate
import numpy as np
from scipy.stats import binomtest, bootstrap

CONFIDENCE = 0.95
RESAMPLES = 9999
INTERVAL_METHOD = (
    "percentile bootstrap of the paired difference, 9,999 resamples of the items or, where they have groups, of the "
    "groups, 95 %"
)

_DESCRIPTION = "Whether two runs on the same items differ: exact paired test and bootstrap interval of the difference."
_CITATION = """\
Q. McNemar, Note on the sampling error of the difference between correlated proportions, Psychometrika 12, 1947.
B. Efron, R. Tibshirani, An introduction to the bootstrap, 1993."""
_KWARGS_DESCRIPTION = """
Args:
    predictions1, predictions2 (`list[dict]`): the items of the first and of the second run, in any order, each with
        `id` (str or int): unique in a run. Both runs have the same ids, otherwise the error names what is missing.
        `score` (bool, or number in [0, 1]), or, where it is absent, `correct`: 1 for a right answer.
        `category` (str, *optional*): reported by itself, too.
        `group` (str or int, *optional*): what items have in common, such as their video. Items of one video are not
            independent: an interval and a test that take them for independent promise too much. All items have a
            group or none has.
        Other fields are ignored; category and group are the same in both runs.
    seed (`int`, defaults to 0): of the bootstrap.
Returns: a dict with
    `n`: items; `num_groups`: groups, or `None` without.
    `first`, `second`: each run's mean score in percent; `difference`: second - first, in points.
    `interval`: `[low, high]` of the difference in points, 95 %; items are resampled in pairs, or whole groups of them.
        `None` if there is a single item or group, or if all of them differ by the same (two runs that are right and
        wrong together, too): resampling then shows no variation, which is not the same as certainty.
    `only_first`, `only_second`: items in which that run scores higher, McNemar's b and c for right and wrong;
        `groups_only_first`, `groups_only_second`: groups in which its sum of scores is higher, or `None` without.
    `p_value`, `test`: exact, two-sided, of no difference. "McNemar": b of b + c against one half, for right and wrong
        without groups. "sign test over items": the same for scores between 0 and 1. "sign test over groups": the same
        of the groups' counts. 1.0 where nothing differs. A sign test asks how often, not by how much.
    `interval_method`: its name.
    `categories`: category -> the same keys but interval_method; `p_value` is not corrected for the number of tests.
Raises: `ValueError` naming the items: ids that differ or come twice, no score, a score outside [0, 1], a category or
    group that the runs call differently, or a group that some items lack.
Examples:
    >>> first = [{"id": i, "correct": i < 4} for i in range(10)]
    >>> second = [{"id": i, "correct": i < 9} for i in range(10)]
    >>> result = PairedComparison(keep_in_memory=True).compute(predictions1=first, predictions2=second)
    >>> result["difference"], result["only_second"], result["p_value"]
    (50.0, 5, 0.0625)
"""


def _named(ids: Iterable[str], most: int = 5) -> str:
    """A few ids for a message, and how many more there are."""
    ids = sorted(ids)
    return ", ".join(ids[:most]) + (f" and {len(ids) - most} more" if len(ids) > most else "")


def plain_item(item: dict) -> dict:
    """An item with the four fields that are compared: `id` str, `score` float, `category` and `group` str or `None`.

    Raises: `ValueError` if there is no id or no score, or if the score is no number in [0, 1].
    """
    if not isinstance(item, dict) or item.get("id") is None:
        raise ValueError(f"an item must be a dict with an id, not {item!r}")
    score = item["correct"] if item.get("score") is None and "correct" in item else item.get("score")
    if not isinstance(score, (Real, np.bool_)) or not 0 <= score <= 1:  # a NaN is in no range
        raise ValueError(f"item {item['id']}: its score (or correct) must be bool or a number in [0, 1], not {score!r}")
    named = {key: None if item.get(key) is None else str(item[key]) for key in ("category", "group")}
    return {"id": str(item["id"]), "score": float(score), **named}


def _pair(first: list[dict], second: list[dict]) -> list[tuple[dict, dict]]:
    """Items of both runs by id, in the order of the ids: results do not depend on the order of the input."""
    runs = []
    for run, name in ((first, "first"), (second, "second")):
        by_id: dict[str, dict] = {}
        for item in map(plain_item, run):
            if item["id"] in by_id:
                raise ValueError(f"item {item['id']} comes twice in the {name} run; drop what a sampler padded")
            by_id[item["id"]] = item
        runs.append(by_id)
    for one, other, name in ((runs[0], runs[1], "second"), (runs[1], runs[0], "first")):
        missing = one.keys() - other.keys()
        if missing:
            raise ValueError(
                f"{len(missing)} items are missing in the {name} run: {_named(missing)}; compare runs on the same items"
            )
    pairs = [(runs[0][id_], runs[1][id_]) for id_ in sorted(runs[0])]
    for key in ("category", "group"):
        differ = [one["id"] for one, other in pairs if one[key] != other[key]]
        if differ:
            raise ValueError(f"the runs give another {key} to {len(differ)} items: {_named(differ)}")
    without = [one["id"] for one, _ in pairs if one["group"] is None]
    if 0 < len(without) < len(pairs):
        raise ValueError(f"{len(without)} items have no group, but others have: {_named(without)}; give all or none")
    return pairs


def _mean_of_groups(sums: np.ndarray, sizes: np.ndarray, axis: int) -> np.ndarray:
    """Mean over the items of the drawn groups, in percent. How many items they are varies with the draw."""
    return 100 * sums.sum(axis=axis) / sizes.sum(axis=axis)


def _interval(sums: np.ndarray, sizes: np.ndarray, seed: int) -> list[float] | None:
    if len(sums) < 2 or np.ptp(sums / sizes) == 0:
        return None
    found = bootstrap(
        (sums, sizes),
        _mean_of_groups,
        paired=True,
        n_resamples=RESAMPLES,
        batch=max(1, 2**20 // len(sums)),  # some MB at once
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return [float(end) for end in found.confidence_interval]


def _sign_test(differences: np.ndarray) -> tuple[int, int, float]:
    first, second = int((differences < 0).sum()), int((differences > 0).sum())
    return first, second, float(binomtest(first, first + second).pvalue) if first + second else 1.0


def _block(pairs: list[tuple[dict, dict]], seed: int) -> dict:
    """All numbers of some items."""
    scores = np.array([[one["score"], other["score"]] for one, other in pairs]).reshape(-1, 2)
    differences = scores[:, 1] - scores[:, 0]
    only_first, only_second, p_value = _sign_test(differences)
    groups = [one["group"] for one, _ in pairs]
    grouped = bool(groups) and groups[0] is not None
    sums, sizes = differences, np.ones(len(pairs))
    group_counts = (None, None)
    test = "McNemar" if np.isin(scores, (0, 1)).all() else "sign test over items"
    if grouped:
        _, index = np.unique(groups, return_inverse=True)
        # Rounded, because sums that are equal in truth must not differ by their last bits.
        sums, sizes = np.bincount(index, differences).round(9), np.bincount(index)
        *group_counts, p_value = _sign_test(sums)
        test = "sign test over groups"
    first, second = (100 * scores.mean(axis=0)).tolist() if pairs else (None, None)
    return {
        "n": len(pairs),
        "num_groups": len(sums) if grouped else None,
        "first": first,
        "second": second,
        "difference": float(100 * differences.mean()) if pairs else None,
        "interval": _interval(sums, sizes, seed),
        "only_first": only_first,
        "only_second": only_second,
        "groups_only_first": group_counts[0],
        "groups_only_second": group_counts[1],
        "p_value": p_value if pairs else None,
        "test": test,
    }


def compare_runs(first: list[dict], second: list[dict], seed: int = 0) -> dict:
    """Compares two runs; items, returned keys and errors are those of [`PairedComparison`]'s `compute`."""
    pairs = _pair(first, second)
    names = sorted({one["category"] for one, _ in pairs if one["category"] is not None})
    categories = {name: _block([pair for pair in pairs if pair[0]["category"] == name], seed) for name in names}
    return {**_block(pairs, seed), "interval_method": INTERVAL_METHOD, "categories": categories}


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _KWARGS_DESCRIPTION)
class PairedComparison(evaluate.Comparison):
    """`evaluate.load("metrics_rgpt4d/paired_comparison")`, or this class without dynamic loading."""

    def _info(self) -> evaluate.ComparisonInfo:
        # large_string, because `evaluate` refuses None where it expects a string
        optional = datasets.Value("large_string")
        item = {"id": datasets.Value("string"), "score": datasets.Value("float64")}
        item |= {"category": optional, "group": optional}
        return evaluate.ComparisonInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_KWARGS_DESCRIPTION,
            features=datasets.Features({"predictions1": item, "predictions2": dict(item)}),
        )

    # Arrow stores rows of both runs: a batch holds the same items of both, and is paired here.
    def add_batch(self, *, predictions1=None, predictions2=None, **kwargs):
        """Adds the same items of both runs, in any order."""
        if predictions1 is None or predictions2 is None:
            raise ValueError("give both predictions1 and predictions2")
        pairs = _pair(predictions1, predictions2)
        super().add_batch(predictions1=[one for one, _ in pairs], predictions2=[other for _, other in pairs], **kwargs)

    def add(self, *, predictions1=None, predictions2=None, **kwargs):
        """Adds one item of both runs."""
        if predictions1 is None or predictions2 is None:
            raise ValueError("give both predictions1 and predictions2")
        ((one, other),) = _pair([predictions1], [predictions2])
        super().add(predictions1=one, predictions2=other, **kwargs)

    def _compute(self, predictions1, predictions2, seed=0):
        return compare_runs(list(predictions1), list(predictions2), seed)
