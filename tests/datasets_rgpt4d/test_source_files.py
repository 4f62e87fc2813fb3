import json
from types import SimpleNamespace

import pytest
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

from datasets_rgpt4d import VSTITrain, source_files
from datasets_rgpt4d.source_files import MissingDataError, SourceFiles

REMEDY = "Get it there."
OLD, NEW = "a" * 40, "b" * 40
ANNOTATIONS = "vstibench_train/qa_camera_displacement.json"


def http_error(kind, message):
    return kind(message, response=SimpleNamespace(headers={}, request=None))


def annotations(answer):
    turns = [{"from": "human", "value": "<image>\nHow far?"}, {"from": "gpt", "value": answer}]
    return [{"id": "1", "question_type": "displacement", "video": "scannet/videos/a.mp4", "conversations": turns}]


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The data set of VSTI-Bench's authors at two commits, of which the tag v1 names the first. `hub.downloads` has what was
    downloaded, `hub.refuses` the error of every request, `hub.refuses_files` that of every download."""
    state = SimpleNamespace(main=NEW, downloads=[], refuses=None, refuses_files=None, asked=[])
    for commit, answer in ((OLD, "1.6"), (NEW, "2.5")):
        for name in (ANNOTATIONS, "scannet/videos/a.mp4"):
            path = tmp_path / commit / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(annotations(answer)))

    def dataset_info(location, revision=None):
        state.asked.append(revision)
        if state.refuses:
            raise state.refuses
        if location != VSTITrain.HUB_ID:
            raise http_error(RepositoryNotFoundError, "404 Repository Not Found")
        commit = {None: state.main, "v1": OLD, OLD: OLD, NEW: NEW}[revision]
        siblings = [path.relative_to(tmp_path / commit) for path in (tmp_path / commit).rglob("*.*")]
        return SimpleNamespace(sha=commit, siblings=[SimpleNamespace(rfilename=name.as_posix()) for name in siblings])

    def download(location, name, repo_type, revision):
        assert location == VSTITrain.HUB_ID and repo_type == "dataset"
        if state.refuses_files:
            raise state.refuses_files
        state.downloads.append((revision, name))
        return str(tmp_path / revision / name)

    monkeypatch.setattr(source_files, "HfApi", lambda: SimpleNamespace(dataset_info=dataset_info))
    monkeypatch.setattr(source_files, "hf_hub_download", download)
    return state


def build(tmp_path, **options):
    builder = VSTITrain(cache_dir=str(tmp_path / "cache"), **options)
    builder.download_and_prepare()
    return builder.as_dataset(split="train")


def test_a_data_set_on_the_hub_records_the_commit(hub, tmp_path):
    (row,) = build(tmp_path)
    assert row["revision"].split()[0] == NEW and row["messages"][1]["content"][0]["text"] == "2.5"
    assert row["videos"][0]["path"] == str(tmp_path / NEW / "scannet/videos/a.mp4")
    assert {revision for revision, _ in hub.downloads} == {NEW}


@pytest.mark.parametrize("revision", ["v1", OLD])
def test_a_pinned_revision_is_read_and_recorded_as_its_commit(hub, tmp_path, revision):
    build(tmp_path)
    (row,) = build(tmp_path, revision=revision)
    assert row["revision"].split()[0] == OLD and row["messages"][1]["content"][0]["text"] == "1.6"


def test_a_branch_that_moves_gives_new_rows_but_not_within_a_build(hub, tmp_path):
    hub.main = OLD
    started = VSTITrain(cache_dir=str(tmp_path / "cache"))
    hub.main = NEW
    started.download_and_prepare()
    assert {row["revision"].split()[0] for row in started.as_dataset(split="train")} == {OLD}
    assert {row["revision"].split()[0] for row in build(tmp_path)} == {NEW}


def test_hub_annotations_go_with_local_videos(hub, tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    (media / "a.mp4").write_text("mine")
    (tmp_path / NEW / "scannet/videos/a.mp4").unlink()
    (row,) = build(tmp_path, media=str(media))
    assert row["videos"][0]["path"] == str(media / "a.mp4") and row["revision"].split()[0] == NEW
    assert hub.downloads == [(NEW, ANNOTATIONS)]


def test_a_local_file_is_preferred_to_a_download(hub, tmp_path):
    media = tmp_path / "media/scannet/videos"
    media.mkdir(parents=True)
    (media / "a.mp4").write_text("mine")
    assert build(tmp_path, media=str(tmp_path / "media"))[0]["videos"][0]["path"] == str(media / "a.mp4")
    assert [name for _, name in hub.downloads] == [ANNOTATIONS]


def test_a_gated_data_set_says_to_accept_its_terms(hub, tmp_path):
    hub.refuses = http_error(GatedRepoError, "403 Forbidden")
    with pytest.raises(MissingDataError, match="is gated: accept its terms .* `hf auth login`. The annotations are in"):
        VSTITrain(cache_dir=str(tmp_path))


def test_gated_files_end_the_build_with_the_remedy(hub, tmp_path):
    hub.refuses_files = http_error(GatedRepoError, "403 Forbidden")
    with pytest.raises(DatasetGenerationError) as error:
        build(tmp_path)
    assert isinstance(error.value.__cause__, MissingDataError)
    assert ANNOTATIONS in str(error.value.__cause__) and VSTITrain.REMEDY in str(error.value.__cause__)


@pytest.mark.parametrize(
    "refusal", [http_error(HfHubHTTPError, "503 Service Unavailable"), ConnectionError("offline mode is enabled")]
)
def test_a_hub_that_cannot_be_reached_is_named(hub, refusal):
    hub.refuses = refusal
    with pytest.raises(MissingDataError, match=f"can be reached .*{str(refusal)[:7]}.*{REMEDY}"):
        SourceFiles(VSTITrain.HUB_ID, REMEDY)


@pytest.mark.parametrize("location", ["authors/absent", "./no/such/folder"])
def test_an_absent_data_set_says_what_to_do(hub, location):
    with pytest.raises(MissingDataError, match=f"{location} is neither a folder here nor a data set .*{REMEDY}"):
        SourceFiles(location, REMEDY)


def test_a_local_folder_has_no_revision_to_choose(tmp_path):
    with pytest.raises(ValueError, match="is a local folder; a revision names a commit"):
        SourceFiles(tmp_path, REMEDY, revision="v1")


def test_the_revision_of_a_folder_is_that_of_the_annotations_read(tmp_path):
    (tmp_path / "a.json").write_text("1")
    (tmp_path / "b.mp4").write_text("1")

    def revision():
        source = SourceFiles(tmp_path, REMEDY)
        source.annotations("a.json"), source.media("b.mp4")
        return source.revision

    first = revision()
    (tmp_path / "b.mp4").write_text("22")
    assert revision() == first and first.startswith("sha256:")
    (tmp_path / "a.json").write_text("2")
    assert revision() != first


@pytest.mark.parametrize("where", ["location", "media"])
def test_the_fingerprint_changes_with_any_file(hub, tmp_path, where):
    folders = {name: tmp_path / name for name in ("location", "media")}
    for folder in folders.values():
        folder.mkdir()

    def fingerprints():
        local = SourceFiles(folders["location"], REMEDY, media=folders["media"])
        on_hub = SourceFiles(VSTITrain.HUB_ID, REMEDY, media=folders["media"])
        return local.fingerprint, on_hub.fingerprint

    before = fingerprints()
    assert fingerprints() == before and before[1] != SourceFiles(VSTITrain.HUB_ID, REMEDY).fingerprint
    (folders[where] / "new.mp4").write_text("1")
    after = fingerprints()
    assert after[0] != before[0] and (after[1] != before[1]) == (where == "media")
    hub.main = OLD
    assert fingerprints()[1] != after[1]


def test_media_are_never_taken_from_outside_the_folder(tmp_path):
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret").write_text("mine")
    for source in (
        SourceFiles(tmp_path / "inside", REMEDY),
        SourceFiles(tmp_path / "inside", REMEDY, media=tmp_path / "inside"),
    ):
        assert source.media("../secret", str(tmp_path / "secret"), "a/../../secret") is None
