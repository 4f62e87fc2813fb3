import os
from io import BytesIO

import numpy as np
import pytest
from datasets import Dataset
from PIL import Image

from datasets_rgpt4d import media_check, unusable_media
from datasets_rgpt4d.schema import TRAINING_FEATURES, training_row
from datasets_rgpt4d.world4d_video import write_video


def row(id, images=(), videos=()):
    blocks = [{"type": "image"} for _ in images] + [{"type": "video"} for _ in videos]
    question = {"role": "user", "content": [*blocks, {"type": "text", "text": "?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "!"}]}
    return training_row(id, "vsti", "", "r", [question, answer], images, videos)


def dataset(*rows):
    return Dataset.from_list(list(rows), features=TRAINING_FEATURES)


@pytest.fixture
def media(tmp_path):
    noise = np.random.default_rng(0)
    write_video(tmp_path / "whole.mp4", iter(noise.integers(0, 256, (40, 32, 32, 3), dtype=np.uint8)), 10, 32)
    whole = (tmp_path / "whole.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) * 2 // 3])
    start = whole.index(b"mdat") - 4
    end = start + int.from_bytes(whole[start : start + 4])
    damaged = whole[: (start + 2 * end) // 3] + bytes(end - (start + 2 * end) // 3) + whole[end:]
    (tmp_path / "damaged.mp4").write_bytes(damaged)  # its first frame can be decoded
    (tmp_path / "empty.mp4").write_bytes(b"")
    picture = Image.fromarray(noise.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    picture.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:900])
    return tmp_path


def png(cut=0):
    buffer = BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(buffer, "png")
    content = buffer.getvalue()
    return {"path": None, "bytes": content[: len(content) - cut]}


def rows_of(media):
    return dataset(
        row("good", [png(), media / "whole.jpg"], [media / "whole.mp4"]),
        row("absent", videos=[media / "whole.mp4", media / "absent.mp4"]),
        row("cut", videos=[media / "cut.mp4"]),
        row("empty", videos=[media / "empty.mp4"]),
        row("cut-picture", [media / "cut.jpg"]),
        row("cut-bytes", [png(), png(cut=300)]),
        row("words"),
        row("damaged", videos=[media / "damaged.mp4"]),
    )


@pytest.mark.parametrize("num_proc", [1, 2])
def test_full_check_finds_what_cannot_be_decoded(media, num_proc):
    found = unusable_media(rows_of(media), "full", media / "known.jsonl", num_proc)
    reasons = {one.id: one.reason for one in found.values()}
    assert reasons == {
        "absent": "the video is missing",
        "cut": "the video cannot be read",
        "empty": "the video is empty",
        "cut-picture": "the image cannot be read",
        "cut-bytes": "the image cannot be read",
        "damaged": "the video cannot be read",
    }
    assert list(found) == [1, 2, 3, 4, 5, 7]
    assert str(media / "absent.mp4") in found[1].detail and "cut.mp4" in found[2].detail


def test_check_of_existence_decodes_nothing(media, monkeypatch):
    monkeypatch.setattr(media_check, "decode_video", None)
    monkeypatch.setattr(media_check.PILImage, "open", None)
    found = unusable_media(rows_of(media), "exists", media / "known.jsonl")
    assert {one.id for one in found.values()} == {"absent", "empty"}


def test_each_file_is_read_once_and_never_again_unless_it_changes(media, monkeypatch):
    read = []
    decode = media_check.decode_video
    monkeypatch.setattr(
        media_check, "decode_video", lambda one, **more: read.append(one["path"]) or decode(one, **more)
    )
    rows = dataset(*(row(str(i), videos=[media / "whole.mp4"]) for i in range(3)), row("3", videos=[media / "cut.mp4"]))
    known = media / "known.jsonl"
    found = unusable_media(rows, "full", known)
    assert sorted(read) == [str(media / "cut.mp4"), str(media / "whole.mp4")]
    with known.open("a") as file:
        file.write('["videos", "torn')  # as a kill leaves it
    assert unusable_media(rows, "full", known) == found and len(read) == 2

    (media / "cut.mp4").write_bytes((media / "whole.mp4").read_bytes())
    os.utime(media / "cut.mp4", ns=(1, 1))
    assert unusable_media(rows, "full", known) == {} and len(read) == 3


def test_findings_of_an_interrupted_check_are_kept(media, monkeypatch):
    rows = dataset(*(row(str(i), [png() | {"path": f"{i}.png"}]) for i in range(70)))
    problem, seen = media_check.medium_problem, []

    def interrupted(*arguments):
        if len(seen) == 40:
            raise KeyboardInterrupt
        seen.append(arguments)
        return problem(*arguments)

    monkeypatch.setattr(media_check, "medium_problem", interrupted)
    with pytest.raises(KeyboardInterrupt):
        unusable_media(rows, "full", media / "known.jsonl")
    seen.clear()
    monkeypatch.setattr(media_check, "medium_problem", lambda *a: seen.append(a) or problem(*a))
    assert unusable_media(rows, "full", media / "known.jsonl") == {}
    assert len(seen) == 70 - media_check.ROWS_AT_ONCE
