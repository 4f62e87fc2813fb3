import json

import pytest

from metrics_rgpt4d import MeanRelativeAccuracy
from metrics_rgpt4d.intervals import bootstrap_interval, wilson_interval
from metrics_rgpt4d.mean_relative_accuracy.mean_relative_accuracy import (
    GROUPS,
    QUESTION_TYPES,
    THRESHOLDS,
    relative_accuracy,
    score,
)


def number(id, answer=2.0, category="camera_displacement"):
    return {"id": id, "category": category, "options": [], "answer": answer}


def choice(id, category="obj_obj_relative_pos_nf", answer="Near"):
    return {"id": id, "category": category, "options": ["Far", "Near"], "answer": answer}


def test_there_are_ten_thresholds_nine_types_and_five_groups():
    assert list(THRESHOLDS) == pytest.approx([0.5 + 0.05 * index for index in range(10)])
    assert len(QUESTION_TYPES) == len(set(QUESTION_TYPES)) == 9 and len(GROUPS) == 5


@pytest.mark.parametrize(
    ("predicted", "expected"),
    [(2.0, 1.0), (1.98, 1.0), (1.88, 0.9), (1.6, 0.7), (2.5, 0.6), (1.02, 0.1), (0.9, 0.0), (3.5, 0.0), (-2.0, 0.0)],
)
def test_relative_accuracy_equals_hand_counted_thresholds(predicted, expected):
    assert relative_accuracy(predicted, 2.0) == expected


def test_truth_of_zero_is_right_for_zero_alone():
    assert relative_accuracy(0.0, 0.0) == 1.0 and relative_accuracy(0.01, 0.0) == 0.0
    assert score(["0 m"], [number(1, 0)])["mean_of_types"] == 100.0  # 0 as an answer is no missing answer


def test_averages_are_over_types_groups_and_items():
    references = [
        number(1),  # 0.7
        number(2),  # 1.0
        *(choice(f"p{k}", f"obj_obj_relative_pos_{k}") for k in ("nf", "lr", "ud")),  # 1, 0, 0
        choice("d", "camera_movement_direction"),  # 1
    ]
    results = score(["1.6", "2", "B", "A", "?", "near"], references)
    displacement, positions, direction = 85.0, (100.0, 0.0, 0.0), 100.0
    assert results["mean_of_types"] == pytest.approx((displacement + sum(positions) + direction) / 5)
    assert results["mean_of_groups"] == pytest.approx((displacement + sum(positions) / 3 + direction) / 3)
    assert results["mean_of_items"] == pytest.approx(100 * (0.7 + 1.0 + 1 + 0 + 0 + 1) / 6)
    assert (results["n"], results["num_types"], results["num_groups"], results["unparsable"]) == (6, 5, 3, 1)
    assert results["groups"]["object-object relative position"]["score"] == pytest.approx(100 / 3)
    assert results["groups"]["object-object relative position"]["n"] == 3
    assert results["types"]["camera_obj_abs_dist"] == {"n": 0, "score": None, "interval": None, "unparsable": 0}


def test_first_token_is_the_official_reading():
    replies = ["1.6 meters", "1.6m", "2.", "about 2", "nan", "b", "B.", "(B)", "Near", "The answer is B"]
    references = [number(index) for index in range(5)] + [choice(index) for index in range(5, 10)]
    results = score(replies, references, scoring="first_token", return_items=True)
    assert [item["parsed"] for item in results["items"]] == [1.6, None, 2.0, None, None, "B", "B", None, None, None]
    assert [item["score"] for item in results["items"]] == [0.7, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.0]
    assert results["unparsable"] == 6
    ours = [item["scorings"]["letter_or_value"]["score"] for item in results["items"]]
    assert ours == [0.7, 0.7, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert results["letter_or_value"]["unparsable"] == 1


def test_lengths_are_metres():
    results = score(["200 cm", "2 s", "6.5617 feet"], [number(1), number(2), number(3)], return_items=True)
    assert [item["score"] for item in results["items"]] == [1.0, 0.0, 1.0]


def test_scoring_argument_chooses_the_headline_and_nothing_else():
    replies, references = ["1.6m", "B"], [number(1), choice(2)]
    ours, official = score(replies, references), score(replies, references, scoring="first_token")
    assert official["mean_of_types"] == ours["first_token"]["mean_of_types"] == 50.0
    assert ours["mean_of_types"] == 85.0 and official["letter_or_value"] == ours["letter_or_value"]


def test_answer_of_a_choice_is_text_or_letter():
    lettered = {"id": 1, "category": "camera_movement_direction", "options": ["A. left", "B. right"], "answer": "B"}
    assert score(["B"], [lettered])["mean_of_types"] == 100.0
    texts = {"id": 1, "category": "camera_movement_direction", "options": ["B", "A"], "answer": "B"}
    assert score(["A"], [texts])["mean_of_types"] == 100.0  # the text B is the first option


def test_intervals_are_those_of_the_kinds_of_answers():
    replies = ["1.6", "2.0", "0.1", "1.9"]
    references = [number(index) for index in range(4)]
    results = score(replies + ["B", "A"], references + [choice("x"), choice("y")], seed=5)
    expected = bootstrap_interval([0.7, 1.0, 0.0, 1.0], seed=5)
    assert results["types"]["camera_displacement"]["interval"] == pytest.approx([100 * end for end in expected])
    wilson = [100 * end for end in wilson_interval(1, 2)]
    assert results["types"]["obj_obj_relative_pos_nf"]["interval"] == pytest.approx(wilson)
    low, high = results["interval"]["mean_of_types"]
    assert low < results["mean_of_types"] < high
    again = score((replies + ["B", "A"])[::-1], (references + [choice("x"), choice("y")])[::-1], seed=5)
    assert again["types"] == results["types"]
    for name, ends in results["interval"].items():
        assert again["interval"][name] == pytest.approx(ends)


def test_other_question_type_counts_in_no_average():
    results = score(["2", "2"], [number(1), number(2, category="camera_obj_dist_change")])
    assert results["n"] == 1 and results["other"]["camera_obj_dist_change"]["score"] == 100.0


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        (number("q7", "far"), "item q7: the answer 'far' is no number, and there are no options"),
        (number("q7", "nan"), "item q7: the answer 'nan' is no number"),
        (choice("q7", answer="C"), "item q7: the answer 'C' is none of the options"),
        ({"id": "q7", "options": [], "answer": 1}, "id 'q7' lacks category"),
    ],
)
def test_bad_item_is_an_error_that_names_it(reference, message):
    with pytest.raises(ValueError, match=message):
        score(["2"], [reference])


def test_unknown_scoring_is_an_error():
    with pytest.raises(ValueError, match="scoring must be one of first_token, letter_or_value, not 'letter'"):
        score(["A"], [choice(1)], scoring="letter")


def test_class_equals_the_function_and_survives_json():
    replies, references = ["1.6 m", "B", "?"], [number(1), choice(2), choice(3) | {"options": ("Far", "Near")}]
    metric = MeanRelativeAccuracy(keep_in_memory=True)
    results = metric.compute(predictions=replies, references=references, seed=1, return_items=True)
    assert results == score(replies, references, seed=1, return_items=True) == json.loads(json.dumps(results))


def test_rows_of_the_benchmark_are_scored(shared_dir):
    rows = json.loads((shared_dir / "samples" / "vstibench.json").read_text(encoding="utf-8"))["rows"]
    references = [
        row
        | {"id": index, "category": row["question_type"], "answer": row["mc_answer"] or row["ground_truth"]}
        | {"options": row["options"] and [option[3:] for option in row["options"]]}  # "A. left"
        for index, row in enumerate(rows)
    ]
    results = score(["1.1", "3.6 m", "D", "right", "(B)", "chair"], references)
    assert results["mean_of_types"] == 100.0 and results["num_types"] == 6
    assert results["first_token"]["mean_of_types"] == pytest.approx(100 * 3 / 6)
