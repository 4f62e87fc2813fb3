"""Pictures of what a teacher and a student perceive in a video, like Fig. 5 and A20 of arXiv 2512.17012."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from torch import Tensor
from transformers import TrainerCallback

from .distillation_windows import distillation_windows, video_lengths
from .signal_errors import camera_centres

NO_EARLIER_FRAME = "no earlier\nframe"
GREY = 0.85  # of a frame that has no flow


@dataclass
class PerceivedVideo:
    """What is perceived in one video.

    Args:
        frames: `(N, H, W, 3)` uint8, RGB.
        seconds: `(N,)` time of each frame.
        sides: who perceives, `"student"`, `"teacher"` or both -> `{signal: (C, N, h, w)}` in the conventions of
            `modeling_rgpt4d.modeling_l4p.L4POutput`, but motion as probability.
        window: frames that were perceived at once.
        window_starts: first frames of the windows, rising.
        aspect_ratio: width by height at which everything is shown.
    """

    frames: np.ndarray
    seconds: np.ndarray
    sides: Mapping[str, Mapping[str, Tensor]]
    window: int
    window_starts: Sequence[int] = (0,)
    aspect_ratio: float = 1.0

    @property
    def signals(self) -> list[str]:
        return list(next(iter(self.sides.values())))

    @property
    def flow_valid(self) -> np.ndarray:
        """`(N,)` bool: the frames whose window holds the frame before them."""
        valid = np.zeros(len(self.frames), dtype=bool)
        for start in self.window_starts:
            valid[start + 1 : start + self.window] = True
        return valid

    def reference(self, signal: str) -> np.ndarray:
        """The values that set the range of colours, for all frames and all sides: the teacher's, if there is one."""
        values = self.sides.get("teacher", self.sides.get("student"))[signal]
        return _array(values[:, self.flow_valid] if signal == "flow" else values)

    def pictures(self, side: str, signal: str) -> np.ndarray:
        """A signal of one side in colours, `(N, h, w, 3)` uint8; grey where it has no flow."""
        painted = signal_picture(signal, self.sides[side][signal], self.reference(signal))
        if signal == "flow":
            painted[~self.flow_valid] = GREY
        return (painted * 255).round().astype(np.uint8)


def signal_picture(name: str, signal: Tensor | np.ndarray, reference: Tensor | np.ndarray | None = None) -> np.ndarray:
    """Paint a frame, or several, of one signal.

    Args:
        name: `depth`, `flow`, `motion` or `camray`.
        signal: `(C, ..., H, W)`: depth in the teacher's unit, flow in pixels, motion in [0, 1], or Pluecker rays.
        reference: `(C, ..., H, W)`, values of the signal that set the range of colours, so that pictures compare; default
            `signal`.

    Returns: `(..., H, W, 3)` float in [0, 1]. Depth: near is bright, on a logarithmic scale. Flow: hue is direction,
        saturation is length. Motion: white moves. Rays: the direction (x, y, z) as red, green, blue.
    Raises: `ValueError` for an unknown name.
    """
    signal = _array(signal)
    reference = signal if reference is None else _array(reference)
    if name == "depth":
        low, high = np.log(_depth_range(reference))
        nearness = 1 - (np.log(signal[0].clip(1e-6)) - low) / max(high - low, 1e-6)
        return matplotlib.colormaps["magma"](nearness.clip(0, 1))[..., :3]
    if name == "flow":
        length = np.hypot(*signal)
        hue = np.arctan2(signal[1], signal[0]) / (2 * np.pi) % 1
        return hsv_to_rgb(np.stack([hue, (length / _longest_flow(reference)).clip(0, 1), np.ones_like(hue)], -1))
    if name == "motion":
        return np.repeat(signal[0].clip(0, 1)[..., None], 3, -1)
    if name == "camray":
        direction = signal[:3] / np.linalg.norm(signal[:3], axis=0).clip(1e-6)
        return (np.moveaxis(direction, 0, -1) + 1) / 2
    raise ValueError(f"no signal is called {name!r}; choose from depth, flow, motion, camray")


def colour_legend(name: str, reference: Tensor | np.ndarray) -> str:
    """What the colours of `signal_picture` mean, in a line."""
    reference = _array(reference)
    if name == "depth":
        near, far = _depth_range(reference)
        return f"depth: bright is near ({near:.3g}), dark is far ({far:.3g}), in the teacher's unit"
    if name == "flow":
        return (
            "backward flow: the hue is the direction to where a point was one frame before, white is at rest, full "
            f"colour is {_longest_flow(reference):.1f} px of the teacher's frame"
        )
    if name == "motion":
        return "motion: white moves in the world, black stands"
    return "camera rays: the direction's x, y and z (right, down, forward) as red, green and blue"


def _depth_range(reference: np.ndarray) -> np.ndarray:
    return np.percentile(reference, [1, 99]).clip(1e-6)


def _longest_flow(reference: np.ndarray) -> float:
    # A pixel at least, so that the noise of a still picture does not look like motion.
    return max(np.percentile(np.hypot(*reference), 99), 1.0) if reference.size else 1.0


def _array(values: Tensor | np.ndarray) -> np.ndarray:
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else values


def draw_perception(path: str | os.PathLike, video: PerceivedVideo, title: str = "") -> None:
    """Write one picture of everything: frames, and each signal, the teacher's above the student's.

    Args:
        path: PNG file, written whole or not at all.
        title: the line above.
    """
    columns = _columns(len(video.frames), 6)
    order = [side for side in ("teacher", "student") if side in video.sides]
    rows = [("video", None)] + [(signal, side) for signal in video.signals for side in order]
    figure = Figure(figsize=(1.5 * video.aspect_ratio * len(columns) + 1, 1.5 * len(rows) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=10, wrap=True)
    axes = figure.subplots(len(rows), len(columns), squeeze=False)
    for axes_row, (signal, side) in zip(axes, rows, strict=True):
        axes_row[0].set_ylabel(signal if side is None else f"{signal}\n{side}", fontsize=8)
        pictures = video.frames if side is None else video.pictures(side, signal)
        _draw_row(axes_row, video, pictures, columns, signal, with_times=side is None)
    _save(figure, path)


def draw_signal(path: str | os.PathLike, video: PerceivedVideo, signal: str) -> None:
    """Write a strip of one signal, a row for each side, and for rays the path of the camera seen from above beside it.

    Args:
        path: PNG file, written whole or not at all.
        signal: one of `video.signals`.
    """
    columns, sides = _columns(len(video.frames), 6 if signal == "camray" else 8), list(video.sides)
    widths = [video.aspect_ratio] * len(columns) + [2.0] * (signal == "camray")
    height = max(1.4 * len(sides), 2.8 if signal == "camray" else 0)
    figure = Figure(figsize=(1.4 * sum(widths) + 0.6, height + 0.5), layout="constrained")
    figure.suptitle(colour_legend(signal, video.reference(signal)), fontsize=8, wrap=True)
    grid = figure.add_gridspec(len(sides), len(widths), width_ratios=widths)
    for row, side in enumerate(sides):
        axes = [figure.add_subplot(grid[row, column]) for column in range(len(columns))]
        axes[0].set_ylabel(side, fontsize=8)
        _draw_row(axes, video, video.pictures(side, signal), columns, signal, with_times=row == 0)
    if signal == "camray":
        _draw_camera_path(figure.add_subplot(grid[:, -1]), video)
    _save(figure, path)


def _columns(num_frames: int, at_most: int) -> np.ndarray:
    return np.unique(np.linspace(0, num_frames - 1, min(num_frames, at_most)).round().astype(int))


def _draw_row(axes, video: PerceivedVideo, pictures: np.ndarray, columns: np.ndarray, signal: str, with_times: bool):
    for axis, column in zip(axes, columns, strict=True):
        axis.set_xticks([])
        axis.set_yticks([])
        if with_times:
            axis.set_title(f"{video.seconds[column]:.2f} s", fontsize=8)
        axis.imshow(pictures[column], interpolation="nearest", extent=(0, video.aspect_ratio, 0, 1))
        if signal == "flow" and not video.flow_valid[column]:
            middle = (video.aspect_ratio / 2, 0.5)
            axis.text(*middle, NO_EARLIER_FRAME, ha="center", va="center", fontsize=7)


def _draw_camera_path(axis, video: PerceivedVideo) -> None:
    """Each window has its own first camera, from which its path starts, so the windows' paths are drawn apart."""
    stops = [*video.window_starts[1:], len(video.frames)]
    for side in video.sides:
        centres = camera_centres(video.sides[side]["camray"].detach().cpu()).numpy()
        style = {"marker": ".", "linewidth": 1, "linestyle": "--" if side == "teacher" else "-"}
        for index, (start, stop) in enumerate(zip(video.window_starts, stops, strict=True)):
            path = centres[start:stop]
            axis.plot(path[:, 0], path[:, 2], color=f"C{index % 10}", label=None if index else side, **style)
    axis.plot(0, 0, marker="^", color="black", markersize=6)
    axis.set_aspect("equal", adjustable="datalim")
    axis.set_title("camera from above, a colour\na window, each from its first", fontsize=7)
    axis.set_xlabel("right", fontsize=7)
    axis.set_ylabel("forward", fontsize=7)
    axis.tick_params(labelsize=6)
    axis.legend(fontsize=6)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.part")
    figure.savefig(unfinished, format="png", dpi=110)
    unfinished.replace(path)


class PerceptionPictures(TrainerCallback):
    """Write `<folder>/perception_step_<step>.png` for one row at chosen steps of a [`P4DTrainer`] (Fig. 5 of the paper).

    Args:
        trainer: the trainer it is added to; it must distil a teacher.
        row: a row of the data set, with a video.
        steps: the steps at which to draw; 0 is before training.
        folder: where the pictures go.

    Raises: `ValueError` if the trainer distils no teacher, or one that gives no signals.
    """

    def __init__(self, trainer, row: dict[str, Any], steps: list[int], folder: str | os.PathLike):
        if trainer.perception_decoder is None:
            raise ValueError(
                "PerceptionPictures needs a trainer with a teacher that it distils: nothing else trains a perception decoder."
            )
        if not trainer.teacher.signals:
            raise ValueError(
                "PerceptionPictures has nothing to draw: the teacher gives no signals. Of a cache only those are read that are "
                "distilled."
            )
        self.trainer, self.row, self.steps, self.folder = trainer, row, set(steps), Path(folder)

    def on_train_begin(self, args, state, control, **kwargs):
        self._draw(state)

    def on_step_end(self, args, state, control, **kwargs):
        self._draw(state)

    def _draw(self, state) -> None:
        if state.global_step not in self.steps:
            return
        # every process perceives, for each holds a part of a sharded model
        batch, student, targets = self.trainer.perceive([self.row])
        if not state.is_world_process_zero:
            return
        teacher, timestamps = self.trainer.teacher, batch["video_timestamps"]
        window = distillation_windows(video_lengths(timestamps), teacher.num_frames, timestamps)[0]  # the one shown
        shown = slice(window.first, window.first + teacher.num_frames)
        sides = {"student": student, "teacher": targets.signals}
        sides = {side: {name: signals[name][0] for name in student} for side, signals in sides.items()}
        if "motion" in student:
            sides["student"]["motion"] = sides["student"]["motion"].sigmoid()
            if teacher.motion_kind == "logit":
                sides["teacher"]["motion"] = sides["teacher"]["motion"].sigmoid()
        processor = self.trainer.processing_class.video_processor
        video = PerceivedVideo(
            frames=shown_frames(batch["pixel_values_videos"][window.video, shown], processor),
            seconds=timestamps[window.video, shown].cpu().numpy(),
            sides=sides,
            window=teacher.num_frames,
        )
        path = self.folder / f"perception_step_{state.global_step:06d}.png"
        draw_perception(path, video, f"step {state.global_step}")


def shown_frames(pixel_values: Tensor, video_processor) -> np.ndarray:
    """Undo the video processor's normalisation: `(N, 3, H, W)` -> `(N, H, W, 3)` uint8."""
    mean, std = (
        pixel_values.new_tensor(v).view(3, 1, 1) for v in (video_processor.image_mean, video_processor.image_std)
    )
    frames = (pixel_values * std + mean).clamp(0, 1) * 255
    return frames.round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
