"""The study's records as samples: which rows there are, what the paper has for them, and what each answered and perceived."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evaluation_report import PAPER
from study_statistics import Resamples, Sample

from datasets_rgpt4d.world4d_questions import R4D_TASKS
from metrics_rgpt4d.r4d_bench.r4d_bench import CATEGORIES, DYNAMIC, STATIC


def stays(clip: dict[str, Any]) -> bool:
    """The camera of this clip, one of `items.json`, neither moves nor turns, and no object leaves its place."""
    return not (clip["camera_turn_deg"] or clip["camera_path_m"]) and {*clip["motions"]} <= {"still", "spin"}


# Groups of test clips that are told apart by what makes a clip hard: a column's name -> of which clips.
DIFFICULTY = {
    "hidden < 5 %": lambda clip: clip["occluded"] < 0.05,
    "hidden ≥ 25 %": lambda clip: clip["occluded"] >= 0.25,
    "camera does not turn": lambda clip: clip["camera_turn_deg"] == 0,
    "camera turns": lambda clip: clip["camera_turn_deg"] > 0,
    "1 or 2 objects": lambda clip: clip["objects"] <= 2,
    "3 or 4 objects": lambda clip: 3 <= clip["objects"] <= 4,
    "5 or 6 objects": lambda clip: clip["objects"] >= 5,
}
# Groups of test clips of which TimeBench is asked apart: how far things get between frames tells of the time between them.
MOVEMENT = {
    "TimeBench, something moves": lambda clip: not stays(clip),
    "TimeBench, all stays in place": stays,
}
BASE_ROWS = ("pairs", "base")  # made once, with seed 0: what the other rows start from
# Row -> what the document calls it, and what it is.
ROWS = {
    "zero_shot": (
        "Zero-shot",
        "the base model, trained on captions, which tell in words how objects move, and where in the picture they are, and "
        "on questions about appearance, without any 4D question; one model, so its seeds are the same",
    ),
    "sft": ("4D-SFT", "trained on the 4D questions, each as if it were asked alone, without a teacher"),
    "concat": ("4D-Concat", "SFT; the teacher's latents are concatenated with the visual features, at inference too"),
    "pe": ("4D-PE", "SFT; the teacher's latents are added as positional encodings, at inference too"),
    "p4d": ("P4D", "SFT with latent and explicit distillation of all four signals, with TPE: the whole method"),
    "ld": ("LD-Only", "latent distillation alone"),
    "ld_d": ("LD+D", "latent distillation, and of depth"),
    "ld_df": ("LD+D+F", "latent distillation, and of depth and flow"),
    "ld_dfm": ("LD+D+F+M", "latent distillation, and of depth, flow and motion"),
    "ed": ("ED-Only", "explicit distillation of all four signals, without latent distillation"),
    "no_cue": ("P4D, no time cue", "P4D without TPE"),
    "mark": ("P4D+mark", "the time is drawn into each frame"),
    "prompt": ("P4D+prompt", "duration and frame rate are told in the prompt"),
    "sft_no_cue": ("4D-SFT, no time cue", "SFT without TPE"),
    "tune_all": ("Tune-All", "P4D; vision tower, projector and language model are trained"),
    "tune_v": ("Tune-V", "P4D; the vision tower alone is trained"),
    "tune_p": ("Tune-P", "P4D; the projector alone is trained"),
    "tune_llm": ("Tune-LLM", "P4D; the language model alone is trained"),
    "tune_llm_lora": ("Tune-LLM-LoRA", "P4D; adapters of the language model alone are trained"),
    "tune_p_llm_lora": ("Tune-P+LLM-LoRA", "P4D; projector and adapters of the language model are trained"),
    "tune_p_llm": ("Tune-P+LLM", "P4D; projector and language model are trained: the paper's choice"),
    "mix_static": ("P4D, static questions", "P4D on the questions of the three static categories, and TimeBench"),
    "mix_dynamic": ("P4D, dynamic questions", "P4D on the questions of the six dynamic categories, and TimeBench"),
    "mix_captions": (
        "P4D and captions",
        "P4D on all questions, and on captions that tell of every object of the first frame",
    ),
    "truth": ("ED from the truth", "explicit distillation of World4D's exact signals instead of the teacher's"),
    "release_states": (
        "Release's states",
        "P4D; the decoder reads the positions that the authors' release takes for frame tokens",
    ),
    "release_weights": ("Release's weights", "P4D with the loss weights of the authors' release"),
    "linear_decoder": ("Linear decoder", "P4D with a linear perception decoder instead of an MLP"),
    "sft_long": ("4D-SFT, twice as long", "SFT with twice the steps"),
    "p4d_long": ("P4D, twice as long", "P4D with twice the steps"),
    "sft_half_rate": ("4D-SFT, half the rate", "SFT with half the learning rate"),
    "sft_5": ("4D-SFT, 5 %", "SFT on the questions about 5 % of the clips"),
    "p4d_5": ("P4D, 5 %", "P4D on the questions about 5 % of the clips, and on the frames of all"),
    "sft_20": ("4D-SFT, 20 %", "SFT on the questions about 20 % of the clips"),
    "p4d_20": ("P4D, 20 %", "P4D on the questions about 20 % of the clips, and on the frames of all"),
    "one_frame": ("4D-SFT, one frame", "trained and tested with one frame of each clip"),
    "blind": ("4D-SFT, blind", "trained and tested on zeroed pixels and without a time cue: the text alone"),
    "probe_sft": (
        "Linear probe on 4D-SFT",
        "a linear perception decoder trained by P4D's losses on the frozen SFT model; it answers as SFT does",
    ),
}
# Table 7's rows -> trained parts, and whether the language model has adapters. One of them is P4D's own setting, which is
# not run twice.
TRAINED_PARTS = {
    "tune_all": ({"vision", "projector", "llm"}, False),
    "tune_v": ({"vision"}, False),
    "tune_p": ({"projector"}, False),
    "tune_llm": ({"llm"}, False),
    "tune_llm_lora": ({"llm"}, True),
    "tune_p_llm_lora": ({"projector", "llm"}, True),
    "tune_p_llm": ({"projector", "llm"}, False),
}
# R4D-Bench Avg, Sta and Dyn in percent, from Tables 4 to 7 of 4D-RGPT, arXiv:2512.17012v2: an 8B model, R4D-Bench.
PAPER_SCORES = {
    "zero_shot": (37.9, 29.1, 41.3),
    "sft": (40.1, 32.2, 43.8),  # Table 4
    "concat": (39.5, 30.6, 42.9),
    "pe": (36.0, 26.6, 39.5),
    "p4d": (42.2, 32.9, 45.7),
    "ld": (40.2, 32.0, 43.3),  # Table 5
    "ld_d": (40.8, 32.5, 44.0),
    "ld_df": (41.9, 33.1, 45.3),
    "ld_dfm": (42.0, 33.1, 45.4),
    "ed": (39.8, 31.5, 42.9),
    "no_cue": (41.0, 31.8, 44.5),  # Table 6
    "mark": (41.1, 31.5, 44.7),
    "prompt": (41.5, 32.1, 45.0),
    "tune_all": (38.8, 30.1, 42.1),  # Table 7
    "tune_v": (35.8, 27.3, 39.0),
    "tune_p": (38.6, 29.8, 42.0),
    "tune_llm": (40.5, 32.2, 43.7),
    "tune_llm_lora": (41.1, 33.0, 44.2),
    "tune_p_llm_lora": (41.4, 32.8, 44.7),
    "tune_p_llm": (42.2, 32.9, 45.7),
}
PAPER_TIMEBENCH = {
    row: PAPER["Table A3"]["rows"][name][0]
    for row, name in (
        ("zero_shot", "NVILA-Lite-8B"),
        ("no_cue", "P4D, no time cue"),
        ("mark", "P4D, marks"),
        ("prompt", "P4D, prompts"),
    )
}
NO_LETTER = "-"


def seed_of(row: str, seed: int) -> int:
    """The seed that a row is made with, where others have `seed`."""
    return 0 if row in BASE_ROWS else seed


@dataclass(frozen=True)
class Column:
    """Questions over which an accuracy is taken: `(items,)` bool, how many, and what a guess gets right of them."""

    mask: np.ndarray
    n: int
    chance: float


class Study:
    """Reads `items.json` and `records/` of a folder.

    Raises: `SystemExit` if there are no items, or they do not tell what the clips show, or a record is of other items, has not
        one letter an item, or has letters that are not what its scores say.
    """

    def __init__(self, folder: Path):
        if not (folder / "items.json").exists():
            raise SystemExit(f"There is no {folder / 'items.json'}: run examples/study.py first.")
        content = json.loads((folder / "items.json").read_text(encoding="utf-8"))
        if "clips" not in content:
            raise SystemExit(
                f"{folder / 'items.json'} does not tell what the test clips show: run a row of examples/study.py, which writes it anew."
            )
        self.data, self.sha256, self.seeds = content["data"], content["sha256"], content["seeds"]
        self.clips, items = content["clips"], content["items"]
        self.answers = np.array([item["answer"] for item in items])
        clips, self.clip_of_item = np.unique([item["clip"] for item in items], return_inverse=True)
        self.num_clips = len(clips)
        self.columns = _columns(items, self.clips)
        self.teacher: dict[str, Any] | None = None
        self.records: dict[str, dict[int, dict[str, Any]]] = {}
        for path in sorted((folder / "records").glob("*.json")):
            record = json.loads(path.read_text(encoding="utf-8"))
            if path.stem == "teacher":
                self.teacher = record
                continue
            self._check(record, path)
            self.records.setdefault(record["row"], {})[record["seed"]] = record
        self.records = {row: dict(sorted(runs.items())) for row, runs in self.records.items()}
        self._check_starts()
        self._samples: dict[tuple[str, str, str], Sample | None] = {}
        self._draws: dict[int, Resamples] = {}

    def _check(self, record: Mapping[str, Any], path: Path) -> None:
        if record["items_sha256"] != self.sha256:
            raise SystemExit(
                f"{path} is of other questions than items.json: remove it and run its row again, or the study anew."
            )
        for name, test in record.get("tests", {}).items():
            if len(test["letters"]) != len(self.answers):
                raise SystemExit(f"{path}: test {name} has {len(test['letters'])} letters, not {len(self.answers)}.")
            column, told = self.columns["Avg"], test["scores"].get("Avg")
            counted = 100 * self._right(test["letters"])[column.mask].mean()
            if told is not None and abs(counted - told) > 0.01:
                raise SystemExit(
                    f"{path}: of test {name} {counted:.2f} % of the letters are right, its score is {told:.2f} %."
                )

    def _check_starts(self) -> None:
        """Runs are compared with each other: those of a seed must go on from the same weights, and all have the same teacher."""
        first: dict[tuple[str, int], dict[str, Any]] = {}
        for record in (run for runs in self.records.values() for run in runs.values()):
            start, seed = record["settings"].get("start"), record["seed"]
            other = first.setdefault((start, seed), record)
            if other.get("start_sha256") != record.get("start_sha256"):
                raise SystemExit(
                    f"{other['row']}-{seed} and {record['row']}-{seed} went on from different models {start!r}, so they "
                    "cannot be compared: remove the records of those that went on from the older one, and run them again."
                )
        taught: dict[str, str] = {}  # hash of a teacher -> one of the runs that it taught
        for record in (run for runs in self.records.values() for run in runs.values()):
            if record.get("teacher_sha256"):
                taught.setdefault(record["teacher_sha256"], f"{record['row']}-{record['seed']}")
        if len(taught) > 1:
            raise SystemExit(
                f"{' and '.join(taught.values())} learnt from different teachers, so they cannot be compared: remove the records "
                "of what the older one has taught, and run them again."
            )

    def _right(self, letters: str) -> np.ndarray:
        return np.array(list(letters)) == self.answers

    def device_seconds(self) -> float:
        """Seconds in which devices made runs, one or several at a time, and the teacher; summed over devices.

        Of a run that does not tell when it ran, its own seconds.
        """
        spans: dict[str, list[list[float]]] = {}
        total = 0.0 if self.teacher is None else self.teacher["training_seconds"]
        for run in (run for runs in self.records.values() for run in runs.values()):
            if "from_to" in run:
                spans.setdefault(run["unit"], []).append(run["from_to"])
            else:
                total += sum(run["seconds"].values())
        for of_device in spans.values():
            until = -math.inf
            for start, end in sorted(of_device):
                total += max(0.0, end - max(start, until))
                until = max(until, end)
        return total

    def is_complete(self) -> bool:
        """Whether every row was run with every seed."""
        wanted = {(self.run_as(row), seed) for row in ROWS for seed in self.seeds}
        return wanted <= {(row, seed) for row, runs in self.records.items() for seed in runs}

    def run_as(self, row: str) -> str:
        """The row that was run for a row of Table 7: itself, or P4D if it trains the same parts."""
        settings = self.settings("p4d")
        if row in TRAINED_PARTS and row not in self.records and settings:
            parts = set(settings.get("trainable", ())), bool(settings.get("llm_lora"))
            return "p4d" if parts == TRAINED_PARTS[row] else row
        return row

    def runs(self, row: str, test: str = "test") -> dict[int, dict[str, Any]]:
        """Seed -> record of the row's runs that have this test."""
        return {seed: run for seed, run in self.records.get(row, {}).items() if test in run.get("tests", {})}

    def settings(self, row: str) -> dict[str, Any]:
        return next(iter(self.records.get(row, {}).values()), {}).get("settings", {})

    def title(self, row: str) -> str:
        return ROWS[row][0] if row in ROWS else row

    def description(self, row: str) -> str:
        """What a row is; of one that the document does not know, how its settings differ from P4D's."""
        if row in ROWS:
            return ROWS[row][1]
        own, other = self.settings(row), self.settings("p4d")
        differ = [name for name in sorted(own) if name != "tests" and own[name] != other.get(name)]
        return "as P4D, but " + ", ".join(f"`{name}` {json.dumps(own[name])}" for name in differ)

    def sample(self, row: str, column: str = "Avg", test: str = "test") -> Sample | None:
        """Right answers by seed and clip; `None` if no run has this test."""
        key = (row, column, test)
        if key not in self._samples:
            runs, mask = self.runs(row, test), self.columns[column].mask
            clips = self.clip_of_item[mask]
            counts = np.bincount(clips, minlength=self.num_clips)
            right = [self._right(run["tests"][test]["letters"])[mask] for run in runs.values()]
            sums = [np.bincount(clips, one, self.num_clips) for one in right]
            shape = (len(runs), self.num_clips)
            self._samples[key] = (
                Sample(tuple(runs), np.array(sums), np.broadcast_to(counts, shape).astype(np.float64)) if runs else None
            )
        return self._samples[key]

    def without_letter(self, row: str) -> float:
        """Percent of the test questions whose reply chooses no option, over all seeds."""
        letters = "".join(run["tests"]["test"]["letters"] for run in self.runs(row).values())
        return 100 * letters.count(NO_LETTER) / len(letters)

    def draws(self, sample: Sample) -> Resamples:
        """Those of the bootstrap, the same for all samples over as many clips."""
        num_clips = sample.sums.shape[1]
        if num_clips not in self._draws:
            self._draws[num_clips] = Resamples(num_clips)
        return self._draws[num_clips]

    def perceived(self, row: str, error: str, side: str = "student") -> Sample | None:
        """An error of perceived signals by seed and clip; `None` if no run has it. Clips without a value count nothing."""
        found = {
            seed: np.array(run["perception"][side][error], dtype=np.float64)
            for seed, run in self.records.get(row, {}).items()
            if (run.get("perception") or {}).get(side, {}).get(error)
        }
        if not found:
            return None
        values = np.stack(list(found.values()))
        return Sample(tuple(found), np.nan_to_num(values), (~np.isnan(values)).astype(np.float64))


def _columns(items: list[dict[str, Any]], clips: list[dict[str, Any]]) -> dict[str, Column]:
    tasks = np.array([item["task"] for item in items])
    guess = np.array([1 / item["num_options"] for item in items])
    static, dynamic = (np.isin(tasks, list(part.values())) for part in (STATIC, DYNAMIC))
    masks = {"Avg": np.isin(tasks, R4D_TASKS), "Sta": static, "Dyn": dynamic, "TimeBench": tasks == "TimeBench"}
    masks |= {column: tasks == task for column, task in CATEGORIES.items()}
    for asked, groups in (("Avg", DIFFICULTY), ("TimeBench", MOVEMENT)):
        for column, is_in in groups.items():
            masks[column] = masks[asked] & np.array([is_in(clips[item["clip"]]) for item in items])
    return {
        name: Column(mask, int(mask.sum()), 100 * float(guess[mask].mean()))
        for name, mask in masks.items()
        if mask.any()
    }
