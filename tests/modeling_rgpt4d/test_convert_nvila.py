"""Checkpoints in NVILA's layouts to ours and back. The sources are made here, by transformers' own Qwen2 and SigLIP."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2Config,
    Qwen2ForCausalLM,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from modeling_rgpt4d.convert_nvila import convert_nvila, convert_to_nvila, main, verify

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]"]
MEDIA = ["<vila/sentinel>", "<image>", "<vila/video>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("Ċ", "Ċ")]
VOCABULARY = {piece: i for i, piece in enumerate([*BYTES, *map("".join, MERGES)])}
FIRST_SPECIAL = len(VOCABULARY)  # 260
RELEASED, FINETUNED = FIRST_SPECIAL + 5, FIRST_SPECIAL + 8
IM_END, PAD = FIRST_SPECIAL + 2, FIRST_SPECIAL + 4
SENTINEL, IMAGE, VIDEO = range(RELEASED, FINETUNED)
TEMPLATE = (
    "{% for m in messages %}"
    "{% if loop.first and m['role'] != 'system' %}{{ '<|im_start|>system\nYou are a helpful assistant<|im_end|>\n' }}"
    "{% endif %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STRIDES = {"mlp_downsample": 2, "mlp_downsample_2x2_fix": 2, "mlp_downsample_3x3_fix": 3}
WIDTH, DIM, GRID = 32, 48, 4  # SigLIP, Qwen2, patches along each side of 56 px
SAMPLING = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}


class Projector(nn.Module):
    """NVILA's, written with `unfold` instead of reshapes."""

    def __init__(self, kind: str):
        super().__init__()
        self.k = k = STRIDES[kind]
        wide = k * k * WIDTH
        if k == 2:
            layers = [nn.Identity(), nn.LayerNorm(wide), nn.Linear(wide, DIM), nn.GELU(), nn.Linear(DIM, DIM)]
        else:
            layers = [nn.Identity(), nn.LayerNorm(wide), nn.Linear(wide, 3 * WIDTH), nn.GELU()]
            layers += [nn.LayerNorm(3 * WIDTH), nn.Linear(3 * WIDTH, DIM), nn.GELU(), nn.Linear(DIM, DIM)]
        self.layers = nn.Sequential(*layers)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        maps = features.transpose(1, 2).unflatten(2, (GRID, GRID))
        maps = nn.functional.pad(maps, (0, -GRID % self.k, 0, -GRID % self.k))
        blocks = nn.functional.unfold(maps, self.k, stride=self.k).transpose(1, 2)  # channel outermost
        blocks = blocks.unflatten(2, (WIDTH, self.k**2)).transpose(2, 3).flatten(2)
        return self.layers(blocks)


class Parts:
    """The three parts of a tiny NVILA with wide random weights, and the folder that its saver would write."""

    def __init__(self, projector="mlp_downsample_3x3_fix", rows=RELEASED, tied=False, head=False, dtype=torch.float32):
        torch.manual_seed(0)
        self.kind, self.head = projector, head
        self.llm_config = {
            "model_type": "qwen2",
            "vocab_size": rows,
            "hidden_size": DIM,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "rope_theta": 1234567.0,
            "rope_scaling": None,
            "tie_word_embeddings": tied,
            "bos_token_id": RELEASED - 2,
            "eos_token_id": IM_END,
            "pad_token_id": PAD,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "model_max_length": 4096,
        }
        self.vision_config = {
            "model_type": "siglip_vision_model",
            "hidden_size": WIDTH,
            "intermediate_size": 40,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "image_size": 14 * GRID,
            "patch_size": 14,
        }
        self.llm = Qwen2ForCausalLM(Qwen2Config(**self.llm_config))
        self.vision = SiglipVisionModel(SiglipVisionConfig(**self.vision_config, vision_use_head=head))
        self.projector = Projector(projector)
        for part in (self.llm, self.vision, self.projector):
            part.to(dtype).eval()
            for parameter in part.parameters():
                nn.init.normal_(parameter, std=0.2)

    @torch.no_grad()
    def logits(self, ids: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
        """Embeddings of `ids` with the features of `pixels` in place of the media ids."""
        features = self.projector(self.vision(pixels, output_hidden_states=True).hidden_states[-2])
        is_media = ids >= IMAGE
        embeddings = self.llm.get_input_embeddings()(ids.masked_fill(is_media, 0))
        embeddings[is_media] = features.flatten(0, 1)
        return self.llm(inputs_embeds=embeddings).logits

    def save(self, folder: Path, sharded=True, fast=False, with_media_tokens=False, **top) -> Path:
        for name in ("llm", "vision_tower", "mm_projector"):
            (folder / name).mkdir(parents=True)
        llm = {name: tensor.clone() for name, tensor in self.llm.state_dict().items()}
        if self.llm_config["tie_word_embeddings"]:
            del llm["lm_head.weight"]
        save_weights(folder / "llm", llm, sharded)
        vision = {f"vision_model.{name}": tensor for name, tensor in self.vision.state_dict().items()}
        save_weights(folder / "vision_tower", vision)
        save_weights(folder / "mm_projector", self.projector.state_dict())
        write(folder / "llm" / "config.json", self.llm_config)
        write(folder / "llm" / "generation_config.json", SAMPLING | {"eos_token_id": [IM_END, FIRST_SPECIAL]})
        write(folder / "vision_tower" / "config.json", self.vision_config)
        size = {"height": 14 * GRID, "width": 14 * GRID}
        preprocessor = {"size": size, "resample": 3, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        write(folder / "vision_tower" / "preprocessor_config.json", preprocessor)
        write(folder / "mm_projector" / "config.json", {"model_type": "v2l_projector", "mm_projector_type": self.kind})
        config = {
            "model_type": "llava_llama",
            "architectures": ["LlavaLlamaModel"],
            "image_aspect_ratio": "resize",
            "num_video_frames": 4,
            "mm_vision_select_layer": -2,
            "mm_vision_select_feature": "cls_patch",
            "image_encoder": {"_target_": "llava.model.encoders.BasicImageEncoder"},
            "video_encoder": json.dumps({"_target_": "llava.model.encoders.BasicVideoEncoder", "start_tokens": None}),
            "s2_scales": "336,672,1008",
            "s2_resize_output_to_scale_idx": 0,
            "some_future_switch": {"of": "nobody"},
        }
        write(folder / "config.json", config | top)
        save_tokenizer(folder / "llm", fast, SPECIAL + MEDIA if with_media_tokens else SPECIAL)
        return folder


def write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2), encoding="utf-8")


def edit(file: Path, **changes) -> None:
    write(file, json.loads(file.read_text()) | changes)


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], sharded=False) -> None:
    if not sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    shards = {f"model-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": {name: f for f, held in shards.items() for name in held}}
    write(folder / "model.safetensors.index.json", index)


def save_tokenizer(folder: Path, fast: bool, special: list[str]) -> None:
    """As Qwen2's slow class writes it: two files of the vocabulary and the tokens that were added."""
    write(folder / "vocab.json", VOCABULARY)
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, MERGES), ""]), encoding="utf-8")
    ids = {token: FIRST_SPECIAL + i for i, token in enumerate(special)}
    write(folder / "added_tokens.json", ids)
    plain = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(i): {"content": token} | plain for token, i in ids.items()},
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
        "unk_token": None,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    write(folder / "tokenizer_config.json", config)
    if fast:
        from transformers import AutoTokenizer

        saved = AutoTokenizer.from_pretrained(folder)
        saved.backend_tokenizer.save(str(folder / "tokenizer.json"))
        (folder / "vocab.json").unlink()
        (folder / "merges.txt").unlink()


def sample(parts: Parts) -> dict[str, torch.Tensor]:
    """One picture and a few words, as ids of our layout."""
    grid = -(-GRID // STRIDES[parts.kind])
    newline = VOCABULARY["Ċ"]
    ids = [5, *[IMAGE] * grid**2, newline, 60, 61, 62]
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(1, 3, 14 * GRID, 14 * GRID, generator=generator)
    return {"input_ids": torch.tensor([ids]), "pixel_values": pixels}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def load(folder: Path):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def assert_equal_logits(folder: Path, parts: Parts) -> None:
    inputs = sample(parts)
    with torch.no_grad():
        logits = load(folder)(**inputs).logits
    torch.testing.assert_close(logits, parts.logits(**{"ids": inputs["input_ids"], "pixels": inputs["pixel_values"]}))


# --- what comes out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "made, saved",
    [
        ({"projector": "mlp_downsample_3x3_fix"}, {}),
        ({"projector": "mlp_downsample", "rows": FINETUNED, "head": True}, {"with_media_tokens": True}),
        ({"projector": "mlp_downsample_2x2_fix", "tied": True}, {"fast": True, "sharded": False, "model_type": "vila"}),
    ],
)
def test_converted_model_has_the_parts_logits_and_goes_back_to_equal_bytes(tmp_path, made, saved):
    parts = Parts(**made)
    source = parts.save(tmp_path / "source", **saved)
    before = files(source)
    report = convert_nvila(source, tmp_path / "ours", max_shard_size="20KB")
    assert_equal_logits(tmp_path / "ours", parts)
    assert len(list((tmp_path / "ours").glob("model-*.safetensors"))) > 3
    assert convert_to_nvila(tmp_path / "ours", tmp_path / "back") == []
    assert files(tmp_path / "back") == before == files(source)
    assert report["notes"] == [] and report["unused_tensors"] == []
    assert json.loads((tmp_path / "ours" / "conversion.json").read_text()) == report
    names = {
        name: len(part)
        for name, part in (("llm", parts.llm), ("mm_projector", parts.projector))
        for part in [list(part.parameters())]
    }
    assert {name: report["parts"][name]["tensors"] for name in names} == names


def test_shards_keep_to_their_size_and_equal_what_save_file_writes(tmp_path):
    convert_nvila(Parts(dtype=torch.bfloat16).save(tmp_path / "source"), tmp_path / "ours", max_shard_size="30KB")
    weight_map = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())["weight_map"]
    shards = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 2 and {shard.name for shard in shards} == set(weight_map.values())
    for shard in shards:
        tensors = load_file(shard)
        assert tensors.keys() == {name for name, file in weight_map.items() if file == shard.name}
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 30_000
        save_file(tensors, tmp_path / "again.safetensors", metadata={"format": "pt"})
        assert shard.read_bytes() == (tmp_path / "again.safetensors").read_bytes()


@pytest.mark.parametrize("wrapper", ["vision_tower.vision_model.", "vision_tower.vision_tower.vision_model."])
@pytest.mark.parametrize("projector", STRIDES)
def test_the_native_layout_gives_the_same_model(tmp_path, wrapper, projector):
    parts = Parts(projector)
    source = parts.save(tmp_path / "nvila", sharded=False)
    native = tmp_path / "native"
    native.mkdir()
    tensors = {f"llm.{name}": tensor for name, tensor in load_file(source / "llm" / "model.safetensors").items()}
    for name, tensor in load_file(source / "vision_tower" / "model.safetensors").items():
        tensors[wrapper + name.removeprefix("vision_model.")] = tensor
    for name, tensor in load_file(source / "mm_projector" / "model.safetensors").items():
        tensors[f"mm_projector.{name}"] = tensor
    save_weights(native, tensors, sharded=True)
    save_tokenizer(native, fast=False, special=SPECIAL + MEDIA)
    config = {"text_config": parts.llm_config, "vision_config": parts.vision_config, "model_type": "nvila_lite"}
    write(native / "config.json", config | {"image_token_id": IMAGE, "video_token_id": VIDEO})
    convert_nvila(native, tmp_path / "ours")
    assert_equal_logits(tmp_path / "ours", parts)
    assert load(tmp_path / "ours").config.text_config.rope_parameters["rope_theta"] == 1234567.0

    # there are no files to go back to: the layout is written from the config, and gives the same model again
    assert "anew" in convert_to_nvila(tmp_path / "ours", tmp_path / "back", max_shard_size="20KB")[0]
    convert_nvila(tmp_path / "back", tmp_path / "again")
    assert_equal_logits(tmp_path / "again", parts)


def test_tokenizer_processor_and_config_are_nvilas(tmp_path):
    for name, options in (("released", {}), ("finetuned", {"with_media_tokens": True})):
        parts = Parts(rows=RELEASED if name == "released" else FINETUNED)
        source = parts.save(tmp_path / name, image_aspect_ratio="dynamic", max_tiles=6, **options)
        convert_nvila(source, tmp_path / f"{name}-ours")
        processor = AutoProcessor.from_pretrained(tmp_path / f"{name}-ours")
        model = load(tmp_path / f"{name}-ours")
        assert model.get_input_embeddings().num_embeddings == parts.llm_config["vocab_size"]
        assert processor.tokenizer.convert_tokens_to_ids(MEDIA) == [SENTINEL, IMAGE, VIDEO]
        assert processor.tokenizer.padding_side == "left" and processor.tokenizer.pad_token_id == PAD
        assert (processor.image_token_id, processor.video_token_id) == (IMAGE, VIDEO)
        assert model.config.frame_end_token_id == processor.frame_end_token_id == VOCABULARY["Ċ"]
        assert processor.frame_grid == model.config.frame_grid == 2
        assert processor.image_processor.image_aspect_ratio == "dynamic"
        assert (processor.image_processor.min_tiles, processor.image_processor.max_tiles) == (1, 6)
        assert processor.image_processor.size["height"] == 56 and processor.video_processor.num_frames == 4
        assert model.config.time_cue == "none" and model.config.vision_feature_layer == -2
        assert processor.tokenizer("the\n\n").input_ids == [  # merged as the files say
            VOCABULARY["t"], VOCABULARY["he"], VOCABULARY["ĊĊ"],
        ]  # fmt: skip


def test_dynamic_s2_becomes_scales(tmp_path):
    parts = Parts("mlp_downsample")
    source = parts.save(
        tmp_path / "source",
        dynamic_s2=True,
        image_aspect_ratio="dynamic_s2",
        s2_scales="56,112",
        s2_resize_output_to_scale_idx=-1,
    )
    wide = {"layers.1.weight": (2 * 4 * WIDTH,), "layers.1.bias": (2 * 4 * WIDTH,)} | {
        "layers.2.weight": (DIM, 2 * 4 * WIDTH)
    }
    weights = load_file(source / "mm_projector" / "model.safetensors")
    save_weights(source / "mm_projector", weights | {name: torch.randn(shape) for name, shape in wide.items()})
    convert_nvila(source, tmp_path / "ours")
    assert load(tmp_path / "ours").config.s2_scales == [56, 112]
    processor = AutoProcessor.from_pretrained(tmp_path / "ours").image_processor
    assert (processor.image_aspect_ratio, list(processor.s2_scales)) == ("dynamic_s2", [56, 112])
    convert_to_nvila(tmp_path / "ours", tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


STRANGER = """
import json, sys
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

folder, inputs, picture = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = load_file(inputs)
expected = inputs.pop("logits")
with torch.no_grad():
    torch.testing.assert_close(model(**inputs).logits, expected)
content = [{"type": "image", "image": Image.open(picture)}, {"type": "text", "text": "Which?"}]
asked = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True,
                                      tokenize=True, return_dict=True, return_tensors="pt")
answers = []
for seed in (0, 1):
    torch.manual_seed(seed)
    answers.append(model.generate(**asked, max_new_tokens=12).tolist())
assert answers[0] == answers[1]
"""


def test_a_stranger_loads_it_and_generates_greedily_although_the_source_samples(tmp_path, run_as_stranger):
    parts = Parts()
    report = convert_nvila(parts.save(tmp_path / "source"), tmp_path / "ours")
    assert report["dropped_sampling_values"] == SAMPLING | {"eos_token_id": [IM_END, FIRST_SPECIAL]}
    generation = json.loads((tmp_path / "ours" / "generation_config.json").read_text())
    generation.pop("transformers_version")
    assert generation == {
        "do_sample": False,
        "eos_token_id": [IM_END],
        "pad_token_id": PAD,
        "bos_token_id": RELEASED - 2,
        "suppress_tokens": [SENTINEL, IMAGE, VIDEO],
    }
    inputs = sample(parts)
    logits = parts.logits(inputs["input_ids"], inputs["pixel_values"])
    save_file(inputs | {"logits": logits.contiguous()}, tmp_path / "inputs.safetensors")
    Image.new("RGB", (80, 60), "red").save(tmp_path / "red.png")
    run_as_stranger(STRANGER, tmp_path / "ours", tmp_path / "inputs.safetensors", tmp_path / "red.png")


def test_tensors_without_a_place_are_kept_and_named(tmp_path):
    parts = Parts(head=True)
    source = parts.save(tmp_path / "source", sharded=False)
    edit(source / "vision_tower" / "config.json", vision_use_head=False)
    weights = load_file(source / "llm" / "model.safetensors")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    save_weights(source / "llm", weights | {name: torch.arange(6.0)})
    report = convert_nvila(source, tmp_path / "ours")
    assert f"llm/{name}" in report["unused_tensors"]
    assert "vision_tower/vision_model.head.probe" in report["unused_tensors"]
    assert set(load_file(tmp_path / "ours" / "nvila" / "unused.safetensors")) == set(report["unused_tensors"])
    assert_equal_logits(tmp_path / "ours", parts)
    convert_to_nvila(tmp_path / "ours", tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


def test_rows_follow_the_table_where_the_config_disagrees(tmp_path):
    parts = Parts(rows=FINETUNED)
    source = parts.save(tmp_path / "source")
    edit(source / "llm" / "config.json", vocab_size=RELEASED)
    report = convert_nvila(source, tmp_path / "ours")
    assert any("vocab_size" in note for note in report["notes"])
    assert_equal_logits(tmp_path / "ours", parts)
    # more rows than tokens are taken only where the config says so
    edit(source / "llm" / "config.json", vocab_size=77)
    save_weights(source / "llm", Parts(rows=FINETUNED + 1).llm.state_dict(), sharded=True)
    with pytest.raises(ValueError, match=f"{FINETUNED + 1} rows; expected 77"):
        convert_nvila(source, tmp_path / "again")
    edit(source / "llm" / "config.json", vocab_size=FINETUNED + 1)
    convert_nvila(source, tmp_path / "again")
    assert load(tmp_path / "again").generation_config.suppress_tokens == [SENTINEL, IMAGE, VIDEO, FINETUNED]


def test_a_source_from_the_hub_is_pinned_to_its_commit(tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--someone--nvila"
    Parts().save(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    report = convert_nvila("someone/nvila", tmp_path / "ours")
    assert (report["source"], report["revision"]) == ("someone/nvila", commit)
    with pytest.raises(ValueError, match="someone/other is no folder here"):
        convert_nvila("someone/other", tmp_path / "other")


# --- the way back --------------------------------------------------------------------------------------------------


def test_trained_weights_go_back_into_the_same_files(tmp_path):
    source = Parts().save(tmp_path / "source")
    convert_nvila(source, tmp_path / "ours", time_cue="tpe")
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    weights["model.multi_modal_projector.layers.2.weight"] += 1
    save_file(weights, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    notes = convert_to_nvila(tmp_path / "ours", tmp_path / "back")
    assert len(notes) == 1 and "timestamps" in notes[0]
    before, after = files(source), files(tmp_path / "back")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"mm_projector/model.safetensors"}
    old, new = (load_file(folder / "mm_projector" / "model.safetensors") for folder in (source, tmp_path / "back"))
    assert torch.equal(new["layers.2.weight"], old["layers.2.weight"] + 1)


def test_files_in_an_order_of_their_own_go_back_to_equal_bytes(tmp_path):
    source = Parts().save(tmp_path / "source")
    file = source / "mm_projector" / "model.safetensors"
    tensors = load_file(file)
    header, values = {"__metadata__": {"written by": "someone", "format": "pt"}}, b""
    for name in sorted(tensors, reverse=True):
        content = tensors[name].numpy().tobytes()
        offsets = [len(values), len(values) + len(content)]
        header[name] = {"shape": list(tensors[name].shape), "data_offsets": offsets, "dtype": "F32"}
        values += content
    encoded = json.dumps(header, indent=1).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + values)
    convert_nvila(source, tmp_path / "ours")
    convert_to_nvila(tmp_path / "ours", tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


def test_a_tied_model_that_stores_its_head_goes_back_to_equal_bytes(tmp_path):
    parts = Parts(tied=True)
    source = parts.save(tmp_path / "source", sharded=False)
    table = parts.llm.get_input_embeddings().weight.detach()
    weights = load_file(source / "llm" / "model.safetensors")
    save_weights(source / "llm", weights | {"lm_head.weight": table.clone()})
    report = convert_nvila(source, tmp_path / "ours")
    assert "lm_head.weight equals model.embed_tokens.weight" in report["notes"][0]
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "model.safetensors")
    assert not (tmp_path / "ours" / "nvila" / "unused.safetensors").exists()
    convert_to_nvila(tmp_path / "ours", tmp_path / "back")
    assert files(tmp_path / "back") == files(source)


@pytest.mark.parametrize("layer", [-2, -1])
def test_a_model_without_a_source_is_written_from_its_config(tmp_path, layer):
    parts = Parts(rows=FINETUNED, tied=True)
    convert_nvila(parts.save(tmp_path / "source", mm_vision_select_layer=layer), tmp_path / "ours")
    load(tmp_path / "ours").save_pretrained(tmp_path / "trained")
    AutoProcessor.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "trained")
    convert_to_nvila(tmp_path / "trained", tmp_path / "back")
    llm = json.loads((tmp_path / "back" / "llm" / "config.json").read_text())
    assert llm["rope_theta"] == llm["rope_parameters"]["rope_theta"] == 1234567.0
    assert llm["tie_word_embeddings"] is True and llm["torch_dtype"] == "float32"
    with safe_open(tmp_path / "back" / "vision_tower" / "model.safetensors", "pt") as opened:
        assert all(name.startswith("vision_model.") for name in opened.keys())
    convert_nvila(tmp_path / "back", tmp_path / "again")
    first, second = load(tmp_path / "ours"), load(tmp_path / "again")
    assert first.config.vision_feature_layer == second.config.vision_feature_layer == layer
    inputs = sample(parts)
    with torch.no_grad():
        assert torch.equal(first(**inputs).logits, second(**inputs).logits)
    old, new = (AutoProcessor.from_pretrained(tmp_path / name) for name in ("ours", "again"))
    assert old.tokenizer.get_vocab() == new.tokenizer.get_vocab()
    text = "the picture\n\n<image>?<|im_end|>"
    assert old.tokenizer(text).input_ids == new.tokenizer(text).input_ids


def test_a_resized_vocabulary_does_not_go_back_into_the_kept_files(tmp_path):
    source = Parts().save(tmp_path / "source")
    convert_nvila(source, tmp_path / "ours")
    model = load(tmp_path / "ours")
    model.resize_token_embeddings(RELEASED + 9)
    (tmp_path / "ours" / "model.safetensors").unlink()
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=rf"lm_head.weight was \({RELEASED}, {DIM}\)"):
        convert_to_nvila(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_changed_config_does_not_go_back_into_the_kept_files(tmp_path):
    source = Parts().save(tmp_path / "source")
    convert_nvila(source, tmp_path / "ours")
    edit(tmp_path / "ours" / "config.json", vision_feature_layer=-1)
    with pytest.raises(ValueError, match=r"vision_feature_layer \(-2 there, -1 here\)"):
        convert_to_nvila(tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize("fusion", ["concat", "positional"])
def test_a_model_that_needs_a_teachers_latents_does_not_go_back(tmp_path, fusion):
    convert_nvila(Parts().save(tmp_path / "source"), tmp_path / "ours")
    options = {"geometry_fusion": fusion, "geometry_hidden_size": 6}
    fused = AutoModelForImageTextToText.from_pretrained(tmp_path / "ours", **options)
    fused.save_pretrained(tmp_path / "fused")
    AutoProcessor.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "fused")
    with pytest.raises(SystemExit, match=f"error: .*fused: geometry_fusion is '{fusion}'.*geometry_fusion='none'"):
        main(["--to-nvila", str(tmp_path / "fused"), str(tmp_path / "back")])
    assert not (tmp_path / "back").exists()

    # what the message advises
    type(fused).from_pretrained(tmp_path / "fused", geometry_fusion="none").save_pretrained(tmp_path / "without")
    AutoProcessor.from_pretrained(tmp_path / "ours").save_pretrained(tmp_path / "without")
    convert_to_nvila(tmp_path / "without", tmp_path / "back")


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    return Parts().save(tmp_path_factory.mktemp("pristine") / "source")


@pytest.fixture
def source(pristine, tmp_path):
    return Path(shutil.copytree(pristine, tmp_path / "source"))


def assert_refused(source, tmp_path, message: str, **options) -> None:
    with pytest.raises(ValueError, match=message):
        convert_nvila(source, tmp_path / "made" / "output", **options)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    "file, changes, message",
    [
        ("config.json", {"model_type": "llava_qwen"}, "model_type 'llava_qwen' cannot be converted"),
        ("config.json", {"model_type": "rgpt4d"}, "a folder of this project already"),
        ("config.json", {"s2": True}, "s2 is True"),
        ("config.json", {"ps3": True}, "ps3 is True"),
        ("config.json", {"num_time_tokens": 4}, "num_time_tokens is 4"),
        ("config.json", {"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ("config.json", {"mm_vision_select_feature": "patch"}, "mm_vision_select_feature is 'patch'"),
        ("config.json", {"chat_template": "vicuna"}, "chat_template is 'vicuna'"),
        ("config.json", {"dynamic_s2": True}, "s2_scales .* must rise from"),
        ("config.json", {"image_aspect_ratio": "dynamic_s2"}, "image_aspect_ratio is 'dynamic_s2'"),
        ("config.json", {"video_encoder": {"_target_": "a.TSPVideoEncoder", "pool_sizes": [[8, 1, 1]]}}, "pool_sizes"),
        ("config.json", {"image_encoder": {"_target_": "a.BasicImageEncoder", "end_tokens": None}}, "end_tokens None"),
        ("config.json", {"image_encoder": '{"_target_": "a.Other"}'}, "image_encoder is Other"),
        ("mm_projector/config.json", {"mm_projector_type": "mlp2x_gelu"}, "mm_projector_type is 'mlp2x_gelu'"),
        ("llm/config.json", {"model_type": "llama"}, "llm/config.json: model_type is 'llama'"),
        ("llm/config.json", {"num_hidden_layers": 3}, r"missing: llm/model.layers.2.*\(48,\)"),
        ("llm/config.json", {"num_hidden_layers": 1}, r"unknown: llm/model.layers.1.*model-0000"),
        ("llm/config.json", {"intermediate_size": 65}, r"is \(48, 64\), expected \(48, 65\)"),
        ("llm/tokenizer_config.json", {"chat_template": "{{ messages[0]['content'] }}"}, "chat template writes"),
        ("vision_tower/config.json", {"model_type": "intern_vit_6b"}, "model_type is 'intern_vit_6b'"),
        ("vision_tower/config.json", {"vision_use_head": True}, "missing: vision_tower/vision_model.head.attention"),
        ("vision_tower/preprocessor_config.json", {"resample": 2}, "resample is 2"),
        ("vision_tower/preprocessor_config.json", {"size": {"height": 70, "width": 70}}, "image_size 56"),
    ],
)
def test_what_the_model_is_not_is_refused_by_key(source, tmp_path, file, changes, message):
    edit(source / file, **changes)
    assert_refused(source, tmp_path, message)


def test_trivial_pooling_is_taken(source, tmp_path):
    edit(source / "config.json", video_encoder={"_target_": "a.TSPVideoEncoder", "pool_sizes": [[1, 1, 1]]})
    convert_nvila(source, tmp_path / "ours")


def test_an_unknown_or_missing_tensor_is_named_with_its_file(source, tmp_path):
    weights = load_file(source / "mm_projector" / "model.safetensors")
    save_weights(source / "mm_projector", weights | {"layers.9.weight": torch.zeros(2)})
    assert_refused(source, tmp_path, "1 unknown: mm_projector/layers.9.weight in .*mm_projector/model.safetensors")
    del weights["layers.4.bias"]
    save_weights(source / "mm_projector", weights)
    assert_refused(source, tmp_path, rf"1 missing: mm_projector/layers.4.bias \({3 * WIDTH},\)")


def test_a_tied_model_with_another_head_is_refused(source, tmp_path):
    edit(source / "llm" / "config.json", tie_word_embeddings=True)
    assert_refused(source, tmp_path, "lm_head.weight differs from model.embed_tokens.weight")


def test_damaged_and_missing_files_are_named(source, tmp_path):
    shard = source / "llm" / "model-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    assert_refused(source, tmp_path, "model-00002-of-00002.safetensors is damaged or cut short")
    shard.write_bytes(content[:50])
    assert_refused(source, tmp_path, "model-00002-of-00002.safetensors is damaged or cut short")
    shard.unlink()
    assert_refused(source, tmp_path, "model-00002-of-00002.safetensors is missing")
    (source / "llm" / "config.json").write_text("{")
    assert_refused(source, tmp_path, "llm/config.json is not readable JSON")
    shutil.rmtree(source / "llm")
    assert_refused(source, tmp_path, "no folder llm")


def test_an_index_that_leaves_its_folder_is_refused(source, tmp_path):
    index = source / "llm" / "model.safetensors.index.json"
    edit(index, weight_map={"lm_head.weight": "../mm_projector/model.safetensors"})
    assert_refused(source, tmp_path, "shards lie beside their index")


def test_pickled_weights_are_opened_only_if_asked_for(source, tmp_path):
    file = source / "mm_projector" / "model.safetensors"
    torch.save(load_file(file), source / "mm_projector" / "pytorch_model.bin")
    expected = load_file(file)
    file.unlink()
    assert_refused(source, tmp_path, "pickled weights .pytorch_model.bin.*--allow-pickle")
    report = convert_nvila(source, tmp_path / "ours", allow_pickle=True)
    assert any("pickled" in note for note in report["notes"])
    weights = load_file(tmp_path / "ours" / "model.safetensors")
    for name, tensor in expected.items():
        assert torch.equal(weights[f"model.multi_modal_projector.{name}"], tensor)
    shutil.rmtree(tmp_path / "ours")
    torch.save({"layers.1.weight": Path("anything")}, source / "mm_projector" / "pytorch_model.bin")
    assert_refused(source, tmp_path, "pytorch_model.bin", allow_pickle=True)


def test_an_output_that_is_there_stays_as_it_is(source, tmp_path):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "mine.txt").write_text("mine")
    for call in (convert_nvila, convert_to_nvila):
        with pytest.raises(ValueError, match="exists and is not empty"):
            call(source, tmp_path / "ours")
    assert files(tmp_path / "ours") == {"mine.txt": b"mine"}
    (tmp_path / "ours" / "mine.txt").unlink()
    convert_nvila(source, tmp_path / "ours")  # an empty folder is as good as none


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_interrupted_conversion_leaves_nothing_behind(source, tmp_path, monkeypatch, error):
    def interrupted(*args, **kwargs):
        raise error

    monkeypatch.setattr("modeling_rgpt4d.convert_nvila.write_json", interrupted)  # the last thing that is written
    with pytest.raises(error):
        convert_nvila(source, tmp_path / "made" / "output")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_full_disk_is_refused_before_writing(source, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    assert_refused(source, tmp_path, "its disk has 0.00 GB free")


# --- verify, and the command ---------------------------------------------------------------------------------------


def test_verify_passes_on_a_converted_folder_and_on_the_source(source, tmp_path, capsys):
    convert_nvila(source, tmp_path / "ours")
    checks = verify(tmp_path / "ours")
    assert [check.ok for check in checks] == [True] * 5
    printed = capsys.readouterr().out
    assert printed.count("ok    ") == 5 and "and the source" in printed
    assert "rope_theta 1.23457e+06" in printed and "float32" in printed
    assert all(check.ok for check in verify(source, dtype="bfloat16"))
    assert "converting it to a temporary folder first" in capsys.readouterr().out


def tampered_file(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.vision_tower.embeddings.patch_embedding.bias"] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lost_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.vision_tower.embeddings.patch_embedding.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def lost_theta(folder: Path) -> None:
    text = json.loads((folder / "config.json").read_text())["text_config"]
    edit(folder / "config.json", text_config=text | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})


def deaf(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.multi_modal_projector.layers.7.weight"].zero_()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "tamper, failing",
    [
        (tampered_file, {"weights"}),
        (lost_tensor, {"weights"}),
        (lost_theta, {"rotary frequencies"}),
        (deaf, {"weights", "sight"}),
        (lambda folder: edit(folder / "generation_config.json", **SAMPLING), {"greedy generation"}),
    ],
)
def test_verify_finds_what_was_tampered_with(source, tmp_path, tamper, failing, capsys):
    convert_nvila(source, tmp_path / "ours")
    tamper(tmp_path / "ours")
    with pytest.raises(SystemExit) as exit:
        main(["--verify", str(tmp_path / "ours")])
    assert exit.value.code == 1
    assert {line.split(":")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")} == {
        f"FAILED {name}" for name in failing
    }


def test_verify_sees_what_the_model_does_after_loading(source, tmp_path, monkeypatch):
    from modeling_rgpt4d import verify_checkpoint as module

    convert_nvila(source, tmp_path / "ours")

    class Broken:
        @staticmethod
        def from_pretrained(*args, **kwargs):
            model = AutoModelForImageTextToText.from_pretrained(*args, **kwargs)
            model.model.vision_tower.embeddings.position_ids[0, 3] = 0
            rotary = model.model.language_model.rotary_emb
            rotary._buffers["inv_freq"] = rotary.inv_freq.bfloat16()  # as a cast of another model would leave it
            model.model.vision_tower.post_layernorm.weight.data += 1  # as if initialised again
            return model

    monkeypatch.setattr(module, "AutoModelForImageTextToText", Broken)
    failed = {check.name for check in verify(tmp_path / "ours") if not check.ok}
    assert failed == {"weights", "position ids", "rotary frequencies"}


def test_the_command_converts_and_goes_back(source, tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}

    def run(*arguments):
        command = [sys.executable, "-m", "modeling_rgpt4d.convert_nvila", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])

    done = run(source, tmp_path / "ours")
    assert done.returncode == 0, done.stderr
    assert "AutoModelForImageTextToText.from_pretrained" in done.stdout and '"temperature": 0.7' in done.stdout
    assert run("--to-nvila", tmp_path / "ours", tmp_path / "back").returncode == 0
    assert files(tmp_path / "back") == files(source)
    again = run(source, tmp_path / "ours")
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "Traceback" not in again.stderr


# --- the original's own files --------------------------------------------------------------------------------------


def test_the_reference_model_gives_the_originals_logits_and_greedy_tokens(shared_dir, tmp_path):
    folder = shared_dir / "parity" / "nvila"
    report = convert_nvila(folder / "model_3x3fix_70", tmp_path / "ours")
    assert report["notes"] == []
    references = load_file(folder / "refs" / "model_3x3fix_70.safetensors")
    model, processor = load(tmp_path / "ours"), AutoProcessor.from_pretrained(tmp_path / "ours")
    prompts = json.loads((folder / "refs" / "model_3x3fix_70.json").read_text())["cases"]
    assert "image_dynamic" in prompts
    pixels = load_file(folder / "refs" / "vision_70.safetensors")["image_resize/pixel_values"]
    ids = [[406] * 4 + [198] if token == 406 else [token] for token in references["image_resize/input_ids"][0].tolist()]
    inputs = {"input_ids": torch.tensor([sum(ids, [])]), "pixel_values": pixels}
    with torch.no_grad():
        logits = model(**inputs).logits
    torch.testing.assert_close(logits, references["image_resize/logits"][..., :405], atol=2e-4, rtol=0)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    output = model.generate(**inputs, max_new_tokens=16)
    expected = references["image_resize/generated_ids"]
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()
    assert processor.tokenizer.convert_tokens_to_ids(MEDIA) == [405, 406, 407]
    convert_to_nvila(tmp_path / "ours", tmp_path / "back")
    assert files(tmp_path / "back") == files(folder / "model_3x3fix_70")
