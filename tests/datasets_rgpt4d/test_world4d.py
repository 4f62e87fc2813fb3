import dataclasses
import hashlib
import io
from fractions import Fraction
from pathlib import Path

import av
import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest

from datasets_rgpt4d import CONFIGS, Scene, World4D, World4DConfig, render_frames, save_world4d
from datasets_rgpt4d.world4d_video import write_video
from examples import render_world4d

SMALL = dict(size_px=32, train_clips=2, validation_clips=1, test_clips=2, durations_s=(1.0, 1.5), fps=(10, 12))


def content(video):
    return video["bytes"] if video["bytes"] is not None else Path(video["path"]).read_bytes()


def comparable(dataset):
    return [{**row, "video": hashlib.sha256(content(row["video"])).hexdigest()} for row in dataset]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    builder = World4D(config_name="tiny", cache_dir=str(cache), **SMALL)
    builder.download_and_prepare()
    return builder, cache


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    config = dataclasses.replace(CONFIGS[0], **SMALL)
    return save_world4d(tmp_path_factory.mktemp("saved") / "world4d", config), config


def test_builder_gives_typed_rows_with_videos(built):
    dataset = built[0].as_dataset()
    assert list(dataset) == ["train", "validation", "test"] and built[0].info.license == "apache-2.0"
    for split, rows in dataset.items():
        assert rows.features["video"] == datasets.Video(decode=False)
        assert len({row["video"]["path"] for row in rows}) == SMALL[f"{split}_clips"]
        assert len(set(rows["id"])) == len(rows) and set(rows["benchmark"]) == {"world4d"}
    row = dataset["test"][0]
    scene = Scene.from_json(row["scene"])
    r4d_bench = "id benchmark task video source som_image question question_raw options answer time_start"
    assert set(r4d_bench.split()) <= set(row)
    assert (row["fps"], row["duration_s"], row["time_start"]) == (scene.fps, scene.duration_s, None)


def test_videos_hold_the_rendered_frames_at_their_exact_times(built):
    for row in built[0].as_dataset(split="test"):
        scene = Scene.from_json(row["scene"])
        with av.open(row["video"]["path"]) as container:
            decoded = [
                (frame.pts * frame.time_base, frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)
            ]
        assert [time for time, _ in decoded] == [Fraction(k, scene.fps) for k in range(scene.num_frames)]
        assert float(decoded[-1][0]) == scene.duration_s  # what TimeBench asks: from the first frame to the last
        rendered = render_frames(scene, scene.frame_times, 32, supersample=2, as_numpy=True)
        error = np.abs(np.stack([image for _, image in decoded]).astype(int) - rendered)
        assert error.mean() < 6  # 4:2:0 colours and H.264 at high quality


def test_building_again_gives_equal_rows_and_bytes(built, tmp_path):
    again = World4D(config_name="tiny", cache_dir=str(tmp_path), **SMALL)
    again.download_and_prepare()
    for split in ("train", "validation", "test"):
        assert comparable(again.as_dataset(split=split)) == comparable(built[0].as_dataset(split=split))


def test_two_processes_build_the_same(built, tmp_path):
    again = World4D(config_name="tiny", cache_dir=str(tmp_path), **SMALL)
    again.download_and_prepare(num_proc=2)
    assert comparable(again.as_dataset(split="test")) == comparable(built[0].as_dataset(split="test"))


def test_parquet_round_trip_gives_equal_rows(built, tmp_path):
    again = World4D(config_name="tiny", cache_dir=str(built[1]), **SMALL)  # a builder keeps the format it wrote last
    again.download_and_prepare(str(tmp_path / "parquet"), file_format="parquet")
    loaded = datasets.load_dataset(str(tmp_path / "parquet"), cache_dir=str(tmp_path / "cache"))
    for split, rows in loaded.items():
        assert rows.features == built[0].info.features
        assert rows[0]["video"]["bytes"] is not None  # embedded: the folder can be moved or uploaded
        assert comparable(rows) == comparable(built[0].as_dataset(split=split))


def test_streaming_gives_equal_rows(built):
    assert comparable(built[0].as_streaming_dataset(split="test")) == comparable(built[0].as_dataset(split="test"))


def test_saved_folder_loads_with_equal_rows(built, saved, tmp_path):
    folder, config = saved
    loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path))
    assert list(loaded) == ["train", "validation", "test"]
    for split, rows in loaded.items():
        assert rows.features == built[0].info.features
        assert comparable(rows) == comparable(built[0].as_dataset(split=split))
        files = sorted(path.name for path in (folder / "videos" / split).iterdir())
        assert files == sorted(set(row["video"]["path"] for row in rows))
    with av.open(io.BytesIO(loaded["test"][0]["video"]["bytes"])) as container:
        assert sum(1 for _ in container.decode(video=0)) == Scene.from_json(loaded["test"][0]["scene"]).num_frames


def test_folders_of_one_name_are_not_taken_for_each_other(tmp_path):
    rows = []
    for seed in (0, 1):
        config = dataclasses.replace(CONFIGS[0], **SMALL, seed=seed)
        folder = save_world4d(tmp_path / str(seed) / "world4d", config)
        rows.append(datasets.load_dataset(str(folder), split="test", cache_dir=str(tmp_path / "cache"))["scene"])
    assert not set(rows[0]) & set(rows[1])


def test_saved_parquet_stores_each_video_once(saved):
    (path,) = saved[0].glob("data/test-00000-of-00001-*.parquet")
    videos = {bytes_ for bytes_ in (video["bytes"] for video in pq.read_table(path).column("video").to_pylist())}
    once = sum(map(len, videos))
    metadata = pq.ParquetFile(path).metadata.row_group(0)
    stored = {
        metadata.column(i).path_in_schema: metadata.column(i).total_uncompressed_size
        for i in range(metadata.num_columns)
    }
    assert stored["video.bytes"] < 1.1 * once + 2000


def test_an_interrupted_save_goes_on_and_keeps_finished_videos(saved, monkeypatch):
    folder, config = saved
    before = {path: path.stat().st_mtime_ns for path in folder.glob("videos/*/*.mp4")}
    rows = [path.read_bytes() for path in sorted(folder.glob("data/*.parquet"))]
    lost = sorted(before)[0]
    lost.unlink()
    (test_file,) = folder.glob("data/test-00000-of-00001-*.parquet")
    test_file.unlink()
    rendered = []
    monkeypatch.setattr(
        "datasets_rgpt4d.world4d.write_video",
        lambda path, *args: (rendered.append(Path(path)), write_video(path, *args)),
    )
    save_world4d(folder, config)
    assert rendered == [lost]
    assert all(path.stat().st_mtime_ns == time for path, time in before.items() if path != lost)
    assert [path.read_bytes() for path in sorted(folder.glob("data/*.parquet"))] == rows


def test_a_failed_encoding_leaves_no_file(tmp_path):
    frames = [np.zeros((32, 32, 3), np.uint8), np.zeros((16, 32, 3), np.uint8)]
    with pytest.raises(ValueError, match="Frame 1 has shape"):
        write_video(tmp_path / "clip.mp4", frames, 10, 32)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="even number of pixels"):
        write_video(tmp_path / "clip.mp4", frames, 10, 33)


def test_save_refuses_a_folder_that_is_not_its_own(saved, tmp_path):
    folder, config = saved
    with pytest.raises(ValueError, match="another configuration"):
        save_world4d(folder, dataclasses.replace(config, seed=1))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        save_world4d(tmp_path, config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("size_px", 33),
        ("train_clips", 0),
        ("durations_s", (0.5,)),
        ("durations_s", (30.0,)),
        ("fps", (60,)),
        ("seed", -1),
    ],
)
def test_nonsense_configurations_are_refused(field, value):
    with pytest.raises(ValueError, match="World4D"):
        World4DConfig(name="bad", **{field: value})


def test_named_sizes_grow():
    assert [config.name for config in CONFIGS] == ["tiny", "small", "full"]
    sizes = [
        (config.size_px, sum(config.clips(split) for split in ("train", "validation", "test"))) for config in CONFIGS
    ]
    assert sizes == [(112, 396), (128, 2_000), (224, 20_000)]


def test_example_renders_and_refuses(saved, tmp_path, capsys):
    arguments = [
        "--size-px",
        "32",
        "--train-clips",
        "1",
        "--validation-clips",
        "1",
        "--test-clips",
        "1",
        "--num-proc",
        "1",
    ]
    render_world4d.main(["--size", "tiny", "--output", str(tmp_path / "out"), *arguments])
    assert "load_dataset" in capsys.readouterr().out and len(list((tmp_path / "out").glob("videos/*/*.mp4"))) == 3
    with pytest.raises(SystemExit, match="even number"):
        render_world4d.main(["--output", str(tmp_path / "bad"), "--size-px", "33"])
    with pytest.raises(SystemExit):
        render_world4d.parse_args(["--size", "huge", "--output", "x"])
