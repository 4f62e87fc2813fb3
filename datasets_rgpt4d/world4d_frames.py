"""World4D's clips as the frames that a model samples from them, in one array: for many short trainings on the same clips.

Decoding a video takes a CPU as long as a small model's whole step; here the frames are rendered once, and every run
maps the same file. They are the frames that a processor would sample from the clip's mp4 file, without its compression.
"""

import functools
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, List, Value
from numpy.lib.format import open_memmap
from tqdm import tqdm

from modeling_rgpt4d.video_decoding import uniform_indices

from .multiple_choice import to_conversation
from .whole_files import write_text
from .world4d import SUPERSAMPLE, World4DConfig
from .world4d_questions import scene_questions
from .world4d_render import render_frames
from .world4d_scene import Scene

Ask = Callable[[Scene, str, int], list[dict[str, Any]]]

ROW_FEATURES = Features(
    {
        "id": Value("string"),
        "clip": Value("int32"),
        "task": Value("string"),
        "question": Value("string"),
        "options": List(Value("string")),
        "answer": Value("string"),
        "regions": List({"name": Value("string"), "box": List(Value("float32"), length=4)}),
    }
)
FRAMES, SCENES, ROWS, COMPLETE = "frames.npy", "scenes.jsonl", "rows", "frames.json"


def _make_clip(
    file: Path, config: World4DConfig, split: str, num_frames: int, ask: Ask, index: int
) -> tuple[str, list[dict[str, Any]]]:
    """Render a clip into its place in the file; returns its scene as JSON and its questions."""
    torch.set_num_threads(1)
    scene = config.scene(split, index)
    times = scene.frame_times[uniform_indices(scene.num_frames, num_frames)]
    frames = render_frames(scene, times, config.size_px, config.device, supersample=SUPERSAMPLE, as_numpy=True)
    np.load(file, mmap_mode="r+")[index] = frames
    return scene.to_json(), ask(scene, split, config.size_px)


def save_frames(
    folder: str | Path,
    config: World4DConfig,
    split: str,
    num_frames: int,
    ask: Ask = scene_questions,
    pool: Executor | None = None,
    progress: bool = False,
) -> Path:
    """Render the clips of a split into `folder`, unless it holds them already.

    Args:
        config: size of the frames, the number and kind of clips, and the device that renders them.
        num_frames: sampled from each clip.
        ask: `(scene, split, size_px)` -> the questions, as `scene_questions` gives them; a function of a module.
        pool: processes that render, as `ProcessPoolExecutor`; without one this process does.
        progress: draw a progress bar on stderr.
    Raises: `ValueError` if the folder holds other clips.
    """
    folder, clips = Path(folder), config.clips(split)
    settings = {
        "size_px": config.size_px,
        "durations_s": list(config.durations_s),
        "fps": list(config.fps),
        "seed": config.seed,
        "split": split,
        "clips": clips,
        "num_frames": num_frames,
        "questions": f"{ask.__module__}.{ask.__qualname__}",
        "world4d": str(config.version),
    }
    described = json.dumps(settings, indent=2) + "\n"
    if (folder / COMPLETE).exists():
        if (folder / COMPLETE).read_text(encoding="utf-8") != described:
            raise ValueError(
                f"{folder} holds other clips, see {folder / COMPLETE}: choose another folder or remove it."
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shape = (clips, num_frames, config.size_px, config.size_px, 3)
    open_memmap(folder / FRAMES, mode="w+", dtype=np.uint8, shape=shape)
    scenes, rows = [], []
    asked = functools.partial(ask, durations_s=config.durations_s) if ask is scene_questions else ask
    make = functools.partial(_make_clip, folder / FRAMES, config, split, num_frames, asked)
    made = map(make, range(clips)) if pool is None else pool.map(make, range(clips), chunksize=16)
    for index, (scene, questions) in enumerate(tqdm(made, f"{split} clips", clips, unit="clip", disable=not progress)):
        scenes.append(scene + "\n")
        for number, question in enumerate(questions):
            kept = {name: question[name] for name in ("task", "question", "options", "answer", "regions")}
            rows.append({"id": f"{split}-{index:06d}-{number}", "clip": index, **kept})
    write_text(folder / SCENES, "".join(scenes))
    Dataset.from_list(rows, features=ROW_FEATURES).save_to_disk(folder / ROWS)
    write_text(folder / COMPLETE, described)
    return folder


class World4DFrames:
    """What `save_frames` wrote.

    Attributes:
        folder: where they lie.
        frames: `(clips, num_frames, size_px, size_px, 3)` uint8, mapped from the file.
        scenes: one a clip.
        rows (`datasets.Dataset`): the questions; `clip` says which clip each is about.
    """

    def __init__(self, folder: str | Path):
        self.folder = folder = Path(folder)
        if not (folder / COMPLETE).exists():
            raise ValueError(f"{folder} holds no finished clips: write them with save_frames.")
        self.frames = np.load(folder / FRAMES, mmap_mode="r")
        self.scenes = [Scene.from_json(line) for line in (folder / SCENES).read_text(encoding="utf-8").splitlines()]
        self.rows = Dataset.load_from_disk(folder / ROWS)

    def video(self, clip: int) -> dict[str, Any]:
        """The clip as a block of a message: what was sampled from it, and when."""
        scene = self.scenes[clip]
        indices = uniform_indices(scene.num_frames, self.frames.shape[1])
        return {"type": "video", "video": self.frames[clip], "fps": scene.fps, "frames_indices": indices}

    def messages(self, row: dict[str, Any], with_answer: bool = True) -> list[dict[str, Any]]:
        """A question as chat messages."""
        return self.conversation([row], with_answer)

    def conversation(self, rows: Sequence[dict[str, Any]], with_answer: bool = True) -> list[dict[str, Any]]:
        """Questions about one clip as one conversation."""
        messages = to_conversation([{**row, "video": ""} for row in rows], with_answer=with_answer)
        regions = messages[0]["content"][0]["regions"]
        messages[0]["content"][0] = {**self.video(rows[0]["clip"]), "regions": regions}
        return messages
