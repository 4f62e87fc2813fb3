"""What the processor makes of the study's clips, made once for all runs, which share it in memory: a small model's step then
does not wait for a tokenizer. The batches are those of `trainer.P4DCollator`, bit for bit.
"""

import functools
import hashlib
import itertools
import json
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.lib.format import open_memmap
from tqdm import tqdm
from transformers import AutoProcessor

from datasets_rgpt4d.whole_files import write_text
from datasets_rgpt4d.world4d_frames import World4DFrames
from datasets_rgpt4d.world4d_render import render_signals
from modeling_rgpt4d.modeling_l4p import SIGNALS
from modeling_rgpt4d.video_decoding import uniform_indices
from trainer import L4PTeacher, P4DCollator, PerceptionTargets
from trainer.collator import IGNORE_INDEX
from trainer.perception_pictures import shown_frames

AT_ONCE = 32
LEVELS = 255
TRUTH = ("depth", "flow", "flow_valid", "motion", "camray")
QUESTION_OPENS = "<|im_start|>user\n"  # in the chat template
SHARED, LEFT_OUT = 0, -1  # turns of tokens


def file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def processor_with(folder: str | Path, time_cue: str):
    """The processor of a model's folder with a time cue; TPE is no matter of the processor."""
    return AutoProcessor.from_pretrained(
        folder, trust_remote_code=True, time_cue=time_cue if time_cue in ("mark", "prompt") else "none"
    )


def _levels(pixel_values: torch.Tensor, processor) -> np.ndarray:
    """The 8-bit frames `(..., H, W, 3)` of which these `(..., 3, H, W)` are the normalised values."""
    frames = shown_frames(pixel_values.flatten(end_dim=-4), processor.video_processor)
    return frames.reshape(*pixel_values.shape[:-3], *frames.shape[-3:])


@functools.lru_cache(maxsize=1)  # of each process that prepares
def _opened(clips: Path, model: Path, time_cue: str, num_frames: int) -> tuple[World4DFrames, P4DCollator]:
    torch.set_num_threads(1)
    return World4DFrames(clips), P4DCollator(processor_with(model, time_cue), num_frames)


def turns_of(ids: np.ndarray, video_token: int, opens: list[int]) -> np.ndarray:
    """Which question each token of a conversation belongs to, `(length,)` int8: 1, 2, ...; `SHARED` is all up to the end of
    the video, and `LEFT_OUT` are the words that open a message, which only a question after others has.
    """
    turns = np.full(len(ids), SHARED, np.int8)
    turns[np.flatnonzero(ids == video_token)[-1] + 2 :] = 1  # behind the token that ends the last frame
    _, *later = np.flatnonzero((np.lib.stride_tricks.sliding_window_view(ids, len(opens)) == opens).all(1))
    for number, start in enumerate(later, 2):
        turns[start:] = number
        turns[start : start + len(opens)] = LEFT_OUT
    return turns


def _prepare_conversations(
    opened: tuple, conversations: list[list[int]]
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray], np.ndarray]:
    """Ids, labels and turns of each conversation, and its marked first frame."""
    clips, collator = _opened(*opened)
    columns = clips.rows[[index for of_one in conversations for index in of_one]]
    each = (dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True))
    rows = [list(itertools.islice(each, len(of_one))) for of_one in conversations]
    batch = collator([{"id": some[0]["id"], "messages": clips.conversation(some)} for some in rows])
    lengths = batch["attention_mask"].sum(1).tolist()
    ids = [row[:n].numpy().astype(np.int32) for row, n in zip(batch["input_ids"], lengths, strict=True)]
    labels = [row[:n].numpy().astype(np.int32) for row, n in zip(batch["labels"], lengths, strict=True)]
    processor = collator.processor
    opens = processor.tokenizer(QUESTION_OPENS)["input_ids"]
    turns = [turns_of(one, processor.video_token_id, opens) for one in ids]
    return ids, labels, turns, _levels(batch["pixel_values_videos"][:, 0], processor)


def _prepare_clips(opened: tuple, time_marks: bool, clips_at_once: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """The frames of clips as the model sees them without regions, and their seconds."""
    clips, collator = _opened(*opened)
    batch = collator.processor.video_processor(
        [clips.frames[clip] for clip in clips_at_once],
        video_metadata=[
            {name: clips.video(clip)[name] for name in ("fps", "frames_indices")} for clip in clips_at_once
        ],
        num_frames=collator.num_frames,
        time_marks=time_marks,
        return_tensors="pt",
    )
    return _levels(batch["pixel_values_videos"], collator.processor), batch["video_timestamps"].numpy()


def prepare_batches(
    folder: Path,
    clips_folder: Path,
    conversations: list[list[int]],
    model: Path,
    time_cue: str,
    num_frames: int,
    pool: Executor,
) -> Path:
    """Write to `folder`, unless it is there, what the processor gives for conversations about the clips of `clips_folder`.

    Args:
        conversations: of each the indices of its rows, which are about one clip.
        model: folder with the processor.
        time_cue, num_frames: of the processor.
        pool: processes that do it.
    """
    if (folder / "batches.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    clips, side = World4DFrames(clips_folder), _side(model, time_cue)
    opened, parts = (clips_folder, model, time_cue, num_frames), _parts(conversations)
    of_conversations = pool.map(functools.partial(_prepare_conversations, opened), parts)
    first = open_memmap(folder / "first.npy", mode="w+", dtype=np.uint8, shape=(len(conversations), *side))
    ids, labels, turns = [], [], []
    for some_ids, some_labels, some_turns, pictures in tqdm(of_conversations, f"batches of {folder.name}", len(parts)):
        first[len(ids) : len(ids) + len(some_ids)] = pictures
        ids += some_ids
        labels += some_labels
        turns += some_turns
    first.flush()
    if clips.frames.shape[1:] == (num_frames, *side):  # the processor changes nothing: the clips' own file serves
        videos = map(clips.video, range(len(clips.frames)))
        seconds = np.stack([(one["frames_indices"] / one["fps"]).astype(np.float32) for one in videos])
    else:
        seconds = _write_frames(folder / "unmarked.npy", opened, False, len(clips.frames), side, pool)
    if time_cue == "mark":
        _write_frames(folder / "marked.npy", opened, True, len(clips.frames), side, pool)
    clip_of_row = np.array(clips.rows["clip"][:])
    np.save(folder / "clips.npy", np.array([clip_of_row[rows[0]] for rows in conversations]))
    np.save(folder / "seconds.npy", seconds)
    np.save(folder / "ids.npy", np.concatenate(ids))
    np.save(folder / "labels.npy", np.concatenate(labels))
    np.save(folder / "turns.npy", np.concatenate(turns))
    np.save(folder / "ends.npy", np.cumsum([len(one) for one in ids]))
    write_text(folder / "batches.json", json.dumps({"time_cue": time_cue, "num_frames": num_frames}) + "\n")
    return folder


def _side(model: Path, time_cue: str) -> tuple[int, int, int]:
    size = processor_with(model, time_cue).video_processor.size
    return size["height"], size["width"], 3


def _write_frames(
    file: Path, opened: tuple, time_marks: bool, count: int, side: tuple[int, int, int], pool: Executor
) -> np.ndarray:
    """Write the frames of all clips, `(count, num_frames, H, W, 3)` uint8; returns their seconds."""
    *_, num_frames = opened
    frames = open_memmap(file, mode="w+", dtype=np.uint8, shape=(count, num_frames, *side))
    parts, seconds = _parts(list(range(count))), []
    made = pool.map(functools.partial(_prepare_clips, opened, time_marks), parts)
    for part, (pictures, times) in zip(parts, made, strict=True):
        frames[part[0] : part[-1] + 1] = pictures
        seconds.append(times)
    frames.flush()
    return np.concatenate(seconds)


def _parts(values: list) -> list[list]:
    return [values[start : start + AT_ONCE] for start in range(0, len(values), AT_ONCE)]


def _mapped(file: Path, otherwise: np.ndarray) -> np.ndarray:
    return np.load(file, mmap_mode="r") if file.exists() else otherwise


def value_table(video_processor) -> torch.Tensor:
    """`(3, 256)` float32: what the processor makes of each level of each channel."""
    levels = np.arange(LEVELS + 1, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    values = video_processor([levels], video_metadata=[{"fps": 1}], num_frames=1, do_resize=False, return_tensors="pt")[
        "pixel_values_videos"
    ]
    return values.reshape(3, LEVELS + 1)


# --------------------------------------------------------------------------------------------------------------- truth


def _truth_of_clip(job: tuple[str, Any, int, int, int]) -> dict[str, np.ndarray]:
    dtype, scene, num_frames, size, ray_size = job
    torch.set_num_threads(1)
    times = scene.frame_times[uniform_indices(scene.num_frames, num_frames)]
    signals = render_signals(scene, times, size, ray_size, as_numpy=True)
    return {name: signals[name] if signals[name].dtype == bool else signals[name].astype(dtype) for name in TRUTH}


def prepare_truth(
    folder: Path, clips_folder: Path, num_frames: int, size: int, ray_size: int, dtype: str, pool: Executor
) -> Path:
    """Write the exact signals of every clip on the teacher's grid to `folder`, one array a signal, unless they are there."""
    if (folder / "truth.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    scenes = World4DFrames(clips_folder).scenes
    jobs = [(dtype, scene, num_frames, size, ray_size) for scene in scenes]
    arrays: dict[str, np.ndarray] = {}
    made = pool.map(_truth_of_clip, jobs, chunksize=8)
    for clip, signals in enumerate(tqdm(made, f"truth of {clips_folder.name}", len(jobs))):
        for name, values in signals.items():
            if clip == 0:
                shape = (len(scenes), *values.shape)
                arrays[name] = open_memmap(folder / f"{name}.npy", mode="w+", dtype=values.dtype, shape=shape)
            arrays[name][clip] = values
    for array in arrays.values():
        array.flush()
    write_text(folder / "truth.json", json.dumps({"size": size, "ray_size": ray_size, "dtype": dtype}) + "\n")
    return folder


class Truth:
    """The exact signals of clips, as [`GroundTruthTeacher`] takes them; `(V, C, N, H, W)` float32 and bool."""

    def __init__(self, folder: Path, device: torch.device):
        self.signals = {name: torch.from_numpy(np.load(folder / f"{name}.npy")).to(device) for name in TRUTH}

    def __call__(self, clips: np.ndarray) -> dict[str, torch.Tensor]:
        return {
            name: values[torch.as_tensor(clips, device=values.device)].to(
                torch.bool if values.dtype == torch.bool else torch.float32
            )
            for name, values in self.signals.items()
        }


# ------------------------------------------------------------------------------------------------------------- teacher


class Targets:
    """What a teacher perceives in all clips, perceived once for all runs, for its forward pass would be a sixth of a step.

    `trainer.TeacherCache` does so for videos of any source; it compares a hash of every window that it reads.

    Args:
        folder: of `prepare_targets`; mapped, so that all runs share what lies in memory.
        device: of what a call gives.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.device = device
        self.arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("latents", *SIGNALS)}

    def __call__(self, clips: np.ndarray) -> dict[str, torch.Tensor]:
        """`"latents"` and signals of clips `(V,)`, shaped as in [`PerceptionTargets`], float16."""
        return {name: torch.from_numpy(values[clips]).to(self.device) for name, values in self.arrays.items()}


class PreparedTeacher(L4PTeacher):
    """Takes what it perceives from the batch, if that carries it."""

    def perceive(self, pixel_values_videos, image_mean, image_std, targets=None, signals=None) -> PerceptionTargets:
        if targets is None:
            return super().perceive(pixel_values_videos, image_mean, image_std, signals=signals)
        wanted = self.signals if signals is None else signals
        latents = targets["latents"].to(self.model.dtype)
        return PerceptionTargets(latents, {signal: targets[signal].float() for signal in wanted})


def prepare_targets(folder: Path, batches: "Batches", teacher: L4PTeacher, weights: Path) -> Path:
    """Write to `folder`, unless it is there, what the teacher perceives in the unmarked frames of every clip, as float16.

    Args:
        weights: the teacher's file, by whose hash it is known whose targets lie in `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count, of_videos = len(batches.unmarked), batches.processor.video_processor
    made_of = {"clips": count, "teacher": file_sha256(weights)}
    with FileLock(folder / "lock"):  # other runs wait
        if (folder / "targets.json").exists():
            if json.loads((folder / "targets.json").read_text()) != made_of:
                raise SystemExit(
                    f"{folder} has the targets of another teacher than {weights}, or other clips: remove it."
                )
            return folder
        arrays: dict[str, np.ndarray] = {}
        for start in tqdm(range(0, count, AT_ONCE), f"targets of {folder.name}", unit="batch"):
            frames = batches.values(batches.taken(batches.unmarked, slice(start, start + AT_ONCE)))
            seen = teacher.perceive(frames, of_videos.image_mean, of_videos.image_std)
            for name, values in {"latents": seen.latents, **seen.signals}.items():
                if start == 0:
                    shape = (count, *values.shape[1:])
                    arrays[name] = open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.float16, shape=shape)
                arrays[name][start : start + AT_ONCE] = values.half().cpu().numpy()
        for array in arrays.values():
            array.flush()
        write_text(folder / "targets.json", json.dumps(made_of) + "\n")
    return folder


# ------------------------------------------------------------------------------------------------------------- batches


class Batches:
    """Prepared conversations, and batches of them on a device.

    Args:
        folder: of `prepare_batches`.
        clips: the clips that it was made of.
        processor: gives the values of the 256 levels.
        device: of the batches.
    """

    def __init__(self, folder: Path, clips: World4DFrames, processor, device: torch.device):
        self.clips, self.processor, self.device = clips, processor, device
        self.ids, self.labels, self.turns, ends = (
            np.load(folder / f"{name}.npy") for name in ("ids", "labels", "turns", "ends")
        )
        self.starts, self.ends = np.concatenate([[0], ends[:-1]]), ends
        self.clip = np.load(folder / "clips.npy")
        self.seconds = np.load(folder / "seconds.npy")
        # Mapped, so that all runs share what lies in memory
        self.first = np.load(folder / "first.npy", mmap_mode="r")
        # A teacher sees frames without seconds on them
        self.unmarked = _mapped(folder / "unmarked.npy", clips.frames)
        self.frames = _mapped(folder / "marked.npy", self.unmarked)
        self.table = value_table(processor.video_processor).to(device)
        self.pad = processor.tokenizer.pad_token_id

    def values(self, levels: torch.Tensor) -> torch.Tensor:
        """`(..., H, W, 3)` uint8 -> the processor's float32 values, `(..., 3, H, W)`."""
        return torch.stack([self.table[c][levels[..., c].int()] for c in range(3)], dim=-3)

    def taken(self, frames: np.ndarray, indices: np.ndarray | slice) -> torch.Tensor:
        return torch.from_numpy(frames[indices]).to(self.device, non_blocking=True)

    def batch(
        self, indices: list[int], answers: bool = True, unmarked: bool = False, apart: bool = False
    ) -> dict[str, torch.Tensor]:
        """As `P4DCollator` gives these conversations, or, without answers, prompts that are padded on the left.

        With `apart`, which needs the answers, every question sees the video and itself, as if it were asked alone, for the
        price of one conversation; mask and positions are then those of `_seen_apart`.
        """
        clip = self.clip[indices]
        parts = [slice(self.starts[i], self.ends[i]) for i in indices]
        if apart:
            parts = [np.arange(one.start, one.stop)[self.turns[one] != LEFT_OUT] for one in parts]
        rows, labels = [self.ids[one] for one in parts], [self.labels[one] for one in parts]
        if not answers:
            rows = [ids[: (of_row != IGNORE_INDEX).argmax()] for ids, of_row in zip(rows, labels, strict=True)]
        longest = max(map(len, rows))
        ids = np.full((len(rows), longest), self.pad, np.int64)
        mask = np.zeros((len(rows), longest), np.int64)
        answer = np.full((len(rows), longest), IGNORE_INDEX, np.int64)
        for row, (one, of_row) in enumerate(zip(rows, labels, strict=True)):
            where = slice(0, len(one)) if answers else slice(longest - len(one), longest)
            ids[row, where], mask[row, where] = one, 1
            if answers:
                answer[row, where] = of_row
        batch = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        if answers:
            batch["labels"] = torch.from_numpy(answer)
        batch = {name: values.to(self.device, non_blocking=True) for name, values in batch.items()}
        if apart:
            turns = torch.full((len(rows), longest), LEFT_OUT, dtype=torch.int8)
            for row, one in enumerate(parts):
                turns[row, : len(one)] = torch.from_numpy(self.turns[one])
            batch |= _seen_apart(turns.to(self.device))
        shown = self.taken(self.frames, clip)
        frames = shown.clone()
        frames[:, 0] = self.taken(self.first, indices)
        batch["pixel_values_videos"] = self.values(frames)
        batch["video_timestamps"] = torch.from_numpy(self.seconds[clip]).to(self.device)
        if unmarked:
            plain = shown if self.frames is self.unmarked else self.taken(self.unmarked, clip)
            batch["unmarked_pixel_values_videos"] = self.values(plain)
        return batch


def _seen_apart(turns: torch.Tensor) -> dict[str, torch.Tensor]:
    """For turns `(batch, length)`, padded on the right with `LEFT_OUT`: `attention_mask` `(batch, 1, query, key)` bool, by which
    a token sees what is shared and its own turn; and `position_ids` `(batch, length)` int64, by which each turn starts where
    the shared part ends.
    """
    query, key = turns[:, :, None], turns[:, None, :]
    seen = ((key == SHARED) | (key == query)).tril()
    own = ((key == query).tril().sum(-1) - 1).where(turns != LEFT_OUT, 0)
    return {
        "attention_mask": seen[:, None],
        "position_ids": own + (turns == SHARED).sum(1, keepdim=True) * (turns > SHARED),
    }


@dataclass
class BatchCollator:
    """Takes rows of `{"index"}`, which conversation; has the attributes that `P4DTrainer` looks at.

    In every second row "unlabelled", if there is one, says which, and the batch has no answers to learn from it.
    """

    batches: Batches
    num_frames: int
    window: int | None = None
    unmarked: bool = False
    pixels: str = "video"
    targets: Truth | Targets | None = None
    apart: bool = False

    def __call__(self, rows: list[dict[str, int]]) -> dict[str, Any]:
        names = ["unlabelled" if number % 2 and "unlabelled" in row else "index" for number, row in enumerate(rows)]
        indices = [row[name] for row, name in zip(rows, names, strict=True)]
        batch = self.batches.batch(indices, unmarked=self.unmarked, apart=self.apart)
        batch["labels"][[name == "unlabelled" for name in names]] = IGNORE_INDEX
        batch = change_pixels(batch, self.pixels, self.batches.clip[indices])
        if self.targets is not None:
            batch["perception_targets"] = self.targets(self.batches.clip[indices])
        return batch


def change_pixels(batch: dict[str, Any], pixels: str, clips: np.ndarray) -> dict[str, Any]:
    """`zeroed` pixels, or frames `shuffled` while their times stay in order."""
    for name in ("pixel_values_videos", "unmarked_pixel_values_videos"):
        if name not in batch or pixels == "video":
            continue
        if pixels == "zeroed":
            batch[name] = torch.zeros_like(batch[name])
        else:
            # The first frame keeps its place, because it carries the marks.
            count = batch[name].shape[1] - 1
            orders = np.stack([[0, *(1 + np.random.default_rng(int(clip)).permutation(count))] for clip in clips])
            batch[name] = batch[name][torch.arange(len(orders))[:, None], torch.from_numpy(orders)]
    return batch
