"""Train a small 4D perception teacher (L4P) from scratch on World4D's exact depth, flow, motion and camera rays.

    python examples/train_teacher.py --output-dir runs/teacher

Clips of the train split are rendered on the fly, as many as the steps need; the errors at the end are on the clips of
the test split, whose objects have combinations of shape, colour and motion that were never shown. The folder then loads
with `AutoModel.from_pretrained("runs/teacher", trust_remote_code=True)`. A finished run is left alone, an interrupted
one goes on from its last whole checkpoint.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.utils.data import DataLoader, Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed

from datasets_rgpt4d.world4d import CONFIGS, MAX_CLIPS, SUPERSAMPLE, World4DConfig
from datasets_rgpt4d.world4d_render import render_frames, render_signals
from modeling_rgpt4d.configuration_l4p import L4PConfig
from modeling_rgpt4d.modeling_l4p import SIGNALS, L4PModel
from modeling_rgpt4d.video_decoding import uniform_indices
from trainer.signal_errors import MeanWithInterval, signal_errors

WORLD4D = {config.name: config for config in CONFIGS}
# Near the inverse of each term's size after a few steps, so that the encoder listens to all four.
LOSS_WEIGHTS = {"depth": 1.0, "flow": 0.5, "motion": 1.0, "camray": 3.0}
MOMENT_WEIGHT = 3.5  # 1/m^2; with half of it moments are learnt late, with twice as much directions are
AVERAGE_CLIPS = 64  # from which the averages of the train split are taken
RECORD, SETTINGS, LOG = "teacher_errors.json", "settings.json", "training_log.jsonl"


class World4DClips(Dataset):
    """The first `num_clips` clips of a split: the teacher's normalised input, and the exact signals on its grids."""

    def __init__(self, world: World4DConfig, split: str, num_clips: int, config: L4PConfig):
        if not 1 <= num_clips <= MAX_CLIPS:
            raise ValueError(f"a split of World4D has 1 to {MAX_CLIPS} clips, got {num_clips}")
        self.world, self.split, self.num_clips, self.config = world, split, num_clips, config

    def __len__(self) -> int:
        return self.num_clips

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        config = self.config
        scene = self.world.scene(self.split, index)
        # As a processor samples a video
        times = scene.frame_times[uniform_indices(scene.num_frames, config.num_frames)]
        rgb = render_frames(scene, times, config.image_size, supersample=SUPERSAMPLE).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
        signals = render_signals(scene, times, config.image_size, config.grid)
        return {"pixel_values": (rgb - mean) / std, **{name: signals[name] for name in (*SIGNALS, "flow_valid")}}


def signal_losses(predicted: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What each head is trained with; scalars, means over everything valid."""
    valid = truth["flow_valid"].expand_as(truth["flow"])
    (direction, moment), (true_direction, true_moment) = (side["camray"].split(3, dim=1) for side in (predicted, truth))
    return {
        "depth": F.l1_loss(predicted["depth"].log(), truth["depth"].log()),
        "flow": F.smooth_l1_loss(predicted["flow"][valid], truth["flow"][valid]),
        "motion": F.binary_cross_entropy_with_logits(predicted["motion"], truth["motion"]),
        # In most clips the camera does not travel: the least absolute error of a moment is that of zero, and a head that once
        # says zero stays there.
        "camray": F.l1_loss(direction, true_direction) + MOMENT_WEIGHT * F.mse_loss(moment, true_moment),
    }


class TeacherTrainer(Trainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        predicted = model(inputs["pixel_values"])
        losses = signal_losses(predicted, inputs)
        self.last_losses = {f"loss_{name}": loss.item() for name, loss in losses.items()}
        loss = sum(LOSS_WEIGHTS[name] * loss for name, loss in losses.items())
        return (loss, predicted) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        super().log({**logs, **self.last_losses} if "loss" in logs else logs, *args, **kwargs)


class LogWriter(TrainerCallback):
    """Keeps the log beside the model, one JSON object a line; always whole, and without doublets after a resume."""

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            lines = "".join(json.dumps(entry) + "\n" for entry in state.log_history)
            write_whole(Path(args.output_dir) / LOG, lines)


def write_whole(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def last_whole_checkpoint(output_dir: Path) -> Path | None:
    """`Trainer` writes a checkpoint's state last: a folder without it was interrupted, and is passed over."""
    whole = [path.parent for path in output_dir.glob("checkpoint-*/trainer_state.json")]
    return max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)


@torch.no_grad()
def errors_on(clips: World4DClips, predict, batch_size: int, workers: int) -> dict[str, list[float | None]]:
    """Errors of `predict(batch) -> signals`, one value a clip."""
    errors: dict[str, list[float | None]] = {}
    for batch in DataLoader(clips, batch_size, num_workers=workers):
        for name, values in signal_errors(predict(batch), batch).items():
            errors.setdefault(name, []).extend(values)
    return errors


def average_truth(clips: World4DClips, batch_size: int, workers: int) -> dict[str, torch.Tensor]:
    """The average signal of each pixel, `(1, channels, N, H, W)`: depth's is geometric, motion's a share of clips."""
    batches = list(DataLoader(clips, batch_size, num_workers=workers))
    mean = {name: torch.cat([batch[name] for batch in batches]).mean(dim=0, keepdim=True) for name in SIGNALS}
    mean["depth"] = torch.cat([batch["depth"] for batch in batches]).log().mean(dim=0, keepdim=True).exp()
    return mean


@torch.no_grad()
def start_at_average(model: L4PModel, average: dict[str, torch.Tensor]) -> None:
    """Set the bias of each head's output, so that training starts at the average and not by finding it."""
    model.heads["depth"].output[-1].bias.fill_(average["depth"].log().mean())
    model.heads["motion"].output[-1].bias.fill_(average["motion"].mean().clamp(1e-3, 1 - 1e-3).logit())
    model.heads["camray"].output[-1].bias.copy_(average["camray"].mean(dim=(0, 2, 3, 4)))


def evaluate(
    model: L4PModel, test: World4DClips, average: dict[str, torch.Tensor], batch_size: int, workers: int
) -> dict[str, dict]:
    """Mean errors with intervals, beside those of saying the same of every clip: average depth and rays, no motion."""
    model.eval()

    def perceive(batch):
        signals = model(batch["pixel_values"].to(model.device))
        return {name: signals[name].cpu() for name in SIGNALS}

    def say_the_same(batch):
        still = {"flow": torch.zeros_like(average["flow"]), "motion": torch.full_like(average["motion"], -math.inf)}
        guess = average | still
        return {name: signal.expand_as(batch[name]) for name, signal in guess.items()}

    sides = {
        side: errors_on(test, predict, batch_size, workers)
        for side, predict in (("teacher", perceive), ("baseline", say_the_same))
    }
    return {
        name: {side: MeanWithInterval.of(errors[name]).as_dict() for side, errors in sides.items()}
        for name in sides["teacher"]
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="where the model, its log and its errors go")
    parser.add_argument("--world4d", choices=list(WORLD4D), default="tiny", help="size of World4D: durations and fps")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=4, help="clips a step and process")
    parser.add_argument("--lr", type=float, default=2e-3, help="highest learning rate; cosine, warmed up")
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the steps that warm up")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the clips")
    parser.add_argument("--workers", type=int, default=0, help="processes that render; 0 suits few cores without a GPU")
    parser.add_argument("--save-steps", type=int, default=100, help="steps between checkpoints")
    parser.add_argument("--eval-clips", type=int, default=60, help="clips of the test split")
    size = parser.add_argument_group("size of the teacher")
    size.add_argument("--num-frames", type=int, default=8, help="frames of a window")
    size.add_argument("--image-size", type=int, default=64, help="side of a frame, pixels")
    size.add_argument("--patch-size", type=int, default=8, help="side of a patch, pixels")
    size.add_argument("--hidden-size", type=int, default=96, help="width of the encoder")
    size.add_argument("--layers", type=int, default=4, help="blocks of the encoder; at least 4")
    size.add_argument("--heads", type=int, default=4, help="attention heads of a block")
    size.add_argument("--feature-dim", type=int, default=8, help="width of the signal heads")
    size.add_argument("--last-dim", type=int, default=8, help="width of their last convolutions")
    return parser.parse_args()


def teacher_config(arguments: argparse.Namespace) -> L4PConfig:
    return L4PConfig(
        num_frames=arguments.num_frames,
        image_size=arguments.image_size,
        patch_size=arguments.patch_size,
        hidden_size=arguments.hidden_size,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        intermediate_size=4 * arguments.hidden_size,
        taps=[math.ceil(arguments.layers * quarter / 4) for quarter in (1, 2, 3, 4)],
        feature_dim=arguments.feature_dim,
        layer_dims=[arguments.feature_dim * factor for factor in (1, 1, 2, 2)],
        last_dim=arguments.last_dim,
    )


def main() -> None:
    arguments = parse_arguments()
    output_dir = arguments.output_dir
    settings = {name: value for name, value in vars(arguments).items() if name not in ("output_dir", "workers")}
    if (output_dir / SETTINGS).exists():
        earlier = json.loads((output_dir / SETTINGS).read_text(encoding="utf-8"))
        changed = {name: (earlier.get(name), value) for name, value in settings.items() if earlier.get(name) != value}
        if changed:
            raise SystemExit(
                f"{output_dir} holds a run with other settings, (before, now): {changed}; choose another --output-dir"
            )
    if (output_dir / RECORD).exists():
        print(f"{output_dir} holds this teacher already; remove the folder to train it again")
        return
    output_dir.mkdir(parents=True, exist_ok=True)
    write_whole(output_dir / SETTINGS, json.dumps(settings, indent=2) + "\n")

    set_seed(arguments.seed)
    model = L4PModel(teacher_config(arguments))
    world, batch_size, workers = WORLD4D[arguments.world4d], arguments.batch_size, arguments.workers
    average = average_truth(World4DClips(world, "train", AVERAGE_CLIPS, model.config), batch_size, workers)
    start_at_average(model, average)
    training = TrainingArguments(
        output_dir=str(output_dir),
        max_steps=arguments.steps,
        per_device_train_batch_size=batch_size,
        learning_rate=arguments.lr,
        lr_scheduler_type="cosine",
        warmup_steps=math.ceil(arguments.warmup * arguments.steps),
        weight_decay=arguments.weight_decay,
        max_grad_norm=1.0,
        seed=arguments.seed,
        dataloader_num_workers=workers,
        logging_steps=min(10, arguments.steps),
        save_steps=arguments.save_steps,
        save_total_limit=1,
        remove_unused_columns=False,  # the dataset's columns are not all arguments of the model
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
    )
    # Each clip is shown once. With several processes each gets its share, so there must be enough for all.
    num_clips = arguments.steps * batch_size * training.world_size * max(1, training.n_gpu)
    clips = World4DClips(world, "train", num_clips, model.config)
    trainer = TeacherTrainer(model, training, train_dataset=clips, callbacks=[LogWriter()])
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=last_whole_checkpoint(output_dir))
    seconds = time.perf_counter() - started
    trainer.save_model(str(output_dir))
    if not trainer.is_world_process_zero():
        return

    test = World4DClips(world, "test", arguments.eval_clips, model.config)
    errors = evaluate(model, test, average, batch_size, workers)
    record = {
        "command": "examples/train_teacher.py",
        "settings": settings,
        "parameters": model.num_parameters(),
        "clips_shown": num_clips,
        "training_seconds": round(seconds, 1),
        "device": str(training.device),
        "versions": {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "evaluated_on": f"the first {arguments.eval_clips} clips of World4D {arguments.world4d}, test split",
        "errors": errors,
    }
    write_whole(output_dir / RECORD, json.dumps(record, indent=2) + "\n")
    print(f"{'error on test clips':<22}{'teacher [95 %]':<32}baseline [95 %]")
    for name, sides in errors.items():
        cells = ["{mean:.3f} [{low:.3f}, {high:.3f}] n={n}".format(**side) for side in sides.values()]
        print(f"{name:<22}{cells[0]:<32}{cells[1]}")
    print(f"The teacher and {RECORD} are in {output_dir}")


if __name__ == "__main__":
    main()
