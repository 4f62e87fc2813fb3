"""4D-RGPT (arXiv 2512.17012, Fig. 2): a vision tower E_V, an NVILA projector E_P and a causal language model.

What P4D trains with (perception decoder, teacher) is not here: the model answers without it. The baselines that need
the teacher for every answer get its latents as an input, `video_geometry`. Axes in comments: V videos, N frames, F all
real frames of the batch, P patches of a frame, C width of the tower, c' width of the teacher's latents, g x g tokens of
a frame, D width of the language model.
"""

import functools
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    BaseModelOutputWithPooling,
    CausalLMOutputWithPast,
)
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, output_capturing, torch_compilable_check
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple

from .configuration_rgpt4d import RGPT4DConfig
from .fast_decoding import CACHE, compiled_prompt, decode_by_graph
from .geometry_fusion import GeometryProjection, rearrange_geometry
from .timestamp_encoding import TimestampEncoding

try:
    from transformers.modeling_utils import slice_logits_to_keep
except ImportError:  # transformers 5.17 does not have it yet

    def slice_logits_to_keep(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
        return hidden_states[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]


# A tower can be asked for the one hidden state that is projected. In transformers 5.17 such a list counts layers from
# 0 and not hidden states, and would silently give the wrong one: all are kept there.
CAN_SELECT_HIDDEN_STATES = hasattr(output_capturing, "select_hidden_states")

if CACHE == "cache":
    take_old_cache_name = deprecate_kwarg("past_key_values", version="5.40.0", new_name="cache")
else:

    def take_old_cache_name(forward):
        return forward


MICROSECONDS = 1e-6
GEOMETRY_WITHOUT_VIDEO = "video_geometry goes with pixel_values_videos: give both, or leave out both"


@dataclass
class RGPT4DModelOutputWithPast(BaseModelOutputWithPast):
    r"""
    last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, D)`): after the language model's final
        norm.
    cache (before transformers 5.24 `past_key_values`), hidden_states, attentions: the language model's.
    image_hidden_states (`tuple[torch.Tensor, ...]`, *optional*): the projected features of each image, `(g * g, D)`,
        row by row, in reading order over the batch; None if no image was given.
    video_hidden_states (`tuple[torch.Tensor, ...]`, *optional*): the projected features of each video, `(num_frames *
        g * g, D)`, frame by frame and row by row, without padding frames; None if no video was given.
    image_outputs, video_outputs (`BaseModelOutputWithPooling`, *optional*): what `get_image_features` and
        `get_video_features` returned.
    """

    image_hidden_states: tuple[torch.Tensor, ...] | None = None
    video_hidden_states: tuple[torch.Tensor, ...] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    video_outputs: BaseModelOutputWithPooling | None = None


@dataclass
class RGPT4DCausalLMOutputWithPast(CausalLMOutputWithPast):
    r"""
    loss (`torch.Tensor` of shape `()`, *optional*): cross entropy of the next token, if `labels` are given.
    logits (`torch.Tensor` of shape `(batch_size, sequence_length or logits_to_keep, vocab_size)`): scores before the
        softmax.
    cache, hidden_states, attentions, image_hidden_states, video_hidden_states, image_outputs, video_outputs: as in
        `RGPT4DModelOutputWithPast`.
    """

    image_hidden_states: tuple[torch.Tensor, ...] | None = None
    video_hidden_states: tuple[torch.Tensor, ...] | None = None
    image_outputs: BaseModelOutputWithPooling | None = None
    video_outputs: BaseModelOutputWithPooling | None = None


class SpaceToDepth(nn.Module):
    """Gather each `stride` x `stride` block of patches into one wide vector; an incomplete block is filled with zeros.

    With k = stride, output cell (Y, X) is the concatenation over dy = 0..k-1 (outer) and dx = 0..k-1 (inner) of the
    patches at (kY + dy, kX + dx). Zeros are added at the bottom and at the right, as in NVILA.
    """

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(F, side * side, C)`, row by row, to `(F, ceil(side / k) ** 2, k * k * C)`, row by row."""
        num_frames, num_patches, width = features.shape
        side, k = round(num_patches**0.5), self.stride
        if side * side != num_patches:
            raise ValueError(f"the projector needs a square grid of patches, and {num_patches} patches are not one")
        padding = -side % k
        grid = features.reshape(num_frames, side, side, width)
        grid = nn.functional.pad(grid, (0, 0, 0, padding, 0, padding))
        cells = (side + padding) // k
        blocks = grid.reshape(num_frames, cells, k, cells, k, width).transpose(2, 3)
        return blocks.reshape(num_frames, cells * cells, k * k * width)

    def extra_repr(self) -> str:
        return f"stride={self.stride}"


class RGPT4DProjector(nn.Module):
    """E_P: NVILA's `mlp_downsample` family, from vision features `(F, P, C)` to tokens `(F, g * g, D)`.

    The modules keep their places in NVILA's list, so that `mm_projector/` loads by a change of prefix. LayerNorm has
    PyTorch's eps of 1e-5, and GELU is the exact one; the tower's own norm and activation differ.

    For 4D-Concat the first linear layer reads the features and F_4D side by side. A linear layer of a concatenation is a
    sum of two: `geometry` has the columns of F_4D, so that the others keep the name and shape of pretrained weights.
    """

    def __init__(self, config: RGPT4DConfig):
        super().__init__()
        width, dim, k = config.vision_config.hidden_size, config.text_config.hidden_size, config.projector_stride
        width *= config.num_scales
        if k == 2:
            layers = [
                SpaceToDepth(2),
                nn.LayerNorm(4 * width),
                nn.Linear(4 * width, dim),
                nn.GELU(),
                nn.Linear(dim, dim),
            ]
        else:
            layers = [
                SpaceToDepth(3),
                nn.LayerNorm(9 * width),
                nn.Linear(9 * width, 3 * width),
                nn.GELU(),
                nn.LayerNorm(3 * width),
                nn.Linear(3 * width, dim),
                nn.GELU(),
                nn.Linear(dim, dim),
            ]
        self.layers = nn.Sequential(*layers)
        self.geometry = None
        if config.geometry_fusion == "concat":
            self.geometry = GeometryProjection(k * k * config.geometry_hidden_size, layers[2].out_features)

    def forward(self, features: torch.Tensor, geometry: torch.Tensor | None = None) -> torch.Tensor:
        """
        Args:
            features: `(F, P, C)`.
            geometry: `(F, P, c')`, F_4D of the same patches; read for 4D-Concat alone.

        Returns: `(F, g * g, D)`.
        """
        if self.geometry is None or geometry is None:
            return self.layers(features)
        to_blocks, norm, linear, *rest = self.layers
        # Departure: the norm stays one of the features. Over the whole concatenation F_4D would change the mean and
        # variance that they are normed with, whatever its weights are, and training could not start from the pretrained
        # projector. F_4D comes with a norm of its own.
        hidden = linear(norm(to_blocks(features))) + self.geometry(to_blocks(geometry))
        for layer in rest:
            hidden = layer(hidden)
        return hidden


class RGPT4DPreTrainedModel(PreTrainedModel):
    config: RGPT4DConfig
    base_model_prefix = "model"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["RGPT4DProjector"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, GeometryProjection):
            init.zeros_(module.weight)

    @classmethod
    def is_remote_code(cls) -> bool:
        # FSDP2 puts a class `FSDP<Name>` of its own module in our place; `save_pretrained` would then copy PyTorch's
        # private files into the checkpoint and point `auto_map` at them. The map that the config already has is right.
        return cls._auto_class is not None and not cls.__name__.startswith("FSDP")

    @classmethod
    def is_custom_code(cls) -> bool:
        # True would make the library wary of how we draw weights that a checkpoint lacks: it would pass over modules
        # without parameters of their own, and so draw SigLIP's attention and MLP from another distribution. We draw by
        # its own `_init_weights` alone, and share no modules, so there is nothing to be wary of.
        return False


class RGPT4DModel(RGPT4DPreTrainedModel):
    """4D-RGPT without the language-model head: everything that training needs happens here (TRL runs this model and
    not the whole)."""

    def __init__(self, config: RGPT4DConfig):
        super().__init__(config)
        config.validate_options()  # `from_pretrained(..., time_cue=...)` changes a config that was valid before
        self.vision_tower = AutoModel.from_config(config.vision_config)
        self.timestamp_encoding = None
        if config.time_cue == "tpe":
            self.timestamp_encoding = TimestampEncoding(config.vision_config.hidden_size, layout=config.tpe_layout)
        self.geometry_encoding = None
        if config.geometry_fusion == "positional":
            self.geometry_encoding = GeometryProjection(config.geometry_hidden_size, config.vision_config.hidden_size)
        self.multi_modal_projector = RGPT4DProjector(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.post_init()

    def _apply(self, fn, recurse=True):
        # `.to(bfloat16)`, `.half()` and whatever else casts a whole model would round the frequencies of the rotary
        # embedding, and with them the positions of thousands of video tokens (modeling_rgpt4d/PARITY.md, cause D). Loading
        # with `dtype=` keeps them float32; so do casts of this model.
        exact = {name: b for name, b in self.named_buffers() if name.endswith("inv_freq") and b.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, before in exact.items():
            owner, _, leaf = name.rpartition(".")
            now = self.get_buffer(name)
            if now.dtype in (torch.float16, torch.bfloat16):
                self.get_submodule(owner)._buffers[leaf] = before.to(now.device)
        return self

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_block_sizes: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode images.

        Args:
            pixel_values: `(num_images, 3, image_size, image_size)`, normalised, any float dtype, in reading order over
                the batch. A tile of an image counts as an image of its own.
            image_block_sizes: `(num_images, 2)` integers, only with `config.s2_scales`: the tiles of each image are those
                of all scales, and this the rows and columns of the last; 1 and 1 is one tile for all scales. Without it
                all images are of that kind.
            vision_feature_layer: instead of the config's.

        Returns: the tower's output; its `pooler_output` is a list with `(rows * columns * g * g, D)` projected features
            for each image.
        Raises: `ValueError` for another shape, and if tiles and block sizes do not match.
        """
        if pixel_values.ndim != 4:
            raise ValueError(f"pixel_values must be (num_images, 3, height, width), not {tuple(pixel_values.shape)}")
        output, features = self._encode_frames(pixel_values, None, vision_feature_layer, **kwargs)
        if image_block_sizes is None:
            output.pooler_output = list(self._project(features))
            return output
        if self.config.s2_scales is None:
            raise ValueError("image_block_sizes belong to models with config.s2_scales, and this one has none")
        blocks = [tuple(block) for block in image_block_sizes.tolist()]
        lengths = [1 if block == (1, 1) else sum(r * c for r, c in self.config.scale_grids(*block)) for block in blocks]
        if sum(lengths) != len(features):
            raise ValueError(
                f"image_block_sizes {blocks} belong to {sum(lengths)} tiles, and {len(features)} are given"
            )
        output.pooler_output = [
            self._project(tiles)[0] if block == (1, 1) else self._project_scales(tiles, *block)
            for tiles, block in zip(features.split(lengths), blocks, strict=True)
        ]
        return output

    @can_return_tuple
    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_timestamps: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        video_geometry: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode videos. Frames are independent here: time enters by their timestamps alone.

        Args:
            pixel_values_videos: `(num_videos, num_frames, 3, image_size, image_size)`, normalised, any float dtype,
                videos in reading order over the batch, shorter ones padded at the end.
            video_timestamps: `(num_videos, num_frames)`, when each frame was taken: seconds as float32 or float64, or
                microseconds as an integer dtype. A negative value marks a padding frame, which is dropped before the
                tower. Both forms give the same features; integers pass unharmed through whatever casts all float
                inputs of a model (FSDP2's and DeepSpeed's mixed precision, `BatchFeature.to(dtype)`). A list with one row for
                each video serves, too. Without them all frames are real.
            vision_feature_layer: instead of the config's.
            video_geometry: `(num_videos, N', h', w', c')`, any float dtype, with `config.geometry_fusion` alone: F_4D of
                Eq. 1 for the `num_frames` frames of each video, where N' divides `num_frames`. Of the taps of
                `L4PModel.encode` it is the deepest, `[:, -1]`. That of padding frames is dropped with them.

        Returns: the tower's output for the real frames; its `pooler_output` is a list with `(num_real_frames * g * g,
            D)` projected features for each video, frame by frame and row by row.
        Raises: `ValueError` for other shapes, for timestamps in a dtype that loses frames, for padding that is not at
            the end, if `config.time_cue` is `"tpe"` and timestamps are missing, and for `video_geometry` that is missing,
            superfluous or of another shape.
        """
        if pixel_values_videos.ndim != 5:
            shape = tuple(pixel_values_videos.shape)
            raise ValueError(f"pixel_values_videos must be (num_videos, num_frames, 3, height, width), not {shape}")
        num_videos, num_frames = pixel_values_videos.shape[:2]
        geometry = self._geometry_of_frames(video_geometry, pixel_values_videos)
        if video_timestamps is None:
            if self.timestamp_encoding is not None:
                raise ValueError(
                    "config.time_cue is 'tpe', so every video needs video_timestamps: pass on all that the processor "
                    "returns, or give (num_videos, num_frames) seconds as float32. To run without time, load the model "
                    "with time_cue='none'"
                )
            frames, seconds, lengths = pixel_values_videos.flatten(0, 1), None, [num_frames] * num_videos
            geometry = None if geometry is None else geometry.flatten(0, 1)
        else:
            if isinstance(video_timestamps, list | tuple):  # so they come from engines, for videos of different lengths
                video_timestamps = torch.stack(list(video_timestamps))
            if video_timestamps.shape != (num_videos, num_frames):
                raise ValueError(
                    f"video_timestamps must be {(num_videos, num_frames)}, one for each frame of pixel_values_videos, "
                    f"not {tuple(video_timestamps.shape)}"
                )
            seconds = self._as_seconds(video_timestamps.to(pixel_values_videos.device))
            is_frame = seconds >= 0
            torch_compilable_check(seconds.isfinite().all(), "video_timestamps must be finite")
            torch_compilable_check(
                is_frame[:, 0].all() & (is_frame[:, :-1] | ~is_frame[:, 1:]).all(),
                "negative video_timestamps mark padding frames, which must follow the real ones, and each video needs "
                "a real one",
            )
            frames, seconds, lengths = pixel_values_videos[is_frame], seconds[is_frame], is_frame.sum(1).tolist()
            geometry = None if geometry is None else geometry[is_frame]

        output, features = self._encode_frames(frames, seconds, vision_feature_layer, **kwargs)
        output.pooler_output = [video.flatten(0, 1) for video in self._project(features, geometry).split(lengths)]
        return output

    def _geometry_of_frames(
        self, video_geometry: torch.Tensor | None, pixel_values_videos: torch.Tensor
    ) -> torch.Tensor | None:
        """F_4D at every patch of every frame, `(V, N, P, c')`, normed, in the tower's dtype; None without fusion."""
        fusion, width = self.config.geometry_fusion, self.config.geometry_hidden_size
        if fusion == "none":
            if video_geometry is not None:
                raise ValueError(
                    "video_geometry is given, but config.geometry_fusion is 'none': leave it out, or load the model with "
                    "geometry_fusion='concat' or 'positional' and geometry_hidden_size, and train it"
                )
            return None
        if video_geometry is None:
            raise ValueError(
                f"config.geometry_fusion is {fusion!r}, so every video needs video_geometry: give the deepest latents that "
                "the 4D perception model has of its frames, L4PModel.encode(frames)[:, -1]. To run without them, load the "
                "model with geometry_fusion='none'"
            )
        num_videos, num_frames = pixel_values_videos.shape[:2]
        shape = tuple(video_geometry.shape)
        if len(shape) != 5 or 0 in shape or (shape[0], shape[-1]) != (num_videos, width) or num_frames % shape[1]:
            raise ValueError(
                f"video_geometry must be ({num_videos}, N', h', w', {width}), where N' divides the {num_frames} frames of "
                f"pixel_values_videos, not {shape}: give one tap of the latents of these very frames"
            )
        # The latents are a stream that no norm has met, in which a few channels of a large transformer may outweigh all
        # others. They get what a transformer has behind its last block; the paper does not say.
        video_geometry = video_geometry.to(pixel_values_videos.device, torch.float32)
        video_geometry = nn.functional.layer_norm(video_geometry, (width,)).to(self.vision_tower.dtype)
        return rearrange_geometry(video_geometry, num_frames, self.config.patch_grid)

    def _as_seconds(self, timestamps: torch.Tensor) -> torch.Tensor:
        if not timestamps.is_floating_point():
            return (timestamps.to(torch.float64) * MICROSECONDS).to(torch.float32)
        # Half precision was enough to carry the padding mark, which is all that is read without the encoding
        if self.timestamp_encoding is not None and timestamps.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"video_timestamps arrived as {timestamps.dtype}, in which neighbouring frames get the same time "
                "(bfloat16 steps by half a second at 100 s). Keep them float32: the model casts the pixels itself, so "
                "`inputs.to(model.device)` is enough. Or pass microseconds as int64, which no cast of float inputs "
                "touches"
            )
        return timestamps.to(torch.float32)

    def _encode_frames(
        self, frames: torch.Tensor, seconds: torch.Tensor | None, vision_feature_layer: int | None, **kwargs
    ) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """Frames `(F, 3, H, W)`, their seconds `(F,)` or None -> the tower's output and `(F, P, C)` features:
        E_V(I) + p."""
        size = self.config.image_size
        if tuple(frames.shape[1:]) != (3, size, size):
            raise ValueError(
                f"the vision tower takes frames of (3, {size}, {size}), not {tuple(frames.shape[1:])}: resize them "
                "with the processor that was saved with the model"
            )
        layer = self.config.vision_feature_layer if vision_feature_layer is None else vision_feature_layer
        layer = self.config.hidden_state_index(layer)
        # A frozen tower gets no graph. Asking for it by `requires_grad` is not enough: gradient checkpointing makes
        # the outputs of all embeddings require a gradient, this tower's too, and would then recompute the whole tower
        # in the backward pass.
        trains = frames.requires_grad or any(p.requires_grad for p in self.vision_tower.parameters())
        with torch.set_grad_enabled(torch.is_grad_enabled() and trains):
            output, features = self._run_tower(frames.to(self.vision_tower.dtype), layer, **kwargs)
        # Class and register tokens stand before the patches in the towers that have them; SigLIP has none
        num_patches = self.config.patch_grid**2
        if features.ndim != 3 or features.shape[1] < num_patches:
            raise ValueError(
                f"the vision tower gave features {tuple(features.shape)}, but the projector needs (frames, "
                f"{num_patches}, width)"
            )
        features = features[:, -num_patches:]
        if self.timestamp_encoding is not None and seconds is not None:
            # The encoding is float32, so the sum is too, and is rounded to the features' dtype once
            features = (features + self.timestamp_encoding(seconds).unsqueeze(1)).to(features.dtype)
        return output, features

    def _run_tower(self, frames: torch.Tensor, layer: int, **kwargs) -> tuple[BaseModelOutputWithPooling, torch.Tensor]:
        """The tower's output and its hidden state `layer`, which stands as `last_hidden_state`, too: nothing later is used."""
        tower, vision = self.vision_tower, self.config.vision_config
        wanted = any(
            kwargs.get(name, getattr(vision, name, False)) for name in ("output_hidden_states", "output_attentions")
        )
        watched = "forward" in tower.__dict__ or tower._forward_hooks or tower._forward_pre_hooks
        if vision.model_type == "siglip_vision_model" and hasattr(tower, "encoder") and not (wanted or watched):
            # NVILA reads the state before the last layer: no need to run that layer, nor the norm and head behind it.
            # (Whoever hooks the tower, as accelerate does to offload it, is served by the whole call below.)
            features = tower.embeddings(frames)
            for block in tower.encoder.layers[:layer]:
                features = block(features, None)
            return BaseModelOutputWithPooling(last_hidden_state=features), features
        if not kwargs.get("output_hidden_states"):
            kwargs["output_hidden_states"] = [layer] if CAN_SELECT_HIDDEN_STATES else True
        output = tower(frames, return_dict=True, **kwargs)
        output.last_hidden_state = output.hidden_states[layer]
        return output, output.last_hidden_state

    def _project(self, features: torch.Tensor, geometry: torch.Tensor | None = None) -> torch.Tensor:
        """`(F, P, C)`, and with fusion `(F, P, c')` -> `(F, g * g, D)`: E_P. What is seen at one scale stands for all of
        them."""
        if geometry is None and self.config.geometry_fusion != "none":
            # Images have none. Zeros change nothing, and let every batch of a training on several GPUs use all parameters.
            geometry = features.new_zeros(*features.shape[:2], self.config.geometry_hidden_size)
        if self.geometry_encoding is not None:
            features = features + self.geometry_encoding(geometry).to(features.dtype)
        if self.config.num_scales > 1:
            features = features.repeat(1, 1, self.config.num_scales)
        return self.multi_modal_projector(features, geometry)

    def _project_scales(self, tiles: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
        """NVILA's `dynamic_s2`: tiles `(T, P, C)` of one image at all scales -> `(rows * columns * g * g, D)`, row by row.

        The features of each scale are one map, brought to the size of one of them (the last in NVILA-8B), so that the
        projector sees a place at every scale. It works on blocks of the size of a tile.
        """
        side, width = self.config.patch_grid, tiles.shape[-1]
        grids = self.config.scale_grids(rows, columns)
        rows, columns = grids[self.config.s2_resize_output_to_scale_idx]
        maps = []
        for (down, across), of_scale in zip(grids, tiles.split([r * c for r, c in grids]), strict=True):
            of_scale = of_scale.view(down, across, side, side, width).permute(4, 0, 2, 1, 3)
            of_scale = of_scale.reshape(1, width, down * side, across * side).float()
            maps.append(nn.functional.interpolate(of_scale, size=(rows * side, columns * side), mode="area"))
        merged = torch.cat(maps, dim=1).to(tiles.dtype).view(-1, rows, side, columns, side)
        blocks = merged.permute(1, 3, 2, 4, 0).reshape(rows * columns, side * side, -1)
        tokens = self.multi_modal_projector(blocks)
        grid = self.config.frame_grid
        return tokens.view(rows, columns, grid, grid, -1).permute(0, 2, 1, 3, 4).flatten(0, 3)

    def get_placeholder_mask(
        self,
        input_ids: torch.LongTensor | None,
        inputs_embeds: torch.Tensor | None,
        image_features: torch.Tensor | None = None,
        video_features: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Where image and video features go: two bool masks `(batch_size, sequence_length, 1)`.

        Placeholders are found by id, or, without `input_ids`, by their embedding.
        Raises: `ValueError` if features `(num_tokens, D)` are given and their number is not that of the placeholders.
        """
        masks = []
        for modality, features in (("image", image_features), ("video", video_features)):
            token_id = getattr(self.config, f"{modality}_token_id")
            if input_ids is not None:
                mask = input_ids == token_id
            elif token_id < self.get_input_embeddings().num_embeddings:
                token = torch.full((), token_id, dtype=torch.long, device=inputs_embeds.device)
                mask = (inputs_embeds == self.get_input_embeddings()(token)).all(-1)
            elif features is None:
                mask = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
            else:
                raise ValueError(
                    f"{modality}_token_id {token_id} has no row in the embedding table, so its places cannot be found "
                    "in inputs_embeds: pass input_ids"
                )
            if features is not None:
                num_placeholders, unit = mask.sum(), "image" if modality == "image" else "frame"
                torch_compilable_check(
                    num_placeholders == features.shape[0],
                    f"{modality} features and {modality} placeholders do not match: {features.shape[0]} features for "
                    f"{num_placeholders} placeholders. Each {unit} (or tile of one) takes {self.config.frame_grid} x "
                    f"{self.config.frame_grid} placeholders; was the text cut, or expanded for another model?",
                )
            masks.append(mask.unsqueeze(-1))
        return masks[0], masks[1]

    @can_return_tuple
    @take_old_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_timestamps: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_block_sizes: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        video_geometry: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | RGPT4DModelOutputWithPast:
        """
        Args:
            input_ids: `(batch_size, sequence_length)`; each image stands as g * g `image_token_id`, each video as g * g
                `video_token_id` for every frame, and after each image and frame one `frame_end_token_id`. Left or
                right padded.
            pixel_values, image_block_sizes: images, see `get_image_features`.
            pixel_values_videos, video_timestamps, video_geometry: videos, see `get_video_features`.
            inputs_embeds: `(batch_size, sequence_length, D)` instead of `input_ids`.
            mm_encoder_outputs: what `get_image_features` and `get_video_features` returned, under `"image"` and
                `"video"`, instead of pixels (`generate` encodes once and passes them).
            attention_mask, position_ids, cache (before transformers 5.24 `past_key_values`) and further keyword arguments
                go to the language model.

        Raises: `ValueError` if pixels and placeholders do not match, also if one of them is missing.
        """
        cache = past_key_values if cache is None else cache
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")

        encoded = dict(mm_encoder_outputs or {})
        for modality, name, pixels in (
            ("image", "pixel_values", pixel_values),
            ("video", "pixel_values_videos", pixel_values_videos),
        ):
            if pixels is not None and encoded.get(modality) is not None:
                raise ValueError(f"give either {name} or mm_encoder_outputs[{modality!r}], not both")
        if video_geometry is not None and pixel_values_videos is None:
            raise ValueError(GEOMETRY_WITHOUT_VIDEO)
        if pixel_values is not None:
            encoded["image"] = self.get_image_features(
                pixel_values, image_block_sizes, vision_feature_layer, return_dict=True
            )
        if pixel_values_videos is not None:
            encoded["video"] = self.get_video_features(
                pixel_values_videos, video_timestamps, vision_feature_layer, video_geometry, return_dict=True
            )
        images, videos = (
            None if encoded.get(modality) is None else tuple(encoded[modality].pooler_output)
            for modality in ("image", "video")
        )
        image_features, video_features = (None if parts is None else torch.cat(parts) for parts in (images, videos))

        image_mask, video_mask = self.get_placeholder_mask(input_ids, inputs_embeds, image_features, video_features)
        if input_ids is not None:
            self._check_no_missing_pixels(input_ids, cache, image_mask, video_mask, images, videos)
            # Placeholders may have no row in the embedding table. Row 0 stands in; features overwrite it.
            for mask, features in ((image_mask, image_features), (video_mask, video_features)):
                if features is not None:
                    input_ids = input_ids.masked_fill(mask.squeeze(-1), 0)
            inputs_embeds = self.get_input_embeddings()(input_ids)
        for mask, features in ((image_mask, image_features), (video_mask, video_features)):
            if features is not None:
                features = features.to(inputs_embeds.device, inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter(mask.to(inputs_embeds.device), features)

        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: cache},
            **kwargs,
        )
        return RGPT4DModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=images,
            video_hidden_states=videos,
            image_outputs=encoded.get("image"),
            video_outputs=encoded.get("video"),
        )

    def _check_no_missing_pixels(self, input_ids, cache, image_mask, video_mask, images, videos):
        """A prompt with placeholders and no pixels trains or answers blindly. It happens: collators that do not know
        videos drop them.

        Only the prompt is looked at: a model may *generate* a placeholder, and a look at each new token would cost a
            synchronisation.
        """
        if torch.compiler.is_compiling() or input_ids.shape[1] == 1:
            return
        if cache is not None and cache.get_seq_length() > 0:
            return
        for modality, name, mask, parts in (
            ("image", "pixel_values", image_mask, images),
            ("video", "pixel_values_videos", video_mask, videos),
        ):
            if parts is None and mask.any():
                raise ValueError(
                    f"input_ids holds {modality} placeholders, but no {name} came with them: pass on all that the "
                    "processor returns"
                )


class RGPT4DForConditionalGeneration(RGPT4DPreTrainedModel, GenerationMixin):
    """4D-RGPT: answers questions about videos and images.

    Example:

    ```python
    >>> model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    >>> processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    >>> content = [{"type": "video", "path": "drive.mp4"}, {"type": "text", "text": "How fast is the car?"}]
    >>> inputs = processor.apply_chat_template(
    ...     [{"role": "user", "content": content}],
    ...     add_generation_prompt=True,
    ...     tokenize=True,
    ...     return_dict=True,
    ...     return_tensors="pt",
    ... )
    >>> answer = model.generate(**inputs.to(model.device), max_new_tokens=32)
    ```"""

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: RGPT4DConfig):
        super().__init__(config)
        self.model = RGPT4DModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        # Most decoders call it embed_tokens; GPT-2, for one, does not
        embedding = self.model.get_input_embeddings()
        name = next(name for name, module in self.model.language_model.named_modules() if module is embedding)
        self._tied_weights_keys = {"lm_head.weight": f"model.language_model.{name}.weight"}
        # A placeholder that the model itself wrote would have no pixels. A folder's generation_config.json overrides this.
        self.generation_config.suppress_tokens = [config.image_token_id, config.video_token_id]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.lm_head = new_embeddings

    def generate(self, *args, fast: bool = False, streamer=None, **kwargs):
        """`GenerationMixin.generate`, with one more switch.

        Args:
            fast: on CUDA, compile what reads the prompt and record a step of decoding as a CUDA graph, which is then
                replayed for every token. The first call takes about half a minute longer, and so does the first of another
                batch size; all others take a fraction of the usual time. Greedy decoding and sampling with any logits
                processor, stopping criterion and streamer; see `decode_by_graph` for what raises a `ValueError`. Not on
                CUDA, it gives the same tokens and is no faster.

        Raises: `ValueError` for `video_geometry` without `pixel_values_videos`.
        """
        # `generate` would drop it before `forward` sees it, with the other arguments of encoders
        if kwargs.get("video_geometry") is not None and kwargs.get("pixel_values_videos") is None:
            raise ValueError(GEOMETRY_WITHOUT_VIDEO)
        if not fast:
            return super().generate(*args, streamer=streamer, **kwargs)
        if kwargs.get("custom_generate") is not None or kwargs.get("assistant_model") is not None:
            raise ValueError("fast=True is a way of decoding of its own: leave out custom_generate and assistant_model")
        # `generate` passes no streamer on to a custom method
        decode = functools.partial(decode_by_graph, streamer=streamer)
        with compiled_prompt(self):
            return super().generate(*args, streamer=streamer, custom_generate=decode, **kwargs)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_block_sizes: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See `RGPT4DModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, image_block_sizes, vision_feature_layer, **kwargs)

    def get_video_features(
        self,
        pixel_values_videos: torch.Tensor,
        video_timestamps: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        video_geometry: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | BaseModelOutputWithPooling:
        """See `RGPT4DModel.get_video_features`."""
        return self.model.get_video_features(
            pixel_values_videos, video_timestamps, vision_feature_layer, video_geometry, **kwargs
        )

    @functools.wraps(
        GenerationMixin.prepare_inputs_for_generation
    )  # `generate` reads from its arguments what it may be given
    def prepare_inputs_for_generation(self, input_ids: torch.LongTensor, **kwargs) -> dict:
        # `generate` says that an assistant (assisted decoding) is never in its first iteration, and so drops what was
        # seen: it would draft blindly. Steps of one token need no look at the cache, which can cost a synchronisation.
        cache = kwargs.get(CACHE)
        if kwargs.get("mm_encoder_outputs") and cache is not None and kwargs.get("next_sequence_length") != 1:
            kwargs["is_first_iteration"] = kwargs.get("is_first_iteration", False) or cache.get_seq_length() == 0
        return super().prepare_inputs_for_generation(input_ids, **kwargs)

    @can_return_tuple
    @take_old_cache_name
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        pixel_values_videos: torch.Tensor | None = None,
        video_timestamps: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        image_block_sizes: torch.Tensor | None = None,
        vision_feature_layer: int | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        video_geometry: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple | RGPT4DCausalLMOutputWithPast:
        """
        Args:
            labels: `(batch_size, sequence_length)`, ids as in `input_ids` (shifted here), -100 where there is no loss.
            logits_to_keep: compute the logits of the last so many positions (0: all), or of these positions.
            The other arguments are those of `RGPT4DModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            pixel_values_videos=pixel_values_videos,
            video_timestamps=video_timestamps,
            attention_mask=attention_mask,
            position_ids=position_ids,
            **{CACHE: past_key_values if cache is None else cache},
            inputs_embeds=inputs_embeds,
            image_block_sizes=image_block_sizes,
            vision_feature_layer=vision_feature_layer,
            mm_encoder_outputs=mm_encoder_outputs,
            video_geometry=video_geometry,
            return_dict=True,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            vocab_size = self.config.text_config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return RGPT4DCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=outputs.image_hidden_states,
            video_hidden_states=outputs.video_hidden_states,
            image_outputs=outputs.image_outputs,
            video_outputs=outputs.video_outputs,
        )


# `RGPT4DModel` is not registered: saved as `AutoModel` it would overwrite that entry of the shared `auto_map`
RGPT4DForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["RGPT4DForConditionalGeneration", "RGPT4DModel", "RGPT4DPreTrainedModel"]
