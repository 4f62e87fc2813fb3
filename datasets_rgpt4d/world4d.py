"""World4D as a `datasets` builder, and as a folder that `load_dataset` reads: one row per question, one mp4 file per
clip.
"""

import dataclasses
import hashlib
import itertools
import json
import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Features, List, Value, Video
from tqdm import tqdm

from .whole_files import write_text
from .world4d_questions import scene_questions
from .world4d_render import render_frames
from .world4d_sampling import SPLITS, sample_scene
from .world4d_scene import Scene
from .world4d_video import write_video

VERSION = datasets.Version("1.1.0")  # wrong answers that the text alone does not give away
MAX_CLIPS = 1_000_000  # of a split: the seeds of the splits are this far apart
SUPERSAMPLE = 2
FRAMES_IN_MEMORY = 32
CLIPS_PER_FILE = 500
CLIPS_PER_ROW_GROUP = 50

FEATURES = Features(
    {
        "id": Value("string"),
        "benchmark": Value("string"),
        "task": Value("string"),
        "video": Video(decode=False),
        "source": Value("string"),
        "som_image": Value("string"),
        "question": Value("string"),
        "question_raw": Value("string"),
        "options": List(Value("string")),
        "answer": Value("string"),
        "time_start": Value("float64"),
        "regions": List({"name": Value("string"), "box": List(Value("float32"), length=4)}),
        "fps": Value("int32"),
        "duration_s": Value("float64"),
        "scene": Value("string"),
    }
)

DESCRIPTION = (
    "World4D: rendered clips of spheres, boxes and cylinders that stand, translate, accelerate and spin in a textured "
    "room, under a still or moving camera, with multiple-choice questions in the nine categories of R4D-Bench and "
    "TimeBench. Every row carries its scene, from which datasets_rgpt4d.render_signals gives exact depth, backward "
    "flow, motion, camera rays and instance masks at any times. "
    "Objects of the test split show only combinations of shape, colour and motion that no other split shows."
)


@dataclass
class World4DConfig(datasets.BuilderConfig):
    """A size of World4D. Every field can be overridden: `World4D(config_name="tiny", train_clips=8)`.

    `durations_s` and `fps` are grids to draw from. `device` is where frames are rendered; colours may differ by one
    level between devices.
    """

    size_px: int = 112
    train_clips: int = 320
    validation_clips: int = 16
    test_clips: int = 60
    durations_s: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
    fps: tuple[int, ...] = (10, 12, 15)
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self):
        super().__post_init__()
        self.durations_s, self.fps = tuple(float(value) for value in self.durations_s), tuple(self.fps)
        if self.size_px < 16 or self.size_px % 2:
            raise ValueError(f"World4D size_px must be an even number of at least 16 pixels, got {self.size_px}.")
        for split in SPLITS:
            if not 1 <= self.clips(split) <= MAX_CLIPS:
                raise ValueError(f"World4D {split}_clips must be between 1 and {MAX_CLIPS}, got {self.clips(split)}.")
        if not all(1 <= value <= 20 for value in self.durations_s) or not all(10 <= value <= 30 for value in self.fps):
            raise ValueError(
                f"World4D clips last 1 to 20 s at 10 to 30 fps, got durations_s={self.durations_s}, fps={self.fps}."
            )
        if self.seed < 0:
            raise ValueError(f"World4D seed must not be negative, got {self.seed}.")

    def clips(self, split: str) -> int:
        return getattr(self, f"{split}_clips")

    def scene(self, split: str, index: int) -> Scene:
        """Clip `index` of `split`; no two clips of any split share a seed."""
        seed = (self.seed * len(SPLITS) + SPLITS.index(split)) * MAX_CLIPS + index
        return sample_scene(seed, split, self.durations_s, self.fps)


_LONG = dict(durations_s=(1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 20.0), fps=(10, 12, 15, 20, 24, 30))
CONFIGS = (
    World4DConfig(name="tiny", version=VERSION, description="396 clips of 112 px, at most 8 s"),
    World4DConfig(
        name="small",
        version=VERSION,
        description="2,000 clips of 128 px",
        size_px=128,
        train_clips=1_700,
        validation_clips=100,
        test_clips=200,
    ),
    World4DConfig(
        name="full",
        version=VERSION,
        description="20,000 clips of 224 px, 1 to 20 s at 10 to 30 fps",
        size_px=224,
        train_clips=18_000,
        validation_clips=500,
        test_clips=1_500,
        **_LONG,
    ),
)


def clip_name(scene: Scene, split: str, index: int, size_px: int) -> str:
    """File name of a clip. It carries a hash of all that its pixels depend on, so a file is only ever reused for the
    same clip.
    """
    key = f"{VERSION} {size_px} {SUPERSAMPLE} {scene.to_json()}"
    return f"{split}-{index:06d}-{hashlib.sha256(key.encode()).hexdigest()[:12]}.mp4"


def render_video(scene: Scene, path: str | Path, size_px: int, device: str = "cpu") -> None:
    """Render a scene's own frames to an mp4 file. Does nothing if the file is there: then it is complete."""
    if os.path.exists(path):
        return
    times = scene.frame_times
    # A clip of 20 s at 224 px would take half a gigabyte in one piece.
    pieces = (
        render_frames(
            scene, times[start : start + FRAMES_IN_MEMORY], size_px, device, supersample=SUPERSAMPLE, as_numpy=True
        )
        for start in range(0, len(times), FRAMES_IN_MEMORY)
    )
    write_video(path, (frame for piece in pieces for frame in piece), scene.fps, size_px)


def clip_rows(config: World4DConfig, split: str, index: int, video_folder: str | Path) -> list[dict[str, Any]]:
    """The rows of one clip; its video is rendered into `video_folder` unless it is there."""
    scene = config.scene(split, index)
    path = os.path.join(video_folder, clip_name(scene, split, index, config.size_px))
    render_video(scene, path, config.size_px, config.device)
    questions = scene_questions(scene, split, config.size_px, config.durations_s)
    return [
        {
            "id": f"{split}-{index:06d}-{number}",
            "benchmark": "world4d",
            **question,
            "video": {"path": path, "bytes": None},
            # As in R4D-Bench's rows: the untrimmed video, here the clip itself, and a marked first frame, here none,
            # because the processor draws the marks from `regions`.
            "source": os.path.basename(path),
            "som_image": "",
            "time_start": None,
            "fps": scene.fps,
            "duration_s": scene.duration_s,
            "scene": scene.to_json(),
        }
        for number, question in enumerate(questions)
    ]


class World4D(datasets.GeneratorBasedBuilder):
    """`World4D(config_name="tiny").download_and_prepare(num_proc=2)`, then `.as_dataset(split="test")`.

    Videos lie in `<cache_dir>/world4d_videos/<size>px` and rows hold their paths, so ten questions share one file; an
    interrupted build goes on where it stopped. `download_and_prepare(folder, file_format="parquet")` embeds the bytes
    in every row; `save_world4d` embeds them once.
    """

    VERSION = VERSION
    BUILDER_CONFIG_CLASS = World4DConfig
    BUILDER_CONFIGS = list(CONFIGS)

    def _info(self):
        return datasets.DatasetInfo(description=DESCRIPTION, features=FEATURES, license="apache-2.0")

    def _split_generators(self, dl_manager):
        folder = os.path.join(self._cache_dir_root, "world4d_videos", f"{self.config.size_px}px")
        os.makedirs(folder, exist_ok=True)
        return [
            datasets.SplitGenerator(
                name=split,
                gen_kwargs={"indices": list(range(self.config.clips(split))), "split": split, "video_folder": folder},
            )
            for split in SPLITS
        ]

    def _generate_examples(self, indices, split, video_folder):
        # One thread: this runs in as many processes as num_proc says, and a forked one must not wait for its parent's
        # thread pool.
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for index in indices:
                for row in clip_rows(self.config, split, index, video_folder):
                    yield row["id"], row
        finally:
            torch.set_num_threads(threads)


def _save_clip(job: tuple[World4DConfig, str, int, str]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return clip_rows(*job)


def _all_clips(config: World4DConfig, folder: Path, num_proc: int) -> Iterator[list[dict[str, Any]]]:
    """Rows of every clip, split after split."""
    jobs = [(config, split, index, str(folder / split)) for split in SPLITS for index in range(config.clips(split))]
    if num_proc == 1:
        for job in jobs:
            yield clip_rows(*job)
        return
    with ProcessPoolExecutor(num_proc, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            yield from pool.map(_save_clip, jobs, chunksize=2)
        finally:
            pool.shutdown(cancel_futures=True)


def _write_parquet(folder: Path, stem: str, clips: list[list[dict[str, Any]]]) -> str:
    """Write `<folder>/<stem>-<hash of the content>.parquet` and return its name; another file of that stem goes."""
    partial = folder / f".{stem}.partial"
    schema = FEATURES.arrow_schema
    # Rows of a clip carry equal bytes: a dictionary page, as large as the row group needs, stores them once. Statistics
    # would copy the least and the greatest video into the footer.
    options = dict(
        use_dictionary=["video.bytes", "video.path", "scene", "task"],
        dictionary_pagesize_limit=2**30,
        write_statistics=False,
        compression="zstd",
    )
    try:
        with pq.ParquetWriter(partial, schema, **options) as writer:
            for start in range(0, len(clips), CLIPS_PER_ROW_GROUP):
                rows = []
                for clip in clips[start : start + CLIPS_PER_ROW_GROUP]:
                    video = Path(clip[0]["video"]["path"])
                    content = {"bytes": video.read_bytes(), "path": video.name}
                    rows += [{**row, "video": content} for row in clip]
                writer.write_table(pa.Table.from_pylist(rows, schema=schema), row_group_size=len(rows))
        with partial.open("rb") as file:
            name = f"{stem}-{hashlib.file_digest(file, 'sha256').hexdigest()[:16]}.parquet"
        for old in folder.glob(f"{stem}-*.parquet"):
            if old.name != name:
                old.unlink()
        os.replace(partial, folder / name)
        return name
    finally:
        partial.unlink(missing_ok=True)


def save_world4d(output_dir: str | Path, config: World4DConfig, num_proc: int = 1, progress: bool = False) -> Path:
    """Write World4D to a folder that `datasets.load_dataset(folder)` reads, with all its splits.

    Layout: `data/<split>-NNNNN-of-NNNNN-<hash>.parquet` (rows with the video's bytes, stored once per clip),
    `videos/<split>/*.mp4` (the same clips as files, which a later call reuses), `world4d.json` (the configuration) and
    `README.md` (the card that tells `load_dataset` where the rows are).

    Args:
        config: one of `CONFIGS`, or `dataclasses.replace(...)` of one.
        num_proc: processes that render.
        progress: draw a progress bar on stderr.
    Raises: `ValueError` if the folder holds something else, or World4D of another configuration.
    """
    if num_proc < 1:
        raise ValueError(f"num_proc must be at least 1, got {num_proc}.")
    folder = Path(output_dir)
    fields = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(World4DConfig)
        if field.name not in ("data_dir", "data_files")
    }
    described = json.dumps({**fields, "version": str(VERSION)}, indent=2) + "\n"
    marker = folder / "world4d.json"
    if marker.exists():
        if marker.read_text(encoding="utf-8") != described:
            raise ValueError(
                f"{folder} holds World4D of another configuration (see {marker}); "
                "choose another folder or remove this one."
            )
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not an empty folder; choose another one.")
    (folder / "data").mkdir(parents=True, exist_ok=True)
    write_text(marker, described)

    for split in SPLITS:
        (folder / "videos" / split).mkdir(parents=True, exist_ok=True)
    questions, files = {}, {}
    clips = _all_clips(config, folder / "videos", num_proc)
    with tqdm(total=sum(config.clips(split) for split in SPLITS), unit="clip", disable=not progress) as bar:
        for split in SPLITS:
            bar.set_description(split)
            questions[split], files[split] = 0, []
            starts = range(0, config.clips(split), CLIPS_PER_FILE)
            for number, start in enumerate(starts):
                pending = []
                for rows in itertools.islice(clips, min(CLIPS_PER_FILE, config.clips(split) - start)):
                    pending.append(rows)
                    questions[split] += len(rows)
                    bar.update()
                stem = f"{split}-{number:05d}-of-{len(starts):05d}"
                files[split].append(_write_parquet(folder / "data", stem, pending))
    # The card names each file with the hash of its content. `load_dataset` caches a local folder that has a card by the
    # folder's name and the card's patterns alone: with the pattern data/train-*.parquet it would take two folders of one
    # name for the same data, and give the rows of the other.
    data_files = "".join(
        f"  - split: {split}\n    path:\n" + "".join(f"    - data/{name}\n" for name in files[split])
        for split in SPLITS
    )
    table = "".join(f"| {split} | {config.clips(split):,} | {questions[split]:,} |\n" for split in SPLITS)
    write_text(
        folder / "README.md",
        "---\nlicense: apache-2.0\ntask_categories:\n- visual-question-answering\n"
        f"configs:\n- config_name: {config.name}\n  data_files:\n{data_files}---\n\n"
        f"# World4D ({config.name})\n\n{DESCRIPTION}\n\n| split | clips | questions |\n|---|---|---|\n{table}",
    )
    return folder
