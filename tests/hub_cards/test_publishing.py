import inspect
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi

from hub_cards import publish


class RecordingApi:
    """Stands for `HfApi`: takes exactly its arguments and remembers the calls."""

    def __init__(self, private=True):
        self.calls, self.private = [], private

    def __getattr__(self, name):
        signature = inspect.signature(getattr(HfApi, name))

        def call(*args, **kwargs):
            bound = signature.bind(self, *args, **kwargs).arguments
            self.calls.append((name, {key: value for key, value in bound.items() if key != "self"}))
            return SimpleNamespace(private=self.private, commit_url="https://hub/commit/1")

        return call


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n", encoding="utf-8")
    (tmp_path / "model.safetensors").write_bytes(b"0")
    return tmp_path


def test_publish_makes_a_private_repository_and_uploads_the_folder(folder):
    api = RecordingApi()
    assert publish(folder, "user/small", api=api) == "https://hub/commit/1"
    names = [name for name, _ in api.calls]
    assert names == ["create_repo", "repo_info", "upload_folder"]
    assert api.calls[0][1] == {"repo_id": "user/small", "repo_type": "model", "private": True, "exist_ok": True}
    assert api.calls[2][1]["folder_path"] == folder and api.calls[2][1]["repo_id"] == "user/small"


def test_publish_of_a_metric_makes_a_space(folder):
    api = RecordingApi()
    publish(folder, "user/metric", repo_type="space", api=api)
    assert api.calls[0][1]["space_sdk"] == "gradio"


def test_publish_does_not_upload_to_a_public_repository_unless_asked(folder):
    api = RecordingApi(private=False)
    with pytest.raises(ValueError, match="user/small exists and is public"):
        publish(folder, "user/small", api=api)
    assert "upload_folder" not in [name for name, _ in api.calls]
    publish(folder, "user/small", private=False, api=api)
    assert api.calls[-1][0] == "upload_folder"


def test_publish_refuses_before_anything_is_sent(folder):
    api = RecordingApi()
    (folder / "checkpoint-3").mkdir()
    (folder / "checkpoint-3" / "optimizer.pt").write_bytes(b"0")
    with pytest.raises(ValueError, match="holds pickles .*optimizer.pt"):
        publish(folder, "user/small", api=api)
    (folder / "checkpoint-3" / "optimizer.pt").unlink()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="nothing but its card"):
        publish(folder, "user/small", api=api)
    (folder / "README.md").write_text("# no front matter\n", encoding="utf-8")
    with pytest.raises(ValueError, match="names no license"):
        publish(folder, "user/small", api=api)
    (folder / "README.md").unlink()
    with pytest.raises(ValueError, match="has no card"):
        publish(folder, "user/small", api=api)
    assert api.calls == []
