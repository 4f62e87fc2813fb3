from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

IGNORE_INDEX = -100


@dataclass
class P4DCollator:
    r"""Turn conversations with videos, images and regions into a training batch.

    Args:
        processor: an `RGPT4DProcessor`; its chat template must mark the assistant's words with `{% generation %}`.
        num_frames: frames sampled from each video.
        truth: for [`GroundTruthTeacher`], a function `(row, timestamps) -> {signal: Tensor}` that gives the exact signals
            of the row's one video at `timestamps`, `(num_frames,)` float32 seconds. Shapes `(C, num_frames, H, W)`.

    Call it with a list of rows. A row has `messages`, a list of `{"role", "content"}`; content is a string or a list of
    blocks as `RGPT4DProcessor.apply_chat_template` takes them. Keys whose value is `None` are left out: `datasets` adds
    them to structs. Returns:
        - `input_ids`, `attention_mask`, `labels`: `(batch, length)` int64, padded on the right. Labels hold the
          assistant's answer and its end token, all else is -100.
        - `pixel_values_videos` `(num_videos, num_frames, 3, H, W)`, `video_timestamps` `(num_videos, num_frames)`
          float32 seconds, `pixel_values` `(num_images, 3, H, W)`, where there are any.
        - `perception_truth`: `{signal: (num_videos, C, num_frames, H, W)}`, if `truth` is given and there are videos.

    Raises:
        `ValueError`: a row without a trainable answer, or a row with several videos although `truth` is given.
    """

    processor: ProcessorMixin
    num_frames: int
    truth: Callable[[dict[str, Any], torch.Tensor], dict[str, torch.Tensor]] | None = None

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        conversations = [_without_none(row["messages"]) for row in rows]
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            return_assistant_tokens_mask=True,
            processor_kwargs={"num_frames": self.num_frames, "padding": True, "padding_side": "right"},
        )
        answer_mask = torch.as_tensor(batch.pop("assistant_masks")).bool()
        for index, row in enumerate(rows):
            if not answer_mask[index].any():
                raise ValueError(
                    f"Row {row.get('id', index)} has no assistant answer to train on. Each conversation needs a message "
                    'with role "assistant" and some text.'
                )
        batch["labels"] = batch["input_ids"].masked_fill(~answer_mask, IGNORE_INDEX)
        if self.truth is not None and "pixel_values_videos" in batch:
            batch["perception_truth"] = self._perception_truth(rows, conversations, batch["video_timestamps"])
        return dict(batch)

    def _perception_truth(self, rows, conversations, timestamps: torch.Tensor) -> dict[str, torch.Tensor]:
        counts = [
            sum(block["type"] == "video" for message in c for block in message["content"] if isinstance(block, dict))
            for c in conversations
        ]
        for row, count in zip(rows, counts, strict=True):
            if count > 1:
                raise ValueError(f"Row {row.get('id')} has {count} videos, but its ground truth describes one.")
        with_video = [row for row, count in zip(rows, counts, strict=True) if count == 1]
        truths = [self.truth(row, seconds) for row, seconds in zip(with_video, timestamps, strict=True)]
        return {name: torch.stack([torch.as_tensor(truth[name]) for truth in truths]) for name in truths[0]}


def _without_none(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def clean(block):
        return {key: value for key, value in block.items() if value is not None} if isinstance(block, dict) else block

    return [
        {**message, "content": [clean(b) for b in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]
