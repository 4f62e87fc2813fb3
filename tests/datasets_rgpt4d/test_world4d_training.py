import dataclasses

import pytest
from datasets import load_dataset

from datasets_rgpt4d import CONFIGS, World4DTraining, save_world4d, to_messages, training_messages
from datasets_rgpt4d.schema import TRAINING_FEATURES


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world4d")
    config = dataclasses.replace(
        CONFIGS[0], size_px=32, train_clips=2, validation_clips=1, test_clips=1, durations_s=(1.0,)
    )
    return save_world4d(folder / "data", config)


def built(folder, tmp_path):
    builder = World4DTraining(location=str(folder), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def test_rows_ask_and_answer_as_world4d_does(folder, tmp_path):
    rows = built(folder, tmp_path)
    originals = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "original"))
    assert rows.features == TRAINING_FEATURES and len(rows) == len(originals) > 10
    for row, original in zip(rows, originals, strict=True):
        assert (row["id"], row["source"], row["subset"]) == (original["id"], "world4d", original["task"])
        (user, answer), (user_before, answer_before) = training_messages(row), to_messages(original)
        assert answer == answer_before and user["content"][1] == user_before["content"][1]
        video = user["content"][0]
        assert video.get("regions", []) == user_before["content"][0]["regions"]
        assert video["video"]["bytes"] is None  # a path, not ten copies of the clip
        with open(video["video"]["path"], "rb") as file:
            assert file.read() == original["video"]["bytes"]


def test_copy_without_files_gives_the_bytes(folder, tmp_path):
    copy = tmp_path / "copy"
    (copy / "data").mkdir(parents=True)
    for file in (folder / "data").iterdir():
        (copy / "data" / file.name).write_bytes(file.read_bytes())
    (copy / "world4d.json").write_bytes((folder / "world4d.json").read_bytes())
    rows, of_files = built(copy, tmp_path), built(folder, tmp_path)
    for row, of_file in zip(rows, of_files, strict=True):
        with open(of_file["videos"][0]["path"], "rb") as file:
            assert row["videos"][0]["bytes"] == file.read()
        assert row["messages"] == of_file["messages"] and row["revision"] == of_file["revision"]


def test_revision_is_that_of_the_configuration(folder, tmp_path):
    revision = built(folder, tmp_path)[0]["revision"]
    other = dataclasses.replace(
        CONFIGS[0], size_px=32, train_clips=1, validation_clips=1, test_clips=1, durations_s=(1.0,)
    )
    assert revision.startswith("sha256:")
    assert built(save_world4d(tmp_path / "other", other), tmp_path)[0]["revision"] != revision


def test_missing_clip_is_unusable(folder, tmp_path):
    copy = tmp_path / "copy"
    for file in folder.rglob("*.*"):
        target = copy / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.read_bytes())
    gone = next((copy / "videos" / "train").iterdir())
    gone.unlink()
    builder = World4DTraining(location=str(copy), skip_unusable=True, cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    assert len(builder.unusable) > 1
    assert {(one.reason, one.detail) for one in builder.unusable} == {
        ("the video is missing", f"videos/train/{gone.name}")
    }
