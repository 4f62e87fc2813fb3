"""The study's optimizer: Muon for the matrices of a model, AdamW for all else. A small model learns from it in fewer steps."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan's quintic, five times: singular values end between 0.7 and 1.2
# The root mean square of AdamW's steps (Liu et al., arXiv 2502.16982): so one learning rate serves both.
SIZE_OF_ADAMW = 0.2


def orthogonalized(matrices: Tensor) -> Tensor:
    """`(n, rows, columns)` -> bfloat16 of the same shape: the singular vectors of each, with singular values about 1."""
    is_tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.bfloat16()
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    linear, cubic, quintic = NEWTON_SCHULZ
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=cubic, alpha=quintic), x, beta=linear)
    return x.mT if is_tall else x


class MuonAndAdamW(AdamW):
    """Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) for some parameters, AdamW for the others.

    The steps are those of `torch.optim.Muon(..., adjust_lr_fn="match_rms_adamw")`, but of all matrices of a shape at once:
    one after the other, as torch takes them, they were half of the time of a small model's step.

    Args:
        matrices: parameters of two dimensions, for Muon.
        others: parameters for AdamW; those of fewer than two dimensions do not decay.
        lr, weight_decay: of both.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, weight_decay: float):
        groups = [
            {"params": matrices, "muon": True},
            {"params": [one for one in others if one.ndim > 1], "muon": False},
            {"params": [one for one in others if one.ndim < 2], "muon": False, "weight_decay": 0.0},
        ]
        super().__init__([group for group in groups if group["params"]], lr=lr, weight_decay=weight_decay, fused=True)

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        groups = self.param_groups
        try:
            self.param_groups = [group for group in groups if not group["muon"]]
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                self._muon_step(group)
        return loss

    def _muon_step(self, group: dict) -> None:
        of_shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for matrix in group["params"]:
            if matrix.grad is not None:
                of_shapes.setdefault(matrix.shape, []).append(matrix)
        for shape, matrices in of_shapes.items():
            for matrix in matrices:
                if not self.state[matrix]:  # named as AdamW's, whose checkpoints these are too
                    self.state[matrix] |= {"step": torch.zeros(()), "exp_avg": torch.zeros_like(matrix)}
                self.state[matrix]["step"] += 1
            momenta = [self.state[matrix]["exp_avg"] for matrix in matrices]
            gradients = [matrix.grad for matrix in matrices]
            torch._foreach_lerp_(momenta, gradients, 1 - MOMENTUM)
            ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)  # Nesterov's
            steps = orthogonalized(torch.stack(ahead)).to(matrices[0].dtype)
            torch._foreach_mul_(matrices, 1 - group["lr"] * group["weight_decay"])
            size = SIZE_OF_ADAMW * max(shape) ** 0.5
            torch._foreach_add_(matrices, steps.unbind(), alpha=-group["lr"] * size)


def muon_and_adamw(model: nn.Module, lr: float, weight_decay: float) -> MuonAndAdamW:
    """For what is trained of a 4D-RGPT, with PEFT's adapters or without. AdamW has the embeddings, as usual with Muon."""
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}  # also the head, if tied
    matrices = {
        id(module.weight): module.weight
        for module in model.modules()
        if isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and id(module.weight) not in embeddings
        and module.weight.requires_grad
    }
    others = [one for one in model.parameters() if one.requires_grad and id(one) not in matrices]
    return MuonAndAdamW(list(matrices.values()), others, lr, weight_decay)
