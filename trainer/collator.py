from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import ProcessorMixin

from .distillation_windows import cut, distillation_windows, video_lengths

IGNORE_INDEX = -100

TargetSource = Callable[[dict[str, Any], dict[str, Any], torch.Tensor], dict[str, torch.Tensor]]


@dataclass
class P4DCollator:
    r"""Turn conversations with videos, images and regions into a training batch.

    Args:
        processor: an `RGPT4DProcessor`; its chat template must mark the assistant's words with `{% generation %}`.
        num_frames: frames sampled from each video; a shorter video gives all that it has.
        targets: for [`GroundTruthTeacher`] and [`CachedTeacher`], what is to be perceived: a function `(row, video, seconds)
            -> {name: Tensor}`, called once for each window of a video. `video` is the block of the message, `seconds` are the
            times of the window's frames, `(window,)` float32.
        window: frames that the teacher sees at once; `num_frames` by default. See `distillation_windows`.
        packed: put all samples of the batch into one row, without padding; attention stays inside each sample, because
            `position_ids` start anew at each.
        for_teacher: where region or time marks are drawn, also give the frames without them. `False` saves the copy where
            there is no teacher.

    Call it with a list of rows. A row has `messages`, a list of `{"role", "content"}`; content is a string or a list of
    blocks as `RGPT4DProcessor.apply_chat_template` takes them. Keys whose value is `None` are left out: `datasets` adds
    them to structs. Returns:
        - `input_ids`, `attention_mask`, `labels`: `(batch, length)` int64, padded on the right. Labels hold the
          assistant's answers and their end tokens, all else is -100. If `packed`, `(1, sum of lengths)`, and
          `position_ids` instead of `attention_mask`.
        - `pixel_values_videos` `(num_videos, num_frames, 3, H, W)`, `video_timestamps` `(num_videos, num_frames)`
          float32 seconds, negative where a frame only fills up, `pixel_values` `(num_images, 3, H, W)`, where there are any;
          `unmarked_pixel_values_videos`, as `pixel_values_videos`, where something is drawn.
        - `perception_targets`: `{name: (num_windows, ...)}`, if `targets` is given and there are windows.

    Raises:
        `ValueError`: a row without a trainable answer.
    """

    processor: ProcessorMixin
    num_frames: int
    targets: TargetSource | None = None
    window: int | None = None
    packed: bool = False
    for_teacher: bool = True

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        conversations = [_without_none(row["messages"]) for row in rows]
        batch = self.processor.apply_chat_template(
            conversations,
            tokenize=True,
            return_dict=True,
            return_tensors="np",  # transformers walks through all ids to find the answers: ten times slower in a tensor
            return_assistant_tokens_mask=True,
            processor_kwargs={
                "num_frames": self.num_frames,
                "return_unmarked": self.for_teacher,
                "padding": True,
                "padding_side": "right",
            },
        )
        batch = {name: torch.as_tensor(values) for name, values in batch.items()}
        answer_mask = batch.pop("assistant_masks").bool()
        for index, row in enumerate(rows):
            if not answer_mask[index].any():
                raise ValueError(
                    f"Row {row.get('id', index)} has no assistant answer to train on. Each conversation needs a message "
                    'with role "assistant" and some text.'
                )
        batch["labels"] = batch["input_ids"].masked_fill(~answer_mask, IGNORE_INDEX)
        if self.targets is not None and "pixel_values_videos" in batch:
            targets = self._targets(rows, conversations, batch["video_timestamps"])
            if targets:
                batch["perception_targets"] = targets
        return _pack(batch) if self.packed else batch

    def _targets(self, rows, conversations, timestamps: torch.Tensor) -> dict[str, torch.Tensor]:
        videos = [
            (row, block)
            for row, conversation in zip(rows, conversations, strict=True)
            for message in conversation
            for block in message["content"]
            if isinstance(block, dict) and block["type"] in ("video", "video_url")
        ]
        window = self.window or self.num_frames
        windows = distillation_windows(video_lengths(timestamps), window, timestamps)
        found = [
            self.targets(*videos[one.video], seconds)
            for one, seconds in zip(windows, cut(timestamps, windows, window), strict=True)
        ]
        return {name: torch.stack([torch.as_tensor(one[name]) for one in found]) for name in found[0]} if found else {}


def _pack(batch: dict[str, Any]) -> dict[str, Any]:
    """All samples in one row. The libraries' attention tells them apart by position ids that start anew."""
    real = batch.pop("attention_mask").bool()
    positions = torch.arange(real.shape[1]).expand_as(real)  # padded on the right
    packed = {"input_ids": batch["input_ids"], "labels": batch["labels"], "position_ids": positions}
    return {**batch, **{name: values[real][None] for name, values in packed.items()}}


def _without_none(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def clean(block):
        return {key: value for key, value in block.items() if value is not None} if isinstance(block, dict) else block

    return [
        {**message, "content": [clean(b) for b in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]
