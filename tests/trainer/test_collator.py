import pytest
import torch

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


def test_collator_gives_truth_at_the_sampled_seconds(processor, rows):
    def truth(row, seconds):
        return {"depth": seconds.view(1, 4, 1, 1) + 10 * int(row["id"])}

    batch = P4DCollator(processor, num_frames=4, truth=truth)(rows[:4])
    assert batch["perception_truth"]["depth"].shape == (2, 1, 4, 1, 1)
    torch.testing.assert_close(batch["perception_truth"]["depth"][1].flatten(), batch["video_timestamps"][1] + 20)


def test_collator_names_a_row_without_answer(processor, rows):
    with pytest.raises(ValueError, match="Row 1 has no assistant answer"):
        P4DCollator(processor, num_frames=4)([{**rows[1], "messages": rows[1]["messages"][:1]}])


def test_collator_refuses_truth_for_several_videos(processor, rows):
    video = rows[0]["messages"][0]["content"][0]
    row = {
        **rows[0],
        "messages": [{"role": "user", "content": [video, *rows[0]["messages"][0]["content"]]}, rows[0]["messages"][1]],
    }
    with pytest.raises(ValueError, match="2 videos"):
        P4DCollator(processor, num_frames=4, truth=lambda row, seconds: {})([row])
