"""Time reading 16 frames and their timestamps from 30 s 1080p videos: ours beside OpenCV seeking and decord.

    pip install opencv-python-headless decord
    python benchmarks/video_reading.py --output video_reading.json
    python benchmarks/video_reading.py --video holiday.mp4 --video lecture.mp4

Without --video it makes two 30 s 1080p H.264 files of the same moving pictures: `keyint250.mp4`, the default settings of
x264, and `keyint30.mp4`, with a key frame at least every second. The pictures are a textured scene with sensor noise, seen
by a camera that pans and zooms, with objects moving in front of it; --clip takes those of a real video instead, scaled up
and played to and fro. Making the files takes a few minutes; --videos-in keeps them for the next run.

The readers take turns in one process (A B C A B C ...), after one round that is not timed, each on a file that it opens
anew and closes. Each gives the same 16 frames in RGB at full size with their times. For each video the script prints the
median, the fastest and the slowest call of every reader, the median of the processor time that a call takes on all cores
together (which other work on the machine disturbs less), and the ratio of medians of ours to the faster of the other two.
It checks that all readers gave the same frames (up to the rounding of their colour conversions) at the same times, and
ends with status 1 if they did not.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from modeling_rgpt4d.video_decoding import decode_video, uniform_indices

try:
    import cv2
    import decord
except ImportError:  # said once the arguments are read, so that --help works
    cv2 = decord = None

WIDTH, HEIGHT, FPS, SECONDS = 1920, 1080, 30, 30
KEYINTS = (250, 30)  # x264's default, and one key frame a second at least
# Mean of absolute differences, in grey levels: conversions to RGB round differently, neighbouring frames differ by more.
LARGEST_DIFFERENCE = 2.0
LARGEST_TIME_DIFFERENCE_S = 1e-3


# ----- the readers: path -> frames (N, H, W, 3) uint8 RGB, seconds (N,)


def read_ours(path: Path, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    video = decode_video(path, num_frames=num_frames)
    return video.frames, video.timestamps


def read_opencv(path: Path, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    capture = cv2.VideoCapture(str(path))
    frames, seconds = [], []
    for index in uniform_indices(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), num_frames):
        capture.set(cv2.CAP_PROP_POS_FRAMES, int(index))
        is_read, frame = capture.read()
        if not is_read:
            raise RuntimeError(f"OpenCV cannot read frame {index} of {path}")
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
        seconds.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
    capture.release()
    return np.stack(frames), np.array(seconds)


def read_decord(path: Path, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    reader = decord.VideoReader(str(path))
    indices = uniform_indices(len(reader), num_frames)
    frames = reader.get_batch(indices.tolist()).asnumpy()
    return frames, reader.get_frame_timestamp(indices)[:, 0]


READERS = {"ours": read_ours, "opencv": read_opencv, "decord": read_decord}


# ----- the videos


def texture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Colours whose spectrum falls with frequency as that of photographs does."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = 1
    channels = []
    for _ in range(3):
        spectrum = np.fft.rfft2(rng.standard_normal((height, width))) / frequency
        spectrum[0, 0] = 0
        channel = np.fft.irfft2(spectrum, s=(height, width))
        channels.append(channel / channel.std())
    mixed = np.stack(channels, -1) @ np.array([[0.8, 0.4, 0.4], [0.4, 0.8, 0.4], [0.4, 0.4, 0.8]])
    return Image.fromarray(np.clip(128 + 45 * mixed, 0, 255).astype(np.uint8))


def made_frames(seed: int, num_frames: int):
    rng = np.random.default_rng(seed)
    scene = texture(rng, 1620, 3840)
    objects = []
    for size in (160, 240, 320, 420):
        y, x = np.mgrid[:size, :size] - (size - 1) / 2
        mask = Image.fromarray(np.where(np.hypot(x, y) < size / 2, 255, 0).astype(np.uint8))
        objects.append((texture(rng, size, size), mask, rng.uniform(0, 2 * math.pi, 2), rng.uniform(2, 7, 2)))
    noise = rng.normal(0, 1.5, (HEIGHT + 64, WIDTH + 64, 3)).round().astype(np.int16)
    for i in range(num_frames):
        seconds = i / FPS
        zoom = 1 + 0.2 * math.sin(2 * math.pi * seconds / 11)
        left = (0.5 + 0.45 * math.sin(2 * math.pi * seconds / 25)) * (scene.width - WIDTH * zoom)
        top = (0.5 + 0.45 * math.sin(2 * math.pi * seconds / 17)) * (scene.height - HEIGHT * zoom)
        frame = scene.transform(
            (WIDTH, HEIGHT), Image.Transform.AFFINE, (zoom, 0, left, 0, zoom, top), Image.Resampling.BILINEAR
        )
        for picture, mask, phase, period in objects:
            x, y = 0.5 + 0.5 * np.sin(phase + 2 * math.pi * seconds / period)
            frame.paste(picture, (int(x * (WIDTH - mask.width)), int(y * (HEIGHT - mask.height))), mask)
        dy, dx = rng.integers(0, 64, 2)
        yield np.clip(np.asarray(frame) + noise[dy : dy + HEIGHT, dx : dx + WIDTH], 0, 255).astype(np.uint8)


def clip_frames(path: Path, num_frames: int):
    with av.open(str(path)) as container:
        pictures = [frame.to_image() for frame in container.decode(video=0)]
    to_and_fro = pictures + pictures[-2:0:-1]
    for i in range(num_frames):
        yield np.asarray(to_and_fro[i % len(to_and_fro)].resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def write_videos(frames, folder: Path, prefix: str) -> list[Path]:
    """One H.264 mp4 for each of `KEYINTS`, otherwise with x264's default settings; a file that is there is taken as it is."""
    paths = [folder / f"{prefix}keyint{keyint}.mp4" for keyint in KEYINTS]
    if all(path.is_file() for path in paths):
        return paths
    unfinished = [path.with_suffix(".unfinished.mp4") for path in paths]
    containers = [av.open(str(path), "w") for path in unfinished]
    streams = []
    for container, keyint in zip(containers, KEYINTS, strict=True):
        stream = container.add_stream("libx264", rate=FPS, options={"preset": "medium", "crf": "23", "g": str(keyint)})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.time_base = Fraction(1, FPS)
        stream.thread_type = "AUTO"  # PyAV's default cuts every picture into slices, which x264's default does not
        streams.append(stream)
    for i, pixels in enumerate(frames):
        if i % 100 == 0:
            print(f"making the videos: frame {i} of {FPS * SECONDS}", file=sys.stderr)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(format="yuv420p")
        frame.pts = i
        for container, stream in zip(containers, streams, strict=True):
            container.mux(stream.encode(frame))
    for container, stream, path, final in zip(containers, streams, unfinished, paths, strict=True):
        container.mux(stream.encode(None))
        container.close()
        path.replace(final)
    return paths


def describe(path: Path) -> dict:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        packets = [packet for packet in container.demux(stream) if packet.size]
        return {
            "video": path.name,
            "codec": stream.codec.name,
            "width": stream.width,
            "height": stream.height,
            "frames": len(packets),
            "key_frames": sum(packet.is_keyframe for packet in packets),
            "seconds": round(container.duration / av.time_base, 3),
            "megabits_per_second": round(path.stat().st_size * 8 / 1e6 / (container.duration / av.time_base), 2),
        }


# ----- the measurement


def measure(path: Path, num_frames: int, repeats: int) -> dict:
    given = {name: read(path, num_frames) for name, read in READERS.items()}  # the round that is not timed
    frames, seconds = given["ours"]
    differences = {}
    for name in list(READERS)[1:]:
        by_frame = [float(np.abs(a.astype(np.int16) - b).mean()) for a, b in zip(frames, given[name][0], strict=True)]
        differences[name] = {
            "mean_absolute_difference": round(statistics.mean(by_frame), 3),
            "of_the_worst_frame": round(max(by_frame), 3),
            "largest_time_difference_s": float(np.abs(seconds - given[name][1]).max()),
        }
    agree = all(
        d["of_the_worst_frame"] <= LARGEST_DIFFERENCE and d["largest_time_difference_s"] <= LARGEST_TIME_DIFFERENCE_S
        for d in differences.values()
    )
    del given, frames

    times: dict[str, list[float]] = {name: [] for name in READERS}
    processor: dict[str, list[float]] = {name: [] for name in READERS}
    for _ in range(repeats):
        for name, read in READERS.items():
            started, processor_started = time.perf_counter(), time.process_time()
            read(path, num_frames)
            times[name].append(time.perf_counter() - started)
            processor[name].append(time.process_time() - processor_started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    faster = min((name for name in READERS if name != "ours"), key=medians.get)
    return {
        **describe(path),
        "num_frames": num_frames,
        "seconds_of_readers": {
            name: {
                "median": medians[name],
                "min": min(values),
                "max": max(values),
                "processor_median": statistics.median(processor[name]),
                "all": values,
            }
            for name, values in times.items()
        },
        "faster_of_the_others": faster,
        "ours_over_the_faster": medians["ours"] / medians[faster],
        "ours_compared_with": differences,
        "frames_and_times_agree": agree,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--video", type=Path, action="append", help="measure this file; may be repeated")
    parser.add_argument("--clip", type=Path, help="make the videos from the pictures of this one")
    parser.add_argument("--videos-in", type=Path, help="folder to keep the made videos in, and to find them in again")
    parser.add_argument("--seed", type=int, default=0, help="of the made pictures (default: %(default)s)")
    parser.add_argument("--num-frames", type=int, default=16, help="frames to read (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="timed calls of each reader (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="write a JSON record here")
    args = parser.parse_args()
    if cv2 is None:
        parser.error("this compares with OpenCV and decord: run `pip install opencv-python-headless decord`")
    if args.video and (args.clip or args.videos_in):
        parser.error("--video measures files that are there; --clip and --videos-in are for those that are made")

    record = {
        "seed": args.seed,
        "python": platform.python_version(),
        "av": av.__version__,
        "libavcodec": ".".join(map(str, av.library_versions["libavcodec"])),
        "opencv": cv2.__version__,
        "decord": decord.__version__,
        "numpy": np.__version__,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "opencv_threads": cv2.getNumThreads(),
        "decoder_threads": "default of each reader",
        "videos": [],
    }
    print(json.dumps({key: value for key, value in record.items() if key != "videos"}))
    with tempfile.TemporaryDirectory() as temporary:
        paths = args.video
        if not paths:
            folder = args.videos_in or Path(temporary)
            folder.mkdir(parents=True, exist_ok=True)
            if args.clip:
                frames, prefix = clip_frames(args.clip, FPS * SECONDS), f"{args.clip.stem}-"
            else:
                frames, prefix = made_frames(args.seed, FPS * SECONDS), f"seed{args.seed}-"
            paths = write_videos(frames, folder, prefix)
        for path in paths:
            result = measure(path, args.num_frames, args.repeats)
            record["videos"].append(result)
            print(
                "\n{video}: {codec} {width}x{height}, {seconds} s, {frames} frames, {key_frames} key frames, "
                "{megabits_per_second} Mbit/s; {num_frames} frames read".format(**result)
            )
            print(
                f"{'reader':8} {'median':>8} {'min':>8} {'max':>8} {'processor':>10}  seconds of {args.repeats} calls"
            )
            for name, values in result["seconds_of_readers"].items():
                print(f"{name:8} {{median:8.3f}} {{min:8.3f}} {{max:8.3f}} {{processor_median:10.3f}}".format(**values))
            print(f"ours / {result['faster_of_the_others']}: {result['ours_over_the_faster']:.3f}")
            for name, values in result["ours_compared_with"].items():
                print(
                    "ours beside {}: frames differ by {mean_absolute_difference} grey levels in the mean, the worst by "
                    "{of_the_worst_frame}; times by {largest_time_difference_s:.6f} s at most".format(name, **values)
                )
    if args.output:
        unfinished = args.output.with_name(f"{args.output.name}.unfinished")
        unfinished.write_text(json.dumps(record, indent=2) + "\n")
        unfinished.replace(args.output)
    if not all(result["frames_and_times_agree"] for result in record["videos"]):
        sys.exit("the readers do not give the same frames at the same times")


if __name__ == "__main__":
    main()
