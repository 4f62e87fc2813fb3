"""The study's optimizer: Muon for the matrices of a model, AdamW for all else. A small model learns from it in fewer steps.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon) is torch's. Its steps are scaled to the size of AdamW's
(Liu et al., arXiv 2502.16982), so that one learning rate serves both.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from trainer.p4d_trainer import DECODER_FOLDER

try:
    from torch.optim import Muon
except ImportError as error:
    raise ImportError(f"The study needs torch.optim.Muon, of torch 2.9; this is torch {torch.__version__}.") from error


class MuonAndAdamW(torch.optim.Optimizer):
    """Both, as one optimizer to a scheduler and to accelerate.

    Args:
        matrices: parameters of two dimensions, for Muon.
        others: parameters for AdamW; those of fewer than two dimensions do not decay.
        lr, weight_decay: of both.
    """

    def __init__(self, matrices: list[nn.Parameter], others: list[nn.Parameter], lr: float, weight_decay: float):
        decaying = [parameter for parameter in others if parameter.ndim > 1]
        constant = [parameter for parameter in others if parameter.ndim < 2]
        groups = [{"params": decaying, "weight_decay": weight_decay}, {"params": constant, "weight_decay": 0.0}]
        self.parts = [AdamW([group for group in groups if group["params"]], lr=lr)] if others else []
        if matrices:
            self.parts.append(Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        """The parts' own dicts: what a scheduler writes into them, the parts read."""
        return [group for part in self.parts for group in part.param_groups]

    @torch.no_grad()
    def step(self, closure: Callable[[], torch.Tensor] | None = None) -> torch.Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = self._groups()  # loading made new ones


def muon_and_adamw(model: nn.Module, lr: float, weight_decay: float) -> MuonAndAdamW:
    """For what is trained of a 4D-RGPT, with PEFT's adapters or without. AdamW has embeddings, as usual with Muon, and the
    perception decoder, which is new in every run.
    """
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}  # also the head, if tied
    matrices = {
        id(module.weight): module.weight
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and id(module.weight) not in embeddings
        and DECODER_FOLDER not in name.split(".")
        and module.weight.requires_grad
    }
    others = [one for one in model.parameters() if one.requires_grad and id(one) not in matrices]
    return MuonAndAdamW(list(matrices.values()), others, lr, weight_decay)
