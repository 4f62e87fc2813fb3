"""The losses of perceptual 4D distillation, Eq. 6 and 7 of arXiv 2512.17012."""

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Reduction = Literal["none", "mean"]
MotionKind = Literal["logit", "probability"]

DEPTH_EPSILON = 1e-8  # authors' release: log(depth + 1e-8)


def latent_distillation_loss(student: Tensor, teacher: Tensor, reduction: Reduction = "mean") -> Tensor:
    r"""Latent distillation, Eq. 6: pull the student's latents to the teacher's.

    Smooth-L1 (beta 1), mean inside a frame, SUM over the latent frames n'. The paper has one feature map F_4D; where a
    teacher is read at several taps, their losses are averaged, so that alpha keeps its meaning.

    Args:
        student, teacher: `(batch, taps, frames, height, width, channels)`, any float dtype; compared in float32. The
            teacher's side gets no gradient.
        reduction: "mean" over the batch gives a scalar, "none" one value a video, `(batch,)`.

    Raises: `ValueError` if the two sides disagree in shape; the message names both.
    """
    if student.ndim != 6 or student.shape != teacher.shape:
        raise ValueError(
            "latents must be (batch, taps, frames, height, width, channels) and alike on both sides; the student's are "
            f"{tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        )
    distance = F.smooth_l1_loss(student.float(), teacher.detach().float(), reduction="none")
    per_video = distance.mean(dim=(3, 4, 5)).sum(dim=2).mean(dim=1)
    return _reduce(per_video, reduction)


def explicit_distillation_loss(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    weights: Mapping[str, float],
    valid: Mapping[str, Tensor] | None = None,
    motion_kind: MotionKind = "logit",
    reduction: Reduction = "mean",
) -> tuple[Tensor, dict[str, Tensor]]:
    r"""Explicit distillation, Eq. 7: pull the student's decoded signals to the teacher's.

    A signal's term is Smooth-L1 (beta 1), mean inside a frame over its valid values, SUM over the frames n; the loss is
    the sum of the terms with weights lambda_m. A frame without a valid value adds nothing. All in float32.

    - `depth` is compared as `log(depth + 1e-8)` (the authors' release; the paper does not say). It is not aligned in
      scale: the student's latents pass through the teacher's own depth head, so both sides share its scale.
    - `flow`: frame 0 has no predecessor and is masked. Departs from the release, which compares what is there.
    - `motion`: logit with logit, or, if the teacher gives probabilities, the sigmoid of the student's logit with them.
    - `camray` as it is, direction and moment.

    Args:
        student: signal -> `(batch, channels, frames, height, width)`, float. `depth` positive; `flow` backward, in
            pixels of this grid, channels (u, v); `motion` logits. Every signal in it is compared.
        teacher: the same signals with the same shapes (more may be there); gets no gradient.
        weights: lambda_m. A signal left out, or weighted 0, is reported but not trained.
        valid: signal -> bool mask, broadcastable to that signal; a signal left out is valid everywhere. What the
            teacher holds at an invalid place does not matter, it may even be NaN.
        motion_kind: what the teacher's `motion` is, "logit" or "probability".
        reduction: "mean" over the batch gives scalars, "none" one value a video, `(batch,)`.

    Returns: the loss, and each signal's unweighted term, detached.
    Raises: `ValueError` if the two sides disagree in signals or shape; the message names both.
    """
    if not student:
        raise ValueError("explicit distillation needs at least one signal")
    missing = sorted(set(student) - set(teacher))
    if missing:
        raise ValueError(f"the teacher gives {sorted(teacher)}, so the student's {missing} cannot be compared")
    absent = sorted(name for name, weight in weights.items() if weight and name not in student)
    if absent:
        raise ValueError(f"signals {absent} have a weight, but the student gives {sorted(student)} only")
    if motion_kind not in ("logit", "probability"):
        raise ValueError(f"motion_kind must be 'logit' or 'probability'; got {motion_kind!r}")

    valid = valid or {}
    total = None
    terms = {}
    for signal, prediction in student.items():
        weight = weights.get(signal, 0.0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(weight)):
            term = _signal_term(signal, prediction, teacher[signal].detach(), valid.get(signal), motion_kind)
        terms[signal] = _reduce(term.detach(), reduction)
        if weight:
            total = weight * term if total is None else total + weight * term
    if total is None:  # nothing is trained, only reported
        total = term.new_zeros(term.shape)
    return _reduce(total, reduction), terms


def _signal_term(
    signal: str, student: Tensor, teacher: Tensor, valid: Tensor | None, motion_kind: MotionKind
) -> Tensor:
    """One signal's term of Eq. 7, `(batch,)`."""
    if student.ndim != 5 or student.shape != teacher.shape:
        raise ValueError(
            f"{signal} must be (batch, channels, frames, height, width) and alike on both sides; the student's is "
            f"{tuple(student.shape)}, the teacher's {tuple(teacher.shape)}"
        )
    mask = _value_mask(signal, student, valid)
    student, teacher = student.float(), teacher.float()
    if mask is not None:
        # Before the logarithm, not after the distance: 0 * NaN would be NaN, in the gradient too.
        student, teacher = torch.where(mask, student, 1.0), torch.where(mask, teacher, 1.0)
    if signal == "depth":
        student, teacher = (student + DEPTH_EPSILON).log(), (teacher + DEPTH_EPSILON).log()
    elif signal == "motion" and motion_kind == "probability":
        student = student.sigmoid()
    distance = F.smooth_l1_loss(student, teacher, reduction="none")
    if mask is None:
        per_frame = distance.mean(dim=(1, 3, 4))
    else:
        # Masked values are equal on both sides before and after the logarithm, but not after the sigmoid.
        distance = distance * mask
        per_frame = distance.sum(dim=(1, 3, 4)) / mask.sum(dim=(1, 3, 4)).clamp(min=1)
    return per_frame.sum(dim=1)


def _value_mask(signal: str, values: Tensor, valid: Tensor | None) -> Tensor | None:
    """Bool mask in the shape of `values`; `None` where everything counts."""
    if valid is not None:
        if valid.dtype != torch.bool:
            raise ValueError(f"the validity mask of {signal} must be bool; got {valid.dtype}")
        try:
            valid = valid.expand(values.shape)
        except RuntimeError as error:
            raise ValueError(
                f"the validity mask of {signal}, {tuple(valid.shape)}, does not broadcast to {tuple(values.shape)}"
            ) from error
    if signal != "flow":
        return valid
    has_predecessor = torch.arange(values.shape[2], device=values.device).view(1, 1, -1, 1, 1) > 0
    return has_predecessor.expand(values.shape) if valid is None else has_predecessor & valid


def _reduce(per_video: Tensor, reduction: Reduction) -> Tensor:
    if reduction == "none":
        return per_video
    if reduction == "mean":
        return per_video.mean()
    raise ValueError(f"reduction must be 'mean' or 'none'; got {reduction!r}")
