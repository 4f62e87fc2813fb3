"""What a teacher perceived, kept on disk: written by `examples/cache_teacher.py`, read in the data loader's workers.

An entry is one window of one video. Its key is the SHA-256 of the video's content and of the times of the window's frames,
so neither the order of batches nor the name of a file matters. A cache is a folder with `manifest.json`, which says
whose perceptions these are, and shards `targets-<process>-<digest>.safetensors`. Each shard is complete in itself and gets
its name when it is whole, so any number of processes may write, at once or one after the other, and there is no index
that could be out of date.

Nothing damaged is ever returned: a shard's name holds the SHA-256 of its header, the header holds that of the manifest and
of every tensor, and they are compared at every reading.
"""

import base64
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from modeling_rgpt4d.checkpoint_files import DTYPES, StoredTensor, make_header, quoted, read_json, write_json
from modeling_rgpt4d.configuration_l4p import L4PConfig
from modeling_rgpt4d.modeling_l4p import SIGNAL_CHANNELS, SIGNALS, L4PModel
from modeling_rgpt4d.processing_rgpt4d import SOURCE_KEYS
from modeling_rgpt4d.video_decoding import FRAME_SUFFIXES

from .teachers import L4PTeacher, PerceptionTargets

MANIFEST = "manifest.json"
VERSION = 1
PRECISIONS = ("bfloat16", "int8")
LATENTS, SCALE = "latents", "latents_scale"
# What is kept of an entry: the integers whose bits its tensors have, see `TeacherCache`.
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.int8: torch.int8}
ABANDONED_AFTER_S = 3600  # no process takes so long to write one shard
STATED_ERROR = {
    "bfloat16": "latents and raw signals rounded to bfloat16: exact for a teacher that runs in bfloat16, else 2^-8 of each "
    "value, and for depth, which is kept as its logarithm, 2^-8 |ln depth| of it",
    "int8": "latents in 8 bits, each within half of the scale of its tap and channel in the window, which is the largest "
    "absolute value there over 127; signals as with bfloat16",
}

Precision = Literal["bfloat16", "int8"]


# ------------------------------------------------------------------------------------------------------ keys of entries

_digests: dict[tuple[str, int, int], str] = {}  # of files, in this process


def video_source(video: Mapping[str, Any]) -> Any:
    """What a message's video block holds: a path, bytes, `{"path", "bytes"}`, an array or a list of pictures."""
    for key in SOURCE_KEYS["video"]:
        source = video.get(key)
        if source is not None:
            if isinstance(source, str) and source.startswith("data:"):
                return base64.b64decode(source.partition(",")[2], validate=True)
            return source
    raise ValueError(f"a video block without a source; expected one of the keys {SOURCE_KEYS['video']}")


def video_name(video: Mapping[str, Any]) -> str:
    """What to call a video in messages."""
    source = video_source(video)
    path = source.get("path") if isinstance(source, Mapping) else source if isinstance(source, str | Path) else None
    return "a video without a path" if path is None else str(path)


def video_digest(video: Mapping[str, Any]) -> str:
    """SHA-256 of a video's content, as hex digits.

    Of a file its bytes, wherever they are; of a folder the names and bytes of its pictures; of an array or a list of
    pictures shape, dtype and bytes; of all but files the rate, too. Files are read once in a process, as long as neither
    size nor time of change differ.

    Args:
        video: the block of a message.

    Raises: `ValueError` if there is nothing to read.
    """
    source = video_source(video)
    if isinstance(source, Mapping):
        source = source["bytes"] if source.get("bytes") is not None else source.get("path")
    if isinstance(source, bytes | bytearray | memoryview):
        return hashlib.sha256(source).hexdigest()
    if isinstance(source, str | Path) and Path(source).is_file():
        return _file_digest(Path(source))
    digest = hashlib.sha256(f"frames at {video.get('fps')}".encode())
    if isinstance(source, str | Path):
        if not Path(source).is_dir():
            raise ValueError(f"{source}: no such file or folder; expected a video file or a folder of frames")
        for file in sorted(Path(source).iterdir()):
            if file.suffix.lower() in FRAME_SUFFIXES and not file.name.startswith("."):
                digest.update(f"\n{file.name}\n{_file_digest(file)}".encode())
    else:
        for frames in source if isinstance(source, list | tuple) else [source]:
            if isinstance(frames, Image.Image):
                frames = frames.convert("RGB")
            frames = np.ascontiguousarray(frames.cpu() if isinstance(frames, Tensor) else frames)
            digest.update(f"\n{frames.dtype} {frames.shape}\n".encode())
            digest.update(frames.data)
    return digest.hexdigest()


def _file_digest(file: Path) -> str:
    state = file.stat()
    known = (str(file), state.st_size, state.st_mtime_ns)
    if known not in _digests:
        with open(file, "rb") as opened:
            _digests[known] = hashlib.file_digest(opened, "sha256").hexdigest()
    return _digests[known]


def microseconds(times: Tensor) -> list[int]:
    """Times of frames, seconds or already microseconds, as the video processor gives them."""
    return (times.double() * 1e6).round().long().tolist() if times.is_floating_point() else times.tolist()


def window_key(digest: str, times: Sequence[int]) -> str:
    """The key of an entry: `digest` of the video, `times` of the window's frames in microseconds."""
    return hashlib.sha256(f"{digest} {','.join(map(str, times))}".encode()).hexdigest()


# -------------------------------------------------------------------------------------------------- whose perceptions


def fingerprint(model: L4PModel) -> str:
    """SHA-256 of a teacher: its configuration and the names, dtypes, shapes and values of its parameters, on any device."""
    config = {name: getattr(model.config, name) for name in L4PConfig.__annotations__}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"\n{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(_bytes_of(parameter.detach().cpu()))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy()


def frame_settings(video_processor: Any) -> dict[str, int] | None:
    """How a student's video processor resizes frames before a teacher sees them; `None` if it does not."""
    if not video_processor.do_resize:
        return None
    size = video_processor.size
    return {"height": size["height"], "width": size["width"], "resample": int(video_processor.resample)}


def make_manifest(
    teacher: L4PTeacher, video_processor: Any, precision: Precision = "bfloat16", latents: bool = True
) -> dict[str, Any]:
    """What `manifest.json` says: all that decides the values of entries, beside the videos.

    Args:
        teacher: whose perceptions; of its signals those that it gives.
        video_processor: the student's, which samples and resizes the frames.
        precision: "bfloat16", or "int8" for the latents. See `pack` for the errors.
        latents: keep the latents, too.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}: choose one of {PRECISIONS}")
    if not latents and not teacher.signals:
        raise ValueError("nothing to keep: neither latents nor signals")
    return {
        "format": "rgpt4d teacher cache",
        "version": VERSION,
        "teacher": fingerprint(teacher.model),
        "teacher_dtype": str(teacher.model.dtype).removeprefix("torch."),
        "num_frames": teacher.num_frames,
        "image_size": teacher.image_size,
        "latent_shape": list(teacher.latent_shape),
        "latents": latents,
        "signals": list(teacher.signals),
        "depth_scale": teacher.depth_scale,
        "motion_kind": teacher.motion_kind,
        "frames": frame_settings(video_processor),
        "precision": precision,
        "error": STATED_ERROR[precision],
    }


def _manifest_digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def entry_tensors(
    latent_shape: Sequence[int], num_frames: int, image_size: int, signals: Sequence[str], latents: bool, precision: str
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name -> dtype and shape of the tensors of one entry."""
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    if latents:
        tensors[LATENTS] = (getattr(torch, precision), tuple(latent_shape))
        if precision == "int8":
            tensors[SCALE] = (torch.float32, (latent_shape[0], latent_shape[-1]))
    for signal in signals:
        side = latent_shape[2] if signal == "camray" else image_size
        tensors[signal] = (torch.bfloat16, (SIGNAL_CHANNELS[signal], num_frames, side, side))
    return tensors


def entry_num_bytes(config: L4PConfig, signals: Sequence[str], latents: bool, precision: str) -> int:
    """What one entry takes on the disk, its part of the header included."""
    tensors = entry_tensors(config.latent_shape, config.num_frames, config.image_size, signals, latents, precision)
    key, names = "0" * 64, {dtype: name for name, dtype in DTYPES.items()}
    record = {
        "video": "x" * 60,
        "digest": key,
        "sampled": config.num_frames,
        "window": [0, 1],
        "microseconds": [10_000_000] * config.num_frames,
        "sha256": dict.fromkeys(tensors, key),
        "rms": dict.fromkeys(tensors, 1.2345e-3),
    }
    stored = {
        f"{key}.{name}": StoredTensor(Path(), "", names[dtype], shape) for name, (dtype, shape) in tensors.items()
    }
    header = make_header(stored, {"entries": json.dumps({key: record})})
    return len(header) + sum(dtype.itemsize * prod(shape) for dtype, shape in tensors.values())


# ------------------------------------------------------------------------------------------------------------- values


@torch.no_grad()
def perceive_raw(
    teacher: L4PTeacher, pixel_values_videos: Tensor, image_mean: Sequence[float], image_std: Sequence[float]
) -> tuple[Tensor, dict[str, Tensor]]:
    """As `teacher.perceive`, in the teacher's dtype, and depth as the logarithm that its head gives."""
    with torch.autocast(device_type=pixel_values_videos.device.type, enabled=False):
        latents = teacher.model.encode(teacher.prepare(pixel_values_videos, image_mean, image_std))
        raw = {
            # one window after the other, as `L4PTeacher.perceive` does
            signal: torch.cat([teacher.model.heads[signal](latents[i : i + 1]) for i in range(len(latents))])
            for signal in teacher.signals
        }
    return latents, raw


def pack(latents: Tensor | None, raw_signals: Mapping[str, Tensor], precision: Precision) -> dict[str, Tensor]:
    """Latents `(W, taps, N', h', w', c')` and raw signals as they are stored.

    - "bfloat16" rounds to the nearest: exact if the teacher runs in bfloat16, else within 2^-8 of each value.
    - "int8" keeps the latents as whole numbers times a float32 scale `(W, taps, c')`, the largest absolute value of the tap
      and channel in the window over 127: within half the scale. One scale for a channel, because a few channels of a
      residual stream are far larger than all others.

    Signals are always bfloat16, depth as its logarithm: its relative error is 2^-8 |ln depth| for a float32 teacher.
    """
    packed = {}
    if latents is not None and precision == "int8":
        values = latents.float()
        scale = values.abs().amax(dim=(2, 3, 4), keepdim=True) / 127
        scale = scale.clamp(min=torch.finfo(torch.float32).tiny)  # a channel of zeros
        packed = {LATENTS: (values / scale).round().to(torch.int8), SCALE: scale[:, :, 0, 0, 0]}
    elif latents is not None:
        packed = {LATENTS: latents.bfloat16()}
    return packed | {signal: values.bfloat16() for signal, values in raw_signals.items()}


def unpack_latents(packed: Mapping[str, Tensor]) -> Tensor:
    """The latents of `pack`: bfloat16, or float32 if they are in 8 bits."""
    if SCALE not in packed:
        return packed[LATENTS]
    return packed[LATENTS].float() * packed[SCALE][:, :, None, None, None]


def relative_rms(
    packed: Mapping[str, Tensor], latents: Tensor | None, raw_signals: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What packing costs: for each stored name the error's RMS over that of the values, `(W,)`. Not finite if they are not."""

    def of(kept: Tensor, exact: Tensor) -> Tensor:
        exact = exact.float().flatten(1)
        return (kept.float().flatten(1) - exact).norm(dim=1) / exact.norm(dim=1).clamp(min=1e-30)

    errors = {} if latents is None else {LATENTS: of(unpack_latents(packed), latents)}
    return errors | {signal: of(packed[signal], values) for signal, values in raw_signals.items()}


# ------------------------------------------------------------------------------------------------------------ writing


class TeacherCacheWriter:
    """Adds entries to a cache, a shard at a time. One writer a process; those of other processes do not matter.

    Args:
        folder: of the cache; made if it is not there.
        manifest: of `make_manifest`.
        rank: number of this process, for the names of shards.
        shard_bytes: a shard is written when its tensors reach this size. A process that is killed loses what it has not
            written yet.

    Raises: `ValueError` if the folder holds a cache that was made otherwise.
    """

    def __init__(self, folder: str | Path, manifest: dict[str, Any], rank: int = 0, shard_bytes: int = 256 * 2**20):
        self.folder, self.rank, self.shard_bytes = Path(folder), rank, shard_bytes
        self.folder.mkdir(parents=True, exist_ok=True)
        self._remove_abandoned()
        file = self.folder / MANIFEST
        if not file.exists():
            if any(self.folder.glob("targets-*.safetensors")):
                raise ValueError(f"{self.folder} holds shards without {MANIFEST}: choose another folder")
            unfinished = self._unfinished(MANIFEST)
            write_json(unfinished, manifest)
            self._finish(unfinished, file)
        found = _read_manifest(self.folder)
        different = [name for name in manifest | found if manifest.get(name) != found.get(name)]
        if different:
            raise ValueError(
                f"{self.folder} is a cache made otherwise. There, and now: "
                + "; ".join(f"{name} {found.get(name)}, {manifest.get(name)}" for name in different)
                + ". Choose another folder"
            )
        self._manifest_digest = _manifest_digest(manifest)
        self._tensors: dict[str, Tensor] = {}
        self._records: dict[str, dict[str, Any]] = {}
        self._num_bytes = 0

    def add(self, record: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Add one window.

        Args:
            record: `video`, its name; its `digest`; `sampled`, how many frames were sampled of it; `window`, number of this
                window and how many there are; `microseconds` of its frames; `rms` errors.
            tensors: of `pack`, one window, on the CPU.
        """
        key = window_key(record["digest"], record["microseconds"])
        digests = {name: hashlib.sha256(_bytes_of(tensor)).hexdigest() for name, tensor in tensors.items()}
        self._records[key] = {**record, "sha256": digests}
        # copies: a slice would keep its whole batch in memory
        for name, tensor in tensors.items():
            self._tensors[f"{key}.{name}"] = tensor.clone(memory_format=torch.contiguous_format)
        self._num_bytes += sum(tensor.nbytes for tensor in tensors.values())
        if self._num_bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what waits as a shard."""
        if not self._records:
            return
        metadata = {"manifest": self._manifest_digest, "entries": json.dumps(self._records)}
        content = save(self._tensors, metadata)
        end_of_header = 8 + int.from_bytes(content[:8], "little")
        digest = hashlib.sha256(content[:end_of_header]).hexdigest()[:32]
        unfinished = self._unfinished("targets")
        try:
            unfinished.write_bytes(content)
            self._finish(unfinished, self.folder / f"targets-{self.rank:05d}-{digest}.safetensors")
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        self._tensors, self._records, self._num_bytes = {}, {}, 0

    def _unfinished(self, name: str) -> Path:
        return self.folder / f".{name}-{self.rank:05d}-{uuid.uuid4().hex}.part"

    def _finish(self, unfinished: Path, file: Path) -> None:
        """Give a file its name once its content is on the disk."""
        _sync(unfinished)
        os.replace(unfinished, file)
        _sync(self.folder)

    def _remove_abandoned(self) -> None:
        """Unfinished files of processes that were killed. Whether one lives on another machine only its age can tell."""
        for file in self.folder.glob(".*.part"):
            try:
                if time.time() - file.stat().st_mtime > ABANDONED_AFTER_S:
                    file.unlink()
            except FileNotFoundError:  # another process was faster
                pass


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------------------------------ reading


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} is no teacher cache, it has no {MANIFEST}: make one with examples/cache_teacher.py")
    manifest = read_json(folder / MANIFEST)
    if manifest.get("format") != "rgpt4d teacher cache" or manifest.get("version") != VERSION:
        raise ValueError(
            f"{folder / MANIFEST} is no teacher cache of version {VERSION}, but {manifest.get('format')!r} of version "
            f"{manifest.get('version')!r}: make one with examples/cache_teacher.py"
        )
    return manifest


class TeacherCache:
    """The targets that `examples/cache_teacher.py` wrote: give it to [`P4DCollator`] as `targets`, and to [`CachedTeacher`].

    Args:
        folder: of the cache.
        signals: which to read, all that it has by default.
        latents: whether to read the latents, by default if it has them.

    As a function `(row, video, seconds) -> {name: Tensor}` it reads one window and compares the SHA-256 of all that it
    returns. The tensors are integers with the bits of what is stored (int16 for bfloat16, int32 for float32; latents in 8
    bits are themselves), because what moves batches to a device may cast floats, as DeepSpeed does, and never integers.

    Raises: `ValueError` if the folder is no cache, a shard is damaged or of another cache, something is asked for that it
        does not have, or a window is missing; it says what to do.
    """

    def __init__(self, folder: str | Path, signals: Sequence[str] | None = None, latents: bool | None = None):
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        self._manifest_digest = _manifest_digest(self.manifest)
        self.num_frames: int = self.manifest["num_frames"]
        self.image_size: int = self.manifest["image_size"]
        self.latent_shape: tuple[int, ...] = tuple(self.manifest["latent_shape"])
        self.depth_scale: str = self.manifest["depth_scale"]
        kept = self.manifest["signals"]
        missing = [signal for signal in signals or () if signal not in kept]
        missing += ["latents"] if latents and not self.manifest["latents"] else []
        if missing:
            raise ValueError(
                f"{self.folder} has no {', '.join(missing)}; it has {quoted(kept)} and {'' if self.manifest['latents'] else 'no '}"
                "latents: leave them out of the training, or make another cache"
            )
        self.signals = tuple(s for s in SIGNALS if s in (kept if signals is None else signals))
        self.gives_latents = self.manifest["latents"] if latents is None else latents
        self.tensors = self._tensors(self.signals, self.gives_latents)
        self.shards = sorted(self.folder.glob("targets-*.safetensors"))
        self._shard_of: dict[bytes, int] = {}
        for number, shard in enumerate(self.shards):
            self._shard_of.update(dict.fromkeys(map(bytes.fromhex, self._records(shard)), number))

    def _tensors(self, signals: Sequence[str], latents: bool) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        return entry_tensors(
            self.latent_shape, self.num_frames, self.image_size, signals, latents, self.manifest["precision"]
        )

    def __len__(self) -> int:
        return len(self._shard_of)

    def __call__(self, row: Mapping[str, Any], video: Mapping[str, Any], seconds: Tensor) -> dict[str, Tensor]:
        times = microseconds(seconds)
        key = window_key(video_digest(video), times)
        number = self._shard_of.get(bytes.fromhex(key))
        if number is None:
            raise ValueError(
                f"{video_name(video)}: the teacher cache {self.folder} has no window of {len(times)} frames from "
                f"{times[0] / 1e6:.3f} to {times[-1] / 1e6:.3f} s. Add it with examples/cache_teacher.py --output "
                f"{self.folder}, with the data and the --num-frames of this training"
            )
        shard = self.shards[number]
        tensors = self._read(shard, key, self._records(shard).get(key), self.tensors)
        return {name: tensor.view(BITS[tensor.dtype]) for name, tensor in tensors.items()}

    def records(self) -> Iterator[dict[str, Any]]:
        """What is known of each entry, see `TeacherCacheWriter.add`; the tensors are not read."""
        for shard in self.shards:
            yield from self._records(shard).values()

    def verify(self, shard: Path) -> tuple[int, int]:
        """Read all of a shard. Returns: entries and bytes. Raises: `ValueError` if anything is damaged."""
        records = self._records(shard)
        everything = self._tensors(self.manifest["signals"], self.manifest["latents"])
        for key, record in records.items():
            self._read(shard, key, record, everything)
        return len(records), shard.stat().st_size

    def _records(self, shard: Path) -> dict[str, dict[str, Any]]:
        """The entries of a shard, from its header, which is compared with the digest in the name."""
        try:
            num_bytes = shard.stat().st_size
            with open(shard, "rb") as opened:
                start = opened.read(8)
                length = int.from_bytes(start, "little")
                if len(start) < 8 or length > num_bytes - 8:
                    raise _damaged(shard, "it is cut short or no shard")
                header = opened.read(length)
        except OSError as error:
            raise _damaged(shard, f"it cannot be read ({error})") from error
        if not shard.stem.endswith("-" + hashlib.sha256(start + header).hexdigest()[:32]):
            raise _damaged(shard, "its header is not what was written")
        layout = json.loads(header)
        metadata = layout.pop("__metadata__")
        if num_bytes != 8 + length + max(entry["data_offsets"][1] for entry in layout.values()):
            raise _damaged(shard, "it is cut short, or something was added")
        if metadata["manifest"] != self._manifest_digest:
            raise ValueError(
                f"{shard} belongs to another cache, or {MANIFEST} beside it was changed: put both back as they were, or "
                "make the cache again"
            )
        return json.loads(metadata["entries"])

    def _read(self, shard: Path, key: str, record: dict[str, Any] | None, tensors: Mapping) -> dict[str, Tensor]:
        if record is None:
            raise _damaged(shard, f"entry {key} is gone")
        try:
            with safe_open(shard, "pt") as opened:
                found = {name: opened.get_tensor(f"{key}.{name}") for name in tensors}
        except (SafetensorError, OSError) as error:
            raise _damaged(shard, f"entry {key} cannot be read ({error})") from error
        for name, (dtype, shape) in tensors.items():
            assert (found[name].dtype, tuple(found[name].shape)) == (dtype, shape)
            if hashlib.sha256(_bytes_of(found[name])).hexdigest() != record["sha256"][name]:
                raise _damaged(shard, f"{name} of entry {key} ({record['video']}) are not what was written")
        return found


def _damaged(shard: Path, what: str) -> ValueError:
    return ValueError(
        f"{shard} is damaged: {what}. Delete this file and run examples/cache_teacher.py again, which makes what is missing"
    )


# ------------------------------------------------------------------------------------------------------------ teacher


class CachedTeacher:
    """What an [`L4PTeacher`] perceived before the training, and its heads for the student's latents.

    Args:
        heads: the same teacher that filled the cache, in the same dtype. After the comparison **its encoder is taken out of
            `heads.model`**: it is most of the memory, and nothing here runs it.
        cache: what the collator reads; its signals and latents are this teacher's.

    Raises: `ValueError` if the cache is another teacher's or says something else of its depth.
    """

    motion_kind = "logit"

    def __init__(self, heads: L4PTeacher, cache: TeacherCache):
        manifest = cache.manifest
        if heads.model.encoder is None:
            raise ValueError("these heads have no encoder left, another CachedTeacher took it: load the teacher again")
        if fingerprint(heads.model) != manifest["teacher"]:
            dtype = str(heads.model.dtype).removeprefix("torch.")
            why = "its weights or settings differ"
            if dtype != manifest["teacher_dtype"]:
                why = f"that ran in {manifest['teacher_dtype']} and this is {dtype}: load it in that dtype"
            raise ValueError(
                f"the cache {cache.folder} was filled by another teacher ({why}). Use the teacher that filled it, or fill "
                "another with examples/cache_teacher.py"
            )
        if heads.depth_scale != manifest["depth_scale"]:
            raise ValueError(
                f"the cache {cache.folder} says that the teacher's depth_scale is {manifest['depth_scale']!r}, and here it is "
                f"{heads.depth_scale!r}: give both the same, here or to examples/cache_teacher.py with --depth-scale"
            )
        self.heads, self.cache = heads, cache
        self.signals = tuple(signal for signal in cache.signals if signal in heads.signals)
        self.gives_latents = cache.gives_latents
        self.num_frames, self.image_size, self.latent_shape = heads.num_frames, heads.image_size, heads.latent_shape
        self.depth_scale = heads.depth_scale
        heads.model.encoder = None

    def to(self, device: torch.device | str) -> "CachedTeacher":
        self.heads.to(device)
        return self

    def compile_layers(self) -> None:
        """As [`L4PTeacher.compile_layers`]."""
        self.heads.compile_layers()

    def check_student(self, num_frames: int, latent_shape: Sequence[int] | None = None) -> None:
        """As [`L4PTeacher.check_student`]."""
        self.heads.check_student(num_frames, latent_shape)

    def check_frames(self, video_processor: Any) -> None:
        """Raise `ValueError` if the student's video processor resizes frames otherwise than the one the cache is for."""
        here, there = frame_settings(video_processor), self.cache.manifest["frames"]
        if here != there:
            raise ValueError(
                f"the cache {self.cache.folder} was made from frames resized by {there}, but the student's processor does "
                f"{here}: use the processor that the cache was made with, or fill another with examples/cache_teacher.py"
            )

    @torch.no_grad()
    def perceive(
        self,
        pixel_values_videos: Tensor,
        image_mean: Sequence[float],
        image_std: Sequence[float],
        targets: Mapping[str, Tensor] | None = None,
        signals: Sequence[str] | None = None,
    ) -> PerceptionTargets:
        """What the batch carries, as values on its device.

        Args:
            pixel_values_videos: `(V, N, 3, H, W)`; only its size and device matter.
            image_mean, image_std: not used.
            targets: what [`TeacherCache`] returned for each window, stacked.
            signals: those of its signals to give, all by default.

        Returns: latents in bfloat16, or float32 if they are in 8 bits, and signals in float32.
        """
        there = self.cache.manifest["frames"]
        height, width = pixel_values_videos.shape[-2:]
        if there is not None and (height, width) != (there["height"], there["width"]):
            raise ValueError(
                f"frames are {height} x {width} pixels, but the cache {self.cache.folder} was made from frames of "
                f"{there['height']} x {there['width']}"
            )
        packed, device = {}, pixel_values_videos.device
        wanted = self.signals if signals is None else signals
        if missing := [signal for signal in wanted if signal not in self.signals]:
            raise ValueError(f"the cache {self.cache.folder} gives {list(self.signals)}, not {missing}")
        for name, (dtype, shape) in self.cache.tensors.items():
            if name in SIGNALS and name not in wanted:
                continue
            if targets is None or name not in targets:
                raise ValueError(
                    f"the batch carries no {name} of the teacher: give the collator targets=TeacherCache(...)"
                )
            bits, expected = targets[name], (len(pixel_values_videos), *shape)
            if bits.dtype != BITS[dtype] or tuple(bits.shape) != expected:
                raise ValueError(
                    f"the batch's {name} is {bits.dtype} {tuple(bits.shape)}, but the cache gives {BITS[dtype]} {expected}"
                )
            packed[name] = bits.to(device).view(dtype)
        decoded = {signal: packed[signal].float() for signal in wanted}
        if "depth" in decoded:
            decoded["depth"] = decoded["depth"].exp()
        return PerceptionTargets(latents=unpack_latents(packed) if self.gives_latents else None, signals=decoded)

    def decode(self, latents: Tensor, signals: Sequence[str]) -> dict[str, Tensor]:
        """As [`L4PTeacher.decode`]."""
        return self.heads.decode(latents, signals)
