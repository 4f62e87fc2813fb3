"""Which frames of a video the teacher sees at once."""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Window(NamedTuple):
    """Frames `first` to `first + num_frames - 1` of one video of a batch."""

    video: int
    first: int


def video_lengths(video_timestamps: Tensor) -> list[int]:
    """Real frames of each video: `(num_videos, num_frames)` seconds or microseconds, negative where a frame only fills up."""
    return (video_timestamps >= 0).sum(dim=1).tolist()


def distillation_windows(
    lengths: Sequence[int], num_frames: int, video_timestamps: Tensor | None = None
) -> list[Window]:
    """Cut videos into the teacher's windows of `num_frames` frames, one after the other.

    The last window of a video ends with it, and so overlaps the one before if the length is no multiple. A video that is
    shorter than a window has none: it is not distilled, and never filled up with frames that are not there.

    Args:
        lengths: real frames of each video of the batch.
        video_timestamps: `(num_videos, num_frames)`; leaves out windows that show a frame twice. The video processor does that
            where more frames are asked for than a video has; nothing moves between the two, whatever happens in the video.

    Returns: the windows in reading order.
    """
    windows = []
    for video, length in enumerate(lengths):
        firsts = list(range(0, length - num_frames + 1, num_frames))
        if firsts and firsts[-1] + num_frames < length:
            firsts.append(length - num_frames)
        windows.extend(Window(video, first) for first in firsts)
    if video_timestamps is None:
        return windows
    times = cut(video_timestamps.cpu(), windows, num_frames)
    return [window for window, moments in zip(windows, times, strict=True) if (moments.diff() > 0).all()]


def cut(frames: Sequence[Tensor] | Tensor, windows: Sequence[Window], num_frames: int) -> list[Tensor]:
    """The windows of per-video tensors `(frames, ...)`: a list of `(num_frames, ...)` views."""
    return [frames[window.video][window.first : window.first + num_frames] for window in windows]
