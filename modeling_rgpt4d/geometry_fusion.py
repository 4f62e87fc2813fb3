"""The latents of the 4D perception model as an input: 4D-Concat and 4D-PE, the baselines of Table 4 (arXiv 2512.17012).

P4D needs them for training only; these two need them for every answer, too.
"""

import torch
from torch import nn


class GeometryProjection(nn.Linear):
    """A linear map of F_4D. The model's `_init_weights` starts it at zero, so that training starts from the model without it
    (the paper does not say).

    Without a bias, zeros stay zeros: what has no geometry, an image, is not touched, also after training.
    """

    def __init__(self, geometry_hidden_size: int, dim: int):
        super().__init__(geometry_hidden_size, dim, bias=False)


def rearrange_geometry(geometry: torch.Tensor, num_frames: int, side: int) -> torch.Tensor:
    """F_4D of videos to the patches of each frame.

    A latent frame stands for `num_frames / N'` frames in a row (L4P's tubelets of 2) and serves each of them. Its grid
    is brought to that of the patches, bilinear with antialias, without keeping the aspect ratio.

    Args:
        geometry: `(V, N', h', w', c')`, any float dtype.
        num_frames: N, a multiple of N'.
        side: patches along a side of a frame.

    Returns: `(V, N, side * side, c')`, row by row, in the same dtype.
    """
    num_videos, latent_frames, height, width, channels = geometry.shape
    if (height, width) != (side, side):
        # in float32: torch has no antialiasing in bfloat16 on a CPU
        grids = geometry.flatten(0, 1).movedim(-1, 1).float()
        grids = nn.functional.interpolate(grids, (side, side), mode="bilinear", align_corners=False, antialias=True)
        geometry = grids.movedim(1, -1).to(geometry.dtype)
    geometry = geometry.reshape(num_videos, latent_frames, side * side, channels)
    return geometry.repeat_interleave(num_frames // latent_frames, dim=1)


__all__ = ["GeometryProjection", "rearrange_geometry"]
