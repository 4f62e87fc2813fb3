import pyarrow.parquet as pq
import pytest
from datasets import Dataset, load_dataset

from datasets_rgpt4d import training_shards, write_training_shards
from datasets_rgpt4d.schema import TRAINING_FEATURES, training_row
from datasets_rgpt4d.training_shards import plan_shards


@pytest.fixture
def media(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    for number in range(3):
        (tmp_path / f"{number}.mp4").write_bytes(bytes([number]) * 10_000)
    return tmp_path


def row(id, images=(), videos=(), regions=()):
    blocks = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    question = {"role": "user", "content": [*blocks, {"type": "text", "text": f"question {id}"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
    return training_row(id, "vsti", "far", "r", [question, answer], images, videos, regions)


def dataset(media, count=12):
    region = {"video": 0, "name": "obj_1", "box": [1.0, 2.0, 3.0, 4.0]}
    rows = [row(str(i), videos=[media / f"{i % 3}.mp4"], regions=[region]) for i in range(count)]
    rows.append(row("image", images=[{"path": None, "bytes": b"picture"}]))
    return Dataset.from_list(rows, features=TRAINING_FEATURES)


def read(folder, tmp_path):
    files = {"train": sorted(map(str, folder.glob("*.parquet")))}
    return load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))


def test_rows_with_paths_come_back_equal_and_in_order(media):
    rows = dataset(media)
    (name,) = write_training_shards(rows, media / "out", embed=False)
    back = read(media / "out", media)
    assert back.to_list() == rows.to_list() and back.features == TRAINING_FEATURES
    assert name.startswith("train-00000-of-00001-") and len(name.split("-")[-1]) == len("0123456789abcdef.parquet")


def test_embedded_rows_hold_the_files_and_each_file_once(media):
    rows = dataset(media)
    (name,) = write_training_shards(rows, media / "out", embed=True)
    back = {row["id"]: row for row in read(media / "out", media)}
    for one in rows:
        again = back.pop(one["id"])
        for video, source in zip(again.pop("videos"), one.pop("videos"), strict=True):
            name_in_row = source["path"].rsplit("/", 1)[1]
            assert video == {"path": name_in_row, "bytes": (media / name_in_row).read_bytes()}
        assert one == again | {} and one["regions"] == again["regions"]
    assert not back
    column = pq.ParquetFile(media / "out" / name).metadata.row_group(0)
    sizes = {
        column.column(i).path_in_schema: column.column(i).total_uncompressed_size for i in range(column.num_columns)
    }
    (size,) = [size for path, size in sizes.items() if path.startswith("videos") and path.endswith("bytes")]
    assert 30_000 < size < 31_000  # three videos of 10 kB, in 12 rows


def test_rows_of_a_video_stand_together_up_to_a_limit(media, monkeypatch):
    monkeypatch.setattr(training_shards, "ROWS_PER_COPY", 3)
    (groups,) = plan_shards(dataset(media), embed=True)
    assert groups == [[0, 3, 6, 1, 4, 7, 2, 5, 8, 9, 10, 11, 12]]
    assert plan_shards(dataset(media), embed=False) == [[[*range(13)]]]


def test_groups_and_files_keep_to_their_sizes(media, monkeypatch):
    monkeypatch.setattr(training_shards, "GROUP_BYTES", 25_000)  # two rows with their video
    monkeypatch.setattr(training_shards, "FILE_BYTES", 30_000)
    files = plan_shards(dataset(media), embed=True)
    assert [[len(group) for group in groups] for groups in files] == [[2, 2, 2], [2, 2, 3]]
    names = write_training_shards(dataset(media), media / "out", embed=True)
    assert [name[:20] for name in names] == ["train-00000-of-00002", "train-00001-of-00002"]
    assert sorted(read(media / "out", media)["id"]) == sorted(dataset(media)["id"])
    monkeypatch.setattr(training_shards, "GROUP_ROWS", 5)
    monkeypatch.setattr(training_shards, "FILE_BYTES", 1)
    assert plan_shards(dataset(media), embed=False) == [[[0, 1, 2, 3, 4]], [[5, 6, 7, 8, 9]], [[10, 11, 12]]]


def test_names_change_with_the_content(media):
    (first,) = write_training_shards(dataset(media), media / "one", embed=False)
    (same,) = write_training_shards(dataset(media), media / "two", embed=False)
    (other,) = write_training_shards(dataset(media).select(range(12)), media / "three", embed=False)
    assert first == same != other


def test_interrupted_writing_leaves_whole_files_and_goes_on(media, monkeypatch):
    monkeypatch.setattr(training_shards, "GROUP_ROWS", 5)
    monkeypatch.setattr(training_shards, "FILE_BYTES", 1)
    with_media, seen = training_shards._with_media, []

    def interrupted(row, *more):
        if len(seen) == 7:
            raise KeyboardInterrupt
        seen.append(row["id"])
        return with_media(row, *more)

    monkeypatch.setattr(training_shards, "_with_media", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_training_shards(dataset(media), media / "out", embed=False)
    (there,) = (media / "out").iterdir()
    before = there.stat().st_mtime_ns
    seen.clear()
    monkeypatch.setattr(
        training_shards, "_with_media", lambda row, *more: seen.append(row["id"]) or with_media(row, *more)
    )
    names = write_training_shards(dataset(media), media / "out", embed=False)
    assert len(seen) == 8 and there.name == names[0] and there.stat().st_mtime_ns == before
    assert read(media / "out", media)["id"][:] == dataset(media)["id"][:]
