import os
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from transformers import TrainerCallback


def signal_picture(name: str, signal: torch.Tensor, reference: torch.Tensor | None = None) -> np.ndarray:
    """Paint one frame of one signal.

    Args:
        name: `depth`, `flow`, `motion` or `camray`.
        signal: `(C, H, W)`: depth in the teacher's unit, flow in pixels, motion in [0, 1], or Pluecker rays.
        reference: the signal that sets the colour range (the teacher's), so that two pictures compare; default `signal`.

    Returns: `(H, W, 3)` float in [0, 1]. Depth: near is bright, on a logarithmic scale. Flow: hue is direction,
        saturation is length. Motion: white moves. Rays: the direction (x, y, z) as red, green, blue.
    """
    signal = signal.detach().float().cpu().numpy()
    reference = signal if reference is None else reference.detach().float().cpu().numpy()
    if name == "depth":
        low, high = np.log(np.percentile(reference, [1, 99]).clip(1e-6))
        nearness = 1 - (np.log(signal[0].clip(1e-6)) - low) / max(high - low, 1e-6)
        return matplotlib.colormaps["magma"](nearness.clip(0, 1))[..., :3]
    if name == "flow":
        # The range is a pixel at least, so that the noise of a still picture does not look like motion.
        length, longest = np.hypot(*signal), max(np.percentile(np.hypot(*reference), 99), 1.0)
        hue = np.arctan2(signal[1], signal[0]) / (2 * np.pi) % 1
        return hsv_to_rgb(np.stack([hue, (length / longest).clip(0, 1), np.ones_like(hue)], -1))
    if name == "motion":
        return np.repeat(signal[0].clip(0, 1)[..., None], 3, -1)
    if name == "camray":
        direction = signal[:3] / np.linalg.norm(signal[:3], axis=0).clip(1e-6)
        return (direction.transpose(1, 2, 0) + 1) / 2
    raise ValueError(f"no signal is called {name!r}; choose from depth, flow, motion, camray")


def draw_perception(
    path: str | os.PathLike,
    frames: np.ndarray,
    seconds: np.ndarray,
    student: dict[str, torch.Tensor],
    teacher: dict[str, torch.Tensor],
    title: str,
) -> None:
    """Write a picture like Fig. 5 and A20 of the paper: frames, and each signal of the student under the teacher's.

    Args:
        path: PNG file, written whole or not at all.
        frames: `(N, H, W, 3)` uint8 or float in [0, 1].
        seconds: `(N,)` time of each frame.
        student, teacher: `{signal: (C, N, H, W)}` of one video; motion as probability.
        title: the line above.
    """
    columns = np.unique(np.linspace(0, len(frames) - 1, min(len(frames), 6)).round().astype(int))
    rows = [("video", None)] + [(name, side) for name in student for side in ("teacher", "student")]
    figure = Figure(figsize=(1.5 * len(columns) + 1, 1.5 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_row, (name, side) in zip(axes, rows, strict=True):
        axes_row[0].set_ylabel(name if side is None else f"{name}\n{side}", fontsize=8)
        for axis, column in zip(axes_row, columns, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            if side is None:
                axis.imshow(frames[column])
                axis.set_title(f"{seconds[column]:.2f} s", fontsize=8)
            elif name == "flow" and column == 0:
                axis.text(0.5, 0.5, "no earlier\nframe", ha="center", va="center", fontsize=7)
            else:
                reference = teacher[name][:, column]
                signal = reference if side == "teacher" else student[name][:, column]
                axis.imshow(signal_picture(name, signal, reference), interpolation="nearest")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    figure.savefig(unfinished, format="png", dpi=110)
    unfinished.replace(path)


class PerceptionPictures(TrainerCallback):
    """Write `<folder>/perception_step_<step>.png` for one row at chosen steps of a [`P4DTrainer`] (Fig. 5 of the paper).

    Args:
        trainer: the trainer it is added to; it must have a teacher.
        row: a row of the data set, with a video.
        steps: the steps at which to draw; 0 is before training.
        folder: where the pictures go.

    Raises: `ValueError` if the trainer has no teacher.
    """

    def __init__(self, trainer, row: dict[str, Any], steps: list[int], folder: str | os.PathLike):
        if trainer.teacher is None:
            raise ValueError("PerceptionPictures needs a trainer with a teacher: without one nothing is perceived.")
        self.trainer, self.row, self.steps, self.folder = trainer, row, set(steps), Path(folder)

    def on_train_begin(self, args, state, control, **kwargs):
        self._draw(state)

    def on_step_end(self, args, state, control, **kwargs):
        self._draw(state)

    def _draw(self, state) -> None:
        if state.global_step not in self.steps or not state.is_world_process_zero:
            return
        batch, student, targets = self.trainer.perceive([self.row])
        processor = self.trainer.processing_class.video_processor
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        frames = batch["pixel_values_videos"][0].cpu() * std + mean
        teacher = {name: targets.signals[name][0] for name in student}
        student = {name: signal[0] for name, signal in student.items()}
        if "motion" in student:
            student["motion"] = student["motion"].sigmoid()
            if self.trainer.teacher.motion_kind == "logit":
                teacher["motion"] = teacher["motion"].sigmoid()
        draw_perception(
            self.folder / f"perception_step_{state.global_step:06d}.png",
            frames.clamp(0, 1).permute(0, 2, 3, 1).numpy(),
            batch["video_timestamps"][0].cpu().numpy(),
            student,
            teacher,
            f"step {state.global_step}",
        )
