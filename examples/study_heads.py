"""The heads of the study's small teacher, faster on a GPU: the same numbers from wider convolutions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 32  # channels that a tensor core's tile has anyway


class FoldedConv3d(nn.Module):
    """A convolution with few channels, computed with `fold` neighbours along the width as channels of one place.

    A GPU's kernels work on tiles of 32 channels, of which a convolution of 8 fills a quarter. In the channels-last layout
    `(B, T, H, W, C)` is also `(B, T, H, W / fold, fold C)`, without a copy; a wide kernel with zeros where a place is no
    neighbour then gives the same sums. Where W is no multiple of `fold`, the convolution itself does.

    Args:
        conv: frozen, of stride 1, whose output has the size of its input, and of one or three taps along the width.
        fold: neighbours.
    """

    def __init__(self, conv: nn.Conv3d, fold: int):
        super().__init__()
        self.conv, self.fold = conv, fold
        out, channels, *rest, taps = conv.weight.shape
        wide = conv.weight.new_zeros(fold, out, fold, channels, *rest, taps)
        for place in range(fold):
            for tap in range(taps):
                read = place + tap - taps // 2  # the place that this tap reads, from the first of this group
                wide[place, :, read % fold, ..., read // fold + taps // 2] = conv.weight[..., tap]
        wide = wide.flatten(2, 3).flatten(0, 1).contiguous(memory_format=torch.channels_last_3d)
        self.register_buffer("weight", wide, persistent=False)
        self.register_buffer("bias", None if conv.bias is None else conv.bias.repeat(fold), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """`(B, C, T, H, W)` -> the same as of `conv`."""
        if x.shape[-1] % self.fold:
            return self.conv(x)
        x = x.movedim(1, -1)
        x = x.reshape(*x.shape[:3], x.shape[3] // self.fold, -1).movedim(-1, 1)
        x = F.conv3d(x, self.weight, self.bias, padding=self.conv.padding).movedim(1, -1)
        return x.reshape(*x.shape[:3], x.shape[3] * self.fold, -1).movedim(-1, 1)


def fold_narrow_convolutions(heads: nn.Module) -> None:
    """Replace, in place, the convolutions of frozen heads that have at most half of `WIDTH` channels."""
    for name, conv in list(heads.named_modules()):
        if (
            isinstance(conv, nn.Conv3d)
            and 2 * conv.in_channels <= WIDTH
            and conv.stride == (1, 1, 1)
            and conv.kernel_size in ((1, 1, 1), (3, 3, 3))
        ):
            parent, _, child = name.rpartition(".")
            setattr(heads.get_submodule(parent), child, FoldedConv3d(conv, WIDTH // conv.in_channels))
