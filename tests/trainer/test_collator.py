import pytest
import torch
from PIL import Image

from trainer import P4DCollator


def test_collator_labels_are_the_answer_and_its_end(processor, rows):
    batch = P4DCollator(processor, num_frames=4)(rows[:2])
    for labels, answer in zip(batch["labels"], ("left", "left"), strict=True):
        assert processor.tokenizer.decode(labels[labels != -100]) == f"{answer}<|im_end|>"


def test_collator_keeps_videos_and_their_seconds(processor, rows):
    batch = P4DCollator(processor, num_frames=4)(rows[:4])
    assert batch["pixel_values_videos"].shape == (2, 4, 3, 28, 28)
    expected = torch.tensor([[0, 2, 3, 5]]) / torch.tensor([[2.0], [4.0]])  # frames of the six, at 2 and 4 per second
    torch.testing.assert_close(batch["video_timestamps"], expected)
    video_tokens = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<video>")).sum(1)
    assert video_tokens.tolist() == [4 * 2 * 2, 0, 4 * 2 * 2, 0]


def test_collator_ignores_keys_that_are_none(processor, rows):
    row = rows[1]
    padded = [{"type": "text", "video": None, "regions": None, **block} for block in row["messages"][0]["content"]]
    messages = [{"role": "user", "content": padded}, row["messages"][1]]
    collate = P4DCollator(processor, num_frames=4)
    torch.testing.assert_close(collate([{"messages": messages}])["input_ids"], collate([row])["input_ids"])


def test_collator_asks_for_targets_window_by_window(processor, rows):
    asked = []

    def targets(row, video, seconds):
        asked.append((row["id"], video["fps"], seconds.tolist()))
        return {"depth": seconds.view(1, 3, 1, 1) + 10 * int(row["id"])}

    video = rows[0]["messages"][0]["content"][0]
    content = [{**video, "fps": 1.0}, *rows[0]["messages"][0]["content"]]  # a second video before the row's own
    two = {**rows[0], "messages": [{"role": "user", "content": content}, rows[0]["messages"][1]]}
    batch = P4DCollator(processor, num_frames=4, targets=targets, window=3)([two, rows[1], rows[2]])
    # frames 0, 2, 3, 5 of the six: the windows are the first three and the last three of them
    frames = [[0, 2, 3], [2, 3, 5]]
    expected = [
        (row, fps, [index / fps for index in window])
        for row, fps in (("0", 1.0), ("0", 2.0), ("2", 4.0))
        for window in frames
    ]
    assert asked == expected
    assert batch["perception_targets"]["depth"].shape == (6, 1, 3, 1, 1)
    torch.testing.assert_close(batch["perception_targets"]["depth"][5].flatten(), torch.tensor([2.0, 3, 5]) / 4 + 20)


@pytest.mark.parametrize("kind", ["video", "video_url"])
def test_collator_asks_for_targets_of_videos_by_path_and_by_url(processor, rows, tmp_path, kind):
    for index, frame in enumerate(rows[0]["messages"][0]["content"][0]["video"]):
        Image.fromarray(frame).save(tmp_path / f"{index}.png")
    where = {"video": str(tmp_path)} if kind == "video" else {"video_url": {"url": str(tmp_path)}}
    content = [{"type": kind, **where, "fps": 2.0}, {"type": "text", "text": "Which way?"}]
    row = {"id": "7", "messages": [{"role": "user", "content": content}, rows[0]["messages"][1]]}
    asked = []

    def targets(row, video, seconds):
        asked.append((row["id"], video["type"]))
        return {"depth": seconds}

    batch = P4DCollator(processor, num_frames=4, targets=targets)([row, rows[2]])
    assert asked == [("7", kind), ("2", "video")]
    assert batch["perception_targets"]["depth"].shape == (2, 4)


def test_collator_asks_for_no_targets_of_windows_that_are_not_there(processor, rows):
    content = rows[0]["messages"][0]["content"]
    short = {**content[0], "video": content[0]["video"][:3]}  # the processor shows one of its frames twice
    row = {**rows[0], "messages": [{"role": "user", "content": [short, content[1]]}, rows[0]["messages"][1]]}
    batch = P4DCollator(processor, num_frames=4, targets=lambda row, video, seconds: 1 / 0)([row, rows[1]])
    assert "perception_targets" not in batch and "pixel_values_videos" in batch


def test_packed_batch_is_one_row_with_positions_that_start_anew(processor, rows):
    padded, packed = (P4DCollator(processor, num_frames=4, packed=packed)(rows[:4]) for packed in (False, True))
    real = padded["attention_mask"].bool()
    lengths = real.sum(1).tolist()
    assert "attention_mask" not in packed and packed["input_ids"].shape == (1, sum(lengths))
    for name in ("input_ids", "labels"):
        assert torch.equal(packed[name][0], padded[name][real])
    assert packed["position_ids"][0].tolist() == [position for length in lengths for position in range(length)]
    assert torch.equal(packed["pixel_values_videos"], padded["pixel_values_videos"])


def test_collator_gives_frames_without_marks_for_the_teacher_alone(processor, rows):
    batch = P4DCollator(processor, num_frames=4)(rows[:4])
    marked, unmarked = batch["pixel_values_videos"], batch["unmarked_pixel_values_videos"]
    assert not torch.equal(marked[:, 0], unmarked[:, 0]) and torch.equal(marked[:, 1:], unmarked[:, 1:])
    assert "unmarked_pixel_values_videos" not in P4DCollator(processor, num_frames=4, for_teacher=False)(rows[:4])


def test_collator_names_a_row_without_answer(processor, rows):
    with pytest.raises(ValueError, match="Row 1 has no assistant answer"):
        P4DCollator(processor, num_frames=4)([{**rows[1], "messages": rows[1]["messages"][:1]}])
