import json

import pytest

from metrics_rgpt4d import ChoiceAccuracy
from metrics_rgpt4d.choice_accuracy.choice_accuracy import score
from metrics_rgpt4d.intervals import macro_interval, wilson_interval


def item(id, category, options=("left", "right"), answer="left", **fields):
    return {"id": id, "category": category, "options": list(options), "answer": answer, **fields}


@pytest.fixture
def mixed():
    """Letters 2 of 5 right, letters or values 3 of 5, one unparsable; three items of exo, two of ego."""
    references = [
        item(1, "exo"),
        item(2, "exo", options=[1, 2, 3, 0], answer=0),
        item(3, "exo"),
        item(4, "ego"),
        item("e5", "ego", question="ignored"),
    ]
    return ["A", "(D)", "B", "It goes left.", "no idea"], references


def test_accuracy_is_counted_by_hand(mixed):
    results = score(*mixed)
    assert results["accuracy"] == 60.0 and results["correct"] == 3 and results["n"] == 5 and results["unparsable"] == 1
    assert results["letter"]["accuracy"] == 40.0 and results["letter"]["unparsable"] == 2
    assert results["interval"] == pytest.approx([100 * end for end in wilson_interval(3, 5)])
    assert results["macro"] == pytest.approx((200 / 3 + 50) / 2) and results["num_categories"] == 2
    assert results["macro_interval"] == pytest.approx([100 * end for end in macro_interval([(2, 3), (1, 2)])])
    assert results["letter"]["macro"] == pytest.approx((200 / 3 + 0) / 2)
    exo, ego = results["categories"]["exo"], results["categories"]["ego"]
    assert (exo["n"], exo["correct"], exo["unparsable"]) == (3, 2, 0)
    assert (ego["n"], ego["correct"], ego["letter"]["correct"], ego["unparsable"]) == (2, 1, 0, 1)


def test_scoring_argument_chooses_the_headline_and_nothing_else(mixed):
    by_value, by_letter = score(*mixed), score(*mixed, scoring="letter")
    assert by_letter["accuracy"] == by_value["letter"]["accuracy"] != by_value["accuracy"]
    assert by_letter["macro"] == by_value["letter"]["macro"]
    assert by_letter["letter_or_value"] == by_value["letter_or_value"]


def test_groups_average_their_categories(mixed):
    groups = {"all": ["exo", "ego"], "first": ["exo", "absent"], "none": ["absent"]}
    results = score(*mixed, category_groups=groups)
    assert {key: results["groups"]["all"][key] for key in ("n", "accuracy", "macro")} == {
        key: results[key] for key in ("n", "accuracy", "macro")
    }
    assert results["groups"]["first"]["macro"] == results["categories"]["exo"]["accuracy"]
    assert results["groups"]["none"]["accuracy"] is None and results["groups"]["none"]["n"] == 0


def test_pair_is_right_only_if_both_orders_are():
    references = []
    for pair in range(3):
        references += [
            item(f"{pair}a", "sat", pair=pair),
            item(f"{pair}b", "sat", options=["right", "left"], pair=pair),
        ]
    results = score(["A", "B", "A", "A", "left", "?"], references)  # always left; always A; left and nothing
    assert results["correct"] == 4 and results["n"] == 6
    pairs = results["pairs"]
    assert (pairs["n"], pairs["correct"], pairs["unparsable"], pairs["incomplete"]) == (3, 1, 1, 0)
    assert pairs["letter"]["correct"] == 1 and pairs["letter"]["unparsable"] == 1
    partial = score(["A", "B", "A"], references[:3])["pairs"]
    assert (partial["n"], partial["incomplete"]) == (1, 1)
    assert score(["A"], references[:1])["pairs"] is None and score(["A"], [item(1, "x")])["pairs"] is None


def test_items_tell_what_was_read(mixed):
    third = score(*mixed, return_items=True)["items"][3]
    assert third == {
        "id": "4",
        "category": "ego",
        "letter": "A",
        "rule": "contained",
        "correct": True,
        "correct_letter": "A",
        "scorings": {
            "letter": {"letter": None, "rule": "none", "correct": False},
            "letter_or_value": {"letter": "A", "rule": "contained", "correct": True},
        },
    }


def test_items_of_several_benchmarks_are_an_error():
    references = [item(1, "x", benchmark="vlm4d"), item(2, "x", benchmark="sti_bench")]
    with pytest.raises(ValueError, match="several benchmarks, sti_bench, vlm4d; score each of them alone"):
        score(["A", "A"], references)
    assert score(["A", "A"], references[:1] + [item(2, "x", benchmark="vlm4d")])["n"] == 2


@pytest.mark.parametrize(
    ("replies", "references", "message"),
    [
        (["A"], [item("q7", "x", answer="A")], "item q7: the answer 'A' is none of the options"),
        (["A", "A"], [item("q7", "x")] * 2, "item q7 comes twice"),
        (["A"], [{"id": "q7", "options": ["a", "b"], "answer": "a"}], "id 'q7' lacks category"),
        ([None], [item("q7", "x")], "item q7: the prediction must be the reply as str"),
    ],
)
def test_bad_input_is_an_error_that_names_the_item(replies, references, message):
    with pytest.raises(ValueError, match=message):
        score(replies, references)


def test_nothing_to_score_is_none_not_zero():
    results = score([], [])
    assert results["n"] == 0 and results["accuracy"] is None and results["macro"] is None


def test_class_equals_the_function_and_survives_json(mixed):
    options = {"category_groups": {"all": ["exo", "ego"]}, "return_items": True}
    results = ChoiceAccuracy(keep_in_memory=True).compute(predictions=mixed[0], references=mixed[1], **options)
    assert results == score(*mixed, **options) == json.loads(json.dumps(results))


def test_rows_of_vlm4d_are_scored_as_they_are(shared_dir):
    splits = json.loads((shared_dir / "samples" / "vlm4d.json").read_text(encoding="utf-8"))["splits"]
    rows = [row | {"options": list(row["choices"].values()), "category": "exo"} for row in splits["real_mc"]]
    results = score(["B", "1", "D", "The right"], rows)
    assert results["correct"] == 4 and results["letter"]["correct"] == 2  # D repeats C's text
