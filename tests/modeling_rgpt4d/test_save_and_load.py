import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from modeling_rgpt4d.configuration_rgpt4d import AUTO_MAP, RGPT4DConfig
from modeling_rgpt4d.modeling_rgpt4d import RGPT4DForConditionalGeneration, RGPT4DModel

CODE = {
    "configuration_rgpt4d.py",
    "fast_decoding.py",
    "geometry_fusion.py",
    "modeling_rgpt4d.py",
    "timestamp_encoding.py",
}

# Runs where this project cannot be imported: what a stranger does with a folder from the Hub.
STRANGER = """
import sys
import torch
from safetensors.torch import load_file
from transformers import (
    AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM
)

folder, inputs, resaved = sys.argv[1:]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert (type(config).__name__, config.frame_grid) == ("RGPT4DConfig", 2)
inputs = load_file(inputs)
expected, answer = inputs.pop("logits"), inputs.pop("answer")
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "RGPT4DForConditionalGeneration", auto_class
    with torch.no_grad():
        logits = model(**inputs).logits
    assert torch.equal(logits, expected), (auto_class, (logits - expected).abs().max())
    assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), answer)
model.save_pretrained(resaved)
"""


def tiny_config(**options) -> RGPT4DConfig:
    vision = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 2, "image_size": 56, "patch_size": 14, "vision_use_head": False}
    text = {"model_type": "qwen2", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": options.pop("tied", False)}
    options = {"image_token_id": 90, "video_token_id": 91, "frame_end_token_id": 10} | options
    return RGPT4DConfig(vision_config=vision, text_config=text, **options)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = RGPT4DForConditionalGeneration(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    ids = [1, *([91] * 4 + [10]) * 4, 20, *[90] * 4, 10, 21, 22]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 56, 56, generator=generator),
        "pixel_values_videos": torch.randn(1, 4, 3, 56, 56, generator=generator),
        "video_timestamps": torch.tensor([[3600.0, 3600.04, 3600.08, 3600.12]]),
    }


def logits_of(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def saved_keys(folder) -> set[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize("tied", [False, True])
def test_reloaded_model_has_bit_equal_logits(tmp_path, inputs, tied):
    torch.manual_seed(0)
    model = RGPT4DForConditionalGeneration(tiny_config(tied=tied)).eval()
    model.save_pretrained(tmp_path)
    reloaded, report = RGPT4DForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    for (name, tensor), again in zip(model.state_dict().items(), reloaded.state_dict().values(), strict=True):
        assert torch.equal(tensor, again), name
    assert torch.equal(logits_of(reloaded, inputs), logits_of(model, inputs))
    assert (reloaded.lm_head.weight is reloaded.get_input_embeddings().weight) == tied
    assert ("lm_head.weight" in saved_keys(tmp_path)) != tied


def test_saved_folder_holds_its_code_and_all_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.glob("*.py")} == CODE
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP
    assert config["auto_map"].keys() >= {"AutoModel", "AutoModelForImageTextToText", "AutoModelForCausalLM"}
    assert config["architectures"] == ["RGPT4DForConditionalGeneration"]


def test_a_stranger_loads_generates_and_saves_again(model, inputs, tmp_path, run_as_stranger):
    model.save_pretrained(tmp_path / "first")
    answer = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    save_file(inputs | {"logits": logits_of(model, inputs), "answer": answer}, tmp_path / "inputs.safetensors")
    # what was loaded as remote code and saved again must be complete too
    for folder, resaved in (("first", "second"), ("second", "third")):
        run_as_stranger(STRANGER, tmp_path / folder, tmp_path / "inputs.safetensors", tmp_path / resaved)
        assert {path.name for path in (tmp_path / resaved).glob("*.py")} == CODE
        assert json.loads((tmp_path / resaved / "config.json").read_text())["auto_map"] == AUTO_MAP


def test_headless_base_loads_from_the_same_folder(model, inputs, tmp_path):
    # the documented way for engines that want `AutoModel` to be the model without its head
    model.config.auto_map["AutoModel"] = "modeling_rgpt4d.RGPT4DModel"
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == AUTO_MAP | {
        "AutoModel": "modeling_rgpt4d.RGPT4DModel"
    }
    assert RGPT4DConfig.from_pretrained(tmp_path).auto_map["AutoModel"] == "modeling_rgpt4d.RGPT4DModel"
    base, report = RGPT4DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    with torch.no_grad():
        hidden = base(**inputs).last_hidden_state
        assert torch.equal(hidden, model.model(**inputs).last_hidden_state)


def test_a_training_only_module_is_never_saved(model, inputs, tmp_path):
    expected = logits_of(model, inputs)
    model.model.add_module("perception_decoder", nn.Linear(32, 8))
    keys = {name for name in model.state_dict() if "perception_decoder" in name}
    assert len(keys) == 2
    model._keys_to_ignore_on_save = keys
    model.save_pretrained(tmp_path)
    assert saved_keys(tmp_path) == model.state_dict().keys() - keys
    reloaded = RGPT4DForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(logits_of(reloaded, inputs), expected)


def test_a_model_wrapped_by_fsdp2_keeps_its_auto_map(model, tmp_path):
    # FSDP2 swaps the class for one named FSDP<Name>; its module stands for torch's private files here
    name = "FSDPRGPT4DForConditionalGeneration"
    model.__class__ = type(name, (RGPT4DForConditionalGeneration,), {"__module__": "subprocess"})
    model.save_pretrained(tmp_path)
    assert "subprocess.py" not in {path.name for path in tmp_path.iterdir()}
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == AUTO_MAP and config["architectures"] == ["RGPT4DForConditionalGeneration"]


def test_time_cue_can_be_changed_at_load(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    timeless = RGPT4DForConditionalGeneration.from_pretrained(tmp_path, time_cue="none")
    assert timeless.config.time_cue == "none" and timeless.model.timestamp_encoding is None
    shifted = inputs | {"video_timestamps": inputs["video_timestamps"] + 7}
    assert torch.equal(logits_of(timeless, inputs), logits_of(timeless, shifted))
    with pytest.raises(ValueError, match="time_cue"):
        RGPT4DForConditionalGeneration.from_pretrained(tmp_path, time_cue="mark")


def test_bfloat16_load_stays_close_and_keeps_time_apart(model, inputs, tmp_path):
    model.save_pretrained(tmp_path)
    half = RGPT4DForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.model.language_model.rotary_emb.inv_freq.dtype == torch.float32  # rounded, long prompts would drift
    features, half_features = (
        m.get_video_features(inputs["pixel_values_videos"], inputs["video_timestamps"]).pooler_output[0].detach()
        for m in (model, half)
    )
    assert half_features.dtype == torch.bfloat16
    # an hour into the video: rounding must be far smaller than the difference that one second makes
    moved = model.get_video_features(inputs["pixel_values_videos"], inputs["video_timestamps"] + 1).pooler_output[0]
    rounding = (half_features.float() - features).abs().mean()
    assert rounding < 0.2 * (moved.detach() - features).abs().mean()
    logits, half_logits = logits_of(model, inputs), logits_of(half, inputs).float()
    assert nn.functional.cosine_similarity(logits, half_logits, dim=-1).min() > 0.995
