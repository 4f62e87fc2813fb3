"""Configuration of the 4D perception model (the teacher of perceptual 4D distillation)."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

NUM_TAPS = 4  # a DPT head joins four levels of the encoder


@strict
class L4PConfig(PreTrainedConfig):
    r"""
    Configuration of [`L4PModel`]: a VideoMAE encoder whose residual stream is read at four depths, and one 3-D DPT head
    a signal. The defaults are the sizes of the released giant teacher (1.24 billion parameters).

    Args:
        image_size (`int`, *optional*, defaults to 224): side of the square frames, in pixels.
        patch_size (`int`, *optional*, defaults to 14): side of a patch, in pixels; divides `image_size`.
        num_channels (`int`, *optional*, defaults to 3): colour channels.
        num_frames (`int`, *optional*, defaults to 16): frames of a window.
        tubelet_size (`int`, *optional*, defaults to 2): frames joined in one token; divides `num_frames`.
        hidden_size (`int`, *optional*, defaults to 1408): width of the encoder, the `c'` of the latents.
        num_hidden_layers (`int`, *optional*, defaults to 36): blocks of the encoder. The released encoder has 40; the
            last four serve a tracking head only, which is no part of this model.
        num_attention_heads (`int`, *optional*, defaults to 16): heads of a block.
        intermediate_size (`int`, *optional*, defaults to 6144): hidden width of a block's MLP.
        taps (`tuple[int, ...]`, *optional*, defaults to `(14, 21, 28, 36)`): the latents are the un-normed residual
            streams after this many blocks. Four ascending numbers, the last one is `num_hidden_layers`.
        feature_dim (`int`, *optional*, defaults to 256): width of a head's fusion path.
        layer_dims (`tuple[int, ...]`, *optional*, defaults to `(256, 512, 1024, 1024)`): width of a head's four levels.
        last_dim (`int`, *optional*, defaults to 128): width of a head's last convolutions.
        image_mean, image_std (`tuple[float, ...]`, *optional*): normalisation of the RGB input in [0, 1]; ImageNet's by
            default.
        hidden_act, hidden_dropout_prob, attention_probs_dropout_prob, layer_norm_eps, qv_bias:
            as in `VideoMAEConfig`, whose blocks read them; `layer_norm_eps` is 1e-6 here.
    """

    model_type = "l4p"

    image_size: int = 224
    patch_size: int = 14
    num_channels: int = 3
    num_frames: int = 16
    tubelet_size: int = 2
    hidden_size: int = 1408
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    intermediate_size: int = 6144
    taps: list[int] | tuple[int, ...] = (14, 21, 28, 36)
    feature_dim: int = 256
    layer_dims: list[int] | tuple[int, ...] = (256, 512, 1024, 1024)
    last_dim: int = 128
    image_mean: list[float] | tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: list[float] | tuple[float, ...] = (0.229, 0.224, 0.225)
    hidden_act: str = "gelu"
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    layer_norm_eps: float = 1e-6
    qv_bias: bool = True

    def __post_init__(self, **kwargs):
        for name in ("taps", "layer_dims", "image_mean", "image_std"):  # JSON has no tuples
            setattr(self, name, tuple(getattr(self, name)))
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}")
        if self.num_frames % self.tubelet_size:
            raise ValueError(f"num_frames {self.num_frames} is not a multiple of tubelet_size {self.tubelet_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if len(self.taps) != NUM_TAPS or list(self.taps) != sorted(set(self.taps)) or self.taps[0] < 1:
            raise ValueError(f"taps must be {NUM_TAPS} ascending numbers of blocks, from 1 on; got {self.taps}")
        if self.taps[-1] != self.num_hidden_layers:
            raise ValueError(
                f"the last of taps {self.taps} must be num_hidden_layers {self.num_hidden_layers}: no head reads later "
                "blocks"
            )
        if len(self.layer_dims) != NUM_TAPS:
            raise ValueError(f"layer_dims needs one width for each of the {NUM_TAPS} taps; got {self.layer_dims}")
        super().__post_init__(**kwargs)

    @property
    def qkv_bias(self) -> bool:
        """The name of `qv_bias` that VideoMAE's blocks read in transformers 5.17."""
        return self.qv_bias

    @property
    def grid(self) -> int:
        """Patches along a side: `h' = w'`."""
        return self.image_size // self.patch_size

    @property
    def latent_shape(self) -> tuple[int, int, int, int, int]:
        """`(taps, N', h', w', c')`, the shape of one video's latents."""
        return (len(self.taps), self.num_frames // self.tubelet_size, self.grid, self.grid, self.hidden_size)


L4PConfig.register_for_auto_class()

__all__ = ["L4PConfig"]
