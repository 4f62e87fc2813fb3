"""Explicit distillation through the teacher's heads, in the memory of one head on a few windows."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .losses import explicit_distillation_loss
from .teachers import PerceptionTargets, Teacher, windows_at_once


class _KnownGradient(torch.autograd.Function):
    """Hands on `losses`, `(W,)`, whose gradient with respect to each window's own latents is `gradient`, `(W, ...)`."""

    @staticmethod
    def forward(ctx, latents: Tensor, losses: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx, of_losses: Tensor):
        (gradient,) = ctx.saved_tensors
        shape = (-1, *[1] * (gradient.ndim - 1))
        return gradient * of_losses.view(shape).to(gradient.dtype), None, None


def decoded_distillation(
    teacher: Teacher, latents: Tensor, targets: PerceptionTargets, signals: Sequence[str], trained: Sequence[str]
) -> dict[str, Tensor]:
    """Eq. 4 and each signal's own term of Eq. 7.

    The heads are frozen and each window's terms depend on its latents alone. So the gradient of a term is computed at
    once, signal by signal and window by window, and only it is kept: the same gradient as by `teacher.decode` on the
    whole batch and one backward pass, with the activations of one head on one window instead of four on all.

    Args:
        latents: `(W, taps, N', h', w', c')`, the student's.
        targets: the teacher's, for W windows.
        signals: names of the signals to compare.
        trained: those of them that get a gradient; the others are watched.

    Returns: signal -> `(W,)`, unweighted.
    """
    terms, at_once = {}, windows_at_once(teacher)
    for signal in signals:
        wants_gradient = signal in trained and torch.is_grad_enabled() and latents.requires_grad
        losses, gradients = [], []
        for start in range(0, len(latents), at_once):
            some = slice(start, start + at_once)
            part = latents.detach()[some].requires_grad_(wants_gradient)
            with torch.set_grad_enabled(wants_gradient):
                loss, _ = explicit_distillation_loss(
                    teacher.decode(part, [signal]),
                    {signal: targets.signals[signal][some]},
                    {signal: 1.0},
                    valid={name: mask[some] for name, mask in targets.valid.items() if name == signal},
                    motion_kind=teacher.motion_kind,
                    reduction="none",
                )
            losses.append(loss.detach())
            if wants_gradient:
                gradients += torch.autograd.grad(loss.sum(), part)
        terms[signal] = torch.cat(losses)
        if wants_gradient:
            terms[signal] = _KnownGradient.apply(latents, terms[signal], torch.cat(gradients))
    return terms


def usable_windows(targets: PerceptionTargets, signals: Sequence[str], with_latents: bool) -> Tensor:
    """`(W,)` bool: the windows whose targets are finite wherever they are compared."""
    finite = []
    if with_latents and targets.latents is not None:
        finite.append(targets.latents.isfinite().flatten(1).all(dim=1))
    for signal in signals:
        values = targets.signals[signal]
        counts = values.isfinite()
        if signal in targets.valid:
            counts = counts | ~targets.valid[signal].expand_as(values)
        if signal == "flow":
            counts = counts[:, :, 1:]  # frame 0 has no predecessor and is never compared
        finite.append(counts.flatten(1).all(dim=1))
    return torch.stack(finite).all(dim=0)


def without(targets: PerceptionTargets, usable: Tensor) -> PerceptionTargets:
    """`targets` with ones at the windows that are not usable: a loss times zero is zero there, and not NaN."""

    def fill(values: Mapping[str, Tensor] | Tensor | None):
        if values is None:
            return None
        shape = (-1, *[1] * (values.ndim - 1))
        return torch.where(usable.view(shape), values, torch.ones((), dtype=values.dtype, device=values.device))

    return PerceptionTargets(
        latents=fill(targets.latents),
        signals={name: fill(values) for name, values in targets.signals.items()},
        valid=targets.valid,
    )
