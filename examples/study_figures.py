"""Figures of the study, drawn from its records: losses, gradient norms, label efficiency and perceived signals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from study_statistics import Estimate

from trainer.perception_pictures import signal_picture

SIGNALS = ("depth", "flow", "motion", "camray")
Log = Sequence[Mapping[str, float]]  # of one run: {"step": ..., "loss_sft": ..., ...}


def save(figure: Figure, path: Path) -> None:
    """PNG, whole or not at all; nothing in it but the picture, so that the same records give the same bytes."""
    unfinished = path.with_name(f".{path.name}.partial")
    figure.savefig(unfinished, format="png", dpi=110, metadata={"Software": None})
    unfinished.replace(path)


def curve(logs: Sequence[Log], name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, and the mean over runs of a logged number at these steps; empty where it was not logged."""
    values: dict[float, list[float]] = {}
    for log in logs:
        for entry in log:
            if name in entry:
                values.setdefault(entry["step"], []).append(entry[name])
    steps = sorted(values)
    return np.array(steps), np.array([np.mean(values[step]) for step in steps])


def draw_curves(path: Path, panels: Mapping[str, Mapping[str, tuple[np.ndarray, np.ndarray]]]) -> None:
    """Panels side by side: title -> {label: [`curve`]}; the vertical axis is logarithmic."""
    figure = Figure(figsize=(4.6 * len(panels), 3.2), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, (steps, values) in curves.items():
            axis.plot(steps, values, label=label, linewidth=1.2)
        axis.set_title(title, fontsize=9)
        axis.set(xlabel="step", yscale="log")
        axis.yaxis.set_major_formatter(LogFormatter())
        axis.yaxis.set_minor_formatter(LogFormatter())
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    save(figure, path)


def draw_label_efficiency(
    path: Path, curves: Mapping[str, Mapping[float, Estimate]], lines: Mapping[str, float]
) -> None:
    """Accuracy in percent over the share of the questions, label -> {share: accuracy}, with intervals; and levels."""
    figure = Figure(figsize=(5, 3.4), layout="constrained")
    axis = figure.subplots()
    for number, (label, points) in enumerate(curves.items()):
        # A hair apart, so that the intervals do not cover each other
        shares = np.array(list(points)) * 100 * 1.03**number
        values = np.array([[point.value, point.low, point.high] for point in points.values()]).T
        errors = np.abs(values[1:] - values[0])
        axis.errorbar(shares, values[0], errors, marker="o", markersize=4, capsize=3, linewidth=1.2, label=label)
    for label, value in lines.items():
        axis.axhline(value, color="grey", linewidth=0.8, linestyle=":")
        axis.annotate(label, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=7)
    shares = sorted({share for points in curves.values() for share in points})
    axis.set(xscale="log", xlabel="questions trained on (%)", ylabel="right answers, nine categories (%)")
    axis.set_xticks([100 * share for share in shares], [f"{100 * share:g}" for share in shares])
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    save(figure, path)


def draw_signal(path: Path, pictures: Mapping[str, np.ndarray], signal: str) -> None:
    """A signal over training: frames, the student's at each step, the teacher's and the truth, in the truth's colours.

    Args:
        pictures: arrays of pictures.npz: `frames` (N, H, W, 3) uint8, `steps` (S,), `student_<signal>` (S, C, N, H, W),
            `teacher_<signal>` and `truth_<signal>` (C, N, H, W); motion as probability.

    Raises: `ValueError` if motion is not in [0, 1].
    """
    truth, teacher, students = (
        np.asarray(pictures[f"{side}_{signal}"], dtype=np.float32) for side in ("truth", "teacher", "student")
    )
    if signal == "motion" and min(side.min() for side in (truth, teacher, students)) < 0:
        raise ValueError("pictures.npz must hold motion as probability: apply the sigmoid to the logits")
    frames = pictures["frames"]
    # From frame 1: before frame 0 there is no frame that its flow could lead to.
    columns = np.unique(np.linspace(1, len(frames) - 1, min(len(frames) - 1, 6)).round().astype(int))
    rows = {"video": None} | {
        f"step {step}": student for step, student in zip(pictures["steps"], students, strict=True)
    }
    rows |= {"teacher": teacher, "truth": truth}
    reference = truth[:, 1:] if signal == "flow" else truth
    figure = Figure(figsize=(1.3 * len(columns) + 0.5, 1.3 * len(rows) + 0.2), layout="constrained")
    for axes, (label, values) in zip(
        figure.subplots(len(rows), len(columns), squeeze=False), rows.items(), strict=True
    ):
        shown = frames if values is None else signal_picture(signal, values, reference)
        axes[0].set_ylabel(label, fontsize=8)
        for axis, column in zip(axes, columns, strict=True):
            axis.set_xticks([])
            axis.set_yticks([])
            axis.imshow(shown[column], interpolation="nearest")
    save(figure, path)


def draw_pictures(folder: Path, pictures: Mapping[str, Any]) -> list[Path]:
    """A figure of each signal that the pictures have; returns their paths."""
    paths = []
    for signal in SIGNALS:
        if f"student_{signal}" in pictures:
            paths.append(folder / f"perceived_{signal}.png")
            draw_signal(paths[-1], pictures, signal)
    return paths
