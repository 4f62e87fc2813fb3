"""Train a 4D-RGPT: supervised fine-tuning alone, or with Perceptual 4D Distillation from a teacher.

    accelerate launch examples/train.py --config examples/configs/small.yaml --model runs/small --data runs/world4d \\
        --output_dir runs/p4d --teacher runs/teacher
    python examples/train.py --config examples/configs/paper.yaml --data my.jsonl --output_dir runs/paper --dry_run

Every option of trainer.P4DConfig (and so of trl.SFTConfig) is taken, from a YAML file (--config), the command line, or
both; the command line wins. A finished run is left alone, an interrupted one goes on from its last checkpoint.
--dry_run prints what the run will cost, and stops with status 1 if it cannot fit.
"""

import functools
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from trl import TrlParser

from datasets_rgpt4d import Scene, render_signals, to_messages, training_messages
from datasets_rgpt4d.schema import TRAINING_FEATURES
from modeling_rgpt4d import L4PConfig, L4PModel, RGPT4DConfig
from trainer import (
    GroundTruthTeacher,
    L4PTeacher,
    MeanWithInterval,
    P4DCollator,
    P4DConfig,
    P4DTrainer,
    PerceptionPictures,
    last_complete_checkpoint,
    signal_errors,
)
from trainer.distillation_windows import cut, distillation_windows, video_lengths
from trainer.run_estimate import RunPlan, estimate, matrix_tflops
from trainer.teacher_cache import CachedTeacher, TeacherCache

RECORD = "run.json"
# What makes two runs different, beside RunArguments: a finished run with other values is never taken for this one.
TRAINING_SETTINGS = (
    "seed max_steps num_train_epochs per_device_train_batch_size gradient_accumulation_steps learning_rate trainable "
    "llm_lora lora_r lora_alpha lora_dropout alpha beta lambda_depth lambda_flow lambda_motion lambda_camray distill_latent "
    "signals decoder_kind decoder_hidden_size"
).split()
# What does not: they say what the machine is, and how the estimate is made.
ESTIMATE_ONLY = ("dry_run", "gpu_memory_gb", "matrix_tflops", "sharding", "text_tokens", "answer_tokens")
# QLoRA: the language model's linear layers alone are quantised, for the other parts are trained or small.
NOT_QUANTIZED = ["model.vision_tower", "model.geometry_encoding", "model.multi_modal_projector", "lm_head"]
FAR_TOO_BIG = 1.25  # times the GPU's memory: the estimate is not so wrong, and the run stops before it loads anything
LOADERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def option(default, text: str, **metadata):
    metadata["help"] = text
    return (
        field(default_factory=default, metadata=metadata)
        if default is list
        else field(default=default, metadata=metadata)
    )


@dataclass
class RunArguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model to start from."})
    data: str | None = option(
        None,
        "Folder of examples/prepare_data.py or World4D (examples/render_world4d.py), or any data set with a column `messages`: "
        ".jsonl or .parquet file, folder, or Hub id. A dry run can do without.",
    )
    train_split: str = option("train", "Split to train on.")
    eval_split: str | None = option(None, "Split for the losses that `eval_strategy` asks for.")
    teacher: str | None = option(None, "Folder or Hub id of an L4P teacher. Without one: supervised fine-tuning alone.")
    teacher_depth_scale: str = option(
        "per_window_scale",
        "What the teacher's depth means: per_window_scale (the released L4P) or metric (trained on metres, as by "
        "examples/train_teacher.py).",
        choices=["per_window_scale", "metric"],
    )
    teacher_cache: str | None = option(
        None, "Folder made by examples/cache_teacher.py: the teacher's encoder does not run, only its heads."
    )
    teacher_dtype: str = option(
        "auto",
        "Of the teacher's weights; auto is bfloat16, or float32 on a CPU.",
        choices=["auto", "float32", "bfloat16"],
    )
    truth: bool = option(False, "Distil World4D's exact signals; the teacher lends only its heads.")
    num_frames: int = option(8, "Frames sampled from each video.")
    packed: bool = option(False, "Put the samples of a batch into one row, without padding.")
    time_cue: str | None = option(
        None,
        "How the model learns the time (Table 6): none, mark (seconds drawn on each frame), prompt (a sentence) or tpe (Eq. "
        "5); by default what the model and its processor have.",
        choices=["none", "mark", "prompt", "tpe"],
    )
    geometry_fusion: str | None = option(
        None,
        "Feed the teacher's latents to the model (Table 4): none, concat or positional; instead of distilling them with "
        "--distill_latent false and --signals none, as the paper does.",
        choices=["none", "concat", "positional"],
    )
    model_dtype: str = option(
        "auto",
        "Of the model's weights; auto is float32, which `bf16` computes with in bfloat16, or with LoRA on a GPU bfloat16.",
        choices=["auto", "float32", "bfloat16"],
    )
    load_in_4bit: bool = option(False, "QLoRA: the language model in 4 bits (bitsandbytes); needs --llm_lora.")
    attn_implementation: str | None = option(
        None, "eager, sdpa, flash_attention_2, ...; by default the library's choice."
    )
    picture_steps: list[int] = option(list, "Steps at which to draw what the student perceives; 0 is the start.")
    perception_clips: int = option(
        32, "World4D test clips on which the perceived signals are compared with the truth at the end."
    )
    num_gpus: int | None = option(
        None,
        "GPUs of all machines that the settings are for; another number of processes is refused, because it would change "
        "the batch.",
    )
    dry_run: bool = option(False, "Print parameters, arithmetic, memory and time of the run, and stop.")
    sharding: str = option(
        "none", "What the dry run assumes; a real run asks accelerate.", choices=["none", "fsdp2", "zero3"]
    )
    gpu_memory_gb: float | None = option(
        None, "Memory of a GPU in GiB that the dry run assumes; by default this machine's."
    )
    matrix_tflops: float | None = option(
        None, "Rate of matrix products of a GPU for the estimate, TFLOP/s; by default by the name of this machine's."
    )
    text_tokens: int = option(128, "Tokens of a sample beside its video, for the estimate.")
    answer_tokens: int = option(32, "Those of them that are learnt, for the estimate.")


def parse(arguments: list[str]) -> tuple[RunArguments, P4DConfig]:
    if "--dry_run" in arguments and not torch.cuda.is_available():
        # Settings for GPUs are refused where there is none; nothing is computed here
        arguments = [*arguments, "--use_cpu", "true"]
    return TrlParser((RunArguments, P4DConfig)).parse_args_and_config(arguments)


def check(run: RunArguments, args: P4DConfig) -> None:
    """What can be known to be wrong before anything is loaded."""
    needs_teacher = {"truth": run.truth, "teacher_cache": run.teacher_cache, "picture_steps": run.picture_steps}
    needs_teacher["geometry_fusion"] = run.geometry_fusion not in (None, "none")
    for name, given in needs_teacher.items():
        if given and run.teacher is None:
            raise SystemExit(f"--{name} needs --teacher.")
    if run.truth and run.teacher_cache:
        raise SystemExit("--truth and --teacher_cache are two sources of the same targets: give one.")
    if run.truth and args.distill_latent:
        raise SystemExit("--truth knows signals, but no latents: add --distill_latent false.")
    if run.load_in_4bit and not args.llm_lora:
        raise SystemExit("--load_in_4bit needs --llm_lora true: 4-bit weights cannot be trained themselves.")
    if run.load_in_4bit and sharding_of_launch() != "none":
        raise SystemExit("--load_in_4bit does not shard: use an accelerate config of DDP.")
    if run.dry_run:
        return
    if run.data is None:
        raise SystemExit("--data is missing; only a dry run can do without.")
    if run.num_gpus not in (None, args.world_size):
        raise SystemExit(
            f"These settings are for {run.num_gpus} GPUs, but {args.world_size} processes were started: that would change "
            f"the batch of {args.per_device_train_batch_size * args.gradient_accumulation_steps * run.num_gpus:,} samples. Start "
            f"as many, or give --num_gpus {args.world_size} and another --gradient_accumulation_steps."
        )
    if args.eval_strategy != "no" and run.eval_split is None:
        raise SystemExit("--eval_strategy needs --eval_split.")
    if run.picture_steps and sharding_of_launch() != "none":
        raise SystemExit("--picture_steps needs the whole model in one process: leave it out with FSDP or ZeRO-3.")


def sharding_of_launch() -> str:
    """What `accelerate launch` was told."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("true", "1"):
        return "fsdp2"
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() in ("true", "1"):
        return "zero3"
    return "none"


# ---------------------------------------------------------------------------------------------------------------- data


def load_rows(data: str) -> DatasetDict:
    suffix = Path(data).suffix
    if suffix in LOADERS:
        return load_dataset(LOADERS[suffix], data_files=data)
    return load_dataset(data)


def split_of(rows: DatasetDict, split: str) -> Dataset:
    if split not in rows:
        raise SystemExit(f"The data have no split {split!r}; there are {sorted(rows)}.")
    columns = rows[split].column_names
    if {*TRAINING_FEATURES} <= {*columns}:
        return rows[split].with_transform(with_media)
    if "messages" in columns:
        return rows[split]
    if "scene" not in columns:
        raise SystemExit(f"The data have neither `messages` nor World4D's questions; their columns are {columns}.")
    return rows[split].with_transform(conversations)


def with_media(rows: dict[str, list]) -> dict[str, list]:
    """A batch of rows of examples/prepare_data.py -> what the collator reads; images and videos stay undecoded."""
    each = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    return {"id": rows["id"], "messages": [training_messages(row) for row in each]}


def world4d_truth(row: dict, video: dict, seconds: torch.Tensor, size: int, ray_size: int) -> dict[str, torch.Tensor]:
    """The exact signals of a World4D row at `seconds`, on the teacher's grid."""
    return render_signals(Scene.from_json(row["scene"]), seconds.double(), size, ray_size)


def conversations(questions: dict[str, list]) -> dict[str, list]:
    """A batch of World4D rows -> what the collator reads; the videos stay undecoded."""
    rows = [dict(zip(questions, values, strict=True)) for values in zip(*questions.values(), strict=True)]
    return {"id": questions["id"], "scene": questions["scene"], "messages": [to_messages(row) for row in rows]}


def one_row_per_clip(questions: Dataset, limit: int) -> list[dict]:
    first_of_clip = {scene: index for index, scene in reversed(list(enumerate(questions["scene"])))}
    rows = questions.with_transform(conversations)
    return [rows[index] for index in sorted(first_of_clip.values())[:limit]]


# ------------------------------------------------------------------------------------------------------------- models


def dtype_of(name: str, run: RunArguments, args: P4DConfig) -> torch.dtype:
    """`name` is "model" or "teacher"."""
    given = getattr(run, f"{name}_dtype")
    if given != "auto":
        return getattr(torch, given)
    on_gpu = args.device.type == "cuda" or (run.dry_run and args.bf16)
    return torch.bfloat16 if on_gpu and (name == "teacher" or args.llm_lora) else torch.float32


@contextmanager
def whole_weights(args: P4DConfig) -> Iterator[None]:
    """While it lasts, `from_pretrained` gives every process the whole weights: under ZeRO-3 it would shard a teacher, too."""
    plugin = args.deepspeed_plugin
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if plugin is not None:
            set_hf_deepspeed_config(getattr(plugin, "dschf", None) or plugin.hf_ds_config)


def load_teacher(run: RunArguments, args: P4DConfig) -> L4PTeacher | None:
    if run.teacher is None:
        return None
    with whole_weights(args):
        l4p = L4PModel.from_pretrained(run.teacher, dtype=dtype_of("teacher", run, args))
    return L4PTeacher(l4p, depth_scale=run.teacher_depth_scale)


def load_student(
    run: RunArguments, args: P4DConfig, teacher: L4PTeacher | None
) -> tuple[PreTrainedModel, ProcessorMixin]:
    options = {"dtype": dtype_of("model", run, args)}
    of_processor = {}
    if run.attn_implementation is not None:
        options["attn_implementation"] = run.attn_implementation
    if run.time_cue is not None:
        options["time_cue"] = "tpe" if run.time_cue == "tpe" else "none"
        of_processor["time_cue"] = run.time_cue if run.time_cue in ("mark", "prompt") else "none"
    if run.geometry_fusion is not None:
        options["geometry_fusion"] = run.geometry_fusion
        options["geometry_hidden_size"] = 0 if run.geometry_fusion == "none" else teacher.latent_shape[-1]
    if run.load_in_4bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
            llm_int8_skip_modules=NOT_QUANTIZED,
        )
        options["device_map"] = {"": args.device}
    processor = AutoProcessor.from_pretrained(run.model, trust_remote_code=True, **of_processor)
    return AutoModelForImageTextToText.from_pretrained(run.model, trust_remote_code=True, **options), processor


# ------------------------------------------------------------------------------------------------------------ estimate


def sizes(run: RunArguments) -> tuple[RGPT4DConfig, L4PConfig | None]:
    """The configurations of model and teacher. A dry run takes the released sizes for what is not there yet, and says so."""

    def load(name: str, default, load_config):
        try:
            return load_config(name)
        except OSError:
            if not run.dry_run:
                raise
            print(f"{name} is not here: its sizes are taken to be those of {default}.")
            return None

    student = load(run.model, "NVILA-Lite-8B", lambda name: AutoConfig.from_pretrained(name, trust_remote_code=True))
    student = RGPT4DConfig() if student is None else RGPT4DConfig.from_dict(student.to_dict())
    if run.teacher is None:
        return student, None
    return student, load(run.teacher, "the released L4P", L4PConfig.from_pretrained) or L4PConfig()


def check_size(run: RunArguments, args: P4DConfig, samples: int | None) -> None:
    """Estimate what the run costs; a dry run prints it and ends here."""
    on_gpu = torch.cuda.is_available() and not args.use_cpu
    if not (run.dry_run or on_gpu):
        return
    name = torch.cuda.get_device_name() if on_gpu else ""
    memory = run.gpu_memory_gb if run.dry_run else None
    if memory is None and on_gpu:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
    student, teacher = sizes(run)
    kind = "truth" if run.truth else "cached" if run.teacher_cache else "online"
    bytes_of = {torch.float32: 4, torch.bfloat16: 2}
    found = estimate(
        RunPlan(
            student=student,
            args=args,
            frames=run.num_frames,
            gpus=run.num_gpus or args.world_size if run.dry_run else args.world_size,
            sharding=run.sharding if run.dry_run else sharding_of_launch(),
            teacher=teacher,
            teacher_kind="none" if teacher is None else kind,
            samples=samples,
            text_tokens=run.text_tokens,
            answer_tokens=run.answer_tokens,
            weight_bytes=bytes_of[dtype_of("model", run, args)],
            four_bit=run.load_in_4bit,
            teacher_bytes=bytes_of[dtype_of("teacher", run, args)],
            matrix_tflops=run.matrix_tflops or matrix_tflops(name),
        )
    )
    problem = None if memory is None else found.problem(memory)
    if run.dry_run:
        print(found.table())
        if problem is not None:
            raise SystemExit(problem)
        if memory is not None:
            print(f"It fits {memory:.1f} GiB.")
    elif problem is not None:
        if found.gib > FAR_TOO_BIG * memory:
            raise SystemExit(problem)
        if args.process_index == 0:
            print(f"Warning: {problem}", file=sys.stderr)


# ----------------------------------------------------------------------------------------------------------------- run


def main() -> None:
    run, args = parse(sys.argv[1:])
    check(run, args)
    record_file = Path(args.output_dir) / RECORD
    settings = {name: value for name, value in asdict(run).items() if name not in ESTIMATE_ONLY}
    settings |= {name: getattr(args, name) for name in TRAINING_SETTINGS}
    if record_file.exists() and not run.dry_run:
        if json.loads(record_file.read_text())["settings"] != settings:
            raise SystemExit(
                f"{args.output_dir} holds a finished run with other settings; choose another --output_dir."
            )
        print(f"{args.output_dir} holds this run already; remove the folder to run it again.")
        return

    rows = None if run.data is None else load_rows(run.data)
    train_rows = None if rows is None else split_of(rows, run.train_split)
    check_size(run, args, None if train_rows is None else len(train_rows))
    if run.dry_run:
        return

    teacher = load_teacher(run, args)
    model, processor = load_student(run, args, teacher)
    targets = truth = None
    is_world4d = "scene" in rows[run.train_split].column_names
    if teacher is not None and is_world4d:
        truth = functools.partial(world4d_truth, size=teacher.image_size, ray_size=teacher.latent_shape[2])
    heads = teacher
    if run.truth:
        if not is_world4d:
            raise SystemExit("--truth needs World4D, whose signals are known.")
        teacher, targets = GroundTruthTeacher(heads), truth
    elif run.teacher_cache:
        needs_latents = args.distill_latent or model.config.geometry_fusion != "none"
        targets = TeacherCache(run.teacher_cache, args.signals, latents=needs_latents)
        teacher = CachedTeacher(heads, targets)

    trainer = P4DTrainer(
        model,
        args,
        teacher=teacher,
        train_dataset=train_rows,
        eval_dataset=None if run.eval_split is None else split_of(rows, run.eval_split),
        processing_class=processor,
        data_collator=P4DCollator(
            processor,
            run.num_frames,
            targets=targets,
            window=None if teacher is None else teacher.num_frames,
            packed=run.packed,
            for_teacher=teacher is not None,
        ),
    )
    watched = trainer.perception_decoder is not None and sharding_of_launch() == "none"
    watched = watched and is_world4d and "test" in rows and teacher.signals
    clips = one_row_per_clip(rows["test"], run.perception_clips) if watched else []
    if run.teacher_cache:
        try:  # what is read at the end is looked for now
            for clip in clips:
                trainer.data_collator([clip])
        except ValueError as error:
            raise SystemExit(f"{error}, or leave out the comparison with --perception_clips 0.") from error
    if run.picture_steps:
        shown = clips[0] if clips else train_rows[0]
        trainer.add_callback(PerceptionPictures(trainer, shown, run.picture_steps, Path(args.output_dir) / "pictures"))

    started = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=last_complete_checkpoint(args.output_dir))
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
        "perception": perception_errors(trainer, clips, truth, args.per_device_train_batch_size) if clips else None,
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
        times, num_frames = batch["video_timestamps"].cpu(), trainer.teacher.num_frames
        windows = distillation_windows(video_lengths(times), num_frames, times)
        moments = zip(windows, cut(times, windows, num_frames), strict=True)
        exact = [truth(rows[window.video], {}, seconds) for window, seconds in moments]
        exact = {name: torch.stack([e[name] for e in exact]) for name in exact[0]}
        if trainer.teacher.depth_scale != "metric":
            exact.pop("depth")  # metres say nothing about a depth whose scale is not known
            exact.pop("depth_valid", None)
        for side, perceived in (("student", signals), ("teacher", targets.signals)):
            perceived = {name: values for name, values in perceived.items() if name in exact}
            for name, values in signal_errors(perceived, exact).items():
                errors[side].setdefault(name, []).extend(values)
    return {side: {n: MeanWithInterval.of(v).as_dict() for n, v in by_name.items()} for side, by_name in errors.items()}


if __name__ == "__main__":
    main()
