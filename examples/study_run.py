"""One run of the study: train a row of examples/study.yaml with a seed, and test it. examples/study.py makes these side by side.

What a row needs lies in the folder `work`: `data`, `teacher`, `initial`, and the models of the rows that it starts from.
"""

import functools
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from study_batches import (
    BatchCollator,
    Batches,
    PreparedTeacher,
    Targets,
    Truth,
    change_pixels,
    file_sha256,
    prepare_targets,
    processor_with,
)
from study_heads import fold_narrow_convolutions
from study_muon import muon_and_adamw
from study_records import seed_of
from tqdm import tqdm
from train import RunArguments, load_student, load_teacher
from transformers import HfArgumentParser, TrainerCallback, set_seed

from datasets_rgpt4d.world4d_frames import World4DFrames
from metrics_rgpt4d import R4DBench
from modeling_rgpt4d.perception_decoder import frame_hidden_states
from trainer import GroundTruthTeacher, P4DConfig, P4DTrainer, signal_errors
from trainer.distillation_windows import cut
from trainer.p4d_trainer import DECODER_FOLDER

REPEATS = 101  # of the comparison of the model with and without its decoder
# What a row may say beside options of examples/train.py and trainer.P4DConfig.
STUDY_OPTIONS = {
    "train": True,  # False: test what the row starts from
    "start": "base",  # the row whose model is trained on, of the same seed or a base row; or `initial`
    "data": "train",  # folder of --work/data
    "tasks": None,  # train on these tasks alone
    "share": 1.0,  # of the clips, drawn at random, with all their questions
    "unlabelled": False,  # half of each batch are the other clips, without answers: what a teacher says of them costs no label
    "pixels": "video",  # `video`, `zeroed` or `shuffled`: what the model sees in training and in the test
    "apart": False,  # the questions about a clip do not see each other, nor each other's answers; as in the test
    "optimizer": "adamw",  # or `muon`, which has AdamW for what is no matrix
    "states": "frame_tokens",  # the hidden states that the decoder reads: a key of TRAINERS
    "tests": ["test"],  # and any of `shuffled`, `zeroed`
    "perception_clips": 0,  # test clips on which the perceived signals are compared with the truth
    "inference": False,  # compare the model with and without its decoder
}


def row_settings(config: dict[str, Any], row: str) -> dict[str, Any]:
    """All settings of a row: the common ones of `training`, overwritten by its own."""
    if row not in config["rows"]:
        raise SystemExit(f"The study has no row {row!r}; there are {list(config['rows'])}.")
    return {**STUDY_OPTIONS, **config["training"], **(config["rows"][row] or {})}


def start_of(settings: dict[str, Any], work: Path, seed: int) -> Path:
    """Folder of the model that a run starts from."""
    if settings["start"] == "initial":
        return work / "initial"
    return work / "models" / f"{settings['start']}-{seed_of(settings['start'], seed)}"


def batches_name(settings: dict[str, Any], split: str) -> str:
    """Folder of what the processor makes of a split; TPE is no matter of the processor, and a test asks everything."""
    cue = settings["time_cue"] if settings["time_cue"] in ("mark", "prompt") else "none"
    name = f"{split}-{cue}-{settings['num_frames']}"
    if split == "test":
        return name
    chosen = json.dumps([settings["tasks"], 1.0 if settings["unlabelled"] else settings["share"]])
    return f"{name}-{hashlib.sha256(chosen.encode()).hexdigest()[:8]}"


def has_labels(count: int, share: float) -> np.ndarray:
    """Which of `count` clips keep their questions, `(count,)` bool; the same with all seeds of a run."""
    if not round(share * count):
        raise SystemExit(f"A share of {share} of {count} clips is none: give more clips or a greater share.")
    order = np.random.default_rng(0).permutation(count)
    return np.isin(np.arange(count), order[: round(share * count)])


def conversations(rows: Dataset, settings: dict[str, Any], split: str) -> list[list[int]]:
    """The rows of each conversation: all chosen questions about a clip in a random order; in a test a single one."""
    if split == "test":
        return [[index] for index in range(len(rows))]
    wanted = set(settings["tasks"] or rows.unique("task"))
    of_clip: dict[int, list[int]] = {}
    for index, (clip, task) in enumerate(zip(rows["clip"][:], rows["task"][:], strict=True)):
        if task in wanted:
            of_clip.setdefault(clip, []).append(index)
    clips = np.array(sorted(of_clip))
    kept = (clips if settings["unlabelled"] else clips[has_labels(len(clips), settings["share"])]).tolist()
    return [np.random.default_rng([clip, 1]).permutation(of_clip[clip]).tolist() for clip in kept]


# ------------------------------------------------------------------------------------------------------------ training


class ReleaseStatesTrainer(P4DTrainer):
    """Reads the hidden states where the authors' release does: as many contiguous positions as a video has frame tokens,
    from one after the first, although every frame is followed by a token that ends it.
    """

    def student_latents(self, decoder, hidden_states, inputs, config, lengths, windows):
        is_frame = inputs["input_ids"] == config.video_token_id
        taken = torch.zeros_like(is_frame)
        for row in range(len(is_frame)):
            first, count = int(is_frame[row].int().argmax()) + 1, int(is_frame[row].sum())
            taken[row, first : first + count] = True
        # The function counts and orders positions by ids alone, so these positions are called frame tokens.
        ids = torch.where(taken, config.video_token_id, config.video_token_id + 1)
        videos = frame_hidden_states(hidden_states, ids, config.video_token_id, lengths, config.frame_grid)
        frames = torch.stack(cut(videos, windows, self.teacher.num_frames))
        return decoder(frames.to(decoder.dtype))


TRAINERS = {"frame_tokens": P4DTrainer, "release": ReleaseStatesTrainer}


@functools.lru_cache(maxsize=2)  # of a process that makes one run after the other: most have the same
def opened(folder: Path, clips: Path, model: Path, time_cue: str, device: torch.device) -> Batches:
    return Batches(folder, World4DFrames(clips), processor_with(model, time_cue), device)


class PerceivedSteps(TrainerCallback):
    """Keeps what the student perceives in a test clip at chosen steps, for the document's pictures."""

    def __init__(self, trainer: P4DTrainer, collator: BatchCollator, row: int, steps: list[int]):
        self.trainer, self.collator, self.row, self.steps = trainer, collator, row, steps
        self.student: dict[int, dict[str, np.ndarray]] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        self.on_step_end(args, state, control)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step not in self.steps:
            return
        trained_by, self.trainer.data_collator = self.trainer.data_collator, self.collator
        _, student, targets = self.trainer.perceive([{"index": self.row}])
        self.trainer.data_collator = trained_by
        self.student[state.global_step] = _painted(student)
        self.teacher = _painted(targets.signals)

    def save(self, file: Path, frames: np.ndarray, truth: dict[str, torch.Tensor]) -> None:
        steps = sorted(self.student)
        arrays = {"frames": frames, "steps": np.array(steps)}
        for name in self.teacher:
            arrays[f"student_{name}"] = np.stack([self.student[step][name] for step in steps])
            arrays[f"teacher_{name}"] = self.teacher[name]
            arrays[f"truth_{name}"] = truth[name][0].half().cpu().numpy()
        unfinished = file.with_name(f".{file.stem}.part.npz")
        np.savez_compressed(unfinished, **arrays)
        unfinished.replace(file)


def _painted(signals: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Of the first clip, motion as probability."""
    of_first = {name: values[0].float() for name, values in signals.items()}
    of_first["motion"] = of_first["motion"].sigmoid()
    return {name: values.half().cpu().numpy() for name, values in of_first.items()}


class Run:
    """A row with a seed: its model, trained or only loaded, with all that tests need.

    Args: `compiled`, by default on a GPU: compile the layers, and fold the teacher's narrow convolutions. By profile a step of
        SFT then takes 12 instead of 19 ms of an H200's kernels, one of P4D 24 instead of 30, and folding takes the heads,
        forward and backward, from 10 to 5. `benchmarks/study_step.py` measures steps.
    """

    def __init__(self, config: dict[str, Any], work: Path, row: str, seed: int, compiled: bool | None = None):
        self.config, self.work, self.row, self.seed = config, work, row, seed
        self.settings = settings = row_settings(config, row)
        self.folder = work / "models" / f"{row}-{seed}"
        start = start_of(settings, work, seed)
        self.start_sha256 = file_sha256(start / "model.safetensors")
        options = {name: value for name, value in settings.items() if name not in STUDY_OPTIONS}
        compiled = torch.cuda.is_available() if compiled is None else compiled
        options |= {"model": str(start), "output_dir": str(self.folder), "seed": seed, "compile_layers": compiled}
        self.teacher_sha256 = None
        if options.get("teacher"):
            options["teacher"] = str(work / "teacher")
            self.teacher_sha256 = file_sha256(work / "teacher" / "model.safetensors")
        self.arguments, self.training = HfArgumentParser((RunArguments, P4DConfig)).parse_dict(options)
        set_seed(seed)
        self.teacher = load_teacher(self.arguments, self.training)
        self.model, self.processor = load_student(self.arguments, self.training, self.teacher)
        if self.teacher is not None:
            if compiled:
                fold_narrow_convolutions(self.teacher.model.heads)
            self.teacher.to(self.training.device)

    def batches(self, split: str) -> Batches:
        data = self.work / "data"
        return opened(
            data / batches_name(self.settings, split),
            data / split,
            self.work / "initial",
            self.settings["time_cue"],
            self.training.device,
        )

    def examples(self, count: int) -> Dataset:
        """What an epoch shows of `count` conversations, as `BatchCollator` takes it."""
        indices = np.arange(count)
        if not self.settings["unlabelled"]:
            return Dataset.from_dict({"index": indices})
        labelled = has_labels(count, self.settings["share"])
        unlabelled = indices[~labelled]
        return Dataset.from_dict({"index": np.resize(indices[labelled], len(unlabelled)), "unlabelled": unlabelled})

    def optimizer(self) -> tuple[Callable, dict[str, float]] | None:
        """What Trainer makes the optimizer of; `None` is its own choice, AdamW."""
        if self.settings["optimizer"] == "adamw":
            return None
        if self.settings["optimizer"] != "muon":
            raise SystemExit(f"The row's optimizer is {self.settings['optimizer']!r}; it must be adamw or muon.")
        # Trainer calls what the first returns with the model and the second
        return lambda: muon_and_adamw, {"lr": self.training.learning_rate, "weight_decay": self.training.weight_decay}

    def train(self, callbacks: Sequence[TrainerCallback] = ()) -> P4DTrainer:
        batches = self.batches(self.settings["data"])
        teacher, targets = self.teacher, None
        prepared = self.work / "data" / f"{self.settings['data']}-{'truth' if self.arguments.truth else 'targets'}"
        if self.arguments.truth:
            teacher = GroundTruthTeacher(self.teacher)
            targets = Truth(prepared, self.training.device)
        elif teacher is not None:
            teacher = PreparedTeacher(teacher.model, teacher.depth_scale)
            weights = self.work / "teacher" / "model.safetensors"
            targets = Targets(prepare_targets(prepared, batches, teacher, weights), self.training.device)
        trainer = TRAINERS[self.settings["states"]](
            self.model,
            self.training,
            teacher=teacher,
            train_dataset=self.examples(len(batches.clip)),
            processing_class=self.processor,
            optimizer_cls_and_kwargs=self.optimizer(),
            callbacks=list(callbacks),
            data_collator=BatchCollator(
                batches,
                self.arguments.num_frames,
                window=None if teacher is None else teacher.num_frames,
                pixels=self.settings["pixels"],
                targets=targets,
                apart=self.settings["apart"],
            ),
        )
        seen = None
        if self.arguments.picture_steps and self.seed == self.config["seeds"][0]:
            test, frames = self.batches("test"), self.arguments.num_frames
            clip = self.config["pictures"]["clip"]
            row = int(np.flatnonzero(test.clip == clip)[0])
            collator = BatchCollator(test, frames, window=frames, unmarked=True)
            seen = PerceivedSteps(trainer, collator, row, self.arguments.picture_steps)
            trainer.add_callback(seen)
        trainer.train()
        if seen is not None:
            truth = Truth(self.work / "data" / "test-truth", self.training.device)
            seen.save(self.work / "pictures.npz", test.clips.frames[clip], truth(np.array([clip])))
        trainer.save_model(str(self.folder))
        return trainer

    # ---------------------------------------------------------------------------------------------------------- tests

    @torch.no_grad()
    def replies(self, pixels: str) -> list[str]:
        """The model's words to every test question, by greedy decoding."""
        model, batches, test = self.model.eval(), self.batches("test"), self.config["test"]
        fused = model.config.geometry_fusion != "none"
        # Questions of one length together: less padding, and long answers do not hold short ones up.
        order = np.argsort(batches.ends - batches.starts, kind="stable").tolist()
        found: dict[int, str] = {}
        for start in tqdm(range(0, len(order), test["batch_size"]), desc=f"answers ({pixels})", unit="batch"):
            indices = order[start : start + test["batch_size"]]
            inputs = batches.batch(indices, answers=False, unmarked=fused)
            inputs = change_pixels(inputs, pixels, batches.clip[indices])
            if fused:
                of_videos = self.processor.video_processor
                frames = inputs.pop("unmarked_pixel_values_videos")
                seen = self.teacher.perceive(frames, of_videos.image_mean, of_videos.image_std, signals=())
                inputs["video_geometry"] = seen.latents[:, -1]
            words = model.generate(**inputs, max_new_tokens=test["max_new_tokens"], do_sample=False)
            words = self.processor.batch_decode(words[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            found |= dict(zip(indices, words, strict=True))
        return [found[index] for index in range(len(order))]

    def test(self, pixels: str) -> dict[str, Any]:
        """Scores of the project's metric, and the letter that each reply chooses ("-" for none)."""
        rows, replies = self.batches("test").clips.rows, self.replies(pixels)
        references = [{name: row[name] for name in ("id", "task", "options", "answer")} for row in rows]
        scores = R4DBench(keep_in_memory=True).compute(predictions=replies, references=references, return_items=True)
        return {"letters": "".join(item["letter"] or "-" for item in scores.pop("items")), "scores": scores}

    def perception(self, trainer: P4DTrainer, count: int) -> dict[str, Any]:
        """Errors of the student's and the teacher's signals against the truth, one value a test clip."""
        batches, frames = self.batches("test"), self.arguments.num_frames
        truth = Truth(self.work / "data" / "test-truth", self.training.device)
        trainer.data_collator = BatchCollator(batches, frames, window=frames, unmarked=True)
        trainer.teacher = self.teacher  # beside the truth, too, stands what the teacher perceives
        clips, rows = np.unique(batches.clip, return_index=True)
        errors: dict[str, dict[str, list]] = {"student": {}, "teacher": {}}
        for start in range(0, min(count, len(rows)), 64):
            some = slice(start, min(start + 64, count))
            _, student, targets = trainer.perceive([{"index": int(row)} for row in rows[some]])
            exact = truth(clips[some])
            for side, signals in (("student", student), ("teacher", targets.signals)):
                for name, values in signal_errors(signals, exact).items():
                    errors[side].setdefault(name, []).extend(None if v is None else round(v, 5) for v in values)
        return errors

    @torch.no_grad()
    def inference(self, trainer: P4DTrainer) -> dict[str, Any]:
        """Logits and time of one batch of test questions with the decoder in the model and without it, in turns."""
        model, batches = self.model.eval(), self.batches("test")
        inputs = batches.batch(list(range(min(64, len(batches.starts)))), answers=False)
        decoder = trainer.perception_decoder
        logits, milliseconds = {}, {True: [], False: []}
        for repeat in range(2 * REPEATS):
            inside = repeat % 2 == 0
            if inside:
                model.add_module(DECODER_FOLDER, decoder)
            elif hasattr(model, DECODER_FOLDER):
                delattr(model, DECODER_FOLDER)
            _synchronize(model.device)
            started = time.perf_counter()
            logits[inside] = model(**inputs).logits
            _synchronize(model.device)
            milliseconds[inside].append(1000 * (time.perf_counter() - started))
        model.add_module(DECODER_FOLDER, decoder)
        # The first of each warms up
        with_decoder, without = (statistics.median(milliseconds[inside][1:]) for inside in (True, False))
        return {
            "logits_equal": torch.equal(logits[True], logits[False]),
            "milliseconds_with_decoder": round(with_decoder, 3),
            "milliseconds_without": round(without, 3),
            "questions": len(inputs["input_ids"]),
            "repeats": REPEATS - 1,
        }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compact_log(history: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The losses and gradient norms of a run's log."""
    for entry in history:
        kept = {name: value for name, value in entry.items() if name.startswith(("loss", "grad_norm"))}
        if kept:
            yield {"step": entry["step"], **{name: float(f"{value:.5g}") for name, value in kept.items()}}


def run(config: dict[str, Any], work: Path, row: str, seed: int) -> dict[str, Any]:
    """Train and test; returns the record."""
    began = time.time()
    one = Run(config, work, row, seed)
    made_on = {"device": "cpu", "unit": "cpu"}
    if one.training.device.type == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        made_on = {"device": properties.name, "unit": str(properties.uuid)}  # the GPU itself, among others of its kind
    settings, trainer, started = one.settings, None, time.perf_counter()
    if settings["train"]:
        trainer = one.train()
    else:
        one.model.to(one.training.device)
    trained = time.perf_counter()
    record: dict[str, Any] = {
        "row": row,
        "seed": seed,
        "settings": settings,
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "datasets")},
        **made_on,
        "parameters": one.model.num_parameters(),
        "log": [] if trainer is None else list(compact_log(trainer.state.log_history)),
        "start_sha256": one.start_sha256,
        "teacher_sha256": one.teacher_sha256,
        "items_sha256": json.loads((work / "items.json").read_text())["sha256"],
    }
    # What was compiled for training would be compiled again for every length of an answer.
    with torch.compiler.set_stance("force_eager"):
        if settings["tests"]:
            changes = {"test": settings["pixels"], "shuffled": "shuffled", "zeroed": "zeroed"}
            record["tests"] = {name: one.test(changes[name]) for name in settings["tests"]}
        if settings["perception_clips"]:
            record["perception"] = one.perception(trainer, settings["perception_clips"])
        if settings["inference"]:
            record["inference"] = one.inference(trainer)
    record["seconds"] = {
        "train": round(trained - started, 3),
        "evaluate": round(time.perf_counter() - trained, 3),
    }
    # Seconds since 1970: others may have had the device at the same time.
    record["from_to"] = [round(began, 3), round(time.time(), 3)]
    return record
