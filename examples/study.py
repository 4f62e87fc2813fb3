"""The study: the paper's claims on World4D, on one GPU, with seeds and intervals.

    python examples/study.py                            # everything that is not there yet, then STUDY.md
    python examples/study.py --rows p4d sft --seeds 0    # these runs alone
    python examples/study.py --document                  # STUDY.md from the records alone

Renders the clips, trains the small teacher and the base model, then trains and tests every row of the configuration, several
side by side. A run whose record is there is not made again, so an interrupted study goes on; remove a record to make a
run again. Records lie in the folder `study`, data and models in --work. Teacher and base model are those in `study`,
unless the configuration asks for others or --from-scratch is given.
"""

import argparse
import contextlib
import dataclasses
import functools
import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import study_run
import torch
import yaml
from make_small_model import build_model, build_tokenizer
from study_batches import file_sha256, prepare_batches, prepare_truth
from study_records import BASE_ROWS, seed_of
from study_report import write_study
from study_run import STUDY_OPTIONS, batches_name, conversations, row_settings
from tqdm import tqdm
from train_teacher import RECORD as TEACHER_RECORD
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from datasets_rgpt4d import answer_letter
from datasets_rgpt4d.whole_files import write_text
from datasets_rgpt4d.world4d import CONFIGS, World4DConfig
from datasets_rgpt4d.world4d_captions import base_questions, mixed_questions
from datasets_rgpt4d.world4d_difficulty import clip_difficulty
from datasets_rgpt4d.world4d_frames import World4DFrames, save_frames
from datasets_rgpt4d.world4d_questions import scene_questions
from modeling_rgpt4d.time_marks import time_prompt

# Each process is forked from one that has imported everything, instead of importing it itself.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["study_run"])
EXAMPLES = Path(__file__).resolve().parent
TOKENIZER_ROWS = 10_000
CONFIG, RECORDS = EXAMPLES / "study.yaml", EXAMPLES.parent / "study"


# --------------------------------------------------------------------------------------------------------- preparation


def world(**clips: int) -> World4DConfig:
    """World4D as the study has it: as `tiny`, with more clips."""
    (tiny,) = (one for one in CONFIGS if one.name == "tiny")
    return dataclasses.replace(tiny, **clips)


def prepare(config: dict[str, Any], work: Path, rows: list[str], pool: Executor) -> None:
    """Clips, the list of test questions, the model with random weights, and what its processor makes of the clips."""
    data, folder = config["data"], work / "data"
    all_settings = [row_settings(config, row) for row in rows]
    worlds = {
        "train": (world(train_clips=data["train_clips"]), "train", mixed_questions),
        "test": (world(test_clips=data["test_clips"]), "test", scene_questions),
        # Another seed: scenes that no other split has.
        "base": (world(train_clips=data["base_clips"], seed=1), "train", base_questions),
    }
    has_initial, base = (work / "initial").exists(), work / "models" / "base-0"
    if (has_initial or base.exists()) and all(one["data"] != "base" for one in all_settings):
        del worlds["base"]  # the base model is made, and nothing else needs its clips
    clips = {
        name: World4DFrames(save_frames(folder / name, one, split, data["num_frames"], ask, pool, progress=True))
        for name, (one, split, ask) in worlds.items()
    }
    write_text(work / "items.json", test_items(config, clips["test"], pool))
    if not has_initial:
        if base.exists():
            tokenizer = AutoTokenizer.from_pretrained(base)
        else:
            texts = [text for name in ("train", "base") for text in spoken(clips[name])]
            tokenizer = build_tokenizer(texts, config["model"]["vocab_size"])
        make_initial_model(config, work, tokenizer)

    # Most rows share their batches with others, and what other rows start from is not tested.
    batches = {
        batches_name(one, split): (one, split)
        for one in all_settings
        for split in (one["data"], "test")
        if split == one["data"] or one["tests"] or one["perception_clips"]
    }
    for name, (settings, split) in batches.items():
        prepare_batches(
            folder / name,
            folder / split,
            conversations(clips[split].rows, settings, split),
            work / "initial",
            settings["time_cue"],
            settings["num_frames"],
            pool,
        )
    size, patch = (config["teacher"].get(name, default) for name, default in (("image-size", 64), ("patch-size", 8)))
    truths = {"test": "float32"} | ({"train": "float16"} if any(s.get("truth") for s in all_settings) else {})
    for split, dtype in truths.items():
        prepare_truth(folder / f"{split}-truth", folder / split, data["num_frames"], size, size // patch, dtype, pool)


def make_initial_model(config: dict[str, Any], work: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    sizes = {name: config["model"][name] for name in ("image_size", "patch_size", "width", "layers")}
    torch.manual_seed(0)
    model, processor = build_model(tokenizer, **sizes, time_cue="none")
    unfinished = work / ".initial.part"
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    unfinished.replace(work / "initial")


def is_stored(config: dict[str, Any]) -> bool:
    """Whether teacher and base model of the repository are those that this configuration would make."""
    own = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    return all(config[part] == own[part] for part in ("data", "model", "teacher")) and all(
        row in config["rows"] and row_settings(config, row) == row_settings(own, row) for row in BASE_ROWS
    )


def take_stored(work: Path, records: Path) -> None:
    """Put the base model and the teacher of the repository, with their records, where runs look for them: each unless `work` has
    one, or `records` tell of another.
    """
    for folder in (work / "models", work / "records", records):
        folder.mkdir(parents=True, exist_ok=True)
    for job, stored, target, rows in (
        (Job("base", 0), RECORDS / "base", work / "models" / "base-0", BASE_ROWS),
        (Job("teacher", 0), RECORDS / "teacher", work / "teacher", ("teacher",)),
    ):
        names = [f"{Job(row, 0).name}.json" for row in rows]
        told = {name: (RECORDS / "records" / name).read_text(encoding="utf-8") for name in names}
        known = [name for name in names if (records / name).exists()]
        if target.exists() or any((records / name).read_text(encoding="utf-8") != told[name] for name in known):
            continue
        unfinished = target.with_name(f".{target.name}.part")
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(stored, unfinished)
        for name, text in told.items():
            write_text(records / name, text)
        made = unfinished / TEACHER_RECORD if job.row == "teacher" else job.made(work)
        write_text(made, told[f"{job.name}.json"])
        unfinished.replace(target)


def spoken(clips: World4DFrames) -> list[str]:
    """What is said about the first of the clips, and the sentences that tell their times: a tokenizer needs no more."""
    texts = [
        block["text"]
        for row in clips.rows.select(range(min(TOKENIZER_ROWS, len(clips.rows))))
        for message in clips.messages(row)
        for block in message["content"]
        if block["type"] == "text"
    ]
    return texts + [time_prompt(scene.duration_s + 1 / scene.fps, scene.fps) for scene in clips.scenes[:TOKENIZER_ROWS]]


def test_items(config: dict[str, Any], test: World4DFrames, pool: Executor) -> str:
    """What the document must know of the test clips and their questions, with a hash that every record repeats."""
    num_frames = config["data"]["num_frames"]
    items = [
        {
            "id": row["id"],
            "task": row["task"],
            "clip": row["clip"],
            "answer": answer_letter(row["options"], row["answer"]),
            "num_options": len(row["options"]),
        }
        for row in test.rows
    ]
    lines = json.dumps([[*item.values()] for item in items])
    content = {
        "data": config["data"],
        "seeds": config["seeds"],
        "sha256": hashlib.sha256(lines.encode()).hexdigest(),
        "clips": list(pool.map(functools.partial(clip_difficulty, num_frames=num_frames), test.scenes, chunksize=16)),
        "items": items,
    }
    return json.dumps(content) + "\n"


# ---------------------------------------------------------------------------------------------------------------- runs


@dataclasses.dataclass(frozen=True)
class Job:
    """A run of a row with a seed, or the teacher's training. It needs the models of the jobs in `needs`."""

    row: str
    seed: int
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "teacher" if self.row == "teacher" else f"{self.row}-{self.seed}"

    def made(self, work: Path) -> Path:
        """The file that it writes last."""
        return work / "teacher" / TEACHER_RECORD if self.row == "teacher" else work / "records" / f"{self.name}.json"


def jobs_to_do(config: dict[str, Any], work: Path, records: Path, rows: list[str], seeds: list[int]) -> list[Job]:
    """The runs that have no record yet, and those whose models they need and that are not in `work`."""
    jobs: dict[str, Job] = {}

    def add(row: str, seed: int, again: bool = False) -> str:
        """The name of the job that makes this model; it is made anew if `again`."""
        settings = {} if row == "teacher" else row_settings(config, row)
        seed = 0 if row == "teacher" else seed_of(row, seed)
        job = Job(row, seed)
        if job.name in jobs or (job.made(work).exists() and not again):
            return job.name
        needs = []
        if settings.get("start", "initial") != "initial":
            needs.append(add(settings["start"], seed))
        if settings.get("teacher"):
            needs.append(add("teacher", 0))
        job = Job(row, seed, tuple(needs))
        jobs[job.name] = job
        return job.name

    for seed in seeds:
        for row in rows:
            recorded = records / f"{row}-{seed_of(row, seed)}.json"
            if recorded.exists():
                check_record(config, recorded)
            else:
                add(row, seed, again=True)
    return list(jobs.values())


def check_record(config: dict[str, Any], file: Path) -> None:
    """A record that was made with other settings is no record of this study."""
    record = json.loads(file.read_text(encoding="utf-8"))
    settings = row_settings(config, record["row"])
    made_with = {**STUDY_OPTIONS, **record["settings"]}  # an option that is younger than the record had its default
    changed = [name for name in sorted(settings.keys() | made_with.keys()) if settings.get(name) != made_with.get(name)]
    if changed:
        raise SystemExit(f"{file} was made with other settings of {changed}: remove it, or give another --records.")


def check_starts(config: dict[str, Any], work: Path, records: Path, jobs: list[Job]) -> None:
    """Runs are compared with each other, so those of a seed must go on from the same base model, and all have the same teacher."""

    def digest(folder: Path) -> str:
        weights = folder / "model.safetensors"
        return file_sha256(weights) if weights.exists() else "to be trained"

    rows = {job: row_settings(config, job.row) for job in jobs if job.row != "teacher"}
    seeds = {job.seed for job, settings in rows.items() if settings["start"] == "base"}
    are_taught = any(settings.get("teacher") for settings in rows.values())
    base, teacher = digest(work / "models" / "base-0"), digest(work / "teacher")
    for file in sorted(records.glob("*.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        settings = record["settings"]
        if record.get("seed") in seeds and settings["start"] == "base" and record.get("start_sha256") != base:
            raise SystemExit(
                f"{file} went on from another base model than {work / 'models' / 'base-0'}, so a run of seed {record['seed']} "
                "could not be compared with it: give a --records folder of your own, or remove what is recorded of this seed."
            )
        # A record that is older than this entry does not tell.
        if are_taught and settings.get("teacher") and record.get("teacher_sha256", teacher) != teacher:
            raise SystemExit(
                f"{file} learnt from another teacher than {work / 'teacher'}, so runs of P4D could not be compared with it: give a "
                "--records folder of your own, or remove what is recorded of P4D."
            )


def visible_gpus() -> list[str | None]:
    """The GPUs that this process was given, by the names that `CUDA_VISIBLE_DEVICES` has for them; [None]: none, the CPU."""
    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return (named.split(",")[:count] if named else [str(gpu) for gpu in range(count)]) or [None]


def on_gpu(gpus: Any) -> None:
    """Start of a process that makes runs: the GPU that is its own from now on, and one thread."""
    gpu = gpus.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(1)


def do(job: Job, config: dict[str, Any], work: Path, log: Path) -> float:
    """Make a run in this process, which has made others before; what it prints goes to `log`. Returns its seconds."""
    started = time.perf_counter()
    with log.open("w", buffering=1) as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            if job.row == "teacher":
                options = [word for name, value in config["teacher"].items() for word in (f"--{name}", str(value))]
                command = [sys.executable, str(EXAMPLES / "train_teacher.py"), "--output-dir", str(work / "teacher")]
                subprocess.run([*command, *options], stdout=file, stderr=file, check=True)
            else:
                record = study_run.run(config, work, job.row, job.seed)
                write_text(job.made(work), json.dumps(record) + "\n")
        except BaseException:
            traceback.print_exc()
            raise
        finally:
            torch.compiler.reset()  # of the compilations of a layer only so many are kept, and the next run's differ
            gc.collect()
            torch.cuda.empty_cache()
    return time.perf_counter() - started


def run_jobs(jobs: list[Job], config: dict[str, Any], work: Path, records: Path, parallel: int) -> None:
    """Run them, `parallel` side by side on each GPU, and copy their records. Ends with an error that names what failed."""
    logs = work / "logs"
    for folder in (logs, work / "records", records):
        folder.mkdir(parents=True, exist_ok=True)
    gpus = visible_gpus()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    waiting, unfinished, failed = list(jobs), {job.name for job in jobs}, []
    running: dict[Future, Job] = {}
    numbers = PROCESSES.Queue()
    for number in gpus * parallel:
        numbers.put(number)
    with (
        ProcessPoolExecutor(len(gpus) * parallel, PROCESSES, initializer=on_gpu, initargs=(numbers,)) as pool,
        tqdm(total=len(jobs), unit="run", desc="runs") as bar,
    ):
        while waiting or running:
            for job in [job for job in waiting if not unfinished & {*job.needs}]:
                running[pool.submit(do, job, config, work, logs / f"{job.name}.log")] = job
                waiting.remove(job)
            if not running:  # what the rest needs has failed
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                bar.update()
                if future.exception() is not None:
                    failed.append(job.name)
                    tqdm.write(f"{job.name} failed, see {logs / job.name}.log: {future.exception()}")
                    continue
                unfinished.remove(job.name)
                made = job.made(work)
                write_text(records / f"{job.name}.json", made.read_text(encoding="utf-8"))
                tqdm.write(f"{job.name} done in {future.result():.0f} s")
    if failed:
        rest = f" They are needed by {[job.name for job in waiting]}." if waiting else ""
        raise SystemExit(f"These runs failed, see {logs}: {failed}.{rest} Start the study again to make them again.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=CONFIG, help="the study's configuration (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/study"), help="data and models (default: %(default)s)")
    parser.add_argument("--records", type=Path, default=RECORDS, help="records and figures (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="the document (default: STUDY.md beside the records' folder)")
    parser.add_argument("--rows", nargs="+", help="rows to run (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="seeds to run (default: those of the configuration)")
    parser.add_argument("--parallel", type=int, default=8, help="runs side by side on a GPU (default: %(default)s)")
    parser.add_argument(
        "--num-proc", type=int, default=os.cpu_count(), help="processes that render (default: %(default)s)"
    )
    parser.add_argument(
        "--from-scratch",
        action="store_true",
        help="train teacher and base model, too, where --work has none, instead of taking those in the folder study",
    )
    parser.add_argument("--document", action="store_true", help="only write the document from the records")
    args = parser.parse_args()
    config = yaml.safe_load(args.config.read_text(encoding="utf-8"))
    work = args.work.resolve()
    if not args.document:
        rows, seeds = args.rows or list(config["rows"]), args.seeds or config["seeds"]
        records = args.records / "records"
        if not args.from_scratch and is_stored(config):
            take_stored(work, records)
        jobs = jobs_to_do(config, work, records, rows, seeds)
        check_starts(config, work, records, jobs)
        if jobs:
            with ProcessPoolExecutor(args.num_proc, PROCESSES) as pool:
                prepare(config, work, sorted({job.row for job in jobs} - {"teacher"}), pool)
            args.records.mkdir(parents=True, exist_ok=True)
            write_text(args.records / "items.json", (work / "items.json").read_text(encoding="utf-8"))
            run_jobs(jobs, config, work, records, args.parallel)
            if (work / "pictures.npz").exists():
                shutil.copyfile(work / "pictures.npz", args.records / ".pictures.part")
                os.replace(args.records / ".pictures.part", args.records / "pictures.npz")
    write_study(args.records, args.output or args.records.resolve().parent / "STUDY.md")


if __name__ == "__main__":
    main()
