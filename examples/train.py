"""Train a 4D-RGPT on World4D: supervised fine-tuning alone, or with Perceptual 4D Distillation from a teacher.

    accelerate launch examples/train.py --config examples/configs/small.yaml --model runs/small --data runs/world4d \\
        --output_dir runs/p4d --teacher runs/teacher

Every option of trainer.P4DConfig (and so of trl.SFTConfig) is taken, from a YAML file (--config), the command line, or
both; the command line wins. A finished run is left alone, an interrupted one goes on from its last checkpoint.
"""

import functools
import json
import shlex
import sys
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.trainer_utils import get_last_checkpoint
from trl import TrlParser

from datasets_rgpt4d import Scene, render_signals, to_messages
from modeling_rgpt4d import L4PModel
from trainer import (
    GroundTruthTeacher,
    L4PTeacher,
    MeanWithInterval,
    P4DCollator,
    P4DConfig,
    P4DTrainer,
    PerceptionPictures,
    signal_errors,
)

RECORD = "run.json"
# What makes two runs different, beside RunArguments: a finished run with other values is never taken for this one.
TRAINING_SETTINGS = (
    "seed max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate trainable "
    "alpha beta lambda_depth lambda_flow lambda_motion lambda_camray distill_latent signals decoder_kind "
    "decoder_hidden_size"
).split()


@dataclass
class RunArguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model to start from."})
    data: str = field(metadata={"help": "Folder of a World4D data set (examples/render_world4d.py)."})
    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of an L4P teacher. Without one: supervised fine-tuning alone."},
    )
    truth: bool = field(
        default=False, metadata={"help": "Distil World4D's exact signals; the teacher lends only its heads."}
    )
    num_frames: int = field(default=8, metadata={"help": "Frames sampled from each video."})
    picture_steps: list[int] = field(
        default_factory=list, metadata={"help": "Steps at which to draw what the student perceives; 0 is the start."}
    )
    perception_clips: int = field(
        default=32,
        metadata={"help": "Test clips on which the perceived signals are compared with the truth at the end."},
    )


def world4d_truth(row: dict, timestamps: torch.Tensor, size: int, ray_size: int) -> dict[str, torch.Tensor]:
    """The exact signals of a World4D row at `timestamps`, on the teacher's grid."""
    return render_signals(Scene.from_json(row["scene"]), timestamps.double(), size, ray_size)


def conversations(questions: dict[str, list]) -> dict[str, list]:
    """A batch of World4D rows -> what the collator reads; the videos stay undecoded."""
    rows = [dict(zip(questions, values, strict=True)) for values in zip(*questions.values(), strict=True)]
    return {"id": questions["id"], "scene": questions["scene"], "messages": [to_messages(row) for row in rows]}


def one_row_per_clip(questions: Dataset, limit: int) -> list[dict]:
    first_of_clip = {scene: index for index, scene in reversed(list(enumerate(questions["scene"])))}
    rows = questions.with_transform(conversations)
    return [rows[index] for index in sorted(first_of_clip.values())[:limit]]


def main() -> None:
    run, args = TrlParser((RunArguments, P4DConfig)).parse_args_and_config()
    record_file = Path(args.output_dir) / RECORD
    settings = {**asdict(run), **{name: getattr(args, name) for name in TRAINING_SETTINGS}}
    if record_file.exists():
        if json.loads(record_file.read_text())["settings"] != settings:
            raise SystemExit(
                f"{args.output_dir} holds a finished run with other settings; choose another --output_dir."
            )
        print(f"{args.output_dir} holds this run already; remove the folder to run it again.")
        return

    questions = load_dataset(run.data)
    processor = AutoProcessor.from_pretrained(run.model, trust_remote_code=True)
    model = AutoModelForImageTextToText.from_pretrained(run.model, trust_remote_code=True)
    teacher = truth = None
    if run.teacher is not None:
        l4p = L4PModel.from_pretrained(run.teacher)
        teacher = L4PTeacher(l4p, depth_scale="metric")  # trained on World4D, in metres
        truth = functools.partial(world4d_truth, size=l4p.config.image_size, ray_size=l4p.config.grid)
        if run.truth:
            teacher = GroundTruthTeacher(teacher)
    elif run.truth:
        raise SystemExit("--truth needs --teacher: the teacher's heads decode the student's latents.")

    trainer = P4DTrainer(
        model,
        args,
        teacher=teacher,
        train_dataset=questions["train"].with_transform(conversations),
        processing_class=processor,
        data_collator=P4DCollator(processor, run.num_frames, truth if run.truth else None),
    )
    clips = one_row_per_clip(questions["test"], run.perception_clips)
    if teacher is not None and run.picture_steps:
        trainer.add_callback(
            PerceptionPictures(trainer, clips[0], run.picture_steps, Path(args.output_dir) / "pictures")
        )

    started = time.perf_counter()
    result = trainer.train(
        resume_from_checkpoint=get_last_checkpoint(args.output_dir) if record_file.parent.exists() else None
    )
    trainer.save_model(args.output_dir)
    trainer.save_state()

    record = {
        "settings": settings,
        "command": shlex.join(["accelerate", "launch", *sys.argv]),
        "versions": {name: version(name) for name in ("rgpt4d", "torch", "transformers", "trl", "datasets")},
        "device": f"{trainer.accelerator.num_processes} x {trainer.accelerator.device.type}",
        "distillation": None if teacher is None else {"alpha": args.alpha, "beta": args.beta, **args.signal_weights},
        "train_loss": result.training_loss,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "log": trainer.state.log_history,
        "perception": None
        if teacher is None
        else perception_errors(trainer, clips, truth, args.per_device_train_batch_size),
    }
    if trainer.is_world_process_zero():
        unfinished = record_file.with_suffix(".part")
        unfinished.write_text(json.dumps(record, indent=1))
        unfinished.replace(record_file)
        print(f"The model, its perception decoder and {RECORD} are in {args.output_dir}.")


def perception_errors(trainer: P4DTrainer, clips: list[dict], truth, batch_size: int) -> dict:
    """Errors of the student's and the teacher's signals against World4D's exact ones: means over test clips, with intervals."""
    errors = {"student": {}, "teacher": {}}
    for start in range(0, len(clips), batch_size):
        rows = clips[start : start + batch_size]
        batch, signals, targets = trainer.perceive(rows)
        exact = [truth(row, seconds.cpu()) for row, seconds in zip(rows, batch["video_timestamps"], strict=True)]
        exact = {name: torch.stack([e[name] for e in exact]) for name in exact[0]}
        for side, perceived in (("student", signals), ("teacher", targets.signals)):
            for name, values in signal_errors(perceived, exact).items():
                errors[side].setdefault(name, []).extend(values)
    return {side: {n: MeanWithInterval.of(v).as_dict() for n, v in by_name.items()} for side, by_name in errors.items()}


if __name__ == "__main__":
    main()
