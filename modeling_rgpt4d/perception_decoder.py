"""The 4D perception decoder D_4DP: hidden states of frame tokens -> latents of the teacher (Eq. 3 of arXiv 2512.17012).

It serves training, and looking at what a trained model perceives; answering questions never needs it. Hence it is
stored beside the model, never inside it.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import cached_file

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
KINDS = ("mlp", "linear")


@dataclass(frozen=True)
class PerceptionDecoderConfig:
    """
    Args:
        in_features: width c of the language model's hidden states.
        latent_shape: `(taps, N', h', w', c')`, the shape of one video's latents in the teacher.
        kind: "mlp", the paper's three layers; "linear", the authors' release: one linear layer a tap.
        hidden_size: width of the MLP, 2560 in the paper; the linear kind has none.
    """

    in_features: int
    latent_shape: tuple[int, int, int, int, int]
    kind: str = "mlp"
    hidden_size: int = 2560  # paper, A1.1

    def __post_init__(self):
        object.__setattr__(self, "latent_shape", tuple(self.latent_shape))  # JSON has no tuples
        if len(self.latent_shape) != 5:
            raise ValueError(f"latent_shape must be (taps, frames, height, width, channels); got {self.latent_shape}")
        if self.kind not in KINDS:
            raise ValueError(f"kind must be one of {list(KINDS)}; got {self.kind!r}")


class PerceptionDecoder(nn.Module):
    """Eq. 3. Weights are in float32 at construction; cast them like any module's."""

    def __init__(self, config: PerceptionDecoderConfig):
        super().__init__()
        self.config = config
        taps, *_, channels = config.latent_shape
        if config.kind == "mlp":
            # One network for all taps, so that they share what it has understood; the paper has one F_4D and one D_4DP.
            self.project = nn.Sequential(
                nn.Linear(config.in_features, config.hidden_size),
                nn.GELU(),
                nn.Linear(config.hidden_size, config.hidden_size),
                nn.GELU(),
                nn.Linear(config.hidden_size, taps * channels),
            )
        else:
            # The release's independent layers, one a tap, side by side in one matrix.
            self.project = nn.Linear(config.in_features, taps * channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier weights and zero biases (paper, A1.1), or N(0, 0.1) weights (release)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                if self.config.kind == "mlp":
                    nn.init.xavier_uniform_(module.weight)
                else:
                    nn.init.normal_(module.weight, std=0.1)
                nn.init.zeros_(module.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """
        Args:
            hidden_states: `(B, N, h, w, c)`, hidden states of the frame tokens. N is a multiple of the latents' N'; the
                grid is free.

        Returns: `(B, taps, N', h', w', c')`, in the dtype of the weights, or of autocast.
        """
        taps, latent_frames, height, width, channels = self.config.latent_shape
        if hidden_states.ndim != 5 or hidden_states.shape[-1] != self.config.in_features:
            raise ValueError(
                "the perception decoder takes hidden states of shape (batch, frames, height, width, "
                f"{self.config.in_features}); got {tuple(hidden_states.shape)}"
            )
        num_frames = hidden_states.shape[1]
        if num_frames % latent_frames:
            raise ValueError(
                f"{num_frames} frames cannot be shared out to the teacher's {latent_frames} latent frames: sample as "
                "many frames as the teacher sees"
            )
        # Rearrange. A latent frame of the teacher joins the frames of one tubelet. Of these we take the last: the
        # language model is causal, so that only the tokens of the last frame have seen the whole tubelet. The paper
        # says "sample" and no more; the authors' release takes every second frame.
        stride = num_frames // latent_frames
        hidden_states = hidden_states[:, stride - 1 :: stride]
        if tuple(hidden_states.shape[2:4]) != (height, width):
            # (B N', c, h, w), in float32: torch has no antialiasing in bfloat16 on a CPU
            frames = hidden_states.flatten(0, 1).movedim(-1, 1).float()
            frames = F.interpolate(frames, size=(height, width), mode="bilinear", align_corners=False, antialias=True)
            hidden_states = frames.movedim(1, -1).unflatten(0, (-1, latent_frames))
        latents = self.project(hidden_states.to(self.dtype))
        return latents.unflatten(-1, (taps, channels)).movedim(-2, 1)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    def save_pretrained(self, folder: str | os.PathLike, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Write `config.json` and `model.safetensors` into `folder`; each file appears whole or not at all.

        Args: `state_dict`, the whole tensors where this module's own are spread over processes.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = {
            name: tensor.detach().cpu().contiguous() for name, tensor in (state_dict or self.state_dict()).items()
        }
        partial = folder / (WEIGHTS_NAME + ".partial")
        save_file(weights, partial, metadata={"format": "pt"})
        os.replace(partial, folder / WEIGHTS_NAME)
        partial = folder / (CONFIG_NAME + ".partial")
        partial.write_text(json.dumps(asdict(self.config), indent=2) + "\n", encoding="utf-8")
        os.replace(partial, folder / CONFIG_NAME)

    @classmethod
    def from_pretrained(
        cls, name_or_path: str | os.PathLike, subfolder: str = "", **hub_options
    ) -> "PerceptionDecoder":
        """Load from a folder, or from a Hub repository (`subfolder` in either).

        Args:
            hub_options: `revision`, `token`, `local_files_only` and the other options of
                `transformers.utils.cached_file`.
        """
        path = os.fspath(name_or_path)
        config_file = cached_file(path, CONFIG_NAME, subfolder=subfolder, **hub_options)
        weights_file = cached_file(path, WEIGHTS_NAME, subfolder=subfolder, **hub_options)
        decoder = cls(PerceptionDecoderConfig(**json.loads(Path(config_file).read_text(encoding="utf-8"))))
        weights = load_file(weights_file)
        decoder.to(next(iter(weights.values())).dtype)
        decoder.load_state_dict(weights)
        return decoder


def frame_hidden_states(
    hidden_states: Tensor, input_ids: Tensor, video_token_id: int, num_frames: Sequence[int], grid: int
) -> tuple[Tensor, ...]:
    """The hidden states of exactly the frame tokens, by the placeholder mask: frame ends, text and padding fall out.

    Reading order over the rows is the order of the videos, so a row may hold no video, several, or several samples
    packed into it, with padding on either side.

    Args:
        hidden_states: `(B, S, c)` of the language model.
        input_ids: `(B, S)`; a frame token holds `video_token_id`.
        num_frames: real frames N of each video of the batch.
        grid: g, tokens along a side of a frame.

    Returns: `(N, g, g, c)` for each video; gradients flow to `hidden_states`.
    Raises: `ValueError` if the batch does not hold that many frame tokens.
    """
    if input_ids.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"input_ids of shape {tuple(input_ids.shape)} do not belong to hidden states of shape "
            f"{tuple(hidden_states.shape)}"
        )
    frame_tokens = hidden_states[input_ids == video_token_id]
    if len(frame_tokens) != sum(num_frames) * grid * grid:
        raise ValueError(
            f"input_ids hold {len(frame_tokens)} frame tokens (id {video_token_id}), but videos of {list(num_frames)} "
            f"frames of {grid} x {grid} tokens are {sum(num_frames) * grid * grid}"
        )
    return frame_tokens.view(-1, grid, grid, hidden_states.shape[-1]).split(list(num_frames))


__all__ = ["PerceptionDecoder", "PerceptionDecoderConfig", "frame_hidden_states"]
