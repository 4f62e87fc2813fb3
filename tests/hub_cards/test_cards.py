import copy
import os

import pytest
from huggingface_hub import DatasetCard, ModelCard, SpaceCard

from hub_cards import dataset_card, metric_card, model_card, write_card
from metrics_rgpt4d.r4d_bench import r4d_bench


@pytest.fixture
def run():
    """The record of a small model trained from scratch; 30 of 40 questions right, 4 by their value."""
    references = [
        {"id": i, "task": "Counting" if i < 24 else "Dimensional Measurement", "options": ["3", "5"], "answer": "3"}
        for i in range(40)
    ] + [{"id": "t", "task": "TimeBench", "options": ["4 s", "8 s"], "answer": "8 s"}]
    replies = ["A"] * 26 + ["3"] * 4 + ["B"] * 8 + ["?"] * 2 + ["8 s"]
    return {
        "name": "rgpt4d-small",
        "summary": "A small model that was trained on rendered scenes | for tests.",
        "repo_id": "user/rgpt4d-small",
        "num_frames": 8,
        "origins": [],
        "training": {
            "command": "accelerate launch examples/train.py --config examples/configs/small.yaml",
            "steps": 300,
            "seed": 0,
            "device": "cpu",
            "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
            "teacher": "World4D teacher, 300 steps",
            "losses": {"sft": 1.0, "latent": 0.5, "explicit": 0.1, "signals": {"depth": 1.0, "flow": 0.1}},
        },
        "data": [{"name": "World4D-tiny", "id": "user/world4d-tiny", "revision": "abc123", "license": "apache-2.0"}],
        "results": [
            {
                "benchmark": "World4D-tiny",
                "dataset_id": "user/world4d-tiny",
                "split": "test",
                "revision": "abc123",
                "command": "python examples/run_eval.py --model runs/p4d",
                "scores": r4d_bench.score(replies, references),
            }
        ],
        "overlaps": [{"train": "World4D-tiny", "test": "World4D-tiny", "note": "no scene is in both splits"}],
        "limits": ["It has seen rendered scenes only."],
    }


@pytest.fixture
def world4d():
    return {
        "name": "World4D tiny",
        "repo_id": "user/world4d-tiny",
        "summary": "Rendered scenes.",
        "license": "apache-2.0",
        "revision": "abc123",
        "command": "python examples/render_world4d.py --size tiny",
        "seed": 0,
        "versions": {"torch": "2.13.0"},
        "splits": [
            {"name": "train", "num_questions": 900, "num_videos": 100, "data_files": "train/*.parquet"},
            {"name": "test", "num_questions": 200, "num_videos": 20, "data_files": "test/*.parquet"},
        ],
        "tasks": {"Counting": 1000, "TimeBench": 100},
        "columns": {"id": "unique name", "options": "left | right"},
        "limits": [],
    }


METRIC = {
    "title": "R4D-Bench accuracy",
    "look": {"emoji": "🎯", "colorFrom": "blue", "colorTo": "green"},
    "text": "What to know.",
    "summary": "Region-level 4D questions: nine categories.",
    "load": "user/r4d_bench",
    "inputs": ["predictions", "references"],
    "arguments": r4d_bench._KWARGS_DESCRIPTION,
    "interval_method": r4d_bench.INTERVAL_METHOD,
    "columns": r4d_bench.CATEGORIES,
    "citation": "A paper.",
}


def test_model_card_survives_saving_and_loading(run, tmp_path):
    card = model_card(run)
    loaded = ModelCard.load(write_card(card, tmp_path))
    assert loaded.content == card.content and loaded.data.to_dict() == card.data.to_dict()
    data = loaded.data
    assert data.pipeline_tag == "video-text-to-text" and data.library_name == "transformers"
    assert set(data.tags) == {"custom_code", "rgpt4d"} and data.license == "apache-2.0"
    assert data.datasets == ["user/world4d-tiny"] and data.base_model is None
    assert data.model_name == "rgpt4d-small"


def test_model_index_states_value_n_and_interval(run):
    entries = {entry.metric_name.split(",")[0]: entry for entry in model_card(run).data.eval_results}
    assert entries["Avg (letter_or_value)"].metric_value == 75.0
    assert entries["Avg (letter_or_value)"].metric_name.endswith("n = 40, 95 % interval 59.8 to 85.8")
    assert entries["Avg (letter)"].metric_value == 65.0
    assert entries["TimeBench (letter_or_value)"].metric_value == 100.0
    assert {entry.dataset_revision for entry in entries.values()} == {"abc123"}


def test_model_card_tables_are_the_record(run):
    text = model_card(run).text
    assert "| Avg | 40 | 75.0 | 59.8 to 85.8 | 65.0 | 49.5 to 77.9 |" in text
    assert "| C | 24 | 100.0 |" in text and "| VG |" not in text
    assert "| TimeBench (in no average) | 1 | 100.0 |" in text
    assert "2 of 40 replies chose no option" in text
    assert "depth 1.0, flow 0.1" in text and "1.0 L_SFT + 0.5 L_LD + 0.1 L_ED" in text
    assert "no scene is in both splits" in text and "It has seen rendered scenes only." in text
    assert "from random initial values" in text
    assert "{{" not in text and "{%" not in text and "None" not in text.replace("None were", "")


def test_loading_snippet_of_the_card_is_python(run):
    text = model_card(run).text
    snippet = text.split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert snippet.count('"user/rgpt4d-small", trust_remote_code=True') == 2 and '{"num_frames": 8}' in snippet


def test_weights_of_others_make_the_card_non_commercial(run):
    run["origins"] = [
        {"name": "Efficient-Large-Model/NVILA-Lite-8B", "role": "initial weights", "license": "cc-by-nc-4.0"},
        {"name": "L4P", "role": "teacher", "license": "cc-by-nc-sa-4.0"},
    ]
    card = model_card(run)
    assert card.data.license == "cc-by-nc-sa-4.0"
    assert card.data.base_model == ["Efficient-Large-Model/NVILA-Lite-8B"]
    assert "may not be used commercially" in card.text and "| L4P | teacher | cc-by-nc-sa-4.0 |" in card.text


def test_run_without_results_or_teacher_says_so(run):
    run |= {"results": [], "overlaps": [], "limits": []}
    run["training"]["teacher"] = None
    run["training"]["losses"]["signals"] = {}
    card = model_card(run)
    assert card.data.eval_results is None
    assert "None were measured." in card.text and "supervised fine-tuning alone" in card.text


FIELDS = [
    "name",
    "origins",
    "training",
    "training.losses.latent",
    "training.versions",
    "results.0.scores",
    "data.0.revision",
    "data.0.license",
    "overlaps.0.note",
]


@pytest.mark.parametrize("field", FIELDS)
def test_missing_field_is_named(run, field):
    run = copy.deepcopy(run)
    *path, last = field.split(".")
    place = run
    for key in path:
        place = place[int(key) if key.isdigit() else key]
    del place[last]
    with pytest.raises(ValueError, match=last):
        model_card(run)


def test_training_and_test_set_without_a_word_on_overlap_is_an_error(run):
    run["data"].append({"name": "SAT", "id": "array/SAT", "revision": "d5dcb10", "license": "mit"})
    with pytest.raises(ValueError, match=r"says nothing of SAT \(training\) and World4D-tiny \(test\)"):
        model_card(run)


def test_dataset_card_survives_saving_and_loading(world4d, tmp_path):
    card = dataset_card(world4d)
    loaded = DatasetCard.load(write_card(card, tmp_path))
    assert loaded.content == card.content and loaded.data.to_dict() == card.data.to_dict()
    assert loaded.data.size_categories == "1K<n<10K" and loaded.data.license == "apache-2.0"
    assert loaded.data.configs[0]["data_files"][1] == {"split": "test", "path": "test/*.parquet"}
    assert "| test | 200 | 20 |" in loaded.text and "| all | 1100 |" in loaded.text
    assert r"| `options` | left \| right |" in loaded.text


def test_dataset_card_refuses_counts_that_disagree_and_missing_fields(world4d):
    with pytest.raises(ValueError, match="the splits hold 1100 questions, but 'tasks' counts 1000"):
        dataset_card(world4d | {"tasks": {"Counting": 1000}})
    with pytest.raises(ValueError, match=r"splits\[0\] of the data set's record lacks 'num_videos'"):
        dataset_card(world4d | {"splits": [{"name": "train", "num_questions": 1}]})
    del world4d["license"]
    with pytest.raises(ValueError, match="lacks 'license'"):
        dataset_card(world4d)


def test_metric_card_survives_saving_and_loading(tmp_path):
    card = metric_card(METRIC)
    loaded = SpaceCard.load(write_card(card, tmp_path))
    assert loaded.content == card.content and loaded.data.to_dict() == card.data.to_dict()
    assert loaded.data.sdk == "gradio" and "metric" in loaded.data.tags and loaded.data.license == "apache-2.0"
    assert loaded.data.get("emoji") == "🎯" and loaded.data.get("description") == METRIC["summary"]
    assert "| `FP` | False Positives |" in loaded.text and "return_items" in loaded.text and "A paper." in loaded.text
    assert "metric.compute(predictions=predictions, references=references)" in loaded.text
    assert "| column |" not in metric_card(METRIC | {"columns": {}}).text
    with pytest.raises(ValueError, match="lacks 'load'"):
        metric_card({k: v for k, v in METRIC.items() if k != "load"})


def test_card_is_written_whole_or_not_at_all(run, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("before", encoding="utf-8")

    def no_space(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(os, "replace", no_space)
        write_card(model_card(run), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "before"
    write_card(model_card(run), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["README.md"]
    with pytest.raises(ValueError, match="is no folder"):
        write_card(model_card(run), tmp_path / "absent")
