"""Time and memory of a training step: SFT beside P4D with the teacher online and from a cache, in one run.

Weights are random: speed does not depend on their values. Every step is one of trainer.P4DTrainer on the same batch of videos with
their questions, at the 8B size with gradient checkpointing, projector and language model trained, the teacher in bfloat16.

    python benchmarks/training.py --output runs/training.json
    accelerate launch --config_file examples/configs/accelerate/fsdp2.yaml --num_processes 2 benchmarks/training.py \\
        --kinds online --output runs/training_2.json

Measured, as medians with minimum and maximum, after two steps that do not count:
- forward and backward pass, and the whole step with clipping and optimizer;
- the allocator's peak of each kind, when nothing is held for the other kinds;
- floating point operations of each kind, by the formulas of trainer.run_estimate, recomputation apart, and their part of the rate of a
  large matrix product measured in the same run;
- the teacher by itself: its encoder, and its heads.
Over several GPUs one kind a launch: a model that FSDP has wrapped cannot be wrapped again. The optimizer is plain SGD: on one GPU, AdamW's states of all 8B parameters do not fit beside them. Reading the cache is the data
loader's work and not part of a step; bringing what was read to the GPU is.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tokenizers
import torch
import transformers
import trl
from datasets import Dataset
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedTokenizerFast, TrainerCallback

from modeling_rgpt4d import (
    L4PConfig,
    L4PModel,
    PerceptionDecoderConfig,
    RGPT4DConfig,
    RGPT4DForConditionalGeneration,
    RGPT4DImageProcessor,
    RGPT4DProcessor,
    RGPT4DVideoProcessor,
)
from trainer import L4PTeacher, P4DConfig, P4DTrainer
from trainer.run_estimate import decoder_flops, heads_flops, sft_flops, teacher_flops
from trainer.teacher_cache import (
    CachedTeacher,
    TeacherCache,
    TeacherCacheWriter,
    make_manifest,
    microseconds,
    pack,
    perceive_raw,
    video_digest,
)

KINDS = ["sft", "online", "cached"]
TEXT_TOKENS, ANSWER_TOKENS = 96, 32  # beside those of the video
TINY = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "text_config": {
        "model_type": "qwen2",
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "image_token_id": 500,
    "video_token_id": 501,
    "frame_end_token_id": 502,
}
TINY_TEACHER = {
    "image_size": 56,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "taps": (1, 2, 3, 4),
    "feature_dim": 8,
    "layer_dims": (8, 8, 8, 8),
    "last_dim": 8,
}


def build(model_class, config, device: str):
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        return model_class._from_config(config, dtype=dtype)


def make_processor(model_config: RGPT4DConfig) -> RGPT4DProcessor:
    """Its tokenizer knows no words: the trainer wants a processor, and the batches are made of ids."""
    words = ["<pad>", "<|im_end|>", "<image>", "<video>", "<|frame_end|>", "end"]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "<pad>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<|im_end|>")
    size = {"height": model_config.image_size, "width": model_config.image_size}
    return RGPT4DProcessor(
        RGPT4DImageProcessor(size=size),
        RGPT4DVideoProcessor(size=size),
        tokenizer,
        frame_end_token="end",
        frame_grid=model_config.frame_grid,
    )


def make_batch(config: RGPT4DConfig, batch: int, frames: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    video = ([config.video_token_id] * config.frame_grid**2 + [config.frame_end_token_id]) * frames
    text = torch.randint(10, 400, (batch, TEXT_TOKENS), generator=generator)
    ids = torch.cat([text[:, :32], torch.tensor([video] * batch), text[:, 32:]], dim=1)
    labels = ids.clone()
    labels[:, :-ANSWER_TOKENS] = -100
    pixels = torch.randn(batch, frames, 3, config.image_size, config.image_size, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "labels": labels,
        "pixel_values_videos": pixels.clamp(-1, 1),
        "video_timestamps": torch.arange(frames).float().repeat(batch, 1),
    }


class TimedTrainer(P4DTrainer):
    """Also notes how long the forward and backward pass of each step takes."""

    def training_step(self, *args, **kwargs):
        synchronize(self.args.device)
        start = time.perf_counter()
        loss = super().training_step(*args, **kwargs)
        synchronize(self.args.device)
        self.passes_ms.append(1e3 * (time.perf_counter() - start))
        return loss


class StepTimes(TrainerCallback):
    def __init__(self, device: torch.device):
        self.device, self.ms = device, []

    def on_step_begin(self, *args, **kwargs):
        synchronize(self.device)
        self.start = time.perf_counter()

    def on_step_end(self, *args, **kwargs):
        synchronize(self.device)
        self.ms.append(1e3 * (time.perf_counter() - self.start))


def synchronize(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def summary(times: list[float]) -> dict[str, float]:
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def measure(call: Callable[[], object], repeats: int, device: str) -> dict[str, float]:
    times = []
    for i in range(2 + repeats):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        if i >= 2:
            times.append(1e3 * (time.perf_counter() - start))
    return summary(times)


def matrix_rate(device: str) -> float:
    """Floating point operations a second of a large matrix product."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (256, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / measure(lambda: a @ b, 20, device)["median"] * 1e3


class Bench:
    def __init__(self, args, device: str):
        self.args, self.device = args, device
        self.config = RGPT4DConfig(**TINY) if args.tiny else RGPT4DConfig()
        self.teacher_config = L4PConfig(**(TINY_TEACHER if args.tiny else {}))
        self.processor = make_processor(self.config)
        self.batch = make_batch(self.config, args.batch, args.frames)
        self.matrix_flops = matrix_rate(device)

    def make_teacher(self) -> L4PTeacher:
        return L4PTeacher(build(L4PModel, self.teacher_config, self.device)).to(self.device)

    def make_trainer(self, model, teacher, folder: str, carried=None) -> TimedTrainer:
        steps = self.args.steps + 2
        settings = P4DConfig(
            folder,
            per_device_train_batch_size=self.args.batch,
            max_steps=steps,
            learning_rate=1e-9,
            lr_scheduler_type="constant",
            optim="sgd",
            gradient_checkpointing=not self.args.no_checkpointing,
            bf16=self.device == "cuda",
            use_cpu=self.device == "cpu",
            report_to="none",
            logging_steps=1000,
            save_strategy="no",
            disable_tqdm=True,
            decoder_hidden_size=self.args.decoder_hidden_size,
            compile_layers=self.args.compile,
        )
        batch = self.batch if carried is None else {**self.batch, "perception_targets": carried}
        rows = self.args.batch * steps * max(int(os.environ.get("WORLD_SIZE", 1)), 1)
        trainer = TimedTrainer(
            model,
            settings,
            teacher=teacher,
            train_dataset=Dataset.from_dict({"row": range(rows)}),
            processing_class=self.processor,
            data_collator=lambda rows: dict(batch),
        )
        trainer.passes_ms = []
        return trainer

    def steps(self, kind: str, model, teacher, carried=None) -> dict:
        """Run a short training and describe its steps."""
        with tempfile.TemporaryDirectory() as folder:
            trainer = self.make_trainer(model, teacher, folder, carried)
            times = StepTimes(trainer.args.device)
            trainer.add_callback(times)
            if self.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            trainer.train()
        record = {"forward_backward_ms": summary(trainer.passes_ms[2:]), "step_ms": summary(times.ms[2:])}
        if self.device == "cuda":
            record["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        core = trainer._core(trainer.model)
        if trainer.perception_decoder is not None:
            del core.perception_decoder
        trainer.model = trainer.model_wrapped = trainer.optimizer = None
        core.zero_grad(set_to_none=True)
        del trainer
        gc.collect()
        return record

    def work(self, kind: str, record: dict) -> dict:
        """Floating point operations of a step, and what part of the matrix rate its forward and backward pass reaches."""
        windows, tokens = self.args.batch, self.batch["input_ids"].shape[1]
        flops = sft_flops(
            self.config, windows, tokens, self.args.frames, ANSWER_TOKENS, checkpointing=not self.args.no_checkpointing
        )
        if kind != "sft":
            decoder = PerceptionDecoderConfig(
                self.config.text_config.hidden_size,
                self.teacher_config.latent_shape,
                hidden_size=self.args.decoder_hidden_size,
            )
            flops += decoder_flops(decoder, windows) + heads_flops(self.teacher_config, windows, backward=True)
        if kind == "online":
            flops += teacher_flops(self.teacher_config, windows)
        seconds = record["forward_backward_ms"]["median"] / 1e3
        return {
            "tflop": flops.total / 1e12,
            "tflop_recomputed": flops.recomputed / 1e12,
            "of_matrix_rate": (flops.total - flops.recomputed) / seconds / self.matrix_flops,
            "of_matrix_rate_with_recomputation": flops.total / seconds / self.matrix_flops,
        }

    def fill_cache(self, teacher: L4PTeacher, folder: str) -> tuple[CachedTeacher, dict[str, torch.Tensor]]:
        """What the teacher perceives in the batch, written to a cache and read from it."""
        pixels = self.batch["pixel_values_videos"].to(self.device)
        packed = pack(*perceive_raw(teacher, pixels, [0.5] * 3, [0.5] * 3), "bfloat16")
        writer = TeacherCacheWriter(folder, make_manifest(teacher, self.processor.video_processor))
        videos = [{"video": bytes([i])} for i in range(self.args.batch)]
        for i, (video, seconds) in enumerate(zip(videos, self.batch["video_timestamps"], strict=True)):
            writer.add(
                {"video": str(i), "digest": video_digest(video), "sampled": self.args.frames, "window": [0, 1],
                 "microseconds": microseconds(seconds), "rms": {}},
                {name: tensor[i].cpu() for name, tensor in packed.items()},
            )  # fmt: skip
        writer.flush()
        cache = TeacherCache(folder)
        read = [cache({}, *one) for one in zip(videos, self.batch["video_timestamps"], strict=True)]
        return CachedTeacher(teacher, cache), {name: torch.stack([one[name] for one in read]) for name in read[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="videos a step and GPU (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=16, help="frames of a video (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="counted steps of each kind (default: %(default)s)")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="default: all")
    parser.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    parser.add_argument("--compile", action="store_true", help="with P4DConfig(compile_layers=True)")
    parser.add_argument("--profile", type=Path, help="write a table of the kernels of one P4D step here")
    parser.add_argument("--tiny", action="store_true", help="small random models, to try the command on a CPU")
    parser.add_argument("--output", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if device == "cpu" and not args.tiny:
        parser.error("the 8B models need a CUDA device; add --tiny to try the command on a CPU")

    args.decoder_hidden_size = 32 if args.tiny else 2560
    bench = Bench(args, device)
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "versions": {
            "python": platform.python_version(),
            **{module.__name__: module.__version__ for module in (torch, transformers, trl)},
        },
        "settings": {key: value for key, value in vars(args).items() if key not in ("output", "profile")},
        "tokens": bench.batch["input_ids"].numel(),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
        "matrix_flops": bench.matrix_flops,
    }
    print(json.dumps(record, default=str), flush=True)
    model = build(RGPT4DForConditionalGeneration, bench.config, device)
    record["parameters"] = sum(p.numel() for p in model.parameters())
    for kind in args.kinds:
        teacher = carried = None
        if kind != "sft":
            teacher = bench.make_teacher()
        if kind == "online" and args.output:
            record["teacher"] = teacher_alone(bench, teacher)
        with tempfile.TemporaryDirectory() as folder:
            if kind == "cached":
                teacher, carried = bench.fill_cache(teacher, folder)
            record[kind] = bench.steps(kind, model, teacher, carried)
        record[kind] |= bench.work(kind, record[kind])
        print(f"{kind:8s} {json.dumps(record[kind])}", flush=True)
        del teacher
        if args.output and int(os.environ.get("RANK", 0)) == 0:
            write(args.output, record)
    if args.profile:
        profile(bench, model, bench.make_teacher(), args.profile)


def teacher_alone(bench: Bench, teacher: L4PTeacher) -> dict:
    pixels = bench.batch["pixel_values_videos"].to(bench.device)
    window = teacher.prepare(pixels, [0.5] * 3, [0.5] * 3)
    record = {}
    with torch.no_grad():
        latents = teacher.model.encode(window)
        record["prepare_ms"] = measure(lambda: teacher.prepare(pixels, [0.5] * 3, [0.5] * 3), 5, bench.device)
        for name, call in (
            ("encoder", lambda: teacher.model.encode(window)),
            *(
                (signal, lambda signal=signal: teacher.model.decode(latents[:1], [signal]))
                for signal in teacher.signals
            ),
        ):
            with FlopCounterMode(display=False) as counter:
                call()
            record[name] = {"ms": measure(call, 5, bench.device), "flops": counter.get_total_flops()}
            print(f"teacher's {name}: {json.dumps(record[name])}", flush=True)
    return record


def profile(bench: Bench, model, teacher, file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        trainer = bench.make_trainer(model, teacher, folder)
        trainer.model.train()
        trainer._num_windows_in_batch = torch.tensor(bench.args.batch, device=bench.device)
        for _ in range(2):
            trainer.training_step(trainer.model, dict(bench.batch), torch.tensor(128, device=bench.device))
        activities = [torch.profiler.ProfilerActivity.CPU]
        if bench.device == "cuda":
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        with torch.profiler.profile(activities=activities) as found:
            trainer.training_step(trainer.model, dict(bench.batch), torch.tensor(128, device=bench.device))
            synchronize(bench.device)
    key = "self_device_time_total" if bench.device == "cuda" else "self_cpu_time_total"
    file.write_text(found.key_averages().table(sort_by=key, row_limit=60, max_name_column_width=90))


def write(file: Path, record: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, default=str) + "\n")
    os.replace(temporary, file)


if __name__ == "__main__":
    main()
