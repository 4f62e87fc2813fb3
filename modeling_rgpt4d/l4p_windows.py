"""L4P over videos longer than one window: windows that overlap by half, merged as the release merges them."""

from collections.abc import Sequence

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from .modeling_l4p import SIGNALS, L4PModel


def window_starts(num_frames: int, window: int) -> range:
    """First frames of the windows: 0, window / 2, ... up to the last one that is whole.

    Raises: `ValueError` if the windows do not end with the video.
    """
    stride = window // 2
    if num_frames < window or num_frames % stride:
        fitting = max(window, -(-num_frames // stride) * stride)
        raise ValueError(
            f"a video of {num_frames} frames does not end with a window of {window} at steps of {stride}: give it "
            f"{fitting} frames, for example by repeating the last one"
        )
    return range(0, num_frames - window + 1, stride)


@torch.no_grad()
def perceive_video(
    model: L4PModel, pixel_values: Tensor, signals: Sequence[str] = SIGNALS, show_progress: bool = False
) -> dict[str, Tensor]:
    """The signals of a whole video, window by window.

    A later window overwrites an earlier one, with two exceptions. Its first frame has no flow, so the earlier window's
    stays; frame 0 of the video keeps its own, which means nothing. And its depth, which is known up to a scale, is first
    brought to the scale of what it overlaps, see `align_depth`. Rays stay as they are: those of each window are in the frame of
    that window's first camera, and at its scale.

    Args:
        model: in the dtype and on the device to run on.
        pixel_values: `(B, T, 3, H, W)`, normalised, T a multiple of half a window and at least a whole one.
        signals: which heads to run.
        show_progress: show a bar over the windows.

    Returns: signal -> float32 `(B, C, T, height, width)`, conventions of `L4POutput`.
    Raises: `ValueError` for another number of frames or an unknown signal.
    """
    window, num_frames = model.config.num_frames, pixel_values.shape[1]
    merged: dict[str, Tensor] = {}
    starts = window_starts(num_frames, window)
    for start in tqdm(starts, desc="windows", unit="window", disable=not show_progress):
        decoded = model.decode(model.encode(pixel_values[:, start : start + window]), signals)
        for signal, values in decoded.items():
            if signal not in merged:
                shape = (*values.shape[:2], num_frames, *values.shape[3:])
                merged[signal] = values.new_zeros(shape)
            first = 0
            if start > 0 and signal == "flow":
                first = 1
            elif start > 0 and signal == "depth":
                overlap = window - (starts[1] - starts[0])
                values = align_depth(values, merged[signal][:, :, start : start + overlap])
            merged[signal][:, :, start + first : start + window] = values[:, :, first:]
    return merged


def align_depth(depth: Tensor, reference: Tensor) -> Tensor:
    r"""Bring `depth` to the scale of `reference`, which covers its first frames.

    Inverse depths are fitted by unweighted least squares over all pixels of these frames, for each video by itself:
    \(a / \mathrm{depth} + b \approx 1 / \mathrm{reference}\). The fit is applied to all frames; 0 where it is not positive.

    Args:
        depth: `(B, 1, N, H, W)`, 0 for an unknown depth.
        reference: `(B, 1, n, H, W)`, n <= N.
    """
    new, old = _inverse(depth), _inverse(reference)
    # float64: a scale and a shift of nearly equal numbers lose digits
    x, y = (values.flatten(1).double() for values in (new[:, :, : old.shape[2]], old))
    x_mean, y_mean = x.mean(1, keepdim=True), y.mean(1, keepdim=True)
    variance = (x - x_mean).square().sum(1)
    scale = ((x - x_mean) * (y - y_mean)).sum(1) / variance.clamp_min(torch.finfo(variance.dtype).tiny)
    # a constant depth tells no scale beside a shift: then the ratio of the means is one
    scale = torch.where(variance > 0, scale, (y_mean / x_mean).squeeze(1))
    shift = y_mean.squeeze(1) - scale * x_mean.squeeze(1)
    shape = (-1, 1, 1, 1, 1)
    return _inverse(scale.view(shape) * new.double() + shift.view(shape)).to(depth.dtype)


def _inverse(values: Tensor) -> Tensor:
    return torch.where(values > 0, 1 / values, 0)


__all__ = ["align_depth", "perceive_video", "window_starts"]
