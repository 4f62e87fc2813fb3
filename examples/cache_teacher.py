"""Let a teacher perceive every video of a data set once, and keep it for training (`examples/train.py --teacher_cache`).

    python examples/cache_teacher.py --teacher runs/teacher --depth-scale metric --model runs/small --data runs/world4d \\
        --output runs/teacher-cache
    torchrun --nproc_per_node 8 examples/cache_teacher.py ...   # or accelerate launch: each process takes its share
    python examples/cache_teacher.py --output runs/teacher-cache --verify

The same command goes on where an interrupted one stopped, with any number of processes: each loses at most the shard that
it had not written yet. --estimate prints what the cache will take, and stops. Videos that cannot be read, and those too
short for a window of the teacher, are listed with the reason in not-cached-*.jsonl; for the former the command ends with
status 1.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from tqdm import tqdm
from train import load_rows, split_of
from transformers import AutoProcessor

from modeling_rgpt4d import L4PConfig, L4PModel
from modeling_rgpt4d.modeling_l4p import SIGNALS
from trainer import L4PTeacher
from trainer.distillation_windows import cut, distillation_windows, video_lengths
from trainer.teacher_cache import (
    MANIFEST,
    PRECISIONS,
    TeacherCache,
    TeacherCacheWriter,
    entry_num_bytes,
    make_manifest,
    microseconds,
    pack,
    perceive_raw,
    relative_rms,
    video_digest,
    video_name,
    video_source,
)

GB = 1e9


class Place(NamedTuple):
    """Where in the data a video is: its row, and which of the row's videos it is."""

    split: str
    row: int
    number: int


def videos_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The video blocks of a row, in the order in which the collator sees them."""
    return [
        block
        for message in row["messages"]
        if not isinstance(message["content"], str)
        for block in message["content"]
        if block["type"] == "video"
    ]


def distinct_videos(splits: Mapping[str, Dataset]) -> list[Place]:
    """One place of each video. A path is not opened: a file with two names is perceived twice, which does no harm."""
    places = {}
    for split, rows in splits.items():
        for index, row in enumerate(rows):
            for number, video in enumerate(videos_of(row)):
                source = video_source(video)
                if isinstance(source, Mapping) and source.get("bytes") is None:
                    source = source.get("path")
                what = str(source) if isinstance(source, str | Path) else video_digest(video)
                places.setdefault((what, video.get("fps")), Place(split, index, number))
    return list(places.values())


class Videos(torch.utils.data.Dataset):
    """Reads videos in the data loader's workers: their digests alone, or the windows of their frames."""

    def __init__(self, splits, places: Sequence[Place], video_processor, num_frames: int, window: int | None):
        self.splits, self.places, self.video_processor = splits, places, video_processor
        self.num_frames, self.window = num_frames, window

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = self.places[index]
        video = videos_of(self.splits[place.split][place.row])[place.number]
        item = {"index": index, "video": video_name(video)}
        try:
            item["digest"] = video_digest(video)
            if self.window is not None:
                item |= self._windows(video)
                if video_digest(video) != item["digest"]:  # nothing is read again, unless size or time differ
                    raise ValueError(f"{item['video']}: changed while it was read")
        except (ValueError, OSError) as error:
            item["problem"] = str(error)
        return item

    def _windows(self, video: dict[str, Any]) -> dict[str, Any]:
        # As the collator samples them, without regions and marks: those are no part of the scene.
        processed = self.video_processor(
            videos=[video_source(video)],
            video_metadata=[{} if video.get("fps") is None else {"fps": video["fps"]}],
            num_frames=self.num_frames,
            time_marks=False,
            return_tensors="pt",
        )
        frames, times = processed["pixel_values_videos"], processed["video_timestamps"]
        windows = distillation_windows(video_lengths(times), self.window, times)
        return {
            "frames": cut(frames, windows, self.window),
            "microseconds": [microseconds(moments) for moments in cut(times, windows, self.window)],
        }


def read(videos: Videos, num_workers: int, on_gpu: bool = False) -> Iterator[dict[str, Any]]:
    yield from DataLoader(videos, batch_size=None, num_workers=num_workers, pin_memory=on_gpu)


class Perceived(NamedTuple):
    """Windows on their way from the GPU: ready once `event` has happened."""

    records: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]
    rms: dict[str, torch.Tensor]
    event: torch.cuda.Event | None


class Perceiver:
    """Runs the teacher on batches of windows, and writes what it perceives while the GPU is busy with the next batch."""

    def __init__(
        self, teacher: L4PTeacher, video_processor, device: torch.device, writer: TeacherCacheWriter, precision, latents
    ):
        self.teacher, self.video_processor, self.device, self.writer = teacher, video_processor, device, writer
        self.precision, self.latents = precision, latents
        self.squares: dict[str, float] = {}
        self.worst: dict[str, float] = {}
        self.num_windows = 0
        self._on_its_way: Perceived | None = None

    def start(self, records: list[dict[str, Any]], frames: list[torch.Tensor]) -> Iterator[tuple[dict[str, Any], str]]:
        """Begin with a batch and write the one before. Yields windows that cannot be kept, with the reason."""
        pixels = torch.stack(frames).to(self.device, non_blocking=True)
        processor = self.video_processor
        latents, raw = perceive_raw(self.teacher, pixels, processor.image_mean, processor.image_std)
        latents = latents if self.latents else None
        packed = pack(latents, raw, self.precision)
        errors = relative_rms(packed, latents, raw)
        on_gpu = self.device.type == "cuda"
        packed, errors = (
            {name: tensor.to("cpu", non_blocking=on_gpu) for name, tensor in some.items()} for some in (packed, errors)
        )
        event = torch.cuda.Event() if on_gpu else None
        if event is not None:
            event.record()
        before, self._on_its_way = self._on_its_way, Perceived(records, packed, errors, event)
        yield from self._keep(before)

    def finish(self) -> Iterator[tuple[dict[str, Any], str]]:
        last, self._on_its_way = self._on_its_way, None
        yield from self._keep(last)
        self.writer.flush()

    def _keep(self, perceived: Perceived | None) -> Iterator[tuple[dict[str, Any], str]]:
        if perceived is None:
            return
        if perceived.event is not None:
            perceived.event.synchronize()
        for i, record in enumerate(perceived.records):
            rms = {name: values[i].item() for name, values in perceived.rms.items()}
            if not all(map(math.isfinite, rms.values())):
                yield record, "the teacher gives values that are not finite"
                continue
            self.writer.add({**record, "rms": rms}, {name: values[i] for name, values in perceived.tensors.items()})
            self.num_windows += 1
            for name, value in rms.items():
                self.squares[name] = self.squares.get(name, 0.0) + value**2
                self.worst[name] = max(self.worst.get(name, 0.0), value)

    def errors_in_words(self) -> str:
        return "; ".join(
            f"{name} {math.sqrt(square / self.num_windows):.2e} (worst window {self.worst[name]:.2e})"
            for name, square in self.squares.items()
        )


class Report:
    """not-cached-*.jsonl: one line for each video without targets."""

    def __init__(self, folder: Path, rank: int, world: int):
        for file in folder.glob("not-cached-*.jsonl"):  # of an earlier run with another number of processes
            if not file.stem.endswith(f"-of-{world}"):
                file.unlink(missing_ok=True)
        self.file = folder / f"not-cached-{rank}-of-{world}.jsonl"
        self.file.unlink(missing_ok=True)
        self.counts = {"unreadable": 0, "too short": 0}
        self._opened: TextIO | None = None

    def add(self, kind: str, video: str, reason: str) -> None:
        self.counts[kind] += 1
        if self._opened is None:
            self._opened = self.file.open("w", encoding="utf-8")
        self._opened.write(json.dumps({"video": video, "kind": kind, "reason": reason}, ensure_ascii=False) + "\n")
        self._opened.flush()


def complete_digests(output: Path, num_frames: int) -> set[str]:
    """Digests of the videos of which a cache has every window."""
    if not (output / MANIFEST).is_file():
        return set()
    found: dict[str, set[int]] = {}
    expected: dict[str, int] = {}
    for record in TeacherCache(output).records():
        if record["sampled"] == num_frames:
            number, count = record["window"]
            found.setdefault(record["digest"], set()).add(number)
            expected[record["digest"]] = count
    return {digest for digest, numbers in found.items() if len(numbers) == expected[digest]}


def verify(output: Path, rank: int, world: int) -> int:
    cache = TeacherCache(output)
    problems = entries = num_bytes = 0
    started = time.perf_counter()
    for shard in tqdm(cache.shards[rank::world], unit="shard", disable=rank > 0):
        try:
            more_entries, more_bytes = cache.verify(shard)
            entries, num_bytes = entries + more_entries, num_bytes + more_bytes
        except ValueError as error:
            problems += 1
            tqdm.write(str(error), file=sys.stderr)
    rate = num_bytes / 1e6 / (time.perf_counter() - started)
    print(f"{entries:,} windows, {num_bytes / GB:.3f} GB read and right ({rate:.0f} MB/s); {problems} damaged shards.")
    return problems


def disk_of(folder: Path) -> Path:
    return next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())


@contextmanager
def until_all_end(world: int) -> Iterator[None]:
    """torchrun ends every process as soon as one ends with a failure: let each wait for the others at its end.

    They connect at the start, when all are there; at the end a process that was killed is noticed at once.
    """
    if world == 1 or not torch.distributed.is_torchelastic_launched():
        yield
        return
    torch.distributed.init_process_group("gloo")
    yield
    torch.distributed.monitored_barrier(timeout=timedelta(days=30))
    torch.distributed.destroy_process_group()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--teacher", help="folder or Hub id of an L4P teacher")
    add("--model", help="folder or Hub id of the student, for its processor")
    add(
        "--data",
        help="World4D folder, or a data set with a column messages: .jsonl or .parquet file, folder, or Hub id",
    )
    add("--splits", nargs="+", help="splits of the data (default: all)")
    add("--output", required=True, type=Path, help="folder of the cache; may hold other data's targets already")
    add("--num-frames", type=int, help="frames sampled from each video, as in the training (default: the teacher's)")
    add("--precision", choices=PRECISIONS, default="bfloat16", help="of the latents (default: %(default)s)")
    add("--signals", nargs="*", choices=SIGNALS, default=SIGNALS, help="to keep (default: all)")
    add("--no-latents", action="store_true", help="keep signals only")
    add(
        "--depth-scale",
        choices=["per_window_scale", "metric"],
        default="per_window_scale",
        help="as in examples/train.py",
    )
    add("--dtype", choices=["auto", "bfloat16", "float32"], default="auto", help="auto: bfloat16, or float32 on a CPU")
    add("--batch-size", type=int, default=4, help="windows at once (default: %(default)s)")
    add("--shard-size-mb", type=float, default=256, help="what a process that is killed loses (default: %(default)s)")
    add("--num-workers", type=int, default=4, help="processes that decode, for each GPU (default: %(default)s)")
    add("--estimate", action="store_true", help="print what the cache will take, and stop")
    add("--verify", action="store_true", help="read the whole cache; needs --output only")
    args = parser.parse_args()
    if not args.verify and None in (args.teacher, args.model, args.data):
        parser.error("--teacher, --model and --data are needed")
    return args


def main() -> None:
    args = parse_args()
    # What torchrun and accelerate launch tell each process
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    try:
        with until_all_end(world):
            problems = verify(args.output, rank, world) if args.verify else cache(args, rank, world)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    sys.exit(1 if problems else 0)


def cache(args: argparse.Namespace, rank: int, world: int) -> int:
    """Returns: how many videos could not be read."""
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    dtype = args.dtype if args.dtype != "auto" else "bfloat16" if on_gpu else "float32"
    config = L4PConfig.from_pretrained(args.teacher)
    num_frames = args.num_frames or config.num_frames
    per_video = len(distillation_windows([num_frames], config.num_frames))
    if not per_video:
        raise ValueError(f"--num-frames {num_frames} is less than a window of the teacher, {config.num_frames} frames")
    video_processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True).video_processor

    loaded = load_rows(args.data)
    splits = {split: split_of(loaded, split) for split in args.splits or loaded}
    everything = distinct_videos(splits)
    places = everything[rank::world]
    done = complete_digests(args.output, num_frames)
    if done:  # else no file need be read twice
        digests = Videos(splits, places, video_processor, num_frames, window=None)
        bar = tqdm(read(digests, args.num_workers), "comparing", len(places), unit="video", disable=rank > 0)
        places = [places[item["index"]] for item in bar if item.get("digest") not in done]
        here = len(range(rank, len(everything), world)) - len(places)
        print(f"Process {rank}: of its {here + len(places):,} videos {here:,} are there already.")

    num_bytes = entry_num_bytes(config, args.signals, not args.no_latents, args.precision)
    needed, free = len(places) * world * per_video * num_bytes, shutil.disk_usage(disk_of(args.output)).free
    if rank == 0:
        total = len(everything) * per_video
        print(
            f"{len(everything):,} distinct videos of {num_frames} frames have at most {total:,} windows. A window takes "
            f"{num_bytes:,} bytes, all of them {total * num_bytes / GB:.3f} GB, of which about {needed / GB:.3f} GB are missing. "
            f"The disk has {free / GB:.3f} GB free."
        )
    if needed > free:
        raise ValueError(
            f"the cache needs {needed / GB:.3f} GB more, but the disk of {args.output} has {free / GB:.3f} GB free: free "
            "some, or choose another --output, --precision int8, --no-latents, or fewer --signals"
        )
    if args.estimate:
        return 0

    model = L4PModel.from_pretrained(args.teacher, dtype=getattr(torch, dtype))
    teacher = L4PTeacher(model, depth_scale=args.depth_scale, signals=args.signals)
    manifest = make_manifest(teacher, video_processor, args.precision, not args.no_latents)
    teacher.to(device)
    writer = TeacherCacheWriter(args.output, manifest, rank, int(args.shard_size_mb * 1e6))
    report = Report(args.output, rank, world)
    perceiver = Perceiver(teacher, video_processor, device, writer, args.precision, not args.no_latents)
    videos = Videos(splits, places, video_processor, num_frames, config.num_frames)
    waiting: deque[tuple[dict[str, Any], torch.Tensor]] = deque()
    started = time.perf_counter()

    def unusable(pairs: Iterator[tuple[dict[str, Any], str]]) -> None:
        for record, reason in pairs:
            report.add("unreadable", record["video"], reason)

    for item in tqdm(read(videos, args.num_workers, on_gpu), "perceiving", len(places), unit="video", disable=rank > 0):
        if "problem" in item:
            report.add("unreadable", item["video"], item["problem"])
            continue
        count = len(item["microseconds"])
        if count == 0:
            report.add("too short", item["video"], f"fewer than {config.num_frames} frames of different times")
        for number, (frames, times) in enumerate(zip(item["frames"], item["microseconds"], strict=True)):
            record = {"video": item["video"], "digest": item["digest"], "sampled": num_frames}
            waiting.append(({**record, "window": [number, count], "microseconds": times}, frames))
        while len(waiting) >= args.batch_size:
            records, frames = zip(*(waiting.popleft() for _ in range(args.batch_size)), strict=True)
            unusable(perceiver.start(list(records), list(frames)))
    if waiting:
        records, frames = zip(*waiting, strict=True)
        unusable(perceiver.start(list(records), list(frames)))
    unusable(perceiver.finish())

    seconds = time.perf_counter() - started
    print(
        f"Process {rank}: {perceiver.num_windows:,} windows added to {args.output} in {seconds:.0f} s; {report.counts['unreadable']} "
        f"videos cannot be read, {report.counts['too short']} are too short"
        + (f", see {report.file}." if any(report.counts.values()) else ".")
    )
    if perceiver.num_windows:
        print(
            f"Process {rank}: relative RMS error of what is kept: {perceiver.errors_in_words()}. {manifest['error']}."
        )
    return report.counts["unreadable"]


if __name__ == "__main__":
    main()
