"""What NVILA's checkpoints say: their configs, tensors and tokenizer, and the config of this model that means the same.

All that a checkpoint can ask for and this model does not do is a `ValueError` that names the key.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import AddedToken, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from .checkpoint_files import DTYPES, StoredTensor, read_folder, read_json
from .configuration_rgpt4d import PROJECTOR_STRIDES, RGPT4DConfig
from .image_processing_rgpt4d import ASPECT_RATIOS
from .modeling_rgpt4d import RGPT4DForConditionalGeneration

PARTS = ("llm", "vision_tower", "mm_projector")
NVILA_TYPES = ("llava_llama", "vila")
NATIVE_TYPE = "nvila_lite"
SENTINEL, IMAGE, VIDEO, FRAME_END = "<vila/sentinel>", "<image>", "<vila/video>", "\n"
# Written by older versions, and recomputed or unused: they need no place
HARMLESS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids)$")
# What a config says about its file and not about its model
ABOUT_THE_FILE = {"_name_or_path", "architectures", "auto_map", "dtype", "model_max_length", "torch_dtype"} | {
    "transformers_version",
    "_attn_implementation_autoset",
}
SAMPLING_KEYS = set(GenerationConfig().to_dict()) - {"bos_token_id", "eos_token_id", "pad_token_id", "use_cache"}
ENCODERS = {
    "image_encoder": ("BasicImageEncoder",),
    "video_encoder": ("BasicVideoEncoder", "TSPVideoEncoder"),
}
# What the encoders of NVILA do if their settings say nothing, and the only thing that this model does
ENCODER_DEFAULTS = {"end_tokens": FRAME_END}
PREPROCESSING = {
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "resample": 3,
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
}


@dataclass
class Source:
    """The configs of a checkpoint in one of NVILA's layouts."""

    folder: Path
    layout: str
    top: dict
    llm: dict
    vision: dict
    projector_type: str | None  # None: the tensors tell
    preprocessor: dict
    generation: dict
    notes: list[str] = field(default_factory=list)

    @property
    def tokenizer_folder(self) -> Path:
        return self.folder if self.layout == NATIVE_TYPE else self.folder / "llm"


def read_source(folder: Path) -> Source:
    top = read_json(folder / "config.json")
    model_type = top.get("model_type")
    if model_type in NVILA_TYPES:
        for part in PARTS:
            if not (folder / part).is_dir():
                raise ValueError(f"{folder} has no folder {part}: NVILA's layout is config.json, {', '.join(PARTS)}")
        generation = folder / "llm" / "generation_config.json"
        source = Source(
            folder=folder,
            layout="nvila",
            top=top,
            llm=read_json(folder / "llm" / "config.json"),
            vision=read_json(folder / "vision_tower" / "config.json"),
            projector_type=read_json(folder / "mm_projector" / "config.json").get("mm_projector_type", "none"),
            preprocessor=read_json(folder / "vision_tower" / "preprocessor_config.json"),
            generation=read_json(generation) if generation.is_file() else {},
        )
    elif model_type == NATIVE_TYPE:
        optional = ("preprocessor_config.json", "generation_config.json")
        preprocessor, generation = (read_json(folder / name) if (folder / name).is_file() else {} for name in optional)
        for key in ("text_config", "vision_config"):
            if not isinstance(top.get(key), dict):
                raise ValueError(f"{folder / 'config.json'}: {key} is missing")
        llm, vision = dict(top["text_config"]), dict(top["vision_config"])
        source = Source(folder, NATIVE_TYPE, top, llm, vision, None, preprocessor, generation)
        top.setdefault("image_aspect_ratio", "dynamic")  # the only mode that this layout's own processor has
    else:
        hint = "is a folder of this project already" if model_type == "rgpt4d" else "cannot be converted"
        raise ValueError(
            f"{folder / 'config.json'}: model_type {model_type!r} {hint}; expected one of {[*NVILA_TYPES, NATIVE_TYPE]}"
        )
    _refuse_unsupported(source)
    return source


def _refuse_unsupported(source: Source) -> None:
    """All that a config can ask for and this model does not do is an error that names the key."""
    top = source.top

    def refuse(key: str, why: str, file: str = "config.json"):
        raise ValueError(f"{source.folder / file}: {key} {why}")

    for name, part, key, expected in (
        ("llm", source.llm, "model_type", "qwen2"),
        ("vision_tower", source.vision, "model_type", "siglip_vision_model"),
    ):
        # the parts of a native config may leave their type out
        if part.get(key, expected if source.layout == NATIVE_TYPE else None) != expected:
            refuse(key, f"is {part.get(key)!r}; expected {expected!r}", f"{name}/config.json")
    if source.projector_type is not None and source.projector_type not in PROJECTOR_STRIDES:
        refuse(
            "mm_projector_type",
            f"is {source.projector_type!r}; expected one of {sorted(PROJECTOR_STRIDES)}",
            "mm_projector/config.json",
        )
    for key in ("s2", "ps3", "mm_use_im_start_end", "num_time_tokens"):
        if top.get(key):
            refuse(key, f"is {top[key]!r}, which this model does not have; expected it off")
    if top.get("mm_vision_select_feature", "cls_patch") != "cls_patch":
        refuse("mm_vision_select_feature", f"is {top['mm_vision_select_feature']!r}; expected 'cls_patch'")
    if top.get("chat_template") not in (None, "qwen2"):
        refuse("chat_template", f"is {top['chat_template']!r}; expected 'qwen2' or none")
    mode = top.get("image_aspect_ratio", "resize")
    if mode == "dynamic_s2" and not top.get("dynamic_s2"):
        refuse("image_aspect_ratio", "is 'dynamic_s2' but dynamic_s2 is off; expected both or none")
    if mode == "pad":
        refuse("image_aspect_ratio", f"is 'pad', which this model does not have; expected one of {ASPECT_RATIOS}")
    for key, classes in ENCODERS.items():
        _check_encoder(top.get(key), classes, lambda why, key=key: refuse(key, why))

    side = source.vision.get("image_size", 224)  # SigLIP's default
    size = source.preprocessor.get("size") or {}
    sides = {size} if isinstance(size, int) else set(size.values())
    if sides and sides != {side}:
        refuse("size", f"is {size}, and vision_tower has image_size {side}", "vision_tower/preprocessor_config.json")
    for key, expected in PREPROCESSING.items():
        if source.preprocessor.get(key, expected) != expected:
            why = f"is {source.preprocessor[key]!r}; SigLIP's is {expected!r}"
            refuse(key, why, "vision_tower/preprocessor_config.json")

    if mode not in ASPECT_RATIOS:
        source.notes.append(f"image_aspect_ratio {mode!r} is unknown and means plain resizing, as in NVILA")
    if (top.get("video_max_tiles") or 1) > 1:
        source.notes.append(f"video_max_tiles is {top['video_max_tiles']}; frames of videos are not tiled here")
    if top.get("fps"):
        source.notes.append(f"fps is {top['fps']}; videos are sampled by num_frames unless the processor is given fps")


def _check_encoder(encoder, classes: tuple[str, ...], refuse) -> None:
    """Only frames as they are, each followed by a newline: `refuse(why)` is called for anything else."""
    if encoder is None:
        return
    if isinstance(encoder, str):
        try:
            encoder = json.loads(encoder)
        except ValueError:
            refuse(f"is {encoder!r}; expected a dict or its JSON")
    if not isinstance(encoder, dict):
        refuse(f"is {encoder!r}; expected a dict or its JSON")
    name = str(encoder.get("_target_")).rpartition(".")[2]
    if name not in classes:
        refuse(f"is {name}; expected {' or '.join(classes)}")
    pools = encoder.get("pool_sizes")
    if (name == "TSPVideoEncoder" or pools) and pools != [[1, 1, 1]]:
        refuse(f"has pool_sizes {pools}, and pooling over time and space is not done here; expected [[1, 1, 1]]")
    for key, value in encoder.items():
        if key not in ("_target_", "pool_sizes") and value != ENCODER_DEFAULTS.get(key):
            refuse(f"has {key} {value!r}; expected {ENCODER_DEFAULTS.get(key)!r}")


def s2_options(top: dict) -> dict:
    if not top.get("dynamic_s2"):
        return {}
    scales = top.get("s2_scales")
    scales = scales.split(",") if isinstance(scales, str) else scales
    return {
        "s2_scales": [int(scale) for scale in scales or []],
        "s2_resize_output_to_scale_idx": top.get("s2_resize_output_to_scale_idx", 0),  # NVILA's default
    }


def canonical_key(part: str, name: str) -> str:
    """A tensor's part and name in one, the name as the original writes it."""
    if part == "vision_tower":  # some writers add a wrapper's name, some leave all wrappers out
        name = "vision_model." + name.removeprefix("vision_tower.").removeprefix("vision_model.")
    return f"{part}/{name}"


def read_tensors(source: Source, allow_pickle: bool) -> dict[str, StoredTensor]:
    """Every tensor of the source by "part/name", named as NVILA's layout names it."""
    if source.layout != NATIVE_TYPE:
        folders = {part: read_folder(source.folder / part, allow_pickle) for part in PARTS}
    else:
        folders = {part: {} for part in PARTS}
        for name, tensor in read_folder(source.folder, allow_pickle).items():
            part, _, rest = name.partition(".")
            if part not in folders:
                raise ValueError(f"{tensor.file}: tensor {name} is of no known part; expected {', '.join(PARTS)}")
            folders[part][rest] = tensor
    stored = {}
    for part, tensors in folders.items():
        for name, tensor in tensors.items():
            key = canonical_key(part, name)
            if key in stored:
                raise ValueError(f"{tensor.file}: tensor {tensor.name} is there twice, under two spellings of its name")
            stored[key] = tensor
    return stored


def build_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer_folder, padding_side="left")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{source.tokenizer_folder} holds no readable Qwen2 tokenizer: {error}") from error
    vocabulary = tokenizer.get_vocab()
    for token in ("<|im_start|>", "<|im_end|>"):
        if token not in vocabulary:
            raise ValueError(f"{source.tokenizer_folder}: the tokenizer has no {token}; expected one of Qwen2")
    # NVILA adds them when it loads, in this order
    added = [token for token in (SENTINEL, IMAGE, VIDEO) if token not in vocabulary]
    first = max(vocabulary.values()) + 1
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in added], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(added) == list(range(first, first + len(added)))
    if tokenizer.pad_token is None:
        if "[PAD]" not in vocabulary:
            raise ValueError(f"{source.tokenizer_folder}: the tokenizer has no pad_token; expected [PAD]")
        tokenizer.pad_token = "[PAD]"
    return tokenizer


def build_config(
    source: Source, stored: dict[str, StoredTensor], tokenizer: PreTrainedTokenizerBase, time_cue: str
) -> RGPT4DConfig:
    table = stored.get("llm/model.embed_tokens.weight")
    if table is None:
        raise ValueError(f"{source.folder}: the language model's model.embed_tokens.weight is missing")
    llm = {k: v for k, v in source.llm.items() if k not in ABOUT_THE_FILE | SAMPLING_KEYS}
    vision = {k: v for k, v in source.vision.items() if k not in ABOUT_THE_FILE | SAMPLING_KEYS}
    rows, said = table.shape[0], llm.get("vocab_size")
    if rows != said:
        if rows > len(tokenizer):
            raise ValueError(
                f"{table.file}: {table.name} has {rows} rows; expected {said} (vocab_size in llm/config.json), or at most "
                f"the {len(tokenizer)} tokens of the tokenizer"
            )
        source.notes.append(f"vocab_size in the source's config is {said}, and its table has {rows} rows: {rows} taken")
    vision.setdefault("vision_use_head", any(key.startswith("vision_tower/vision_model.head.") for key in stored))
    longest, positions = source.llm.get("model_max_length") or 0, llm.get("max_position_embeddings") or 0
    if longest > positions and not llm.get("rope_scaling") and not llm.get("rope_parameters"):
        source.notes.append(
            f"model_max_length {longest} exceeds max_position_embeddings {positions}: NVILA's loader scales the positions "
            "then, and this config does not say so"
        )
    if "rope_theta" not in llm and "rope_theta" not in (llm.get("rope_parameters") or {}):
        source.notes.append("llm/config.json has no rope_theta: 10000 is taken, as transformers does")
    projector_type = source.projector_type
    if projector_type is None:
        is_3x3 = "mm_projector/layers.7.weight" in stored
        projector_type = "mlp_downsample_3x3_fix" if is_3x3 else "mlp_downsample_2x2_fix"
    sizes: dict[str, int] = {}
    for tensor in stored.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.num_bytes
    dtype = max(sizes, key=sizes.get)
    if len(sizes) > 1:
        source.notes.append(f"tensors are of several dtypes {sorted(sizes)}; from_pretrained gives all of them {dtype}")
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in (IMAGE, VIDEO)}
    (frame_end,) = tokenizer.encode(FRAME_END, add_special_tokens=False)
    config = RGPT4DConfig(
        vision_config={"model_type": "siglip_vision_model"} | vision,
        text_config={"model_type": "qwen2"} | llm | {"vocab_size": rows},
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        frame_end_token_id=frame_end,
        projector_type=projector_type,
        vision_feature_layer=source.top.get("mm_vision_select_layer", -2),
        **s2_options(source.top),
        time_cue=time_cue,
    )
    for part in (config, config.text_config, config.vision_config):
        part.dtype = DTYPES[dtype]
    config.architectures = [RGPT4DForConditionalGeneration.__name__]
    if llm.get("rope_theta") not in (None, config.text_config.rope_parameters["rope_theta"]):
        raise ValueError(f"rope_theta {llm['rope_theta']} was lost by transformers {transformers.__version__}")
    return config


def nvila_key(name: str) -> str:
    """Our name of a tensor -> "part/name" in NVILA's layout."""
    for ours, key in (
        ("model.language_model.", "llm/model."),
        ("model.vision_tower.", "vision_tower/vision_model."),
        ("model.multi_modal_projector.", "mm_projector/"),
    ):
        if name.startswith(ours):
            return key + name.removeprefix(ours)
    return f"llm/{name}"


def expected_shapes(config: RGPT4DConfig) -> tuple[RGPT4DForConditionalGeneration, dict[str, tuple[int, ...]]]:
    """The model without memory, and the names and shapes of what its checkpoint holds."""
    with torch.device("meta"):
        model = RGPT4DForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return model, shapes


__all__ = [
    "Source",
    "build_config",
    "build_tokenizer",
    "canonical_key",
    "expected_shapes",
    "nvila_key",
    "read_source",
    "read_tensors",
]
