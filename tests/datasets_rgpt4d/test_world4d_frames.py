import dataclasses

import numpy as np
import pytest

from datasets_rgpt4d import to_conversation
from datasets_rgpt4d.world4d import CONFIGS, clip_rows
from datasets_rgpt4d.world4d_frames import World4DFrames, save_frames
from datasets_rgpt4d.world4d_questions import scene_questions
from modeling_rgpt4d import decode_video

TINY = dataclasses.replace(CONFIGS[0], size_px=64, train_clips=3)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return World4DFrames(save_frames(tmp_path_factory.mktemp("frames") / "train", TINY, "train", num_frames=8))


def test_frames_and_times_are_those_sampled_from_the_video(clips, tmp_path):
    for clip in range(3):
        path = clip_rows(TINY, "train", clip, tmp_path)[0]["video"]["path"]
        decoded, block = decode_video(path, num_frames=8), clips.video(clip)
        kept = decode_video(block["video"], fps=block["fps"], source_indices=block["frames_indices"])
        assert np.array_equal(kept.indices, decoded.indices)
        np.testing.assert_allclose(kept.timestamps, decoded.timestamps, atol=1e-6)
        # The file's are compressed, with a quarter of the colours' resolution
        assert np.abs(kept.frames.astype(int) - decoded.frames).mean() < 8
        assert kept.duration == pytest.approx(decoded.duration)


def test_questions_are_those_of_the_clips(clips):
    expected = [row for clip in range(3) for row in clip_rows_without_video(clip)]
    assert [(row["question"], row["answer"]) for row in clips.rows] == expected


def clip_rows_without_video(clip):
    questions = scene_questions(TINY.scene("train", clip), "train", 64)
    return [(question["question"], question["answer"]) for question in questions]


def test_other_clips_in_the_folder_are_refused_and_the_same_are_kept(clips):
    before = (clips.folder / "frames.npy").stat().st_mtime_ns
    save_frames(clips.folder, TINY, "train", num_frames=8)
    assert (clips.folder / "frames.npy").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="holds other clips"):
        save_frames(clips.folder, TINY, "train", num_frames=4)


def test_unfinished_clips_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no finished clips"):
        World4DFrames(tmp_path)


def test_a_conversation_names_each_object_once():
    rows = [
        question("Which way does <obj_1> move?", ["left", "right"], "left", a=(1, 1, 2, 2)),
        question("Is <obj_1> left of <obj_2>?", ["yes", "no"], "no", a=(3, 3, 4, 4), b=(1, 1, 2, 2)),
        question(
            "Which is red, <obj_1> or <obj_2>?", ["<obj_1>", "<obj_2>"], "<obj_2>", a=(1, 1, 2, 2), b=(5, 5, 6, 6)
        ),
    ]
    messages = to_conversation(rows)
    texts = [block["text"] for message in messages for block in message["content"] if block["type"] == "text"]
    assert texts[0].startswith("Which way does <obj_1> move?")
    assert texts[2].startswith("Is <obj_2> left of <obj_1>?")
    assert texts[4].startswith("Which is red, <obj_1> or <obj_3>?") and "(B) <obj_3>" in texts[4]
    assert texts[1::2] == ["left", "no", "<obj_3>"]
    video = messages[0]["content"][0]
    assert [(region["name"], region["box"]) for region in video["regions"]] == [
        ("obj_1", [1, 1, 2, 2]),
        ("obj_2", [3, 3, 4, 4]),
        ("obj_3", [5, 5, 6, 6]),
    ]
    assert sum(block["type"] == "video" for message in messages for block in message["content"]) == 1
    assert to_conversation(rows, with_answer=False) == messages[:-1]


def question(text, options, answer, **boxes):
    regions = [{"name": f"obj_{n}", "box": list(box)} for n, box in enumerate(boxes.values(), start=1)]
    return {"video": "clip.mp4", "question": text, "options": options, "answer": answer, "regions": regions}


def test_an_open_question_says_its_answer():
    user, answer = to_conversation([question("Describe the video.", [], "a red box")])
    assert user["content"][1]["text"] == "Describe the video." and answer["content"][0]["text"] == "a red box"


def test_a_conversation_without_questions_is_refused():
    with pytest.raises(ValueError, match="at least one question"):
        to_conversation([])


def test_a_conversation_about_several_videos_is_refused():
    rows = [question("Where?", ["a", "b"], "a"), {**question("Where?", ["a", "b"], "a"), "video": "other.mp4"}]
    with pytest.raises(ValueError, match="about one video"):
        to_conversation(rows)
