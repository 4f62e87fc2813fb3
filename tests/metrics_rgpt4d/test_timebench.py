import json

import pytest

from metrics_rgpt4d import TimeBench
from metrics_rgpt4d.timebench.timebench import score


def item(id, true=8.0, multiples=(0.25, 2, 1, 4, 0.5), **fields):
    options = [f"{true * multiple:.2f}" for multiple in multiples]
    return {"id": id, "options": options, "answer": f"{true:.2f}", **fields}


def test_chosen_multiples_are_counted_by_hand():
    references = [item(index) for index in range(6)]
    results = score(["A", "(B) 16.00", "8 seconds", "32.00", "E", "about twenty"], references)
    assert results["chosen"] == {"0.25x": 1, "0.5x": 1, "1x": 1, "2x": 1, "4x": 1}
    assert (results["n"], results["correct"], results["unparsable"]) == (6, 1, 1)
    assert (results["too_short"], results["too_long"], results["mean_log2_multiple"]) == (2, 2, 0.0)
    letters = results["letter"]
    assert letters["chosen"] == {"0.25x": 1, "0.5x": 1, "1x": 0, "2x": 1, "4x": 0} and letters["unparsable"] == 3
    assert letters["mean_log2_multiple"] == pytest.approx((-2 - 1 + 1) / 3)


def test_chosen_and_unparsable_add_up_to_all_items():
    results = score(["A", "B", "?", "A", "A"], [item(index) for index in range(5)])
    assert results["chosen"]["0.25x"] == 3
    for block in (results, results["letter"], results["letter_or_value"]):
        assert sum(block["chosen"].values()) + block["unparsable"] == results["n"]
        assert block["chosen"]["1x"] == block["correct"]
        assert block["too_short"] + block["too_long"] + block["correct"] + block["unparsable"] == results["n"]


@pytest.mark.parametrize("true", [0.33, 1.37, 2.005, 19.7, 61.23])
def test_options_cut_or_rounded_to_two_decimals_keep_their_multiple(true):
    for decimals in (lambda x: f"{x:.2f}", lambda x: f"{int(x * 100 + 1e-9) / 100:.2f}"):
        options = [decimals(true * multiple) for multiple in (0.25, 0.5, 1, 2, 4)]
        reference = {"id": 1, "options": options, "answer": options[2]}
        for letter, name in zip("ABCDE", ("0.25x", "0.5x", "1x", "2x", "4x"), strict=True):
            assert score([letter], [reference])["chosen"][name] == 1


def test_option_of_the_papers_figure_is_counted_as_three_times(shared_dir):
    rows = json.loads((shared_dir / "samples" / "timebench.json").read_text(encoding="utf-8"))["rows"]
    figure = rows[0] | {"id": "A15"}
    assert score(["D"], [figure])["chosen"] == {"0.25x": 0, "0.5x": 0, "1x": 0, "2x": 0, "4x": 0, "3x": 1}
    for row, name in zip(rows[1:], ("0.25x", "0.25x"), strict=True):
        assert score(["A"], [row | {"id": 1}])["chosen"][name] == 1


def test_categories_are_scored_apart():
    references = [item(1, category="10 fps"), item(2, category="30 fps"), item(3, category="30 fps")]
    results = score(["C", "A", "C"], references)
    assert results["categories"]["10 fps"]["accuracy"] == 100.0 and results["categories"]["30 fps"]["n"] == 2
    assert results["categories"]["30 fps"]["too_short"] == 1
    assert score(["C"], [item(1)])["categories"] == {}


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (item("t7") | {"answer": "9.00"}, "item t7: the answer '9.00' is none of the options"),
        (item("t7") | {"options": ["8.00", "long"]}, "item t7: 'long' is no duration"),
        (item("t7") | {"options": ["8.00", "4 m"]}, "item t7: '4 m' is no duration"),
        (item("t7") | {"options": ["8.00", "0"]}, "item t7: '0' is no duration"),
        ({"id": "t7", "options": ["8.00", "4.00"]}, "id 't7' lacks answer"),
    ],
)
def test_bad_item_is_an_error_that_names_it(reference, message):
    with pytest.raises(ValueError, match=message):
        score(["A"], [reference])


def test_class_equals_the_function_and_survives_json():
    replies, references = ["A", "C", "?"], [item(index, category="10 fps") for index in range(3)]
    metric = TimeBench(keep_in_memory=True)
    results = metric.compute(predictions=replies, references=references, return_items=True)
    assert results == score(replies, references, return_items=True) == json.loads(json.dumps(results))
    assert [record["multiple"] for record in results["items"]] == [0.25, 1.0, None]
