"""The 4D perception model L4P: latents (Eq. 1) and signals (Eq. 2) of arXiv 2512.17012, at any size.

Axes: B videos, N frames, N' = N / tubelet_size, (h', w') the grid of patches, c' the width of the encoder.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel
from transformers.models.videomae.modeling_videomae import VideoMAELayer, VideoMAEPatchEmbeddings
from transformers.utils import ModelOutput

from .configuration_l4p import L4PConfig

SIGNAL_CHANNELS = {"depth": 1, "flow": 2, "motion": 1, "camray": 6}  # paper, A1.1
SIGNALS = tuple(SIGNAL_CHANNELS)

# Resampling of the four levels relative to the grid (N', h', w'), as exponents of two for (time, height, width).
FULL_RESOLUTION_LEVELS = ((1, 2, 2), (1, 1, 1), (0, 0, 0), (-1, -1, -1))
RAY_LEVELS = ((1, 0, 0), (1, 0, 0), (0, 0, 0), (-1, -1, -1))

SMALL_START = 0.1


@dataclass
class L4POutput(ModelOutput):
    r"""
    Latents and signals of a batch of videos. The signals are float32; one that was not asked for is `None`.

    latents (`torch.Tensor` of shape `(B, taps, N', h', w', c')`):
        Un-normed residual streams of the encoder (Eq. 1).
    depth (`torch.Tensor` of shape `(B, 1, N, H, W)`):
        Depth along the optical axis, positive. Up to one scale a window for the released weights.
    flow (`torch.Tensor` of shape `(B, 2, N, H, W)`):
        Backward flow: pixel `(x, y)` of frame t was at `(x + u, y + v)` in frame t - 1; pixels, u right, v down.
        Frame 0 has no predecessor, its values mean nothing.
    motion (`torch.Tensor` of shape `(B, 1, N, H, W)`):
        Logit that the pixel's point moves in the world.
    camray (`torch.Tensor` of shape `(B, 6, N, h', w')`):
        Ray through each patch centre: direction, then moment `o x d`, in the frame of the window's first camera
        (x right, y down, z forward). The direction is a linear output, only close to unit length.
    """

    latents: torch.FloatTensor | None = None
    depth: torch.FloatTensor | None = None
    flow: torch.FloatTensor | None = None
    motion: torch.FloatTensor | None = None
    camray: torch.FloatTensor | None = None


def sinusoidal_positions(num_positions: int, dim: int) -> Tensor:
    """Sines (even channels) and cosines of the flat token index, `(1, num_positions, dim)` float32.

    Computed in float64 on the CPU, whatever the default device: `from_pretrained` builds models on the meta device.
    """
    position = torch.arange(num_positions, dtype=torch.float64, device="cpu")[:, None]
    channel = torch.arange(dim, device="cpu")
    angle = position / 10_000 ** (2 * (channel // 2) / dim)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()[None]


def start_small(last: nn.Module) -> None:
    """Let training from scratch start with small weights here: `SMALL_START` of what keeps the variance.

    For the last layer of a residual branch, because no norm meets the stream on its way to the heads and it would grow
    with depth; and for the last layer of a head, so that signals start near zero, and depth near one. `_init_weights`
    reads the mark: in custom code the library does not call it for a module whose parameters are all its children's.
    """
    last.starts_small = True


class L4PEncoder(nn.Module):
    """VideoMAE's patches and blocks over all tokens of a window: no class token, no final norm.

    transformers' own `VideoMAEEmbeddings` keeps the position table in a plain attribute, which neither follows the
    device nor survives construction on the meta device; here it is a buffer, filled again by `L4PModel._init_weights`.
    """

    def __init__(self, config: L4PConfig):
        super().__init__()
        self.taps = config.taps
        self.grid_shape = config.latent_shape[1:4]
        self.patch_embeddings = VideoMAEPatchEmbeddings(config)
        self.layers = nn.ModuleList(VideoMAELayer(config) for _ in range(config.num_hidden_layers))
        for layer in self.layers:
            # transformers 5.17 gives the keys a bias too. A softmax over keys cannot see it, and the release has none.
            layer.attention.attention.key.register_parameter("bias", None)
            start_small(layer.attention.output.dense)
            start_small(layer.output.dense)
        self.register_buffer(
            "position_embeddings",
            sinusoidal_positions(self.patch_embeddings.num_patches, config.hidden_size),
            persistent=False,
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = self.patch_embeddings(pixel_values)
        hidden = hidden + self.position_embeddings.to(hidden.dtype)
        tapped = []
        for depth, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden)
            if depth in self.taps:
                tapped.append(hidden)
        return torch.stack(tapped, dim=1).unflatten(2, self.grid_shape)


class L4PReassemble(nn.Module):
    """One level of a head: `(B, c', N', h', w')` -> `(B, dim, ...)` on a grid resampled by powers of two."""

    def __init__(self, hidden_size: int, dim: int, exponents: tuple[int, int, int]):
        super().__init__()
        self.project = nn.Conv3d(hidden_size, dim, kernel_size=1)
        stride = tuple(2 ** abs(e) for e in exponents)
        if max(exponents) > 0:
            self.resample = nn.ConvTranspose3d(dim, dim, kernel_size=stride, stride=stride)
        elif min(exponents) < 0:
            kernel_size = tuple(2 * (s // 2) + 1 for s in stride)
            self.resample = nn.Conv3d(dim, dim, kernel_size, stride=stride, padding=tuple(s // 2 for s in stride))
        else:
            self.resample = nn.Identity()

    def forward(self, level: Tensor) -> Tensor:
        return self.resample(self.project(level))


class L4PResidualUnit(nn.Module):
    """`x + conv(relu(conv(relu(x))))`."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv1 = nn.Conv3d(dim, dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv3d(dim, dim, kernel_size=3, padding=1)
        start_small(self.conv2)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class L4PFusion(nn.Module):
    """Joins the path from the deeper levels with one lateral level, then up-samples to `size`."""

    def __init__(self, dim: int, is_deepest: bool):
        super().__init__()
        # The released checkpoint has a lateral unit at the deepest level too; nothing ever reads it.
        self.lateral_unit = None if is_deepest else L4PResidualUnit(dim)
        self.unit = L4PResidualUnit(dim)
        self.project = nn.Conv3d(dim, dim, kernel_size=1)

    def forward(self, lateral: Tensor, deeper: Tensor | None, size: tuple[int, int, int]) -> Tensor:
        path = lateral if deeper is None else deeper + self.lateral_unit(lateral)
        path = resize(self.unit(path), size)
        return self.project(path)


def interpolation_matrix(num_in: int, num_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Linear interpolation along one axis with aligned corners, `(num_out, num_in)`.

    In half precision a weight is rounded to multiples of 1/256 such that each row still sums to one exactly: a constant
    stays that constant, and a sampling point moves by 1/512 of a pixel at most.
    """
    # Whole numbers, so that nothing is rounded before the one division.
    numerator = torch.arange(num_out, device=device)[:, None] * (num_in - 1)
    denominator = max(num_out - 1, 1)
    left, weight = numerator // denominator, (numerator % denominator) / denominator
    if dtype in (torch.float16, torch.bfloat16):
        weight = (weight * 256).round() / 256
    column = torch.arange(num_in, device=device)
    return ((column == left) * (1 - weight) + (column == left + 1) * weight).to(dtype)


@functools.lru_cache(maxsize=128)
def kept_interpolation_matrix(num_in: int, num_out: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The same matrix again: making it takes ten small kernels, and a decoding needs about a hundred."""
    with torch.inference_mode(False):  # a tensor of inference mode could not serve a backward pass later
        return interpolation_matrix(num_in, num_out, dtype, device)


def resize(x: Tensor, size: tuple[int, int, int]) -> Tensor:
    """Trilinear resize of `(B, C, T, H, W)`, corners aligned.

    One matrix product an axis over the channels-last layout that the convolutions work in: on a GPU many times faster than
    `F.interpolate`, whose backward pass adds atomically and so differs from run to run.
    """
    # A compiler traces what makes the matrix, and must not keep its stand-ins.
    matrix = interpolation_matrix if torch.compiler.is_compiling() else kept_interpolation_matrix
    for axis, num_out in zip((2, 3, 4), size, strict=True):
        num_in = x.shape[axis]
        if num_in == num_out:
            continue  # aligned corners on an equal grid sample every point at itself
        x = x.movedim(1, -1)  # (B, T, H, W, C)
        # (outer axes, this axis, inner axes and channels)
        rows = x.reshape(x.shape[: axis - 1].numel(), num_in, -1)
        x = (matrix(num_in, num_out, x.dtype, x.device) @ rows).view(*x.shape[: axis - 1], num_out, *x.shape[axis:])
        x = x.movedim(-1, 1)
    return x


class L4PHead(nn.Module):
    """A DPT head with 3-D convolutions and no normalisation: latents -> one signal."""

    def __init__(self, config: L4PConfig, signal: str):
        super().__init__()
        is_ray = signal == "camray"
        levels = RAY_LEVELS if is_ray else FULL_RESOLUTION_LEVELS
        self.last_upsampling = 1 if is_ray else 2
        side = config.grid if is_ray else config.image_size
        self.output_size = (config.num_frames, side, side)

        dim = config.feature_dim
        self.reassemble = nn.ModuleList(
            L4PReassemble(config.hidden_size, width, exponents)
            for width, exponents in zip(config.layer_dims, levels, strict=True)
        )
        self.laterals = nn.ModuleList(
            nn.Conv3d(width, dim, kernel_size=3, padding=1, bias=False) for width in config.layer_dims
        )
        deepest = len(levels) - 1
        self.fusion = nn.ModuleList(L4PFusion(dim, is_deepest=level == deepest) for level in range(len(levels)))
        self.project = nn.Conv3d(dim, config.last_dim, kernel_size=3, padding=1)
        self.output = nn.Sequential(
            nn.Conv3d(config.last_dim, config.last_dim, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv3d(config.last_dim, SIGNAL_CHANNELS[signal], kernel_size=1),
        )
        start_small(self.output[-1])

    def forward(self, latents: Tensor) -> Tensor:
        # (B, N', h', w', c') seen as (B, c', N', h', w') is already channels-last: convolutions read it without a copy,
        # and stay in this layout if their weights are in it too.
        laterals = [
            lateral(reassemble(latents[:, tap].movedim(-1, 1)))
            for tap, (reassemble, lateral) in enumerate(zip(self.reassemble, self.laterals, strict=True))
        ]
        path = None
        for level in reversed(range(len(laterals))):
            if level > 0:
                # The grid of the next level: for the release's sizes that is up-sampling by two; odd grids fit as well.
                size = tuple(laterals[level - 1].shape[2:])
            else:
                frames, height, width = laterals[0].shape[2:]
                size = (frames, height * self.last_upsampling, width * self.last_upsampling)
            path = self.fusion[level](laterals[level], path, size)
        return self.output(resize(self.project(path), self.output_size))


class L4PPreTrainedModel(PreTrainedModel):
    config: L4PConfig
    base_model_prefix = "l4p"
    main_input_name = "pixel_values"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["VideoMAELayer", "L4PHead"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, (nn.Linear, nn.Conv3d, nn.ConvTranspose3d)):
            # Variance is kept from layer to layer: with the library's fixed 0.02 a narrow model starts as good as dead.
            # A transposed convolution whose stride is its kernel gives each output one tap: its fan-in is the number of
            # input channels, the first axis of its weight.
            fan_in = module.in_channels if isinstance(module, nn.ConvTranspose3d) else module.weight[0].numel()
            scale = SMALL_START if getattr(module, "starts_small", False) else 1.0
            init.normal_(module.weight, mean=0.0, std=scale * fan_in**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, L4PEncoder):
            positions = sinusoidal_positions(module.patch_embeddings.num_patches, self.config.hidden_size)
            init.copy_(module.position_embeddings, positions)


class L4PModel(L4PPreTrainedModel):
    r"""A video encoder and one dense head a signal: `depth`, `flow`, `motion`, `camray`.

    Raises `ValueError` when frames, latents or names of signals do not fit the configuration, and names both sides.
    """

    def __init__(self, config: L4PConfig):
        super().__init__(config)
        self.encoder = L4PEncoder(config)
        self.heads = nn.ModuleDict({signal: L4PHead(config, signal) for signal in SIGNALS})
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.patch_embeddings

    def encode(self, pixel_values: Tensor) -> Tensor:
        r"""Eq. 1.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, N, 3, H, W)`): RGB frames, normalised with the configuration's
                `image_mean` and `image_std`; exactly `num_frames` frames of `image_size` pixels a side.

        Returns: the latents, `(B, taps, N', h', w', c')`, in the model's dtype.
        """
        config = self.config
        expected = (config.num_frames, config.num_channels, config.image_size, config.image_size)
        if pixel_values.ndim != 5 or tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"L4PModel encodes videos of shape (batch, {', '.join(map(str, expected))}); got "
                f"{tuple(pixel_values.shape)}"
            )
        return self.encoder(pixel_values.to(self.dtype))

    def decode(self, latents: Tensor, signals: Sequence[str] = SIGNALS) -> dict[str, Tensor]:
        r"""Eq. 2, and Eq. 4 when the latents are a student's. Differentiable in `latents`, also where heads are frozen.

        Args:
            latents (`torch.Tensor` of shape `(B, taps, N', h', w', c')`): any float dtype; cast to the model's.
            signals (`Sequence[str]`): which heads to run; the others cost nothing.

        Returns: signal -> float32 tensor, with the shapes and conventions of [`L4POutput`].
        """
        unknown = [signal for signal in signals if signal not in SIGNALS]
        if unknown:
            raise ValueError(f"unknown signals {unknown}; there are {list(SIGNALS)}")
        if latents.ndim != 6 or tuple(latents.shape[1:]) != self.config.latent_shape:
            raise ValueError(
                "L4PModel decodes latents of shape (batch, taps, frames, height, width, channels) = (batch, "
                f"{', '.join(map(str, self.config.latent_shape))}); got {tuple(latents.shape)}"
            )
        latents = latents.to(self.dtype)
        decoded = {}
        for signal in signals:
            # float32 before exp: in half precision depth would keep three decimal digits
            raw = self.heads[signal](latents).float()
            decoded[signal] = raw.exp() if signal == "depth" else raw
        return decoded

    def forward(
        self, pixel_values: Tensor, signals: Sequence[str] = SIGNALS, return_dict: bool | None = None, **kwargs
    ) -> L4POutput | tuple:
        r"""`encode`, then `decode`.

        Args:
            pixel_values (`torch.Tensor` of shape `(B, N, 3, H, W)`): as in [`~L4PModel.encode`].
            signals (`Sequence[str]`): as in [`~L4PModel.decode`]; an empty list gives the latents alone.
        """
        latents = self.encode(pixel_values)
        output = L4POutput(latents=latents, **self.decode(latents, signals))
        return output if return_dict is not False else output.to_tuple()


L4PModel.register_for_auto_class("AutoModel")

__all__ = ["L4PModel", "L4POutput", "L4PPreTrainedModel", "SIGNALS"]
