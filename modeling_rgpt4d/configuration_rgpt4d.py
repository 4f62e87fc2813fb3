"""Configuration of 4D-RGPT: vision tower, NVILA projector, causal language model, and how the model learns the time."""

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig
from transformers.configuration_utils import PreTrainedConfig

# How many patches along each side become one token. The first two are the same function of a square grid; both names
# stay because released NVILA checkpoints carry them.
PROJECTOR_STRIDES = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}

# The geometry of NVILA-Lite-8B, whose weights 4D-RGPT starts from: SigLIP so400m at 448 px and Qwen2 7B.
DEFAULT_VISION_CONFIG = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "image_size": 448,
    "patch_size": 14,
    "vision_use_head": False,
}
DEFAULT_TEXT_CONFIG = {
    "model_type": "qwen2",
    "vocab_size": 151_651,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
}

# What a saved folder offers. `AutoModel` is the model that answers, because people call `generate` on what it returns.
# An engine that wants the model without its head sets `config.auto_map["AutoModel"] = "modeling_rgpt4d.RGPT4DModel"`
# before saving.
AUTO_MAP = {
    "AutoConfig": "configuration_rgpt4d.RGPT4DConfig",
    "AutoModel": "modeling_rgpt4d.RGPT4DForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_rgpt4d.RGPT4DForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_rgpt4d.RGPT4DForConditionalGeneration",
    "AutoModelForCausalLM": "modeling_rgpt4d.RGPT4DForConditionalGeneration",
    "AutoProcessor": "processing_rgpt4d.RGPT4DProcessor",
}


@strict
class RGPT4DConfig(PreTrainedConfig):
    r"""
    Args:
        vision_config: config (or its dict) of any image encoder with square images that `AutoModel` can build; SigLIP
            so400m patch 14 at 448 px if omitted.
        text_config: config (or its dict) of any decoder that `AutoModel` can build; Qwen2 7B if omitted. If its
            embeddings are tied (Qwen2 0.5B and 1.5B), so are those of the whole model.
        image_token_id, video_token_id: ids of the placeholders that image and video features replace. They may lie
            beyond the embedding table, as in NVILA's checkpoints.
        frame_end_token_id: id of the ordinary text token written after each frame and each image; `"\n"` (198) in
            NVILA.
        projector_type: `"mlp_downsample"`, `"mlp_downsample_2x2_fix"` (2 x 2 patches a token) or
            `"mlp_downsample_3x3_fix"` (3 x 3).
        vision_feature_layer: which of the tower's hidden states is projected, counted as in `hidden_states`; NVILA
            uses the last but one.
        s2_scales: sides in pixels of the scales that NVILA's `dynamic_s2` (NVILA-8B) shows of one image, from the
            tower's own image size on, each a multiple of it; `None` (NVILA-Lite, 4D-RGPT) shows one.
        s2_resize_output_to_scale_idx: which of `s2_scales` has the size that all of them are brought to; NVILA-8B takes
            the last (-1), which alone keeps the picture's aspect ratio.
        time_cue: `"tpe"` adds the timestamp encoding of Eq. 5 (arXiv 2512.17012) to the features of every video frame,
            `"none"` does not.
        tpe_layout: `"interleaved"` (Eq. 5) or `"halves"` (the authors' release), see `TimestampEncoding`.
        geometry_fusion: `"none"`, or how the latents of the 4D perception model enter, which must then come with every
            video as `video_geometry`: `"concat"` (4D-Concat of Table 4) puts them beside the features, before the
            projector; `"positional"` (4D-PE) adds a linear map of them to the features.
        geometry_hidden_size: width c' of these latents, the `hidden_size` of an `L4PConfig`; not read with `"none"`.

    Raises: `ValueError` if an option is unknown or the parts do not fit.

    Example:

    ```python
    >>> config = RGPT4DConfig()
    >>> config.frame_grid  # 448 px -> 32 x 32 patches -> 11 x 11 tokens
    11
    ```"""

    model_type = "rgpt4d"
    # `sub_configs` and the code in `__post_init__` work from transformers 5.17 on; its newer declarative form needs
    # 5.2x
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}
    # Trainer gathers every other output over evaluation batches; these differ in size from batch to batch
    keys_to_ignore_at_inference = [
        "cache",
        "past_key_values",
        "image_hidden_states",
        "video_hidden_states",
        "image_outputs",
        "video_outputs",
    ]

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    image_token_id: int = 151_649
    video_token_id: int = 151_650
    frame_end_token_id: int = 198
    # `str` and not `Literal`: a wrong name then reaches `validate_options`, whose message tells what to do
    projector_type: str = "mlp_downsample_3x3_fix"
    vision_feature_layer: int = -2
    s2_scales: list[int] | None = None
    s2_resize_output_to_scale_idx: int = -1
    time_cue: str = "tpe"
    tpe_layout: str = "interleaved"
    geometry_fusion: str = "none"
    geometry_hidden_size: int = 0
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _as_config(self.vision_config, DEFAULT_VISION_CONFIG)
        self.text_config = _as_config(self.text_config, DEFAULT_TEXT_CONFIG)
        # Only the flag of the whole model decides whether `lm_head` is tied, but checkpoints of the parts carry it in
        # their own config
        if getattr(self.text_config, "tie_word_embeddings", False):
            self.tie_word_embeddings = True
        super().__post_init__(**kwargs)
        # An entry that the user (or a loaded folder) has set stays
        self.auto_map = {**AUTO_MAP, **(getattr(self, "auto_map", None) or {})}
        self.validate_options()  # `strict` repeats this when saving, but hides the ValueError in an error of its own

    def validate_options(self):
        if self.projector_type not in PROJECTOR_STRIDES:
            raise ValueError(
                f"unknown projector_type {self.projector_type!r}: choose one of {sorted(PROJECTOR_STRIDES)}. NVILA's "
                "other projectors (linear, mlp2x_gelu, ...) belong to models that are not of the NVILA-Lite family"
            )
        if self.time_cue not in ("none", "tpe"):
            raise ValueError(
                f"unknown time_cue {self.time_cue!r}: choose 'tpe' or 'none'. Burned-in marks and a sentence in the "
                "prompt change the data and not the model: use 'none' with them"
            )
        if self.tpe_layout not in ("interleaved", "halves"):
            raise ValueError(
                f"unknown tpe_layout {self.tpe_layout!r}: choose 'interleaved' (the paper) or 'halves' (the release)"
            )
        if self.geometry_fusion not in ("none", "concat", "positional"):
            raise ValueError(
                f"unknown geometry_fusion {self.geometry_fusion!r}: choose 'none', 'concat' (4D-Concat) or 'positional' "
                "(4D-PE)"
            )
        if self.geometry_fusion != "none" and self.geometry_hidden_size < 1:
            raise ValueError(
                f"geometry_fusion is {self.geometry_fusion!r}, but geometry_hidden_size is {self.geometry_hidden_size}: "
                "give the width of the 4D perception model's latents, the hidden_size of its config (1408 for the "
                "released L4P)"
            )
        tokens = (self.image_token_id, self.video_token_id, self.frame_end_token_id)
        if len(set(tokens)) < len(tokens):
            raise ValueError(
                f"image_token_id, video_token_id and frame_end_token_id are {tokens}, but must differ: features "
                "replace the first two, each its own"
            )
        self.hidden_state_index(self.vision_feature_layer)
        if self.patch_grid < 1:
            raise ValueError(f"images of {self.image_size} px hold no whole patch: raise vision_config.image_size")
        scales = self.s2_scales or [self.image_size]
        if scales[0] != self.image_size or sorted(set(scales)) != scales or any(s % scales[0] for s in scales):
            raise ValueError(
                f"s2_scales {scales} must rise from the vision tower's image size {self.image_size} in multiples of it, "
                f"for example {[self.image_size * k for k in (1, 2, 3)]}"
            )
        if not -len(scales) <= self.s2_resize_output_to_scale_idx < len(scales):
            raise ValueError(
                f"s2_resize_output_to_scale_idx is {self.s2_resize_output_to_scale_idx}: choose one of the {len(scales)} "
                "s2_scales, counted from 0, or -1 for the last"
            )

    def hidden_state_index(self, layer: int) -> int:
        """The tower's hidden state `layer`, which may count from the end, counted from 0 (the embeddings)."""
        num_states = self.vision_config.num_hidden_layers + 1
        if not -num_states <= layer < num_states:
            raise ValueError(
                f"vision_feature_layer {layer} does not exist: the vision tower has {num_states} hidden states, so "
                f"choose {-num_states} to {num_states - 1}"
            )
        return layer % num_states

    @property
    def projector_stride(self) -> int:
        """k: a token of the language model covers k x k patches."""
        return PROJECTOR_STRIDES[self.projector_type]

    @property
    def num_scales(self) -> int:
        """How many features of each patch, side by side on the channels, the projector takes: 1 without `s2_scales`."""
        return len(self.s2_scales or [None])

    def scale_grids(self, rows: int, columns: int) -> list[tuple[int, int]]:
        """Rows and columns of the tiles of each of `s2_scales`; those of the last one are given."""
        return [(scale // self.image_size,) * 2 for scale in self.s2_scales[:-1]] + [(rows, columns)]

    @property
    def image_size(self) -> int:
        """Height and width in pixels of every image and frame."""
        return _one_side(self.vision_config.image_size, "vision_config.image_size")

    @property
    def patch_grid(self) -> int:
        """The tower cuts an image into `patch_grid` x `patch_grid` patches."""
        return self.image_size // _one_side(self.vision_config.patch_size, "vision_config.patch_size")

    @property
    def frame_grid(self) -> int:
        """g: every image and every frame becomes g x g tokens, row by row (an odd rest of patches is padded)."""
        return -(-self.patch_grid // self.projector_stride)


def _as_config(config: dict | PreTrainedConfig | None, default: dict) -> PreTrainedConfig:
    if isinstance(config, PreTrainedConfig):
        return config
    # a dict of its own keeps the library's defaults: only a config that is left out altogether gets ours
    config = dict(default if config is None else config)
    return AutoConfig.for_model(config.pop("model_type", default["model_type"]), **config)


def _one_side(size: int | list[int] | tuple[int, int], name: str) -> int:
    sides = {size} if isinstance(size, int) else set(size)
    if len(sides) != 1:
        raise ValueError(f"{name} is {size}, but the projector needs a square grid of patches: give one number")
    return sides.pop()


RGPT4DConfig.register_for_auto_class()

__all__ = ["RGPT4DConfig"]
