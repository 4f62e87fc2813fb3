"""NVILA-Lite, NVILA and released 4D-RGPT checkpoints to folders that plain transformers loads, and back.

    python -m modeling_rgpt4d.convert_nvila Efficient-Large-Model/NVILA-Lite-8B nvila-lite-8b
    python -m modeling_rgpt4d.convert_nvila --to-nvila nvila-lite-8b back
    python -m modeling_rgpt4d.convert_nvila --verify nvila-lite-8b

A source has NVILA's layout (`config.json` and the folders `llm`, `vision_tower`, `mm_projector`; model types `llava_llama`
and `vila`) or is one set of weights of the model type `nvila_lite`. Tensors are copied one by one and never cast. All is
checked from configs and file headers before the first byte is written.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import safetensors
import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.dynamic_module_utils import custom_object_save

from .checkpoint_files import (
    DTYPES,
    PICKLE_SUFFIXES,
    StoredTensor,
    check_output,
    make_header,
    quoted,
    read_folder,
    read_header,
    read_json,
    tensors_in,
    whole_folder,
    write_folder,
    write_json,
    write_safetensors,
)
from .configuration_rgpt4d import RGPT4DConfig
from .image_processing_rgpt4d import ASPECT_RATIOS, RGPT4DImageProcessor
from .nvila_layout import (
    ABOUT_THE_FILE,
    FRAME_END,
    HARMLESS,
    IMAGE,
    NATIVE_TYPE,
    NVILA_TYPES,
    PARTS,
    PREPROCESSING,
    SAMPLING_KEYS,
    SENTINEL,
    VIDEO,
    Source,
    build_config,
    build_tokenizer,
    canonical_key,
    expected_shapes,
    nvila_key,
    read_source,
    read_tensors,
)
from .processing_rgpt4d import RGPT4DProcessor
from .verify_checkpoint import QUESTION, Check, verify_checkpoint
from .video_processing_rgpt4d import RGPT4DVideoProcessor

SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model"]  # all that is not weights, without foreign code
# Written by both templates, the source's and ours, to see whether they are the same
CONVERSATIONS = (
    [{"role": "user", "content": "<image>Which is nearer?"}],
    [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "There."},
        {"role": "user", "content": "When?"},
    ],
)


def convert_nvila(
    source: str | Path,
    output: str | Path,
    revision: str | None = None,
    time_cue: str = "none",
    max_shard_size: int | str = "5GB",
    allow_pickle: bool = False,
) -> dict:
    """Convert a checkpoint to a folder that `AutoModelForImageTextToText` and `AutoProcessor` load.

    Args:
        source: folder, or id of a repository of the Hub.
        output: folder to make; it must not exist, or be empty.
        revision: branch, tag or commit of the repository.
        time_cue: `"none"`, as the released models were trained, or `"tpe"` to train on with timestamps.
        max_shard_size: of one file of weights, in bytes or as "5GB".
        allow_pickle: open pickled weights (with `weights_only`) where there are no safetensors.

    Returns: the report, which is also `conversion.json` in `output`: source, revision, versions, tensors and bytes of each
        part, dropped sampling values, unused tensors, notes.
    Raises: `ValueError` if the checkpoint is of another kind, uses what this model has not, or is not whole. Then nothing is
        left behind.
    """
    source, output = str(source), Path(output)
    check_output(output)
    folder, commit = _fetch(source, revision, SMALL_FILES)
    configs = read_source(folder)  # refused, if need be, before gigabytes are downloaded
    configs.folder, _ = _fetch(source, commit, SMALL_FILES + _weight_patterns(configs, allow_pickle))
    stored = read_tensors(configs, allow_pickle)
    _note_unread(configs, stored)
    pickled = any(tensor.file.suffix in PICKLE_SUFFIXES for tensor in stored.values())

    tokenizer = build_tokenizer(configs)
    config = build_config(configs, stored, tokenizer, time_cue)
    model, placed, unused = _place(configs, config, stored)
    processor = _build_processor(configs, config, tokenizer)
    generation, dropped = _build_generation_config(configs, config, tokenizer)
    if pickled:
        configs.notes.append("weights were pickled: --to-nvila will write safetensors, and not the files that were")
    keeps = configs.layout != NATIVE_TYPE and not pickled

    total = sum(tensor.num_bytes for tensor in (*placed.values(), *unused.values()))
    report = {
        "source": source,
        "revision": commit,
        "layout": f"{configs.layout} ({configs.top['model_type']})",
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__}
        | {"safetensors": safetensors.__version__},
        "time_cue": time_cue,
        "parts": {
            part: {
                "tensors": sum(key.startswith(f"{part}/") for key in stored),
                "bytes": sum(tensor.num_bytes for key, tensor in stored.items() if key.startswith(f"{part}/")),
            }
            for part in PARTS
        },
        "dropped_sampling_values": dropped,
        "unused_tensors": sorted(unused),
        "notes": configs.notes,
    }
    with whole_folder(output, total) as unfinished:
        config.save_pretrained(unfinished)
        generation.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        custom_object_save(model, unfinished)
        if keeps:
            _keep_small_files(configs, stored, unfinished / "nvila")
        with tqdm(total=total, unit="B", unit_scale=True, desc=f"{output.name}") as bar:
            write_folder(unfinished, placed, max_shard_size, bar.update)
            if unused:
                (unfinished / "nvila").mkdir(exist_ok=True)
                write_safetensors(unfinished / "nvila" / "unused.safetensors", unused, progress=bar.update)
        write_json(unfinished / "conversion.json", report)
    return report


def _fetch(source: str, revision: str | None, patterns: list[str]) -> tuple[Path, str | None]:
    """The folder with the files, and the commit that they are of if they come from the Hub."""
    if Path(source).is_dir():
        if revision is not None:
            raise ValueError(f"revision {revision!r} is of a repository of the Hub, and {source} is a folder here")
        return Path(source), None
    try:
        folder = Path(snapshot_download(source, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(f"{source} is no folder here, and could not be had from the Hub: {error}") from error
    return folder, folder.name


def _weight_patterns(configs: Source, allow_pickle: bool) -> list[str]:
    suffixes = [".safetensors", ".bin"] if allow_pickle else [".safetensors"]
    folders = [""] if configs.layout == NATIVE_TYPE else [f"{part}/" for part in PARTS]
    return [f"{folder}*{suffix}" for folder in folders for suffix in suffixes]


def _place(source: Source, config: RGPT4DConfig, stored: dict[str, StoredTensor]):
    """Find each tensor its place. Returns: the model on the meta device; our name -> tensor; "part/name" -> unused tensor.

    Raises: `ValueError` that names what is missing, unknown, or of another shape, with file and expectation.
    """
    model, shapes = expected_shapes(config)
    keys = {nvila_key(name): name for name in shapes}
    placed = {name: stored[key] for key, name in keys.items() if key in stored}
    unused, unknown = {}, []
    for key in stored.keys() - keys.keys():
        tied = key == "llm/lm_head.weight" and config.tie_word_embeddings
        if tied and not torch.equal(stored[key].load(), stored["llm/model.embed_tokens.weight"].load()):
            raise ValueError(
                f"{stored[key].file}: lm_head.weight differs from model.embed_tokens.weight, but llm/config.json ties them; "
                "expected equal values, or tie_word_embeddings false"
            )
        if tied:
            source.notes.append("lm_head.weight equals model.embed_tokens.weight, as the config says: stored once")
        elif key.startswith("vision_tower/vision_model.head.") or HARMLESS.search(key):
            unused[key] = stored[key]
        else:
            unknown.append(f"{key} in {stored[key].file}")
    missing = [f"{key} {shapes[name]}" for key, name in keys.items() if key not in stored]
    wrong = [
        f"{nvila_key(name)} in {tensor.file} is {tensor.shape}, expected {shapes[name]}"
        for name, tensor in placed.items()
        if tensor.shape != shapes[name]
    ]
    if missing or unknown or wrong:
        problems = (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        listed = "; ".join(f"{len(names)} {kind}: {quoted(names)}" for kind, names in problems if names)
        raise ValueError(f"{source.folder}: tensors are not as the configs say: {listed}")
    return model, {name: placed[name] for name in shapes}, dict(sorted(unused.items()))


def _build_processor(source: Source, config: RGPT4DConfig, tokenizer: PreTrainedTokenizerBase) -> RGPT4DProcessor:
    top, size = source.top, {"height": config.image_size, "width": config.image_size}
    mode = top.get("image_aspect_ratio", "resize")
    image_processor = RGPT4DImageProcessor(
        size=size,
        image_aspect_ratio=mode if mode in ASPECT_RATIOS else "resize",
        min_tiles=top.get("min_tiles", 1),
        max_tiles=top.get("max_tiles", 12),
        s2_scales=config.s2_scales,
        s2_resize_output_to_scale_idx=config.s2_resize_output_to_scale_idx,
    )
    processor = RGPT4DProcessor(
        image_processor,
        RGPT4DVideoProcessor(size=size, num_frames=top.get("num_video_frames", 8)),
        tokenizer,
        image_token=IMAGE,
        video_token=VIDEO,
        frame_end_token=FRAME_END,
        frame_end_placeholder=SENTINEL,
        frame_grid=config.frame_grid,
    )
    if tokenizer.chat_template is None:
        source.notes.append("the source has no chat template: NVILA's qwen2 template is written")
    else:
        for conversation in CONVERSATIONS:
            theirs, ours = (
                tokenizer.apply_chat_template(
                    conversation, chat_template=template, tokenize=False, add_generation_prompt=True
                )
                for template in (tokenizer.chat_template, processor.chat_template)
            )
            if theirs != ours:
                raise ValueError(
                    f"{source.tokenizer_folder}: its chat template writes {theirs!r}; expected NVILA's qwen2 template, "
                    f"{ours!r}. Models before NVILA have other templates and are not converted; if this one was trained "
                    "with NVILA's, remove chat_template from its tokenizer_config.json"
                )
    tokenizer.chat_template = processor.chat_template
    return processor


def _build_generation_config(
    source: Source, config: RGPT4DConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[GenerationConfig, dict]:
    """Greedy, whatever the source's file says: NVILA ignores that file, and transformers 5 would sample as it says.

    Returns: the config, and what of the source's is dropped.
    """
    ids = tokenizer.convert_tokens_to_ids
    generation = GenerationConfig(
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[ids("<|im_end|>")],
        pad_token_id=ids("[PAD]") if "[PAD]" in tokenizer.get_vocab() else tokenizer.pad_token_id,
        # placeholders that the model itself wrote would have no pixels; rows behind the tokenizer's have no text
        suppress_tokens=[*ids([SENTINEL, IMAGE, VIDEO]), *range(len(tokenizer), config.text_config.vocab_size)],
    )
    said = {k: v for k, v in source.llm.items() if k in SAMPLING_KEYS} | source.generation
    bookkeeping = ("_from_model_config", "transformers_version", "use_cache")
    written = generation.to_dict() | {"eos_token_id": generation.eos_token_id[0]}
    return generation, {
        k: v for k, v in said.items() if k not in bookkeeping and v not in (written.get(k), [written.get(k)])
    }


# --- the way back --------------------------------------------------------------------------------------------------


def _keep_small_files(source: Source, stored: dict[str, StoredTensor], kept: Path) -> None:
    """Copy what is not weights, and the header of each file of weights: with them the way back is equal to the byte."""
    for place in ("", *PARTS):
        (kept / place).mkdir()
        for file in _files_of(source, place):
            if file.suffix not in (".safetensors", *PICKLE_SUFFIXES):
                shutil.copyfile(file, kept / place / file.name)
    for file in {tensor.file for tensor in stored.values()}:
        (kept / file.parent.name / f"{file.name}.header").write_bytes(read_header(file))


def _files_of(source: Source, place: str) -> list[Path]:
    return sorted(file for file in (source.folder / place).iterdir() if file.is_file())


def _note_unread(source: Source, stored: dict[str, StoredTensor]) -> None:
    """Name the files that look like weights and are none of the model's, and folders that are not looked into."""
    read = {tensor.file for tensor in stored.values()}
    for place in ("",) if source.layout == NATIVE_TYPE else ("", *PARTS):
        for file in _files_of(source, place):
            if file.suffix in (".safetensors", *PICKLE_SUFFIXES) and file not in read:
                source.notes.append(f"{Path(place) / file.name} is not part of the model: not read, not kept")
    for folder in sorted(source.folder.iterdir()):
        if folder.is_dir() and folder.name not in PARTS and not folder.name.startswith("."):
            source.notes.append(f"folder {folder.name} is not part of the model: not read, not kept")


def convert_to_nvila(folder: str | Path, output: str | Path, max_shard_size: int | str = "5GB") -> list[str]:
    """Convert a folder of this project to NVILA's layout (`config.json`, `llm`, `vision_tower`, `mm_projector`).

    A folder that `convert_nvila` made of this layout gives files that equal the source's to the byte. If its weights were
    trained since, they are written into the same files with the same names. Any other folder is written from its config.

    Args:
        folder: converted, or saved after training.
        output: folder to make; it must not exist, or be empty.
        max_shard_size: of one file of weights, where the folder does not tell the files.

    Returns: notes on what NVILA's code will not do with the result.
    Raises: `ValueError` if the model has no form in NVILA's layout, or no longer is what the kept files of its source say.
    """
    folder, output = Path(folder), Path(output)
    check_output(output)
    if read_json(folder / "config.json").get("model_type") != "rgpt4d":
        raise ValueError(f"{folder / 'config.json'}: model_type is not 'rgpt4d'; give a folder that this project wrote")
    config = RGPT4DConfig.from_pretrained(folder)
    for part, expected in ((config.text_config, "qwen2"), (config.vision_config, "siglip_vision_model")):
        if part.model_type != expected:
            raise ValueError(f"{folder}: NVILA's layout holds {expected}, and this model has {part.model_type}")
    if config.geometry_fusion != "none":
        raise ValueError(
            f"{folder}: geometry_fusion is {config.geometry_fusion!r}, and NVILA's layout has no place for the teacher's "
            "latents. To convert the model without them, load it with geometry_fusion='none' and save it first; its answers "
            "will be others"
        )
    tensors = read_folder(folder)
    _, shapes = expected_shapes(config)
    if {name: tensor.shape for name, tensor in tensors.items()} != shapes:
        differing = {
            name
            for name in shapes.keys() | tensors.keys()
            if shapes.get(name) != getattr(tensors.get(name), "shape", None)
        }
        raise ValueError(f"{folder}: weights are not as config.json says: {quoted(differing)}")
    processor = RGPT4DProcessor.from_pretrained(folder)

    notes = []
    if config.time_cue != "none":
        notes.append(f"the model was trained with time_cue {config.time_cue!r}: NVILA's code knows no timestamps")
    if processor.video_token != VIDEO:
        notes.append(f"the placeholder of a video is {processor.video_token!r} here and {VIDEO!r} in NVILA")
    kept = folder / "nvila"
    total = sum(tensor.num_bytes for tensor in tensors.values())
    if (kept / "config.json").is_file():
        files = _files_as_kept(kept, config, processor.tokenizer, tensors, notes)
        with whole_folder(output, total) as unfinished, tqdm(total=total, unit="B", unit_scale=True) as bar:
            for file in sorted(file for place in ("", *PARTS) for file in (kept / place).iterdir() if file.is_file()):
                target = unfinished / file.relative_to(kept)
                target.parent.mkdir(exist_ok=True)
                if file.suffix == ".header":
                    header, values = files[file]
                    write_safetensors(target.with_suffix(""), values, header, bar.update)
                elif file.name != "unused.safetensors":
                    shutil.copyfile(file, target)
        return notes

    notes.append("no files of a source are kept in this folder: configs and tokenizer are written anew")
    by_part: dict[str, dict[str, StoredTensor]] = {part: {} for part in PARTS}
    for name, tensor in tensors.items():
        part, _, key = nvila_key(name).partition("/")
        by_part[part][key] = tensor
    with whole_folder(output, total) as unfinished, tqdm(total=total, unit="B", unit_scale=True) as bar:
        for part, values in by_part.items():
            (unfinished / part).mkdir()
            write_folder(unfinished / part, values, max_shard_size, bar.update)
        _write_configs(unfinished, folder, config, processor)
    return notes


def _files_as_kept(
    kept: Path,
    config: RGPT4DConfig,
    tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, StoredTensor],
    notes: list[str],
) -> dict[Path, tuple[bytes, dict[str, StoredTensor]]]:
    """For each kept header the header to write and the tensors behind it.

    Raises: `ValueError` if the model is no longer what the kept files say.
    """
    remedy = f"remove {kept} to write the layout from the model's own config"
    have = {nvila_key(name): tensor for name, tensor in tensors.items()}
    if (kept / "unused.safetensors").is_file():
        have = tensors_in(kept / "unused.safetensors") | have
    if config.tie_word_embeddings:
        have["llm/lm_head.weight"] = have["llm/model.embed_tokens.weight"]
    source, files, described = read_source(kept), {}, {}
    for file in sorted(kept.glob("*/*.header")):
        content = json.loads(file.read_bytes())
        metadata, values = content.pop("__metadata__", None), {}
        for name, entry in content.items():
            key = canonical_key(file.parent.name, name)
            shape = tuple(entry["shape"])
            if key not in have or have[key].shape != shape:
                now = f"is {have[key].shape}" if key in have else "is not there"
                raise ValueError(f"{key} was {shape} in {file} and {now} in the model: {remedy}")
            values[name], described[key] = have[key], StoredTensor(file, name, entry["dtype"], shape)
        header = file.read_bytes()
        if any(values[name].dtype != entry["dtype"] for name, entry in content.items()):
            header = make_header(values, metadata)
            notes.append(f"{file.relative_to(kept).with_suffix('')} has other dtypes than the source's")
        files[file] = header, values
    lost = {key for key in map(nvila_key, tensors) if key not in described}
    if lost:
        raise ValueError(f"no file of {kept} has a place for {quoted(lost)}: {remedy}")

    old_tokenizer = build_tokenizer(source)
    if old_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise ValueError(f"the tokenizer is no longer that of {kept / 'llm'}: {remedy}")
    old = _flat(build_config(source, described, old_tokenizer, config.time_cue))
    new = _flat(config)
    changed = {
        f"{key} ({old.get(key)} there, {new.get(key)} here)" for key in old.keys() | new if old.get(key) != new.get(key)
    }
    if changed:
        raise ValueError(f"the config is no longer that of {kept}: {quoted(changed)}; {remedy}")
    return files


def _flat(config: RGPT4DConfig) -> dict:
    """What a config says about the model's numbers."""
    ignored = ABOUT_THE_FILE | {"use_cache", "tpe_layout", "keys_to_ignore_at_inference"}
    parts = config.to_dict()
    nested = {f"{part}.{k}": v for part in ("text_config", "vision_config") for k, v in parts.pop(part).items()}
    return {k: v for k, v in (parts | nested).items() if k.rpartition(".")[2] not in ignored}


def _write_configs(output: Path, folder: Path, config: RGPT4DConfig, processor: RGPT4DProcessor) -> None:
    """Every file of NVILA's layout that is not weights, as transformers 4.46 reads it."""
    tokenizer, image = processor.tokenizer, processor.image_processor
    tensors = read_folder(folder)
    dtype = str(DTYPES[tensors["model.language_model.embed_tokens.weight"].dtype]).removeprefix("torch.")

    def of_part(part, architecture: str) -> dict:
        drop = ABOUT_THE_FILE | {"rope_parameters", "layer_types", "output_hidden_states", "output_attentions"}
        values = {k: v for k, v in json.loads(part.to_json_string(use_diff=False)).items() if k not in drop}
        return values | {"architectures": [architecture], "torch_dtype": dtype}

    rope = dict(config.text_config.rope_parameters)
    llm = of_part(config.text_config, "Qwen2ForCausalLM")
    # Each generation of transformers reads one of them and falls back to 10000 without a word if it is not there
    llm |= {"rope_theta": rope["rope_theta"], "rope_parameters": rope, "rope_scaling": None}
    if rope.get("rope_type", "default") != "default":
        llm["rope_scaling"] = {k: v for k, v in rope.items() if k != "rope_theta"} | {"type": rope["rope_type"]}
    llm["model_max_length"] = min(tokenizer.model_max_length, config.text_config.max_position_embeddings)
    llm["tie_word_embeddings"] = config.tie_word_embeddings
    vision = of_part(config.vision_config, "SiglipVisionModel")
    projector = {"architectures": ["MultimodalProjector"], "mm_projector_type": config.projector_type}
    projector |= {"model_type": "v2l_projector", "torch_dtype": dtype}
    scales = config.s2_scales or []
    top = {
        "architectures": ["LlavaLlamaModel"],
        "model_type": "llava_llama",
        "model_dtype": f"torch.{dtype}",
        "llm_cfg": llm,
        "vision_tower_cfg": vision,
        "mm_projector_cfg": projector,
        "hidden_size": config.text_config.hidden_size,
        "mm_hidden_size": config.vision_config.hidden_size * config.num_scales,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": "cls_patch",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": image.image_aspect_ratio,
        "min_tiles": image.min_tiles,
        "max_tiles": image.max_tiles,
        "video_max_tiles": 1,
        "num_video_frames": processor.video_processor.num_frames,
        "fps": 0.0,
        "s2": False,
        "dynamic_s2": bool(scales),
        "s2_scales": ",".join(map(str, scales or [config.image_size])),
        "s2_resize_output_to_scale_idx": config.s2_resize_output_to_scale_idx,
        "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
        "video_encoder": {"_target_": "llava.model.encoders.BasicVideoEncoder"},
        "ps3": False,
        "num_time_tokens": 0,
        "time_token_ids": [],
        "chat_template": None,
        "version": "auto",
        "resume_path": None,
    }
    preprocessor = PREPROCESSING | {
        "image_processor_type": "SiglipImageProcessor",
        "rescale_factor": 1 / 255,
        "size": {"height": config.image_size, "width": config.image_size},
    }
    for name, content in (
        ("config.json", top),
        ("llm/config.json", llm),
        ("vision_tower/config.json", vision),
        ("vision_tower/preprocessor_config.json", preprocessor),
        ("mm_projector/config.json", projector),
    ):
        write_json(output / name, content)
    if (folder / "generation_config.json").is_file():
        shutil.copyfile(folder / "generation_config.json", output / "llm" / "generation_config.json")

    # 4.46 reads the template from the tokenizer's config, and does not know the class that 5 names there
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(output / "llm", save_jinja_files=False)
    saved = read_json(output / "llm" / "tokenizer_config.json")
    backend = read_json(output / "llm" / "tokenizer.json")
    special = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in backend["added_tokens"]}
    saved |= {"tokenizer_class": "Qwen2Tokenizer", "added_tokens_decoder": special}
    saved["additional_special_tokens"] = saved.pop("extra_special_tokens", [])
    write_json(output / "llm" / "tokenizer_config.json", saved)
    write_json(
        output / "llm" / "added_tokens.json", {token["content"]: token["id"] for token in backend["added_tokens"]}
    )
    write_json(output / "llm" / "vocab.json", backend["model"]["vocab"])
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in backend["model"]["merges"]]
    (output / "llm" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")


# --- checking, and the command -------------------------------------------------------------------------------------


def verify(
    folder: str | Path,
    source: str | Path | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    **options,
) -> list[Check]:
    """Run the five checks of `verify_checkpoint` on a folder, and print each.

    Args:
        folder: a folder or Hub id that transformers loads, or one in NVILA's layout, which is converted to a temporary folder
            first.
        source: of the conversion, in NVILA's layout, to compare with; by default what `conversion.json` names, if it is here.
        revision: branch, tag or commit of `folder` on the Hub.
        allow_pickle: open a source with pickled weights.
        options: of `verify_checkpoint`.
    """
    here, _ = _fetch(str(folder), revision, [*SMALL_FILES, "*.py"])
    model_type = read_json(here / "config.json").get("model_type")
    if model_type in (*NVILA_TYPES, NATIVE_TYPE):
        with tempfile.TemporaryDirectory() as temporary:
            print(f"{folder} has the layout of {model_type}: converting it to a temporary folder first")
            convert_nvila(folder, Path(temporary) / "converted", revision, allow_pickle=allow_pickle)
            return verify(Path(temporary) / "converted", source, None, allow_pickle, **options)
    if here != Path(folder):
        here, _ = _fetch(str(folder), revision, [*SMALL_FILES, "*.py", "model*.safetensors"])
    if source is None and (here / "conversion.json").is_file():
        said = read_json(here / "conversion.json")["source"]
        source = said if Path(said).is_dir() else None
    tensors, theta = None, None
    if source is not None:
        folder, commit = _fetch(str(source), None, SMALL_FILES)
        configs = read_source(folder)
        configs.folder, _ = _fetch(str(source), commit, SMALL_FILES + _weight_patterns(configs, allow_pickle))
        tensors = read_tensors(configs, allow_pickle)
        _, shapes = expected_shapes(RGPT4DConfig.from_pretrained(here))
        tensors = {name: tensors[key] for name in shapes if (key := nvila_key(name)) in tensors}
        llm = configs.llm
        theta = llm.get("rope_theta", (llm.get("rope_parameters") or {}).get("rope_theta"))
    return verify_checkpoint(here, tensors, theta, **options)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_rgpt4d.convert_nvila",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", nargs="?", help="folder or Hub id; with --to-nvila a folder of this project")
    parser.add_argument("output", nargs="?", type=Path, help="folder to make")
    way = parser.add_mutually_exclusive_group()
    way.add_argument("--to-nvila", action="store_true", help="convert back to NVILA's layout")
    way.add_argument("--verify", metavar="FOLDER", help="load FOLDER (or a Hub id) and check it instead of converting")
    parser.add_argument("--revision", help="branch, tag or commit of a Hub id")
    parser.add_argument("--time-cue", choices=("none", "tpe"), default="none", help="tpe to train on with timestamps")
    parser.add_argument("--max-shard-size", default="5GB", help="of one file of weights (default: %(default)s)")
    parser.add_argument(
        "--allow-pickle", action="store_true", help="open pickled weights where there are no safetensors"
    )
    checks = parser.add_argument_group("with --verify")
    checks.add_argument("--source", dest="compare", help="what FOLDER was converted from (default: as it says itself)")
    checks.add_argument("--image", help="a picture to ask about (default: one that is drawn)")
    checks.add_argument("--question", default=QUESTION, help="(default: %(default)s)")
    checks.add_argument("--device", default="cpu", help="(default: %(default)s)")
    checks.add_argument("--dtype", default="auto", help="auto (the checkpoint's), float32, bfloat16 or float16")
    args = parser.parse_args(arguments)
    if (args.verify is None) != (args.output is not None):
        parser.error("give SOURCE and OUTPUT, or --verify FOLDER alone")
    if args.to_nvila and (args.revision or args.allow_pickle or args.time_cue != "none"):
        parser.error("--revision, --time-cue and --allow-pickle are of the other direction")
    try:
        if args.verify is not None:
            options = {key: getattr(args, key) for key in ("image", "question", "device", "dtype")}
            done = verify(args.verify, args.compare, args.revision, args.allow_pickle, **options)
            sys.exit(not all(check.ok for check in done))
        if args.to_nvila:
            for note in convert_to_nvila(args.source, args.output, args.max_shard_size):
                print(f"note: {note}")
            print(f"{args.output} has NVILA's layout")
            return
        report = convert_nvila(
            args.source, args.output, args.revision, args.time_cue, args.max_shard_size, args.allow_pickle
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was left behind")
    print(json.dumps(report, indent=2, ensure_ascii=False))
    print(f'model = AutoModelForImageTextToText.from_pretrained("{args.output}", trust_remote_code=True)')
    print(f'processor = AutoProcessor.from_pretrained("{args.output}", trust_remote_code=True)')


if __name__ == "__main__":
    main()

__all__ = ["convert_nvila", "convert_to_nvila", "verify"]
