"""Errors of perceived signals against exact ones: what a teacher, or a student through the teacher's heads, gets right.

Signals are `(batch, channels, frames, height, width)` in the conventions of `modeling_rgpt4d.modeling_l4p.L4POutput`.
Every function gives one value a video, `(batch,)` float32, NaN where the video has nothing to compare.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

BOOTSTRAP_SAMPLES = 2000


def depth_abs_rel(depth: Tensor, truth: Tensor, valid: Tensor | None = None) -> Tensor:
    """AbsRel: mean of |depth - truth| / truth over valid pixels. Both in metres; nothing is aligned."""
    return _mean((depth - truth).abs() / truth, valid)


def depth_delta(depth: Tensor, truth: Tensor, valid: Tensor | None = None, threshold: float = 1.25) -> Tensor:
    """Share of valid pixels whose ratio to the truth, in either direction, is below `threshold`."""
    return _mean((torch.maximum(depth / truth, truth / depth) < threshold).float(), valid)


def flow_end_point_error(flow: Tensor, truth: Tensor, valid: Tensor | None = None) -> Tensor:
    """EPE: mean distance in pixels between the flow vectors of valid pixels; frame 0, which has none, is left out."""
    distance = (flow - truth).norm(dim=1, keepdim=True)
    return _mean(distance[:, :, 1:], None if valid is None else valid.expand_as(distance)[:, :, 1:])


def motion_iou(logit: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of the moving pixels of a whole video: logit > 0 against probability > 0.5.

    NaN if nothing moves and nothing is said to move; 0 if nothing moves but something is said to.
    """
    said, moves = (logit > 0).flatten(1), (truth > 0.5).flatten(1)
    return (said & moves).sum(1) / (said | moves).sum(1)  # 0 / 0 = NaN


def ray_angle(camray: Tensor, truth: Tensor) -> Tensor:
    """Mean angle in degrees between the directions of the rays (channels 0..2; neither side needs unit length)."""
    one, other = camray[:, :3].float(), truth[:, :3].float()
    # atan2 keeps small angles exact, where the arc cosine of a float32 near 1 loses them.
    angle = torch.atan2(torch.linalg.cross(one, other, dim=1).norm(dim=1), (one * other).sum(dim=1))
    return angle.rad2deg().flatten(1).mean(dim=1)


def camera_centres(camray: Tensor) -> Tensor:
    r"""Where the camera is: the point that is nearest to all rays of a frame, by least squares.

    Args:
        camray: `(..., 6, N, h, w)` direction d and moment \(m = o \times d\) of rays; d of any length.

    Returns: `(..., N, 3)` float64, in the frame and the unit of the rays. Of parallel rays the point nearest to the origin.
    """
    rays = camray.double().movedim(-4, -1).flatten(-3, -2)  # (..., N, rays, 6)
    length = rays[..., :3].norm(dim=-1, keepdim=True).clamp_min(1e-12)
    direction, moment = (rays / length).split(3, dim=-1)
    foot = torch.linalg.cross(direction, moment)  # the point of the ray that is nearest to the origin
    identity = torch.eye(3, dtype=rays.dtype, device=rays.device)
    across = identity - direction.unsqueeze(-1) * direction.unsqueeze(-2)
    # sum (I - d d^T) o = sum (I - d d^T) p, where p is across d already
    return (torch.linalg.pinv(across.sum(-3), hermitian=True) @ foot.sum(-2).unsqueeze(-1)).squeeze(-1)


def camera_centre_error(camray: Tensor, truth: Tensor) -> Tensor:
    """Mean distance of the camera's centres over the frames, in the unit of the rays: metres where depth is metric."""
    return (camera_centres(camray) - camera_centres(truth)).norm(dim=-1).mean(dim=-1).float()


def signal_errors(signals: Mapping[str, Tensor], truth: Mapping[str, Tensor]) -> dict[str, list[float | None]]:
    """All errors that the signals at hand allow: lists with one value a video, `None` where nothing can be compared.

    Args:
        signals: any of `depth` (metres), `flow` (pixels), `motion` (logits), `camray`.
        truth: exact signals with the same shapes, motion in {0, 1}, and optionally `depth_valid` and `flow_valid`
            masks.

    Returns: `depth_abs_rel`, `depth_delta_1.25`, `flow_epe_px`, `motion_iou`, `ray_angle_deg`,
        `camera_centre_m`.
    """
    for name, signal in signals.items():
        if name not in truth:
            raise ValueError(f"the truth has {sorted(truth)}, but no {name} to compare with")
        if signal.shape != truth[name].shape:
            raise ValueError(f"{name} is {tuple(signal.shape)}, but its truth is {tuple(truth[name].shape)}")
        truth = {**truth, name: truth[name].to(signal.device)}
    errors: dict[str, Tensor] = {}
    if "depth" in signals:
        depths = (signals["depth"], truth["depth"], truth.get("depth_valid"))
        errors["depth_abs_rel"], errors["depth_delta_1.25"] = depth_abs_rel(*depths), depth_delta(*depths)
    if "flow" in signals:
        errors["flow_epe_px"] = flow_end_point_error(signals["flow"], truth["flow"], truth.get("flow_valid"))
    if "motion" in signals:
        errors["motion_iou"] = motion_iou(signals["motion"], truth["motion"])
    if "camray" in signals:
        errors["ray_angle_deg"] = ray_angle(signals["camray"], truth["camray"])
        errors["camera_centre_m"] = camera_centre_error(signals["camray"], truth["camray"])
    return {
        name: [None if math.isnan(value) else value for value in values.tolist()] for name, values in errors.items()
    }


@dataclass(frozen=True)
class MeanWithInterval:
    """Mean of n values, and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float | None], seed: int = 0) -> "MeanWithInterval":
        """Videos are resampled with replacement; `None` values are left out, which `n` shows."""
        numbers = np.array([value for value in values if value is not None], dtype=np.float64)
        if not len(numbers):
            raise ValueError("no value to average")
        draws = np.random.default_rng(seed).integers(len(numbers), size=(BOOTSTRAP_SAMPLES, len(numbers)))
        low, high = np.percentile(numbers[draws].mean(axis=1), [2.5, 97.5])
        return cls(float(numbers.mean()), float(low), float(high), len(numbers))

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def _mean(values: Tensor, valid: Tensor | None) -> Tensor:
    if valid is None:
        return values.float().flatten(1).mean(dim=1)
    valid = valid.to(values.device).expand_as(values)
    # `where`, because a value at an invalid place may be NaN
    return torch.where(valid, values.float(), 0.0).flatten(1).sum(dim=1) / valid.flatten(1).sum(dim=1)
