"""From any kind of video to frames and their true times in seconds: files through PyAV, folders of frames, arrays."""

import io
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

try:  # arrays and folders of frames need no PyAV
    import av
except ImportError:
    av = None

# Containers that may be opened. FFmpeg guesses the format from the content: without this list it renders a text file as
# ANSI art, takes a photograph for a video of one frame, and follows the addresses inside a playlist.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,gif,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,ivf"
CONTAINERS_IN_WORDS = "mp4, mov, mkv, webm, gif, avi, ts, mpeg, flv, wmv or ogv"
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
# Compressed packets up to this size stay in memory between the pass that lists them and the pass that decodes them;
# a larger file is read twice.
MAX_KEPT_BYTES = 64 * 2**20
# A container whose own duration exceeds its last packet by more than this has lost its end.
MAX_MISSING_END_S = 0.5
# Types of H.264 units (ITU-T H.264, table 7-1): a slice of a picture, and what may come with it and concerns no other:
# supplemental information, access unit delimiter, filler.
NAL_SLICE = 1
NAL_ABOUT_ONE_PICTURE = (6, 9, 12)


@dataclass(frozen=True)
class DecodedVideo:
    """Sampled frames of one video.

    Attributes:
        frames (`np.ndarray`): `(num_frames, height, width, 3)`, uint8, RGB, upright (the rotation flag is applied).
        timestamps (`np.ndarray`): `(num_frames,)`, float64, seconds after the first frame of the source; not decreasing.
        indices (`np.ndarray`): `(num_frames,)`, int64, which frame of the source, in the order of presentation.
        total_num_frames (`int`): frames in the source.
        duration (`float`): seconds from the first frame to the end of the last one.
        source_size (`tuple[int, int]`): height and width of the source's upright frames, pixels.
        name (`str`): what error messages call the source.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    indices: np.ndarray
    total_num_frames: int
    duration: float
    source_size: tuple[int, int]
    name: str


def uniform_indices(total_num_frames: int, num_frames: int) -> np.ndarray:
    """`num_frames` indices from the first frame to the last, evenly spaced, rounded half to even as NVILA does.

    There are always `num_frames` of them: a source with fewer frames has some repeated.
    """
    return np.linspace(0, total_num_frames - 1, num_frames).round().astype(np.int64)


def decode_video(
    source: Any,
    num_frames: int | None = None,
    *,
    sample_fps: float | None = None,
    fps: float | None = None,
    source_indices: Sequence[int] | None = None,
    each_frame: Callable[[np.ndarray, int], np.ndarray] | None = None,
    name: str | None = None,
) -> DecodedVideo:
    """Sample frames uniformly from a video, with the true time of each.

    Args:
        source: one of
            - a path (`str` or `Path`) of a video file, or its `bytes`, or `{"path": ..., "bytes": ...}` as the
              `datasets` feature `Video(decode=False)` gives it;
            - a path of a folder with one picture a frame, in the order of their names (`frame_2` before `frame_10`);
            - an array or tensor `(N, H, W, 3)` or `(N, 3, H, W)`, uint8, RGB;
            - a list of PIL pictures, or of such arrays without `N`.
        num_frames (`int`, *optional*): how many frames to take (`uniform_indices`); all if neither this nor
            `sample_fps` is given. If the source has fewer, frames repeat, each with its own time.
        sample_fps (`float`, *optional*): take `round(duration * sample_fps)` frames, at least one, instead.
        fps (`float`, *optional*): frames per second of a folder, an array or a list. Required for them, and refused for
            a file, which knows the time of every frame itself.
        source_indices (`Sequence[int]`, *optional*): for frames that were already sampled, the index in the source of each;
            times are then index / fps.
        each_frame (`Callable`, *optional*): `(frame uint8 (H, W, 3), position) -> uint8 (h, w, 3)`, called on each sampled
            frame as it is decoded, for example to resize it, so that frames of a large video never stand in memory
            together. `position` counts the sampled frames from 0.
        name (`str`, *optional*): what to call the source in errors; by default its path or kind.

    Raises:
        `ValueError`: the source is missing, empty, truncated, damaged or no video, or `fps` is missing; it names the
            source and what was expected.
        `ImportError`: a file is given and PyAV is not installed.

    Pixels are taken as stored: a pixel aspect ratio other than 1 is not applied, so regions keep their coordinates.
    """
    if num_frames is not None and sample_fps is not None:
        raise ValueError(f"give either a number of frames or frames per second, not {num_frames} and {sample_fps}")
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"the number of frames must be at least 1, got {num_frames}")
    if sample_fps is not None and not sample_fps > 0:
        raise ValueError(f"frames per second to sample must be positive, got {sample_fps}")

    if isinstance(source, dict):
        path, content = source.get("path"), source.get("bytes")
        if path is None and content is None:
            raise ValueError(f"a video given as a dict needs 'path' or 'bytes', got keys {sorted(source)}")
        name = name or (str(path) if path is not None else None)
        source = content if content is not None else path
    sample = _Sampling(num_frames, sample_fps, each_frame)

    if isinstance(source, bytes | bytearray | memoryview):
        name = name or "video given as bytes"
        _refuse_fps(fps, name)
        return _decode_file(_VideoFile(bytes(source), name), sample)
    if isinstance(source, str | Path):
        name = name or str(source)
        if "://" in str(source):
            raise ValueError(f"{name}: addresses are not fetched; download the video and give its path")
        path = Path(source)
        if path.is_dir():
            return _sample_frames(_FolderOfFrames(path, name), fps, source_indices, sample, name)
        if not path.is_file():
            raise ValueError(f"{name}: no such file or folder; expected a video file or a folder of frames")
        _refuse_fps(fps, name)
        return _decode_file(_VideoFile(path, name), sample)
    if isinstance(source, list | tuple):
        name = name or "video given as a list of frames"
        return _sample_frames([_as_rgb(frame, name) for frame in source], fps, source_indices, sample, name)
    if isinstance(source, np.ndarray | torch.Tensor):
        name = name or "video given as an array"
        return _sample_frames(_as_rgb_video(source, name), fps, source_indices, sample, name)
    raise ValueError(
        f"cannot read a video from {type(source).__name__}; expected a path, bytes, an array (N, H, W, 3) or a list of pictures"
    )


@dataclass(frozen=True)
class _Sampling:
    num_frames: int | None
    fps: float | None
    each_frame: Callable[[np.ndarray, int], np.ndarray] | None

    def indices(self, total: int, duration: float) -> np.ndarray:
        if self.fps is not None:
            return uniform_indices(total, max(1, round(duration * self.fps)))
        return uniform_indices(total, total if self.num_frames is None else self.num_frames)

    def apply(self, frame: np.ndarray, position: int) -> np.ndarray:
        return frame if self.each_frame is None else self.each_frame(frame, position)


# ----- frames that are already pictures: the caller gives the rate


def _sample_frames(frames: Sequence, fps, source_indices, sample: _Sampling, name: str) -> DecodedVideo:
    if len(frames) == 0:
        raise ValueError(f"{name}: no frames; expected at least one")
    if fps is None:
        raise ValueError(
            f"{name}: frames alone have no times; give their rate, as in "
            '{"type": "video", "video": frames, "fps": 30} in a message or video_metadata=[{"fps": 30}]'
        )
    if not fps > 0:
        raise ValueError(f"{name}: fps must be positive, got {fps}")
    if source_indices is None:
        source_indices = np.arange(len(frames))
    source_indices = np.asarray(source_indices, dtype=np.int64)
    if len(source_indices) != len(frames):
        raise ValueError(f"{name}: {len(frames)} frames but {len(source_indices)} indices of frames")
    first = frames[0]
    duration = (int(source_indices[-1] - source_indices[0]) + 1) / fps
    picked = sample.indices(len(frames), duration)
    taken = []
    for position, index in enumerate(picked):
        frame = frames[index]
        if frame.shape != first.shape:
            raise ValueError(
                f"{name}: frame {index} is {frame.shape[1]} x {frame.shape[0]} pixels and frame 0 is "
                f"{first.shape[1]} x {first.shape[0]}; all frames of a video have one size"
            )
        taken.append(sample.apply(frame, position))
    seconds = (source_indices - source_indices[0]) / float(fps)
    return DecodedVideo(
        np.stack(taken), seconds[picked], source_indices[picked], len(frames), duration, first.shape[:2], name
    )


class _FolderOfFrames(Sequence):
    """The pictures of a folder in natural order of their names; each is opened only when it is asked for."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        files = (f for f in folder.iterdir() if f.suffix.lower() in FRAME_SUFFIXES and not f.name.startswith("."))
        # Departs from NVILA, which sorts the plain names: without leading zeros "10" would come before "2" there.
        self.files = sorted(
            files, key=lambda f: [(int(s), s) if s.isdigit() else (-1, s) for s in re.split(r"(\d+)", f.name)]
        )
        if not self.files:
            raise ValueError(f"{name}: the folder holds no frames; expected pictures ({', '.join(FRAME_SUFFIXES)})")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> np.ndarray:
        path = self.files[index]
        try:
            with Image.open(path) as image:
                return np.asarray(image.convert("RGB"))
        except (UnidentifiedImageError, OSError, SyntaxError) as error:
            raise ValueError(f"{path}: not a readable picture ({error}); expected a frame of {self.name}") from error


def _as_rgb(frame: Any, name: str) -> np.ndarray:
    if isinstance(frame, Image.Image):
        return np.asarray(frame.convert("RGB"))
    if not isinstance(frame, np.ndarray | torch.Tensor) or frame.ndim != 3:
        raise ValueError(f"{name}: expected PIL pictures or arrays (H, W, 3), got {type(frame).__name__}")
    return _as_rgb_video(frame[None], name)[0]


def _as_rgb_video(video: np.ndarray | torch.Tensor, name: str) -> np.ndarray:
    array = video.detach().cpu().numpy() if isinstance(video, torch.Tensor) else video
    if array.ndim == 4 and array.shape[-1] != 3 and array.shape[1] == 3:
        array = array.transpose(0, 2, 3, 1)
    if array.ndim != 4 or array.shape[-1] != 3:
        raise ValueError(f"{name}: expected shape (N, H, W, 3) or (N, 3, H, W), got {tuple(array.shape)}")
    if array.dtype != np.uint8:
        raise ValueError(f"{name}: expected uint8 values from 0 to 255, got {array.dtype}")
    return array


# ----- files


def _refuse_fps(fps, name: str):
    if fps is not None:
        raise ValueError(f"{name}: a video file carries the time of every frame; leave out fps={fps}")


@dataclass(frozen=True)
class _VideoFile:
    content: Path | bytes
    name: str

    @property
    def num_bytes(self) -> int:
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size

    @contextmanager
    def open(self) -> Iterator[tuple[Any, Any]]:
        """The container and its first moving video stream. Every failure of FFmpeg inside becomes a `ValueError`."""
        if av is None:
            raise ImportError(f"{self.name}: reading video files needs PyAV; run `pip install av`")
        if self.num_bytes == 0:
            raise ValueError(f"{self.name}: the file is empty; expected a video")
        # "file:" keeps FFmpeg from reading a protocol out of a name such as "a:b.mp4"
        target = io.BytesIO(self.content) if isinstance(self.content, bytes) else f"file:{self.content}"
        try:
            with av.open(target, options={"format_whitelist": CONTAINERS}) as container:
                streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
                if not streams:
                    raise ValueError(f"{self.name}: holds no video stream; expected {CONTAINERS_IN_WORDS}")
                streams[0].thread_type = "AUTO"
                yield container, streams[0]
        except av.error.FFmpegError as error:
            raise ValueError(
                f"{self.name}: not a readable video ({error.strerror}); the file is truncated, damaged or of another "
                f"kind. Expected {CONTAINERS_IN_WORDS}"
            ) from error


@dataclass(frozen=True)
class _Packets:
    """What one pass over the compressed packets of a stream tells, in the order of the file; nothing is decoded."""

    pts: list[int | None]  # time of presentation, in units of the stream's time base
    is_shown: list[bool]  # False before the start of an edit list: decoded, because others need it, but no frame
    is_key: list[bool]  # decoding may start here
    kept: list | None  # the packets themselves, unless they are too large together
    last_duration: int

    def shown_pts(self) -> list[int] | None:
        """Times of all frames in order of presentation, or None where packets do not tell them."""
        pts = [time for time, shown in zip(self.pts, self.is_shown, strict=True) if shown]
        return None if not pts or None in pts or len(set(pts)) != len(pts) else sorted(pts)

    def ranges(self, wanted: Iterable[int]) -> list[tuple[int, int]]:
        """The runs [start, stop) of packets to decode for frames `wanted`: each from a key frame to the last wanted one."""
        position = {pts: i for i, pts in enumerate(self.pts) if self.is_shown[i]}
        ranges: list[tuple[int, int]] = []
        for target in sorted(position[pts] for pts in wanted):
            start = target
            # Pictures that follow a key frame in the file but precede it in time may need the group before it.
            while start > 0 and not (self.is_key[start] and self.pts[start] <= self.pts[target]):
                start -= 1
            if ranges and start <= ranges[-1][1]:
                ranges[-1] = (ranges[-1][0], max(target + 1, ranges[-1][1]))
            else:
                ranges.append((start, target + 1))
        return ranges


def _decode_file(file: _VideoFile, sample: _Sampling) -> DecodedVideo:
    with file.open() as (container, stream):
        packets = _list_packets(file, container, stream)
        pts = packets.shown_pts()
        if pts is not None:
            if packets.kept is not None:
                video = _decode_sample(file, stream, packets.kept, packets.ranges, pts, packets.last_duration, sample)
            else:
                with file.open() as (second, again):
                    of_file = _packets_of(second, again)
                    video = _decode_sample(file, again, of_file, packets.ranges, pts, packets.last_duration, sample)
            if video is not None:
                return video
    # Packets without times, or one that shows no frame of its own: then only decoding everything tells the frames.
    with file.open() as (container, stream):
        pts = [frame.pts for frame in container.decode(stream)]
    if not pts or None in pts or len(set(pts)) != len(pts):
        raise ValueError(f"{file.name}: its frames carry no usable times; convert it to mp4, for example with ffmpeg")
    with file.open() as (container, stream):
        everything = [(0, len(packets.pts) + 1)]
        of_file = _packets_of(container, stream)
        video = _decode_sample(
            file, stream, of_file, lambda _: everything, sorted(pts), packets.last_duration, sample, skip=False
        )
    if video is None:
        raise ValueError(f"{file.name}: not all of its frames can be decoded; the file is damaged")
    return video


def _packets_of(container, stream) -> Iterator:
    return (packet for packet in container.demux(stream) if packet.size)


def _list_packets(file: _VideoFile, container, stream) -> _Packets:
    pts, is_shown, is_key, kept = [], [], [], []
    num_bytes, last_duration, end_s = 0, 0, 0.0
    for packet in container.demux():  # all streams, because a container is as long as its longest one
        if packet.size == 0:
            continue
        if packet.pts is not None:
            end_s = max(end_s, float((packet.pts + (packet.duration or 0)) * packet.time_base))
        if packet.stream_index != stream.index:
            continue
        pts.append(packet.pts)
        is_shown.append(not packet.is_discard)
        is_key.append(packet.is_keyframe)
        last_duration = packet.duration or last_duration
        num_bytes += packet.size
        kept.append(packet)
        if num_bytes > MAX_KEPT_BYTES:
            kept.clear()
    if not pts:
        raise ValueError(f"{file.name}: holds no frames; expected a video")
    _check_complete(file, container, stream, end_s)
    return _Packets(pts, is_shown, is_key, kept if num_bytes <= MAX_KEPT_BYTES else None, last_duration)


def _check_complete(file: _VideoFile, container, stream, end_s: float):
    """FFmpeg reads a truncated file up to its end without complaint; the container's own tables know better."""
    missing = None
    last_byte = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if last_byte > file.num_bytes:
        missing = f"its index reaches byte {last_byte} and the file has {file.num_bytes}"
    elif container.format.name == "gif":
        with io.BytesIO(file.content) if isinstance(file.content, bytes) else file.content.open("rb") as reader:
            reader.seek(-min(file.num_bytes, 64), io.SEEK_END)
            if not reader.read().rstrip(b"\0").endswith(b";"):  # the trailer of the GIF format
                missing = "its end mark is absent"
    elif container.duration is not None:
        start_s = (container.start_time or 0) / av.time_base
        declared_s = container.duration / av.time_base + max(start_s, 0.0)
        if declared_s - end_s > MAX_MISSING_END_S:
            missing = f"it declares {declared_s:.2f} s and ends at {end_s:.2f} s"
    if missing is not None:
        raise ValueError(f"{file.name}: the video is truncated ({missing}); expected the whole file")


def _decode_sample(
    file: _VideoFile,
    stream,
    packets: Iterable,
    ranges_for: Callable[[Iterable[int]], list[tuple[int, int]]],
    pts: list[int],
    last_duration: int,
    sample: _Sampling,
    skip: bool = True,
) -> DecodedVideo | None:
    """Decode the sampled frames and no more packets than they need: those of `ranges_for`, without (if `skip`) pictures
    in them that no other refers to. None if a frame that was listed never comes."""
    units = stream.time_base
    times = (np.asarray(pts, dtype=np.int64) - pts[0]) * units.numerator / units.denominator
    if last_duration:
        last_s = last_duration * units.numerator / units.denominator
    else:
        last_s = times[-1] / max(len(times) - 1, 1)
    duration = float(times[-1] + last_s)
    indices = sample.indices(len(pts), duration)
    positions: dict[int, list[int]] = {}  # pts -> where the frame stands in the sample (several places if it repeats)
    for position, index in enumerate(indices):
        positions.setdefault(pts[index], []).append(position)

    ranges = ranges_for(positions)
    packets = _without_skipped(stream, packets, positions) if skip else packets
    missing = set(positions)
    frames = source_size = None
    for frame in _decode_ranges(stream, packets, ranges):
        if frame.pts not in missing:
            continue
        if frame.is_corrupt:
            at_s = times[indices[positions[frame.pts][0]]]
            raise ValueError(f"{file.name}: the frame at {at_s:.3f} s is damaged; expected a whole video")
        picture = _upright(frame, file.name)
        if source_size is not None and picture.shape[:2] != source_size:
            raise ValueError(
                f"{file.name}: the size of its frames changes on the way; all frames of a video have one size"
            )
        source_size = picture.shape[:2]
        missing.remove(frame.pts)
        for position in positions[frame.pts]:
            picked = sample.apply(picture, position)
            if frames is None:  # one array from the start: a list of large frames would be copied in the end
                frames = np.empty((len(indices), *picked.shape), picked.dtype)
            elif picked.shape != frames.shape[1:]:
                raise ValueError(
                    f"{file.name}: `each_frame` gave frames of shapes {frames.shape[1:]} and {picked.shape}"
                )
            frames[position] = picked
    if missing:
        return None
    return DecodedVideo(frames, times[indices], indices, len(pts), duration, source_size, file.name)


def _without_skipped(stream, packets: Iterable, wanted: Container[int]) -> Iterator:
    """The packets, with None for those that the frames `wanted` do not need: H.264 pictures that no other refers to,
    which are a third to a half of a file with B-frames."""
    # They are dropped here and not by the decoder's own `skip_frame`, where each would still take the turn of a thread.
    # Other codecs have no mark that is as strict: what HEVC calls a non-reference picture may serve a higher temporal
    # layer. In mp4 and mkv (a header that begins with 1) each unit of a packet is preceded by its size.
    header = stream.codec_context.extradata or b""
    can_skip = stream.codec.name == "h264" and len(header) > 4 and header[0] == 1
    was_wanted = False
    for packet in packets:
        is_wanted = packet.pts in wanted
        # The packet that follows a wanted one may be the second field of the same picture.
        if can_skip and not (is_wanted or was_wanted or packet.is_keyframe):
            yield None if _is_disposable(packet, 1 + (header[4] & 3)) else packet
        else:
            yield packet
        was_wanted = is_wanted


def _is_disposable(packet, num_size_bytes: int) -> bool:
    """Whether the packet holds nothing but slices of an H.264 picture that is never referred to (ITU-T H.264, 7.4.1:
    nal_ref_idc is 0), and units that tell about it alone. False if it cannot be told."""
    content = memoryview(packet)
    has_slice, start = False, 0
    while start + num_size_bytes < len(content):
        size = int.from_bytes(content[start : start + num_size_bytes], "big")
        start += num_size_bytes
        unit_type, is_referred_to = content[start] & 31, content[start] & 96
        if is_referred_to or unit_type not in (NAL_SLICE, *NAL_ABOUT_ONE_PICTURE):
            return False
        has_slice |= unit_type == NAL_SLICE
        start += size
    return has_slice and start == len(content)


def _decode_ranges(stream, packets: Iterable, ranges: list[tuple[int, int]]) -> Iterator:
    """Frames of the packets in `ranges`, passing over those that are None. The decoder is drained at the end of each
    range, so frames that wait for reordering come out, and starts afresh at the next."""
    waiting = iter(ranges)
    start, stop = next(waiting)
    for i, packet in enumerate(packets):
        if i < start:
            continue
        if packet is not None:
            yield from packet.decode()
        if i + 1 == stop:
            yield from stream.codec_context.decode(None)
            start, stop = next(waiting, (None, None))
            if start is None:
                return
            stream.codec_context.flush_buffers()
    yield from stream.codec_context.decode(None)  # the last range ends with the file


def _upright(frame, name: str) -> np.ndarray:
    """RGB pixels with the container's display matrix (rotation and mirroring by multiples of 90 degrees) applied."""
    picture = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return picture
    # A pixel at (x, y) is shown at (a x + c y, b x + d y), y down; fixed point with 16 fractional bits.
    a, b, _, c, d = np.frombuffer(bytes(matrix), dtype=np.int32)[:5]
    if a == d == 0 and b != 0 and c != 0:
        picture = picture.transpose(1, 0, 2)
        flip_x, flip_y = c < 0, b < 0
    elif b == c == 0 and a != 0 and d != 0:
        flip_x, flip_y = a < 0, d < 0
    else:
        raise ValueError(f"{name}: is to be shown rotated by {frame.rotation} degrees; expected a multiple of 90")
    picture = picture[::-1] if flip_y else picture
    return np.ascontiguousarray(picture[:, ::-1] if flip_x else picture)
