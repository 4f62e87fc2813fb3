import inspect
from pathlib import Path

import pytest
from huggingface_hub import SpaceCard

import metrics_rgpt4d
from hub_cards import metric_card, metric_record
from metrics_rgpt4d import DepthFlow, R4DBench


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Keeps what `evaluate` writes inside the test's folder."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))


def folder_of(metric):
    return Path(inspect.getfile(metric)).parent


@pytest.mark.parametrize("name", metrics_rgpt4d.__all__)
def test_card_in_the_folder_is_what_the_metric_says_of_itself(name):
    metric = getattr(metrics_rgpt4d, name)
    folder = folder_of(metric)
    card = metric_card(metric_record(metric(), folder, f"metrics_rgpt4d/{folder.name}"))
    remedy = f"run: python examples/publish.py --metric metrics_rgpt4d/{folder.name}"
    assert card.content == (folder / "README.md").read_text(encoding="utf-8"), remedy
    loaded = SpaceCard.load(folder / "README.md")
    assert loaded.data.sdk == "gradio" and "metric" in loaded.data.tags and loaded.data.license == "apache-2.0"


def test_every_metric_folder_is_exported():
    room = Path(metrics_rgpt4d.__file__).parent
    folders = {path.parent for path in room.glob("*/*.py") if path.stem == path.parent.name}
    assert {folder_of(getattr(metrics_rgpt4d, name)) for name in metrics_rgpt4d.__all__} == folders


def test_text_is_kept_and_the_rest_follows_the_metric(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(
        "---\ntitle: Errors\nemoji: 📐\n---\n\n# Errors\n\nWhat to *know*.\n\n## More\n", encoding="utf-8"
    )
    record = metric_record(DepthFlow(), tmp_path, "user/depth_flow")
    assert record["text"] == "What to *know*.\n\n## More" and record["look"] == {"emoji": "📐"}
    first = metric_card(record).content
    assert first.count("# Errors") == 1 and 'evaluate.load("user/depth_flow")' in first and "2,000 resamples" in first
    readme.write_text(first.replace("2,000 resamples", "some resamples").replace("*know*", "*see*"), encoding="utf-8")
    again = metric_card(metric_record(DepthFlow(), tmp_path, "user/depth_flow")).content
    assert again == first.replace("*know*", "*see*")


def test_columns_have_their_meaning_in_the_card():
    text = metric_card(metric_record(R4DBench(), folder_of(R4DBench), "user/r4d_bench")).text
    assert "| `SA` | Speed & Acceleration |" in text


def test_what_a_card_cannot_do_without_is_named(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="has no README.md"):
        metric_record(DepthFlow(), tmp_path, "a/b")
    (tmp_path / "README.md").write_text("What to know.", encoding="utf-8")
    with pytest.raises(ValueError, match="has no title"):
        metric_record(DepthFlow(), tmp_path, "a/b")
    (tmp_path / "README.md").write_text("---\ntitle: Errors\n---\n", encoding="utf-8")
    monkeypatch.delattr("metrics_rgpt4d.depth_flow.depth_flow.INTERVAL_METHOD")
    with pytest.raises(ValueError, match="has no INTERVAL_METHOD"):
        metric_record(DepthFlow(), tmp_path, "a/b")
