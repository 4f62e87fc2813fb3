"""What a student perceives: its hidden states, read by the perception decoder and the teacher's heads (Eq. 3 and 4)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from transformers import PreTrainedModel

from modeling_rgpt4d.perception_decoder import PerceptionDecoder, frame_hidden_states

from .distillation_windows import Window, cut, distillation_windows, video_lengths
from .teachers import Teacher, windows_at_once


def student_latents(
    decoder: PerceptionDecoder,
    hidden_states: Tensor,
    input_ids: Tensor,
    config,
    lengths: Sequence[int],
    windows: Sequence[Window],
    num_frames: int,
) -> Tensor:
    """Eq. 3: the student's latents of each window.

    Args:
        hidden_states: `(B, S, c)` of the language model, after its last norm.
        input_ids: `(B, S)`.
        config: the model's, for the id of frame tokens and their grid.
        lengths: real frames of each video of the batch.
        windows: at least one.
        num_frames: frames of a window.

    Returns: `(W, taps, N', h', w', c')`.
    """
    videos = frame_hidden_states(hidden_states, input_ids, config.video_token_id, lengths, config.frame_grid)
    frames = torch.stack(cut(videos, windows, num_frames))
    return decoder(frames.to(decoder.dtype))


@torch.no_grad()
def perceive(
    model: PreTrainedModel,
    decoder: PerceptionDecoder,
    heads: Teacher,
    inputs: Mapping[str, Any],
    signals: Sequence[str] | None = None,
    show_progress: bool = False,
) -> tuple[list[Window], dict[str, Tensor]]:
    """What a trained model perceives in the videos of its inputs.

    Args:
        model: an `RGPT4DForConditionalGeneration`, in evaluation mode.
        decoder: the perception decoder that was trained with it.
        heads: the teacher that it was trained with, on the model's device.
        inputs: what the processor returns, on the model's device, without labels; for a model with `config.geometry_fusion`
            also `video_geometry`, the teacher's deepest latents, as in training of the frames without marks.
        signals: which of the teacher's signals; all by default.
        show_progress: show a bar over the windows.

    Returns: the windows, and the signals in them, `(W, C, N, H, W)` float32.
    Raises: `ValueError` if no video has as many frames of different times in a row as the teacher's window, and if
        `video_geometry` is missing.
    """
    if "pixel_values_videos" not in inputs:
        raise ValueError("there is no video in the inputs, so there is nothing to perceive")
    fusion = getattr(model.config, "geometry_fusion", "none")
    if fusion != "none" and inputs.get("video_geometry") is None:
        raise ValueError(
            f"the model's geometry_fusion is {fusion!r}, but the inputs have no video_geometry: add the deepest latents that "
            'the teacher has of the frames without marks, inputs["video_geometry"] = heads.perceive(frames, image_mean, '
            "image_std, signals=()).latents[:, -1]"
        )
    lengths = video_lengths(inputs["video_timestamps"])
    windows = distillation_windows(lengths, heads.num_frames, inputs["video_timestamps"])
    if not windows:
        raise ValueError(
            f"the videos have {lengths} frames, but the teacher sees {heads.num_frames} of different times at once: sample "
            "as many frames of a video that has them"
        )
    hidden_states = model.base_model(**inputs, use_cache=False).last_hidden_state
    latents = student_latents(
        decoder, hidden_states, inputs["input_ids"], model.config, lengths, windows, heads.num_frames
    )
    wanted = heads.signals if signals is None else signals
    decoded = []
    with tqdm(total=len(latents), desc="windows", unit="window", disable=not show_progress) as bar:
        for part in latents.split(windows_at_once(heads)):
            decoded.append(heads.decode(part, wanted))
            bar.update(len(part))
    return windows, {name: torch.cat([one[name] for one in decoded]) for name in wanted}


def stitch(
    windows: Sequence[Window], signals: Mapping[str, Tensor], lengths: Sequence[int]
) -> list[dict[str, Tensor] | None]:
    """Windows put together to whole videos: where two overlap the later one stays, except for its first frame's flow,
    which has no predecessor there. Nothing is brought to one scale or one camera: each window keeps its own.

    Args:
        windows, signals: as `perceive` returns them.
        lengths: frames of each video.

    Returns: for each video `{signal: (C, length, H, W)}`, or `None` if it is shorter than a window.
    """
    videos: list[dict[str, Tensor] | None] = [None] * len(lengths)
    for index, window in enumerate(windows):
        if videos[window.video] is None:
            videos[window.video] = {}
        whole = videos[window.video]
        for name, values in signals.items():
            part = values[index]
            if name not in whole:
                whole[name] = part.new_zeros(part.shape[0], lengths[window.video], *part.shape[2:])
            # A window that begins where the one before ended keeps its own meaningless first flow: there is no other.
            overlaps = name == "flow" and index > 0 and windows[index - 1].video == window.video
            overlaps = overlaps and windows[index - 1].first + part.shape[1] > window.first
            skipped = int(overlaps)
            whole[name][:, window.first + skipped : window.first + part.shape[1]] = part[:, skipped:]
    return videos
