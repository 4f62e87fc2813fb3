import json
from math import comb, sqrt
from pathlib import Path

import evaluate
import numpy as np
import pytest

from metrics_rgpt4d import PairedComparison, R4DBench
from metrics_rgpt4d.paired_comparison.paired_comparison import compare_runs

METRIC_FOLDER = Path(__file__).parents[2] / "metrics_rgpt4d" / "paired_comparison"


def run_of(scores, **fields):
    """Items `q000`, `q001`, ... with these scores; a field is a list with a value an item."""
    return [
        {"id": f"q{i:03d}", "score": score} | {name: values[i] for name, values in fields.items()}
        for i, score in enumerate(scores)
    ]


def runs_of(both, only_first, only_second, neither):
    """Two runs by the four cells of their table."""
    first = [1] * (both + only_first) + [0] * (only_second + neither)
    second = [1] * both + [0] * only_first + [1] * only_second + [0] * neither
    return run_of(first), run_of(second)


@pytest.mark.parametrize(("b", "c"), [(1, 8), (0, 5), (3, 3), (0, 1), (12, 30)])
def test_p_value_is_the_exact_binomial_tail_twice(b, c):
    results = compare_runs(*runs_of(4, b, c, 2))
    tail = sum(comb(b + c, k) for k in range(min(b, c) + 1)) / 2 ** (b + c)
    assert results["p_value"] == pytest.approx(min(1, 2 * tail))
    assert (results["only_first"], results["only_second"], results["n"]) == (b, c, b + c + 6)
    assert results["test"] == "McNemar" and results["num_groups"] is results["groups_only_first"] is None


def test_scores_and_difference_by_hand():
    results = compare_runs(*runs_of(3, 1, 4, 2))
    assert (results["first"], results["second"]) == (40.0, 70.0) and results["difference"] == pytest.approx(30)
    turned = compare_runs(*runs_of(3, 1, 4, 2)[::-1])
    assert turned["difference"] == pytest.approx(-30) and turned["p_value"] == results["p_value"]
    assert (turned["only_first"], turned["only_second"]) == (4, 1)


def test_interval_of_many_items_is_that_of_the_normal_approximation():
    both, b, c, neither = 300, 60, 100, 340
    results = compare_runs(*runs_of(both, b, c, neither))
    n = both + b + c + neither
    error = 100 * sqrt(b + c - (b - c) ** 2 / n) / n  # of the difference of correlated proportions
    middle = 100 * (c - b) / n
    assert results["interval"] == pytest.approx([middle - 1.96 * error, middle + 1.96 * error], abs=0.1 * error)
    # Paired: questions on which both agree add nothing, so that it is narrower than two runs on other questions give.
    unpaired = 100 * sqrt((0.45 * 0.55 + 0.5 * 0.5) / n)
    assert results["interval"][1] - results["interval"][0] < 0.7 * 2 * 1.96 * unpaired


def test_seed_alone_decides_the_draws():
    runs = [run_of(scores) for scores in np.random.default_rng(0).random((2, 50))]
    assert compare_runs(*runs) == compare_runs(*runs, seed=0)
    assert compare_runs(*runs)["interval"] != compare_runs(*runs, seed=1)["interval"]


def test_copies_of_a_question_in_a_group_add_no_certainty():
    first, second = runs_of(20, 6, 15, 13)
    alone = compare_runs(first, second)
    copies = [
        [
            {"id": f"{item['id']}-{copy}", "score": item["score"], "group": item["id"]}
            for item in run
            for copy in range(10)
        ]
        for run in (first, second)
    ]
    grouped = compare_runs(*copies)
    assert grouped["n"] == 540 and grouped["num_groups"] == 54 and grouped["test"] == "sign test over groups"
    assert grouped["interval"] == pytest.approx(alone["interval"]) and grouped["p_value"] == alone["p_value"]
    assert (grouped["groups_only_first"], grouped["groups_only_second"]) == (6, 15)
    assert (grouped["only_first"], grouped["only_second"]) == (60, 150)
    naive = compare_runs(*([{k: v for k, v in item.items() if k != "group"} for item in run] for run in copies))
    width, naive_width = (r["interval"][1] - r["interval"][0] for r in (grouped, naive))
    assert naive_width == pytest.approx(width / sqrt(10), rel=0.1) and naive["p_value"] < 1e-6 < grouped["p_value"]


def test_cluster_interval_equals_that_of_the_ratio_estimator_for_groups_of_any_size():
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(200), rng.integers(1, 20, 200))
    tendency = rng.normal(0.7, 0.3, 200)[groups]
    second = (rng.random(len(groups)) < 0.1 + tendency).astype(int)
    first = (rng.random(len(groups)) < 0.1).astype(int)
    results = compare_runs(run_of(first, group=groups), run_of(second, group=groups))
    difference = second - first
    # Variance of a mean over clusters of unequal size (Cochran, Sampling Techniques, chapter 6).
    residuals = np.bincount(groups, difference - difference.mean())
    error = 100 * sqrt((residuals**2).sum()) / len(groups)
    middle = 100 * difference.mean()
    assert results["difference"] == pytest.approx(middle)
    assert results["interval"] == pytest.approx([middle - 1.96 * error, middle + 1.96 * error], abs=0.15 * error)


def test_group_in_which_the_runs_gain_and_lose_the_same_counts_for_neither():
    first, second = [1, 0, 0.3, 0.1, 0.9, 1], [0, 1, 0.4, 0.2, 0.7, 0]
    groups = ["a", "a", "b", "b", "b", "c"]  # sums of b: 1.3 and 1.3, but the differences do not add to 0.0
    results = compare_runs(run_of(first, group=groups), run_of(second, group=groups))
    assert (results["groups_only_first"], results["groups_only_second"]) == (1, 0)


def test_fractional_scores_get_the_sign_test():
    results = compare_runs(run_of([0.2, 0.5, 0.9, 0.0, 1.0]), run_of([0.3, 0.6, 1.0, 0.1, 1.0]))
    assert results["test"] == "sign test over items" and results["p_value"] == pytest.approx(2 / 2**4)
    assert results["difference"] == pytest.approx(8) and results["only_second"] == 4


def test_nothing_varies_means_no_interval_and_not_certainty():
    same = compare_runs(*runs_of(3, 0, 0, 2))
    assert same["difference"] == 0 and same["interval"] is None and same["p_value"] == 1.0
    assert compare_runs(*runs_of(0, 0, 1, 0))["interval"] is None
    nothing = compare_runs([], [])
    assert nothing["n"] == 0 and nothing["difference"] is nothing["p_value"] is nothing["interval"] is None


def test_categories_are_the_comparisons_of_their_items():
    first, second = runs_of(9, 3, 7, 6)
    names = ["Counting" if i % 3 else "Rotational" for i in range(len(first))]
    tagged = [[item | {"category": name} for item, name in zip(run, names, strict=True)] for run in (first, second)]
    results = compare_runs(*tagged)
    assert list(results["categories"]) == ["Counting", "Rotational"]
    for name, block in results["categories"].items():
        alone = compare_runs(*([item for item in run if item["category"] == name] for run in tagged))
        assert block == {key: alone[key] for key in block} and block["n"] < results["n"]
    assert sum(block["only_second"] for block in results["categories"].values()) == results["only_second"] == 7
    tagged[0][0]["category"] = tagged[1][0]["category"] = None  # in no category, but in the whole
    assert sum(block["n"] for block in compare_runs(*tagged)["categories"].values()) == results["n"] - 1


def test_order_of_the_items_does_not_matter():
    scores = np.random.default_rng(0).random((2, 24))
    for fields in ({}, {"group": [i // 3 for i in range(24)]}):
        first, second = (run_of(row, **fields) for row in scores)
        assert compare_runs(first[::-1], second[3:] + second[:3]) == compare_runs(first, second)


def test_correct_stands_for_a_score():
    first, second = runs_of(2, 1, 3, 2)
    as_bool = [[{"id": item["id"], "correct": bool(item["score"])} for item in run] for run in (first, second)]
    assert compare_runs(*as_bool) == compare_runs(first, second)
    as_numpy = [[{"id": item["id"], "score": np.bool_(item["score"])} for item in run] for run in (first, second)]
    assert compare_runs(*as_numpy) == compare_runs(first, second)


ONE = {"id": "q1", "score": 1}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            run_of([1] * 9),
            run_of([1]),
            "8 items are missing in the second run: q001, q002, q003, q004, q005 and 3 more",
        ),
        ([ONE], [ONE, {"id": "q2", "score": 0}], "1 items are missing in the first run: q2"),
        ([ONE, ONE], [ONE], "item q1 comes twice in the first run"),
        ([ONE], [{"id": "q1"}], r"item q1: its score \(or correct\) must be bool or a number in \[0, 1\], not None"),
        ([ONE], [{"id": "q1", "score": 80}], "item q1: .* not 80"),
        ([ONE], [{"id": "q1", "score": float("nan")}], "item q1: .* not nan"),
        ([ONE], [{"id": "q1", "score": "yes"}], "item q1: .* not 'yes'"),
        ([{"score": 1}], [ONE], "must be a dict with an id"),
        ([ONE | {"group": "a"}], [ONE | {"group": "b"}], "another group to 1 items: q1"),
        ([ONE | {"category": "C"}], [ONE], "another category to 1 items: q1"),
        (run_of([1, 0], group=["a", None]), run_of([1, 0], group=["a", None]), "1 items have no group, .*: q001"),
    ],
)
def test_bad_input_is_an_error_that_names_the_items(first, second, message, cache):
    with pytest.raises(ValueError, match=message):
        compare_runs(first, second)
    with pytest.raises(ValueError, match=message):
        PairedComparison(keep_in_memory=True).compute(predictions1=first, predictions2=second)


def test_folder_loads_offline_and_equals_the_class(cache):
    first, second = runs_of(9, 3, 7, 6)
    first = [item | {"category": "C"} if i % 2 else item for i, item in enumerate(first)]  # the first one has none
    second = [item | {"category": "C"} if i % 2 else item for i, item in enumerate(second)]
    results = evaluate.load(str(METRIC_FOLDER)).compute(predictions1=first, predictions2=second, seed=5)
    assert results == compare_runs(first, second, seed=5)
    assert results == PairedComparison(keep_in_memory=True).compute(predictions1=first, predictions2=second, seed=5)
    assert json.loads(json.dumps(results)) == results


def test_batches_and_single_items_equal_one_call(cache):
    first, second = runs_of(9, 3, 7, 6)
    metric = PairedComparison(keep_in_memory=True)
    metric.add_batch(predictions1=first[:5], predictions2=second[:5][::-1])
    for one, other in zip(first[5:], second[5:], strict=True):
        metric.add(predictions1=one, predictions2=other)
    assert metric.compute() == compare_runs(first, second)
    metric.add_batch(predictions1=first[:2], predictions2=second[:2])
    metric.add(predictions1=first[0], predictions2=second[0])
    with pytest.raises(ValueError, match="item q000 comes twice"):
        metric.compute()


def test_items_of_another_metric_are_taken_as_they_are(cache):
    references = [{"id": i, "task": "Counting", "options": ["1", "2"], "answer": "1"} for i in range(6)]
    replies = ["A", "A", "A", "B", "B", "?"], ["A", "B", "A", "A", "A", "A"]
    first, second = (
        R4DBench(keep_in_memory=True).compute(predictions=p, references=references, return_items=True)["items"]
        for p in replies
    )
    results = compare_runs(first, second)
    assert (results["n"], results["only_first"], results["only_second"]) == (6, 1, 3)
