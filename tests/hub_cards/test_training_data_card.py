import copy

import pytest
from huggingface_hub import DatasetCard

from hub_cards import LINEAGE, training_data_card, training_overlaps, write_card
from hub_cards.lineage import data_license
from hub_cards.training_lineage import BENCHMARKS, OVERLAPS


@pytest.fixture
def record():
    def source(name, license, rows, unusable):
        counts = {"read": rows + 7, "not_chosen": 5, "unusable": unusable, "rows": rows}
        files = [f"data/{name}/train-00000-of-00001-0123.parquet"]
        about = {"id": f"user/{name}", "revision": "abc123", "license": license, "lineage": LINEAGE[name]}
        return {"name": name, **about, **counts, "data_files": files}

    return {
        "name": "mixture",
        "repo_id": "user/mixture",
        "summary": "Conversations.",
        "sources": [
            source("sat", "mit", 900, {"an image | is missing": 2}),
            source("wolf", "cc-by-nc-sa-4.0", 200, {}),
        ],
        "overlaps": training_overlaps(["sat", "wolf"]),
        "statistics": "| source | rows |\n|---|---|\n| sat | 900 |\n",
        "embedded": True,
        "mixture": "seed: 0\n",
        "command": "python examples/prepare_data.py --sources sat wolf",
        "versions": {"datasets": "5.2.0"},
        "columns": {"id": "unique in its source"},
    }


def test_card_survives_saving_and_loading(record, tmp_path):
    card = training_data_card(record)
    loaded = DatasetCard.load(write_card(card, tmp_path))
    assert loaded.content == card.content and loaded.data.to_dict() == card.data.to_dict()
    assert loaded.data.license == "cc-by-nc-sa-4.0" and loaded.data.size_categories == "1K<n<10K"
    everything, sat, wolf = (config["data_files"][0]["path"] for config in loaded.data.configs)
    assert [config["config_name"] for config in loaded.data.configs] == ["default", "sat", "wolf"]
    assert everything == sat + wolf and len(sat) == 1
    assert "| sat | user/sat | abc123 | mit | 907 | 5 | 2 | 900 |" in loaded.text
    assert '- sat, unusable: 2 times "an image | is missing"' in loaded.text
    assert "Media stand in the rows as bytes." in loaded.text and "{{" not in loaded.text
    for overlap in record["overlaps"]:
        assert f"| {overlap['train']} | {overlap['test']} | {overlap['note']} |" in loaded.text


def test_license_that_is_not_established_is_not_guessed(record):
    record["sources"][1]["license"] = "not established; nuScenes' terms bind the videos"
    card = training_data_card(record)
    assert card.data.license == "other" and card.data.license_name == "licenses-of-the-sources"
    assert "do not make it public unless all of them allow it" in card.text


@pytest.mark.parametrize("field", ["statistics", "sources.0.revision", "sources.1.unusable", "overlaps.0.note"])
def test_missing_field_is_named(record, field):
    record = copy.deepcopy(record)
    *path, last = field.split(".")
    place = record
    for key in path:
        place = place[int(key) if key.isdigit() else key]
    del place[last]
    with pytest.raises(ValueError, match=last):
        training_data_card(record)


def test_source_without_a_word_on_overlap_is_an_error(record):
    record["overlaps"] = training_overlaps(["wolf"])
    with pytest.raises(ValueError, match=r"says nothing of \['sat'\]"):
        training_data_card(record)


def test_strictest_license_of_data_wins():
    assert data_license(["mit", "Apache-2.0"]) in ("mit", "apache-2.0")
    assert data_license(["mit", "cc-by-nc-4.0"]) == "cc-by-nc-4.0"
    assert data_license(["cc-by-nc-sa-4.0", "cc-by-nc-4.0"]) == "cc-by-nc-sa-4.0"
    assert data_license(["mit", "not established"]) == data_license([]) == "other"


def test_overlaps_cover_every_pair_with_what_is_known():
    found = {(one["train"], one["test"]): one["note"] for one in training_overlaps([*LINEAGE])}
    assert found.keys() == {(train, test) for train in LINEAGE for test in BENCHMARKS} and {*OVERLAPS} <= {*found}
    assert "ScanNet" in found["vsti", "sti_bench"] and "possible" in found["vsti", "r4d_bench"]
    assert "No common video" in found["vsti", "vstibench"] and "No common image" in found["sat", "sat_real"]
    with pytest.raises(ValueError, match=r"nothing is known here of \['llava', 'mmbench'\]"):
        training_overlaps(["llava"], ["mmbench"])
