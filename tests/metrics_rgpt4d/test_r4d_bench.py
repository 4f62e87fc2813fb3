import json
from pathlib import Path

import evaluate
import pytest

from metrics_rgpt4d import R4DBench
from metrics_rgpt4d.choice_scoring import correct_letters
from metrics_rgpt4d.r4d_bench.r4d_bench import CATEGORIES, COLUMNS, score

METRIC_FOLDER = Path(__file__).parents[2] / "metrics_rgpt4d" / "r4d_bench"


def item(id, task="Counting", options=("left", "right", "up", "down"), answer="left"):
    return {"id": id, "task": task, "options": list(options), "answer": answer}


@pytest.fixture
def mixed():
    """Replies and items in which the two scorings differ: letters 2 of 6, letters or values 4 of 6, one other task."""
    references = [
        {"id": 555, "task": "Speed & Acceleration", "options": ["-0.10m/s²", "-0.70m/s²"], "answer": "-0.70m/s²"},
        {"id": "validation_3", "task": "Counting", "options": [1, 2, 3, 0], "answer": 0, "video": "a.mp4"},
        {"id": 7, "task": "Counting", "options": [1, 2, 3, 0], "answer": 1},
        {"id": "validation_9", "task": "False Positives", "options": ["clockwise", None], "answer": None},
        {"id": 556, "task": "Spatial Relation", "options": ["Left", "Right"], "answer": "Left"},
        {"id": 557, "task": "Spatial Relation", "options": ["Left", "Right"], "answer": "Left"},
        {"id": "t1", "task": "TimeBench", "options": ["4.92", "9.85"], "answer": "9.85"},
    ]
    predictions = ["-0.7 m/s^2", "(D)", "B", "None", "A. Left", "left or right", "9.85"]
    return predictions, references


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Keeps what `evaluate` writes inside the test's folder."""
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_CACHE", tmp_path / "evaluate")
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path


def test_columns_hold_hand_counted_percentages(mixed):
    results = score(*mixed)
    assert results["Avg"] == pytest.approx(100 * 4 / 6)
    assert results["Sta"] == 50.0 and results["SR"] == 50.0
    assert results["Dyn"] == 75.0 and results["C"] == 50.0 and results["FP"] == 100.0 and results["SA"] == 100.0
    assert results["macro"] == pytest.approx((50 + 50 + 100 + 100) / 4) and results["num_categories"] == 4
    assert results["letter"]["accuracy"]["Avg"] == pytest.approx(100 * 2 / 6)
    assert results["letter"]["accuracy"]["SA"] == 0.0
    assert results["n"] == dict.fromkeys(COLUMNS, 0) | {"Avg": 6, "Sta": 2, "Dyn": 4, "SR": 2, "C": 2, "FP": 1, "SA": 1}
    assert results["unparsable"] == 1
    assert results["letter"]["unparsable"]["Avg"] == 3
    assert results["letter_or_value"]["correct"]["Avg"] == 4


def test_scoring_argument_chooses_the_headline_and_nothing_else(mixed):
    by_value, by_letter = score(*mixed), score(*mixed, scoring="letter")
    assert by_letter["Avg"] == by_value["letter"]["accuracy"]["Avg"] != by_value["Avg"]
    assert by_letter["unparsable"] == 3 and by_letter["scoring"] == "letter"
    for name in ("letter", "letter_or_value"):
        assert by_letter[name] == by_value[name]


def test_other_task_is_reported_by_name_and_not_in_any_column(mixed):
    results = score(*mixed)
    assert results["other"]["TimeBench"]["n"] == 1
    assert results["other"]["TimeBench"]["accuracy"] == 100.0
    assert results["other"]["TimeBench"]["letter"]["accuracy"] == 0.0
    without = score(mixed[0][:-1], mixed[1][:-1])
    assert {k: v for k, v in results.items() if k != "other"} == {k: v for k, v in without.items() if k != "other"}


def test_empty_column_is_none_not_zero(mixed):
    results = score(*mixed)
    assert results["VG"] is None and results["interval"]["VG"] is None and results["n"]["VG"] == 0
    nothing = score([], [])
    assert nothing["Avg"] is None and nothing["macro"] is None and nothing["interval"]["macro"] is None


def test_every_category_reaches_its_own_column():
    references = [item(i, task) for i, task in enumerate(CATEGORIES.values())]
    for index, column in enumerate(CATEGORIES):
        replies = ["B"] * len(references)
        replies[index] = "A"
        results = score(replies, references)
        assert [c for c in CATEGORIES if results[c] == 100.0] == [column]
        assert results["Avg"] == pytest.approx(100 / 9) and results["n"]["Sta"] == 3 and results["n"]["Dyn"] == 6
        assert (results["Sta"] > 0) == (column in ("VG", "DM", "SR")) != (results["Dyn"] > 0)


def test_items_tell_letter_rule_and_verdict(mixed):
    first = score(*mixed, return_items=True)["items"][0]
    assert first == {
        "id": "555",
        "task": "Speed & Acceleration",
        "letter": "B",
        "rule": "equal",
        "correct": True,
        "correct_letter": "B",
        "scorings": {
            "letter": {"letter": None, "rule": "none", "correct": False},
            "letter_or_value": {"letter": "B", "rule": "equal", "correct": True},
        },
    }
    assert "items" not in score(*mixed)


def test_letter_right_is_right_under_both_scorings(mixed):
    for record in score(*mixed, return_items=True)["items"]:
        assert record["scorings"]["letter"]["correct"] <= record["scorings"]["letter_or_value"]["correct"]


def test_duplicate_option_texts_are_both_right():
    twice = item("validation_633", options=["not sure", "not moving", "away ", "away"], answer="away")
    assert correct_letters(twice) == "CD"
    for reply in ("C", "D", "away"):
        assert score([reply], [twice])["Avg"] == 100.0


def test_same_input_gives_same_output_in_any_order(mixed):
    predictions, references = mixed
    results = score(predictions, references)
    turned = score(predictions[::-1], references[::-1])
    assert json.dumps(turned, sort_keys=True) == json.dumps(results, sort_keys=True)


def test_static_and_dynamic_by_source_are_another_partition():
    references = [
        item(1, "Spatial Relation") | {"benchmark": "stibench"},  # static by both
        item(2, "Speed & Acceleration") | {"benchmark": "stibench"},  # static by source alone
        item(3, "Counting") | {"benchmark": "vlm4d"},
        item(4, "Counting") | {"benchmark": "world4d"},
        item(5, "TimeBench") | {"benchmark": "vlm4d"},  # in no column, so of no source either
    ]
    results = score(["A", "A", "B", "A", "A"], references)
    assert results["n"]["Sta"] == 1 and results["n"]["Dyn"] == 3
    by_source = results["by_source"]
    assert (by_source["Sta"]["n"], by_source["Sta"]["accuracy"]) == (2, 100.0)
    assert (by_source["Dyn"]["n"], by_source["Dyn"]["accuracy"], by_source["Dyn"]["letter"]["correct"]) == (1, 0.0, 0)
    assert by_source["unknown"] == 1
    assert score(["A"], [item(1)])["by_source"] is None


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        (["A"], [item("q7", answer="A")], "item q7: the answer 'A' is none of the options"),
        (["A"], [item("q7", options=["left"])], "item q7: 1 options"),
        (["A"], [item("q7") | {"options": "left"}], "item q7: options must be a list"),
        (["A"], [{"id": "q7", "task": "Counting", "options": ["a", "b"]}], "id 'q7' lacks answer"),
        (["A", "A"], [item("q7"), item("q7")], "item q7 comes twice"),
        ([None], [item("q7")], "item q7: the prediction must be the reply as str, not NoneType"),
        (["A"], [item("q7"), item("q8")], "1 predictions for 2 references"),
    ],
)
def test_bad_input_is_an_error_that_names_the_item(predictions, references, message, cache):
    with pytest.raises(ValueError, match=message):
        score(predictions, references)
    with pytest.raises(ValueError, match=message):
        R4DBench(keep_in_memory=True).compute(predictions=predictions, references=references)


def test_unknown_scoring_is_an_error():
    with pytest.raises(ValueError, match="scoring must be one of letter, letter_or_value, not 'values'"):
        score(["A"], [item(1)], scoring="values")


def test_folder_loads_offline_and_equals_the_class(mixed, cache):
    predictions, references = mixed
    loaded = evaluate.load(str(METRIC_FOLDER))
    options = {"scoring": "letter", "return_items": True}
    results = loaded.compute(predictions=predictions, references=references, **options)
    assert results == R4DBench(keep_in_memory=True).compute(predictions=predictions, references=references, **options)
    assert results == score(predictions, references, **options)


def test_batches_and_single_items_equal_one_call(mixed, cache):
    predictions, references = mixed
    metric = R4DBench(keep_in_memory=True)
    metric.add_batch(predictions=predictions[:3], references=references[:3])
    for prediction, reference in zip(predictions[3:], references[3:], strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute() == score(predictions, references)


def test_results_survive_json(mixed):
    results = score(*mixed, return_items=True)
    assert json.loads(json.dumps(results)) == results


def test_rows_of_the_benchmark_are_scored_as_they_are(shared_dir):
    rows = json.loads((shared_dir / "samples" / "r4d_bench.json").read_text(encoding="utf-8"))["rows"]
    rows = [row | {"answer": "-0.70m/s²"} if row["id"] == 555 else row for row in rows]  # printed there as a letter
    results = score(["-0.70m/s²", "A", "0", "none"], rows)
    assert results["Avg"] == 75.0 and results["FP"] == 0.0 and results["n"]["Avg"] == 4


def test_space_card_has_the_front_matter_of_a_metric():
    from huggingface_hub import RepoCard

    card = RepoCard.load(METRIC_FOLDER / "README.md", repo_type="space")
    assert card.data.sdk == "gradio" and "metric" in card.data.tags
