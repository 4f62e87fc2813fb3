"""The original NVILA against ours: its weights and inputs, its features, embeddings, logits and greedy answers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from modeling_rgpt4d.configuration_rgpt4d import RGPT4DConfig
from modeling_rgpt4d.modeling_rgpt4d import RGPT4DForConditionalGeneration

NEWLINE, IMAGE, VIDEO = 198, 406, 407
CASES = ("text", "image_resize", "video4", "multi_image", "image_dynamic", "image_dynamic_tall")
PREFIXES = {
    "vision_tower": ("vision_model.", "model.vision_tower."),
    "mm_projector": ("layers.", "model.multi_modal_projector.layers."),
}


@pytest.fixture(scope="module")
def folder(shared_dir):
    return shared_dir / "parity" / "nvila"


@pytest.fixture(scope="module")
def references(folder):
    tensors = load_file(folder / "refs" / "model_3x3fix_70.safetensors")
    return tensors | load_file(folder / "refs" / "vision_70.safetensors")


@pytest.fixture(scope="module")
def model(folder):
    root = folder / "model_3x3fix_70"
    part = {name: json.loads((root / name / "config.json").read_text()) for name in ("vision_tower", "llm")}
    config = RGPT4DConfig(
        vision_config=part["vision_tower"],
        text_config=part["llm"],
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        frame_end_token_id=NEWLINE,
        projector_type=json.loads((root / "mm_projector" / "config.json").read_text())["mm_projector_type"],
        time_cue="none",  # NVILA knows no time
    )
    model = RGPT4DForConditionalGeneration(config).eval()
    state = {}
    for name, (old, new) in PREFIXES.items():
        weights = load_file(root / name / "model.safetensors")
        state |= {new + key.removeprefix(old): tensor for key, tensor in weights.items()}
    for key, tensor in load_file(root / "llm" / "model.safetensors").items():
        state[key if key == "lm_head.weight" else "model.language_model." + key.removeprefix("model.")] = tensor
    model.load_state_dict(state)  # strict: every tensor has its place and every place its tensor
    return model


def expand(input_ids: torch.Tensor, frame_grid: int, as_video: bool) -> torch.Tensor:
    """NVILA writes one id a medium; ours has its tokens and the newline that NVILA adds to the embeddings."""
    ids = []
    for token in input_ids[0].tolist():
        ids += [VIDEO if as_video else IMAGE] * frame_grid**2 + [NEWLINE] if token == IMAGE else [token]
    return torch.tensor([ids])


def inputs_of(case: str, references, model) -> dict[str, torch.Tensor]:
    as_video = case.startswith("video")
    inputs = {"input_ids": expand(references[f"{case}/input_ids"], model.config.frame_grid, as_video)}
    pixels = references.get(f"{case}/pixel_values")
    if pixels is not None:
        inputs |= {"pixel_values_videos": pixels[None]} if as_video else {"pixel_values": pixels}
    return inputs


def test_the_grid_of_the_reference_is_padded(model):
    assert model.config.patch_grid == 5 and model.config.frame_grid == 2


@pytest.mark.parametrize("case", [case for case in CASES if case != "text"])
def test_features_equal_the_original(case, references, model):
    pixels = references[f"{case}/pixel_values"]
    with torch.no_grad():
        features = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        tokens = torch.stack(list(model.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(features, references[f"{case}/vision_features"], atol=1e-5, rtol=0)
    torch.testing.assert_close(tokens, references[f"{case}/projector_output"], atol=1e-5, rtol=0)


def test_projector_equals_the_original_on_small_inputs(references, model):
    with torch.no_grad():
        output = model.model.multi_modal_projector(references["projector_small_input/projector_input"])
    torch.testing.assert_close(output, references["projector_small_input/projector_output"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_embeddings_and_logits_equal_the_original(case, references, model):
    captured = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        logits = model(**inputs_of(case, references, model)).logits
    hook.remove()
    torch.testing.assert_close(captured["inputs_embeds"], references[f"{case}/inputs_embeds"], atol=1e-5, rtol=0)
    # the original adds three random vocabulary rows at load
    expected = references[f"{case}/logits"][..., : logits.shape[-1]]
    assert expected.shape == logits.shape and logits.shape[-1] == 405
    torch.testing.assert_close(logits, expected, atol=3e-5, rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_greedy_answer_equals_the_original(case, references, model):
    expected = references[f"{case}/generated_ids"]
    inputs = inputs_of(case, references, model)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False, eos_token_id=402)
    assert output[:, inputs["input_ids"].shape[1] :].tolist() == expected.tolist()


def test_right_padded_batch_equals_the_original(references, model):
    # sample 0 has an image, sample 1 a video. Losses cannot be compared: the three extra logits of the original are in
    # them
    case = "batch2_labels"
    pixels = references[f"{case}/pixel_values"]
    mask = references[f"{case}/input_attention_mask"].bool()
    ids = references[f"{case}/input_ids"]
    rows = [expand(ids[i][mask[i]][None], model.config.frame_grid, as_video=i == 1)[0] for i in (0, 1)]
    length = max(len(row) for row in rows)
    input_ids = torch.zeros(2, length, dtype=torch.long)
    attention_mask = torch.zeros(2, length, dtype=torch.long)
    for i, row in enumerate(rows):
        input_ids[i, : len(row)], attention_mask[i, : len(row)] = row, 1
    assert attention_mask.tolist() == references[f"{case}/attention_mask"].tolist()
    with torch.no_grad():
        output = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            pixel_values=pixels[:1],
            pixel_values_videos=pixels[None, 1:],
        )
    real = attention_mask.bool()
    torch.testing.assert_close(
        output.logits[real], references[f"{case}/logits"][real][:, : output.logits.shape[-1]], atol=3e-5, rtol=0
    )
