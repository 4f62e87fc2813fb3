import os
import zipfile
from types import SimpleNamespace

import datasets
import pytest

from datasets_rgpt4d import source_files
from datasets_rgpt4d.source_files import MissingDataError, SourceFiles

REMEDY = "Get it there."


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Call it with the names and paths of a repository's files: it is then the data set `authors/set` on the Hub."""
    monkeypatch.setattr(datasets.config, "EXTRACTED_DATASETS_PATH", str(tmp_path / "extracted"))
    downloads = []

    def publish(files):
        info = SimpleNamespace(sha="c" * 40, siblings=[SimpleNamespace(rfilename=name) for name in files])
        monkeypatch.setattr(source_files, "HfApi", lambda: SimpleNamespace(dataset_info=lambda *a, **k: info))

        def download(location, name, repo_type, revision):
            assert (location, repo_type, revision) == ("authors/set", "dataset", "c" * 40)
            downloads.append(name)
            return str(files[name])

        monkeypatch.setattr(source_files, "hf_hub_download", download)
        return SourceFiles("authors/set", REMEDY), downloads

    return publish


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_archive_of_the_hub_is_extracted_once_and_its_files_are_found(tmp_path, hub, monkeypatch):
    archive = write_zip(
        tmp_path / "video.zip", {"top/a/one.mp4": b"1" * 5000, "top/data.json": b"[]", "top/empty/": b""}
    )
    source, _ = hub({"video.zip": archive})
    assert source.media("top/a/one.mp4") is None
    source.unpack("*.zip", "top")
    whole, without_top = source.media("top/a/one.mp4"), source.media("absent", "a/one.mp4")
    assert whole == without_top and whole.read_bytes() == b"1" * 5000
    assert source.annotations("data.json").read_bytes() == b"[]" and source.revision == "c" * 40
    assert source.media("one.mp4") is None and source.media("") is None
    assert sorted(os.listdir(tmp_path / "extracted"))[0] == whole.parents[2].name

    monkeypatch.setattr(source_files, "ZipFile", None)  # a second extraction would fail
    again = SourceFiles("authors/set", REMEDY)
    again.unpack("*.zip", "top")
    assert again.media("a/one.mp4") == whole


def test_interrupted_extraction_goes_on_where_it_stopped(tmp_path, hub, monkeypatch):
    archive = write_zip(tmp_path / "video.zip", {f"v/{k}.mp4": bytes([k]) * 3000 for k in range(4)})
    source, _ = hub({"video.zip": archive})
    opened, real = [], zipfile.ZipFile.open

    def failing(self, member, *arguments, **keywords):
        opened.append(member.filename)
        if len(opened) == 3:
            raise KeyboardInterrupt
        return real(self, member, *arguments, **keywords)

    monkeypatch.setattr(zipfile.ZipFile, "open", failing)
    source.unpack("video.zip")
    with pytest.raises(KeyboardInterrupt):
        source.media("v/0.mp4")
    assert [name for name in os.listdir(tmp_path / "extracted") if not name.endswith((".partial", ".lock"))] == []
    assert source.media("v/0.mp4") is not None
    assert opened == ["v/0.mp4", "v/1.mp4", "v/2.mp4", "v/2.mp4", "v/3.mp4"]
    assert [source.media(f"v/{k}.mp4").read_bytes() for k in range(4)] == [bytes([k]) * 3000 for k in range(4)]


@pytest.mark.parametrize("name", ["../out.mp4", "/out.mp4", "a/../../out.mp4"])
def test_archive_never_writes_outside_its_folder(tmp_path, hub, name):
    source, _ = hub({"video.zip": write_zip(tmp_path / "video.zip", {"fine.mp4": b"1", name: b"2"})})
    source.unpack("video.zip")
    with pytest.raises(ValueError, match="outside the archive's folder"):
        source.media("fine.mp4")
    assert not list(tmp_path.rglob("*.mp4"))


def test_damaged_archive_says_what_to_do(tmp_path, hub):
    archive = write_zip(tmp_path / "video.zip", {"one.mp4": os.urandom(5000)})
    content = bytearray(archive.read_bytes())
    content[200] ^= 255
    archive.write_bytes(content)
    source, _ = hub({"video.zip": archive})
    source.unpack("video.zip")
    for _ in range(2):
        with pytest.raises(MissingDataError, match="is damaged .* delete .*video.zip"):
            source.media("one.mp4")


def test_archive_is_not_fetched_for_media_that_lie_elsewhere(tmp_path, hub):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "one.mp4").write_bytes(b"1")
    _, downloads = hub({"video.zip": write_zip(tmp_path / "video.zip", {"two.mp4": b"2"})})
    source = SourceFiles("authors/set", REMEDY, media=tmp_path / "mine")
    source.unpack("video.zip")
    assert source.media("one.mp4") == tmp_path / "mine" / "one.mp4" and downloads == []
    assert source.media("two.mp4").read_bytes() == b"2" and downloads == ["video.zip"]
    assert source.media("three.mp4") is None and downloads == ["video.zip"]


def test_local_folder_is_unpacked_by_its_owner(tmp_path):
    folder = tmp_path / "my data"
    folder.mkdir()
    write_zip(folder / "video.zip", {"videos/one.mp4": b"1"})
    with pytest.raises(MissingDataError, match="no folder video or videos: .*cd '.*/my data'; unzip -n video.zip`"):
        SourceFiles(folder, REMEDY).unpack("video.zip", "video", "videos")
    SourceFiles(folder, REMEDY, media=tmp_path).unpack("video.zip", "video", "videos")
    (folder / "videos").mkdir()
    source = SourceFiles(folder, REMEDY)
    source.unpack("video.zip", "video", "videos")
    assert source.media("videos/one.mp4") is None  # its other files are missing as any are


def test_names_are_found_at_any_depth_and_through_links(tmp_path, hub):
    for name in ("elsewhere/deep/c.mp4", "folder/a.mp4", "folder/sub/b.mp4", "folder/.hidden.mp4"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "elsewhere")
    source = SourceFiles(tmp_path / "folder", REMEDY)
    assert source.names("**/*.mp4") == ["a.mp4", "linked/deep/c.mp4", "sub/b.mp4"]
    assert source.names("*.mp4") == ["a.mp4"]
    published, _ = hub({"a.mp4": None, "sub/b.mp4": None, "c.txt": None})
    assert published.names("**/*.mp4") == ["a.mp4", "sub/b.mp4"]
