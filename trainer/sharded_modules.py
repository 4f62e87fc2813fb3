"""Batches with and without pictures under FSDP and ZeRO-3, where every process must run the same modules.

There a module's weights are gathered from all processes when it runs, and its gradients are reduced when they are complete. A
process whose batch has no video would leave the others waiting for its part of the vision tower and of the perception
decoder. So it runs them once on zeros, with weight zero.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import GatheredParameters
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_rgpt4d.perception_decoder import PerceptionDecoder


def is_sharded(model: nn.Module) -> bool:
    """Whether the weights of a wrapped model are spread over processes."""
    return is_deepspeed_zero3_enabled() or any(isinstance(parameter, DTensor) for parameter in model.parameters())


def used_elsewhere_only(accelerator: Accelerator, used_here: list[bool]) -> list[bool]:
    """For each of several things, whether another process uses it in this step and this one does not."""
    here = torch.tensor(used_here, dtype=torch.int32, device=accelerator.device)
    anywhere = accelerator.reduce(here.clone(), reduction="sum") > 0
    return (anywhere & (here == 0)).tolist()


@contextmanager
def idle_passes_of_vision(core: PreTrainedModel, num_passes: int) -> Iterator[None]:
    """While it lasts, the model also runs tower and projector `num_passes` times on a frame of zeros, before all else.

    The model runs them first, too. In another order each process would wait for the others at another module.
    """
    zeros = []

    def run(module, args):
        zeros[:] = [0.0 * _features_of_zeros(core).sum() for _ in range(num_passes)]

    def add(module, args, kwargs):
        embeddings = kwargs["inputs_embeds"]
        return args, {**kwargs, "inputs_embeds": embeddings + sum(zeros).to(embeddings.dtype)}

    hooks = []
    if num_passes:
        hooks.append(core.model.register_forward_pre_hook(run))
        hooks.append(core.model.language_model.register_forward_pre_hook(add, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def idle_pass_of_decoder(core: PreTrainedModel, decoder: PerceptionDecoder, hidden_states: Tensor) -> Tensor:
    """Zero, `()`, from the decoder's latents of frames of zeros."""
    grid = core.config.frame_grid
    frames = hidden_states.new_zeros(1, decoder.config.latent_shape[1], grid, grid, decoder.config.in_features)
    # ZeRO-3 lets go of a module's weights when the gradient of its input is there: as with real frames, or never
    frames.requires_grad_(hidden_states.requires_grad)
    return 0.0 * decoder(frames.to(decoder.dtype)).sum()


def gather_output_head(core: PreTrainedModel) -> None:
    """Let FSDP2 know that the output head is used, before its weight is read.

    TRL 1.16 reads the weight and never calls the head, which accelerate 1.15 shards by itself. FSDP2 would not take part then, and
    the part of the head that a process holds would learn from the batch of that process alone.
    """
    head = core.get_output_embeddings()
    if isinstance(head, FSDPModule):
        head.unshard()


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The whole tensors of a module that may be sharded. All processes must call it together."""
    with GatheredParameters(list(module.parameters())):  # does nothing but under ZeRO-3
        return {
            name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()
            for name, tensor in module.state_dict().items()
        }


def _features_of_zeros(core: PreTrainedModel) -> Tensor:
    size, device = core.config.image_size, core.device
    inputs = {"video_timestamps": torch.zeros(1, 1, device=device)}
    if core.config.geometry_fusion != "none":
        inputs["video_geometry"] = torch.zeros(1, 1, 1, 1, core.config.geometry_hidden_size, device=device)
    pixels = torch.zeros(1, 1, 3, size, size, device=device)
    return core.model.get_video_features(pixels, **inputs, return_dict=True).pooler_output[0]
