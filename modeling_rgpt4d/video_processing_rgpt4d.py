"""Videos to normalised frames and their times, without torchvision."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.dataclasses import validate_typed_dict
from PIL import Image
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import PILImageResampling
from transformers.processing_utils import VideosKwargs
from transformers.video_utils import VideoMetadata

from .region_marks import draw_marks
from .time_marks import draw_time
from .video_decoding import DecodedVideo, decode_video

try:
    from transformers.video_processing_utils import VideoProcessorMixin
except ImportError:  # before transformers 5.23 the only base class is the one that needs torchvision
    from transformers.video_processing_utils import BaseVideoProcessor as VideoProcessorMixin

PADDING_TIMESTAMP = -1.0  # marks a frame that only fills up a shorter video of the batch
REFUSED_OPTIONS = ("do_center_crop", "do_pad", "crop_size", "data_format", "input_data_format", "device")


class RGPT4DVideoProcessorKwargs(VideosKwargs, total=False):
    """Options of a call, beside those of every video processor.

    regions (`list`): for each video None or a list of regions as `draw_marks` takes them.
    timestamp_unit (`str`), time_marks (`bool`), return_unmarked (`bool`): see `RGPT4DVideoProcessor`.
    """

    regions: list | tuple | None
    timestamp_unit: str | None
    time_marks: bool | None
    return_unmarked: bool | None


class RGPT4DVideoProcessor(VideoProcessorMixin):
    """Decode videos, sample frames uniformly, draw regions on the first of them, resize, normalise.

    Every frame is converted to RGB, resized by PIL's bicubic filter without keeping its aspect ratio, scaled to [0, 1] and
    normalised to [-1, 1] as NVILA's SigLIP expects: to the bit what the PIL image processor gives for the same picture.

    Args:
        size (`dict`): `{"height": 448, "width": 448}`, pixels.
        num_frames (`int`): frames to sample from each video.
        fps (`float`, *optional*): sample so many frames per second of the video instead of `num_frames`.
        do_sample_frames (`bool`): False takes every frame.
        timestamp_unit (`str`): "s" gives the times of frames as float32 seconds, "us" as int64 microseconds, for engines
            that cast all float inputs to the model's dtype. The model takes both.
        time_marks (`bool`): write its time on every resized frame, above regions, see `draw_time`.
        return_unmarked (`bool`): where regions or times are drawn, also give the same frames without them, for a
            teacher that perceives the scene itself.
        do_resize, resample, do_rescale, rescale_factor, do_normalize, image_mean, image_std: as in any video processor.
    """

    do_resize = True
    size = {"height": 448, "width": 448}
    resample = PILImageResampling.BICUBIC
    do_rescale = True
    rescale_factor = 1 / 255
    do_normalize = True
    image_mean = [0.5, 0.5, 0.5]
    image_std = [0.5, 0.5, 0.5]
    do_convert_rgb = True
    do_sample_frames = True
    num_frames = 16
    fps = None
    timestamp_unit = "s"
    time_marks = False
    return_unmarked = False
    return_metadata = False
    valid_kwargs = RGPT4DVideoProcessorKwargs
    model_input_names = ["pixel_values_videos", "video_timestamps"]

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._set_attributes(**kwargs)

    def preprocess(self, videos: Any, **kwargs) -> BatchFeature:
        """Turn videos into model inputs.

        Args:
            videos: one video or a (nested) list of videos; each anything that `decode_video` reads. A list of pictures
                or of arrays `(H, W, 3)` is one video.
            regions (`list`, *optional*): for each video None or its list of regions, in pixels of its own frames.
            video_metadata (`list`, *optional*): for each video a dict or `VideoMetadata` whose `fps` is the frame rate of
                an array or folder and whose `frames_indices` tells which source frames an array holds, if it was
                sampled (then `total_num_frames` and `duration` are those of the source); `{}` for a video file.
            num_frames, fps, do_sample_frames, size and the other options of the class.
            return_tensors (`str`, *optional*): "pt", or "np" as without it.

        Returns: `BatchFeature` with
            - `pixel_values_videos`: `(num_videos, num_frames, 3, height, width)` float32; shorter videos are followed by
              frames of zeros;
            - `video_timestamps`: `(num_videos, num_frames)` float32, seconds after the first frame of each video (or int64,
              microseconds, see `timestamp_unit`), -1 for the frames that fill up;
            - `unmarked_pixel_values_videos` if `return_unmarked` and something is drawn on a video of the batch: as
              `pixel_values_videos`, without marks; it is no input of the model;
            - `video_metadata` if `return_metadata`: frames, seconds and frames per second (the mean, if they vary) of
              each source. A single frame may have no duration: then it is 0 and the rate None.
        Raises: `ValueError` that names the video and what was expected.
        """
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        refused = [key for key in REFUSED_OPTIONS if kwargs.pop(key, False)]
        if refused:
            raise ValueError(f"{type(self).__name__} has no {refused}; it resizes whole frames on the CPU")
        validate_typed_dict(self.valid_kwargs, kwargs)
        if "num_frames" in kwargs and "fps" in kwargs:
            raise ValueError(
                "give either num_frames or fps, which is a number of frames per second of the video, not both"
            )
        options = {key: getattr(self, key, None) for key in self.valid_kwargs.__annotations__}
        if kwargs.get("do_sample_frames") is False and ("num_frames" in kwargs or "fps" in kwargs):
            raise ValueError("do_sample_frames=False takes all frames; leave out num_frames and fps")
        if "num_frames" in kwargs:
            options["fps"] = None
        options = self._standardize_kwargs(**{**options, **kwargs})
        size = options["size"]
        if options["do_resize"] and not (size and size.height and size.width):
            raise ValueError(f"size must be {{'height': ..., 'width': ...}} in pixels, got {size}")
        if options["timestamp_unit"] not in ("s", "us"):
            raise ValueError(f"timestamp_unit must be 's' or 'us', got {options['timestamp_unit']!r}")
        videos = flatten_videos(videos)
        regions = per_video(options["regions"], videos, "regions")
        metadata = per_video(options["video_metadata"], videos, "video_metadata")

        told = [_reader(meta) for meta in metadata]
        read = [
            self._read(f"video {i}", video, marks, tell, options)
            for i, (video, marks, tell) in enumerate(zip(videos, regions, told, strict=True))
        ]
        decoded, unmarked = [video for video, _ in read], [frames for _, frames in read]
        sizes = {video.frames.shape[1:3] for video in decoded}
        if len(sizes) > 1:
            raise ValueError(f"videos of a batch need frames of one size, got {sorted(sizes)}; leave do_resize on")
        longest = max(len(video.frames) for video in decoded)
        in_seconds = options["timestamp_unit"] == "s"
        timestamps = np.full((len(decoded), longest), PADDING_TIMESTAMP, dtype=np.float32 if in_seconds else np.int64)
        for i, video in enumerate(decoded):
            times = video.timestamps if in_seconds else np.rint(video.timestamps * 1e6)
            timestamps[i, : len(video.frames)] = times
        table = self._value_table(options)
        data = {
            "pixel_values_videos": _normalised([video.frames for video in decoded], longest, table),
            "video_timestamps": timestamps,
        }
        if any(frames is not None for frames in unmarked):
            frames = [v.frames if u is None else u for v, u in zip(decoded, unmarked, strict=True)]
            data["unmarked_pixel_values_videos"] = _normalised(frames, longest, table)
        outputs = BatchFeature(data, tensor_type=options["return_tensors"])
        if options["return_metadata"]:
            outputs["video_metadata"] = [_metadata(video, tell) for video, tell in zip(decoded, told, strict=True)]
        return outputs

    def _read(self, position: str, video: Any, regions: list | None, tell: Callable, options: dict):
        """The sampled frames of one video, resized while they are decoded, with marks; and an array of those without
        marks, or None if it is not wanted or nothing is drawn."""
        path = video.get("path") if isinstance(video, dict) else video if isinstance(video, str | Path) else None
        where = str(path) if path is not None else position
        without_regions = None

        def resized(picture: Image.Image) -> np.ndarray:
            if options["do_resize"]:
                picture = picture.resize((options["size"].width, options["size"].height), options["resample"])
            return np.asarray(picture)

        def each_frame(frame: np.ndarray, index: int) -> np.ndarray:
            nonlocal without_regions
            picture = Image.fromarray(frame)
            if index == 0 and regions:
                if options["return_unmarked"]:
                    without_regions = resized(picture)
                picture = draw_marks(picture, regions, source=where)
            return resized(picture)

        decoded = decode_video(
            video,
            num_frames=options["num_frames"] if options["do_sample_frames"] and not options["fps"] else None,
            sample_fps=options["fps"] if options["do_sample_frames"] else None,
            fps=tell("fps"),
            source_indices=tell("frames_indices"),
            each_frame=each_frame,
            name=where,
        )
        unmarked = None
        if options["return_unmarked"] and (regions or options["time_marks"]):
            unmarked = decoded.frames.copy()
            if without_regions is not None:
                unmarked[0] = without_regions
        if options["time_marks"]:
            for frame, seconds in zip(decoded.frames, decoded.timestamps, strict=True):
                frame[:] = np.asarray(draw_time(Image.fromarray(frame), seconds, source=where))
        return decoded, unmarked

    @staticmethod
    def _value_table(options: dict) -> np.ndarray:
        """`(3, 256)` float32: the value of each of the 256 levels in each channel.

        Computed as the PIL image processor does it (levels times factor rounded to float32, then mean and std in float32),
        so a frame and an image get equal bits.
        """
        table = np.repeat(np.arange(256, dtype=np.uint8)[None], 3, axis=0)
        if options["do_rescale"]:
            table = (table.astype(np.float64) * options["rescale_factor"]).astype(np.float32)
        table = table.astype(np.float32)
        if options["do_normalize"]:
            mean, std = (
                np.broadcast_to(np.float32(options[key]), (3,))[:, None] for key in ("image_mean", "image_std")
            )
            table = (table - mean) / std
        return table


def flatten_videos(videos: Any) -> list:
    """The videos of a single one, a list, or nested lists, in reading order. A list of pictures is one video."""
    if isinstance(videos, np.ndarray | torch.Tensor) and videos.ndim == 5:
        return list(videos)
    if not isinstance(videos, list | tuple) or _is_frame(next(iter(videos), None)):
        return [videos]
    flat = [video for item in videos for video in flatten_videos(item)]
    if any(video is None for video in flat):
        raise ValueError("a video is None; expected a path, bytes, an array (N, H, W, 3) or a list of pictures")
    return flat


def _is_frame(item: Any) -> bool:
    return isinstance(item, Image.Image) or (isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 3)


def per_video(values: Any, videos: Sequence, what: str) -> list:
    """One value for each video: None for all, a list as long as the videos, or for a single video its own value."""
    if values is None:
        return [None] * len(videos)
    values = list(values) if isinstance(values, list | tuple) else [values]
    if len(videos) == 1 and values and isinstance(values[0], dict) and what == "regions":
        return [values]
    if len(values) != len(videos):
        raise ValueError(f"{what}: got {len(values)} entries for {len(videos)} videos; give one for each")
    return values


def _normalised(videos: Sequence[np.ndarray], longest: int, table: np.ndarray) -> np.ndarray:
    """`(num_videos, longest, 3, height, width)` float32 of uint8 `(num_frames, height, width, 3)`, zeros at the end."""
    pixels = np.zeros((len(videos), longest, 3, *videos[0].shape[1:3]), dtype=np.float32)
    for i, frames in enumerate(videos):
        for channel in range(3):
            np.take(table[channel], frames[..., channel], out=pixels[i, : len(frames), channel], mode="clip")
    return pixels


def _reader(metadata: Any) -> Callable:
    """What a caller's dict or `VideoMetadata` tells of a video, by name; None for what it does not tell."""
    return (metadata or {}).get if isinstance(metadata, dict | None) else lambda key: getattr(metadata, key, None)


def _metadata(video: DecodedVideo, tell: Callable) -> VideoMetadata:
    height, width = video.source_size
    total, duration, fps = video.total_num_frames, video.duration, tell("fps")
    if tell("frames_indices") is not None:  # sampled before: only the caller knows what lies beyond its frames
        total, duration = tell("total_num_frames") or total, tell("duration") or duration
    return VideoMetadata(
        total_num_frames=total,
        fps=fps if fps is not None else total / duration if duration else None,
        width=width,
        height=height,
        duration=duration,
        video_backend="pyav",
        frames_indices=video.indices,
    )


__all__ = ["RGPT4DVideoProcessor"]
