import copy

import pytest
import torch
from torch import nn
from transformers import AutoConfig
from transformers.feature_extraction_utils import BatchFeature

from modeling_rgpt4d.configuration_rgpt4d import PROJECTOR_STRIDES, RGPT4DConfig
from modeling_rgpt4d.modeling_rgpt4d import RGPT4DForConditionalGeneration, RGPT4DProjector
from modeling_rgpt4d.timestamp_encoding import TimestampEncoding

PAD, IMAGE, VIDEO, FRAME_END, VOCABULARY = 0, 90, 91, 10, 96
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}
TEXT = {
    "model_type": "qwen2",
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "pad_token_id": PAD,
}


def tiny_config(vision=None, text=None, **options) -> RGPT4DConfig:
    options = {"image_token_id": IMAGE, "video_token_id": VIDEO, "frame_end_token_id": FRAME_END} | options
    return RGPT4DConfig(vision_config=VISION | (vision or {}), text_config=TEXT | (text or {}), **options)


def tiny_model(seed: int = 0, **options) -> RGPT4DForConditionalGeneration:
    """Weights are drawn wide, so that a wrong feature, time or position moves the logits by far more than rounding
    does."""
    torch.manual_seed(seed)
    model = RGPT4DForConditionalGeneration(tiny_config(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def media(tokens: int, placeholder: int, count: int = 1) -> list[int]:
    return ([placeholder] * tokens + [FRAME_END]) * count


def video_sample(seed: int, num_frames: int = 4, grid: int = 2, text: int = 5) -> dict[str, torch.Tensor]:
    """One question about one video, unpadded."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(11, 80, (text,), generator=generator).tolist()
    ids = [1, *media(grid**2, VIDEO, num_frames), *words]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values_videos": torch.randn(1, num_frames, 3, 56, 56, generator=generator),
        "video_timestamps": torch.arange(num_frames)[None] * 0.5,
    }


def batched(samples: list[dict], side: str) -> dict[str, torch.Tensor]:
    """Pad ids on `side`, and videos at their end: the timestamp -1 marks a padding frame, whose pixels must not
    matter."""
    length = max(sample["input_ids"].shape[1] for sample in samples)
    num_frames = max(sample["video_timestamps"].shape[1] for sample in samples)
    batch = {key: [] for key in samples[0]}
    for sample in samples:
        gap = length - sample["input_ids"].shape[1]
        gap = (gap, 0) if side == "left" else (0, gap)
        batch["input_ids"].append(nn.functional.pad(sample["input_ids"], gap, value=PAD))
        batch["attention_mask"].append(nn.functional.pad(sample["attention_mask"], gap))
        frames = num_frames - sample["video_timestamps"].shape[1]
        batch["video_timestamps"].append(nn.functional.pad(sample["video_timestamps"], (0, frames), value=-1.0))
        pixels = sample["pixel_values_videos"]
        batch["pixel_values_videos"].append(nn.functional.pad(pixels, (0, 0) * 3 + (0, frames), value=torch.nan))
    return {key: torch.cat(values) for key, values in batch.items()}


def logits_of(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


# --- configuration -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("projector_type, grid", [("mlp_downsample", 2), ("mlp_downsample_3x3_fix", 2)])
def test_frame_grid_rounds_up(projector_type, grid):
    assert tiny_config(projector_type=projector_type).frame_grid == grid  # 4 x 4 patches, by 2 and by 3


def test_default_config_is_the_geometry_of_nvila_lite_8b():
    config = RGPT4DConfig()
    assert (config.patch_grid, config.frame_grid) == (32, 11)
    assert (config.vision_config.model_type, config.text_config.model_type) == ("siglip_vision_model", "qwen2")
    assert config.text_config.rope_parameters["rope_theta"] == 1_000_000


@pytest.mark.parametrize(
    "options, message",
    [
        ({"projector_type": "linear"}, "mlp_downsample_3x3_fix"),
        ({"time_cue": "mark"}, "use 'none' with them"),
        ({"tpe_layout": "half"}, "halves"),
        ({"image_token_id": VIDEO}, "must differ"),
        ({"vision_feature_layer": -4}, "-3 to 2"),
        ({"vision": {"image_size": [56, 70]}}, "square"),
        ({"vision": {"image_size": 13}}, "raise vision_config.image_size"),
    ],
)
def test_config_errors_name_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_config_survives_a_round_trip(tmp_path):
    config = tiny_config(projector_type="mlp_downsample", time_cue="none", tpe_layout="halves", vision_feature_layer=-1)
    config.save_pretrained(tmp_path)
    assert RGPT4DConfig.from_pretrained(tmp_path).to_dict() == config.to_dict()
    assert (tmp_path / "configuration_rgpt4d.py").is_file()


def test_config_accepts_config_objects_and_keeps_them():
    vision, text = AutoConfig.for_model(**VISION), AutoConfig.for_model(**TEXT)
    config = tiny_config()
    by_object = RGPT4DConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    assert by_object.text_config is text and by_object.vision_config.to_dict() == config.vision_config.to_dict()


# --- vision tower, projector, time ---------------------------------------------------------------------------------


def naive_projector(projector: RGPT4DProjector, features: torch.Tensor, stride: int) -> torch.Tensor:
    """The projector written out with loops and formulas, for one frame of (P, C) features."""
    side = int(len(features) ** 0.5)
    weights = dict(projector.layers.named_parameters())

    def norm(x, i):
        centred = x - x.mean()
        return centred / (centred.pow(2).mean() + 1e-5).sqrt() * weights[f"{i}.weight"] + weights[f"{i}.bias"]

    def linear(x, i):
        return weights[f"{i}.weight"] @ x + weights[f"{i}.bias"]

    def gelu(x):
        return x * (1 + torch.erf(x / 2**0.5)) / 2

    tokens = []
    for top in range(0, side, stride):
        for left in range(0, side, stride):
            cell = []
            for y in range(top, top + stride):
                for x in range(left, left + stride):
                    inside = y < side and x < side
                    cell.append(features[y * side + x] if inside else torch.zeros_like(features[0]))
            cell = torch.cat(cell)
            if stride == 2:
                tokens.append(linear(gelu(linear(norm(cell, 1), 2)), 4))
            else:
                tokens.append(linear(gelu(linear(norm(gelu(linear(norm(cell, 1), 2)), 4), 5)), 7))
    return torch.stack(tokens)


@pytest.mark.parametrize("side", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("projector_type", sorted(PROJECTOR_STRIDES))
def test_projector_equals_loops_on_even_and_odd_grids(projector_type, side):
    torch.manual_seed(0)
    config = tiny_config(projector_type=projector_type, vision={"image_size": 14 * side})
    projector = RGPT4DProjector(config)
    for parameter in projector.parameters():
        nn.init.normal_(parameter, std=0.3)
    features = torch.randn(2, side * side, 32)
    with torch.no_grad():
        tokens = projector(features)
        expected = torch.stack([naive_projector(projector, frame, config.projector_stride) for frame in features])
    assert tokens.shape == (2, config.frame_grid**2, 32)
    torch.testing.assert_close(tokens, expected, atol=1e-5, rtol=1e-5)


def test_projector_refuses_a_grid_that_is_not_square(model):
    with pytest.raises(ValueError, match="square"):
        model.model.multi_modal_projector(torch.randn(1, 15, 32))


def test_features_are_projected_hidden_states_plus_the_timestamp_encoding(model):
    sample = video_sample(0)
    seconds = torch.tensor([[0.0, 0.4, 3.7, 3600.5]])
    with torch.no_grad():
        output = model.get_video_features(sample["pixel_values_videos"], seconds)
        hidden = model.model.vision_tower(sample["pixel_values_videos"][0], output_hidden_states=True).hidden_states[-2]
        hidden = hidden + TimestampEncoding(32)(seconds[0])[:, None]
        expected = model.model.multi_modal_projector(hidden).flatten(0, 1)
    assert len(output.pooler_output) == 1
    torch.testing.assert_close(output.pooler_output[0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layer", [0, 1, -1])
def test_vision_feature_layer_selects_the_hidden_state(model, layer):
    pixels = torch.randn(2, 3, 56, 56)
    with torch.no_grad():
        features = model.get_image_features(pixels, vision_feature_layer=layer).pooler_output
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[layer]
        expected = model.model.multi_modal_projector(hidden)
    torch.testing.assert_close(torch.stack(features), expected, atol=1e-6, rtol=0)


def test_time_reaches_the_logits_with_tpe_alone():
    sample = video_sample(1)
    later = sample | {"video_timestamps": sample["video_timestamps"] * 3}
    with_time = tiny_model(time_cue="tpe")
    assert (logits_of(with_time, **sample) - logits_of(with_time, **later)).abs().max() > 0.05
    without = tiny_model(time_cue="none")
    assert torch.equal(logits_of(without, **sample), logits_of(without, **later))
    # the same weights: the encoding has none
    assert with_time.state_dict().keys() == without.state_dict().keys()


def test_both_layouts_reach_the_logits():
    sample = video_sample(1)
    assert not torch.allclose(
        logits_of(tiny_model(), **sample), logits_of(tiny_model(tpe_layout="halves"), **sample), atol=1e-2
    )


def test_a_video_without_timestamps_is_an_error_with_tpe(model):
    sample = video_sample(0)
    del sample["video_timestamps"]
    with pytest.raises(ValueError, match="time_cue='none'"):
        model(**sample)
    assert tiny_model(time_cue="none")(**sample).logits.isfinite().all()


@pytest.mark.parametrize(
    "timestamps, message",
    [
        (torch.zeros(1, 3), r"must be \(1, 4\)"),
        (torch.tensor([[0.0, 1.0, torch.nan, 2.0]]), "finite"),
        (torch.tensor([[0.0, -1.0, 1.0, 2.0]]), "padding"),
        (torch.full((1, 4), -1.0), "each video needs a real one"),
    ],
)
def test_bad_timestamps_are_refused(model, timestamps, message):
    with pytest.raises(ValueError, match=message):
        model(**video_sample(0) | {"video_timestamps": timestamps})


def test_frames_of_another_size_are_refused(model):
    with pytest.raises(ValueError, match="resize them"):
        model.get_image_features(torch.randn(1, 3, 70, 70))
    with pytest.raises(ValueError, match="num_frames"):
        model.get_video_features(torch.randn(4, 3, 56, 56), torch.zeros(1, 4))


def test_seconds_rounded_by_a_cast_of_all_inputs_are_refused(model):
    # What `inputs.to(device, torch.bfloat16)` does with transformers' own BatchFeature
    inputs = BatchFeature(video_sample(0)).to("cpu", torch.bfloat16)
    assert inputs["video_timestamps"].dtype == torch.bfloat16 and inputs["input_ids"].dtype == torch.int64
    with pytest.raises(ValueError, match="neighbouring frames get the same time"):
        model(**inputs)
    # without the encoding only the padding mark is read, which bfloat16 holds
    assert tiny_model(time_cue="none")(**inputs).logits.isfinite().all()


def test_integer_microseconds_equal_float_seconds_and_survive_the_cast(model):
    sample = video_sample(0)
    sample["video_timestamps"] = torch.tensor([[0.0, 1 / 30, 2 / 30, -1.0]])
    sample["input_ids"] = sample["input_ids"][:, [*range(16), *range(21, 26)]]  # one frame of 5 tokens less
    sample["attention_mask"] = sample["attention_mask"][:, :21]
    microseconds = (sample["video_timestamps"].double() * 1e6).round().long()
    inputs = BatchFeature(sample | {"video_timestamps": microseconds}).to("cpu", torch.bfloat16)
    inputs["pixel_values_videos"] = sample["pixel_values_videos"]
    torch.testing.assert_close(logits_of(model, **inputs), logits_of(model, **sample), atol=1e-5, rtol=0)


# --- placeholders --------------------------------------------------------------------------------------------------


def test_output_shapes(model):
    sample = video_sample(0)
    output = model(**sample, labels=sample["input_ids"])
    assert output.logits.shape == (1, sample["input_ids"].shape[1], VOCABULARY) and output.loss.shape == ()
    assert [features.shape for features in output.video_hidden_states] == [(4 * 2 * 2, 32)]
    assert output.image_hidden_states is None
    assert isinstance(model(**sample, return_dict=False), tuple)


def test_features_replace_exactly_their_placeholders(model):
    sample = mixed_sample()
    captured = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: captured.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        output = model(**sample)
    hook.remove()
    ids, embeds = sample["input_ids"], captured["inputs_embeds"]
    assert torch.equal(embeds[ids == IMAGE], torch.cat(output.image_hidden_states))
    assert torch.equal(embeds[ids == VIDEO], torch.cat(output.video_hidden_states))
    words = (ids != IMAGE) & (ids != VIDEO)
    assert torch.equal(embeds[words], model.get_input_embeddings()(ids[words]))


def mixed_sample() -> dict[str, torch.Tensor]:
    """Image, video of 2 frames, text, video of 3 frames, image: the shorter video is padded."""
    generator = torch.Generator().manual_seed(3)
    image, video = media(4, IMAGE), media(4, VIDEO, 2)
    ids = [1, *image, *video, 20, 21, *media(4, VIDEO, 3), 22, *image, 23, 24]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values": torch.randn(2, 3, 56, 56, generator=generator),
        "pixel_values_videos": torch.randn(2, 3, 3, 56, 56, generator=generator),
        "video_timestamps": torch.tensor([[0.0, 0.5, -1.0], [0.0, 0.1, 0.2]]),
    }


def test_several_images_and_videos_in_one_sample_keep_their_order(model):
    sample = mixed_sample()
    with torch.no_grad():
        output = model(**sample)
        images = [model.get_image_features(image[None]).pooler_output[0] for image in sample["pixel_values"]]
        videos = [
            model.get_video_features(sample["pixel_values_videos"][:1, :2], sample["video_timestamps"][:1, :2]),
            model.get_video_features(sample["pixel_values_videos"][1:], sample["video_timestamps"][1:]),
        ]
    for got, alone in zip(output.image_hidden_states, images, strict=True):
        torch.testing.assert_close(got, alone, atol=1e-5, rtol=0)
    for got, alone in zip(output.video_hidden_states, videos, strict=True):
        torch.testing.assert_close(got, alone.pooler_output[0], atol=1e-5, rtol=0)


def test_generation_writes_no_placeholder(model):
    model, sample = copy.deepcopy(model), mixed_sample()  # other tests share the fixture
    with torch.no_grad():
        hidden = model.model(**sample).last_hidden_state[0, -1]
        model.lm_head.weight[VIDEO] = 10 * hidden  # by its logit alone, the next token would be a placeholder
        assert model(**sample).logits[0, -1].argmax() == VIDEO
    for use_cache in (True, False):
        answer = model.generate(**sample, max_new_tokens=4, do_sample=False, use_cache=use_cache)
        new = answer[:, sample["input_ids"].shape[1] :]
        assert new.shape == (1, 4) and not torch.isin(new, torch.tensor([IMAGE, VIDEO])).any()
    swapped = sample | {"pixel_values": sample["pixel_values"].flip(0)}
    assert (logits_of(model, **sample) - logits_of(model, **swapped)).abs().max() > 0.05


def test_padding_frames_are_dropped_before_the_tower(model):
    sample = video_sample(0, num_frames=3)
    longer = video_sample(1, num_frames=5)
    padded = batched([sample, longer], "right")
    assert padded["pixel_values_videos"][0, 3:].isnan().all()  # any use of the padding would show
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    logits = logits_of(model, **padded)
    hook.remove()
    assert seen == [8] and logits.isfinite().all()
    length = sample["input_ids"].shape[1]
    torch.testing.assert_close(logits[:1, :length], logits_of(model, **sample), atol=1e-5, rtol=0)


@pytest.mark.parametrize("missing", ["pixel_values", "pixel_values_videos"])
def test_placeholders_without_pixels_are_an_error(model, missing):
    sample = mixed_sample()
    del sample[missing]
    with pytest.raises(ValueError, match=f"no {missing} came with them"):
        model(**sample)
    with pytest.raises(ValueError, match=f"no {missing} came with them"):
        model.generate(**sample, max_new_tokens=1)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_placeholders_is_an_error(model, change):
    sample = video_sample(0)
    ids = sample["input_ids"]
    extra = torch.full((1, 1), VIDEO)
    ids = torch.cat([ids[:, :1], ids[:, 2:]], 1) if change < 0 else torch.cat([ids[:, :1], extra, ids[:, 1:]], 1)
    with pytest.raises(ValueError, match="16 features for 1[57] placeholders"):
        model(**sample | {"input_ids": ids, "attention_mask": torch.ones_like(ids)})


def test_pixels_without_placeholders_are_an_error(model):
    with pytest.raises(ValueError, match="do not match"):
        model(input_ids=torch.tensor([[1, 2, 3]]), pixel_values=torch.randn(1, 3, 56, 56))


def test_pixels_and_encoder_outputs_together_are_an_error(model):
    sample = video_sample(0)
    encoded = model.get_video_features(sample["pixel_values_videos"], sample["video_timestamps"])
    with pytest.raises(ValueError, match="not both"):
        model(**sample, mm_encoder_outputs={"video": encoded})


def test_encoder_outputs_equal_pixels(model):
    sample = mixed_sample()
    pixels = {key: sample.pop(key) for key in ("pixel_values", "pixel_values_videos", "video_timestamps")}
    expected = logits_of(model, **sample, **pixels)
    with torch.no_grad():
        encoded = {
            "image": model.get_image_features(pixels["pixel_values"]),
            "video": model.get_video_features(pixels["pixel_values_videos"], pixels["video_timestamps"]),
        }
    assert torch.equal(logits_of(model, **sample, mm_encoder_outputs=encoded), expected)
    # one modality may come encoded and the other as pixels; the caller's dict is left alone
    del encoded["image"]
    pixel_values = pixels["pixel_values"]
    assert torch.equal(logits_of(model, **sample, pixel_values=pixel_values, mm_encoder_outputs=encoded), expected)
    assert encoded.keys() == {"video"}


def test_embeddings_instead_of_ids_give_the_same(model):
    sample = mixed_sample()
    expected = logits_of(model, **sample)
    inputs_embeds = model.get_input_embeddings()(sample.pop("input_ids"))
    assert torch.equal(logits_of(model, inputs_embeds=inputs_embeds, **sample), expected)
    with pytest.raises(ValueError, match="exactly one"):
        model(**sample)


def test_placeholders_may_lie_beyond_the_embedding_table(model):
    outside = tiny_model(image_token_id=VOCABULARY, video_token_id=VOCABULARY + 1)
    sample = mixed_sample()
    expected = logits_of(outside, **sample | {"input_ids": renumbered(sample["input_ids"])})
    assert torch.equal(expected, logits_of(model, **sample))
    sample["inputs_embeds"] = model.get_input_embeddings()(sample.pop("input_ids"))
    with pytest.raises(ValueError, match="pass input_ids"):
        outside(**sample)


def renumbered(input_ids: torch.Tensor) -> torch.Tensor:
    return input_ids.where(input_ids != IMAGE, VOCABULARY).where(input_ids != VIDEO, VOCABULARY + 1)


# --- batches, caches, generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles(model, side):
    samples = [video_sample(0, 4, text=5), video_sample(1, 2, text=9), video_sample(2, 3, text=2)]
    logits = logits_of(model, **batched(samples, side))
    for row, sample in zip(logits, samples, strict=True):
        length = sample["input_ids"].shape[1]
        row = row[-length:] if side == "left" else row[:length]
        torch.testing.assert_close(row, logits_of(model, **sample)[0], atol=1e-5, rtol=0)


def greedy(model, inputs, **options) -> list[list[int]]:
    options = {"max_new_tokens": 8, "do_sample": False} | options
    output = model.generate(**inputs, **options)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def test_generation_of_a_left_padded_batch_equals_singles(model):
    samples = [video_sample(0, 4), video_sample(1, 2, text=9)]
    assert greedy(model, batched(samples, "left")) == [greedy(model, sample)[0] for sample in samples]


@pytest.mark.parametrize("make", [lambda: video_sample(0), mixed_sample])
def test_generation_is_the_same_with_and_without_every_cache(model, make):
    expected = greedy(model, make())
    assert len(set(expected[0])) > 1
    assert greedy(model, make(), use_cache=False) == expected
    assert greedy(model, make(), cache_implementation="static", disable_compile=True) == expected
    assert greedy(model, make(), prefill_chunk_size=7) == expected


def test_cached_steps_equal_one_pass(model):
    sample = video_sample(0)
    expected = logits_of(model, **sample)
    cut = sample["input_ids"].shape[1] - 3
    first = sample | {key: sample[key][:, :cut] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        output = model(**first, use_cache=True)
        logits = [output.logits]
        for i in range(cut, cut + 3):
            output = model(
                input_ids=sample["input_ids"][:, i : i + 1],
                attention_mask=sample["attention_mask"][:, : i + 1],
                past_key_values=output.past_key_values,
            )
            logits.append(output.logits)
    torch.testing.assert_close(torch.cat(logits, 1), expected, atol=1e-5, rtol=0)


def test_beams_of_a_batch_equal_beams_of_singles(model):
    first = mixed_sample()
    second = {key: value.clone() for key, value in mixed_sample().items()}
    second["pixel_values"], second["pixel_values_videos"] = -second["pixel_values"], -second["pixel_values_videos"]
    both = {key: torch.cat([first[key], second[key]]) for key in first}
    singles = [greedy(model, sample, num_beams=3)[0] for sample in (first, second)]
    assert singles[0] != singles[1]
    assert greedy(model, both, num_beams=3) == singles


def test_generate_encodes_once(model):
    calls = []
    hook = model.model.vision_tower.register_forward_pre_hook(lambda *args: calls.append(1))
    greedy(model, video_sample(0), max_new_tokens=4)
    hook.remove()
    assert len(calls) == 1


def test_generate_from_text_alone(model):
    assert len(greedy(model, {"input_ids": torch.tensor([[1, 5, 7]])})[0]) == 8


def test_eager_equals_sdpa(model):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager.model.language_model.config._attn_implementation == "eager"
    assert eager.model.vision_tower.config._attn_implementation == "eager"
    batch = batched([video_sample(0, 4), video_sample(1, 2)], "left")
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(logits_of(eager, **batch)[real], logits_of(model, **batch)[real], atol=1e-5, rtol=0)


def test_logits_to_keep_selects_rows(model):
    sample = video_sample(0)
    logits = logits_of(model, **sample)
    for keep, rows in ((3, slice(-3, None)), (torch.tensor([0, 4, 9]), torch.tensor([0, 4, 9]))):
        torch.testing.assert_close(logits_of(model, **sample, logits_to_keep=keep), logits[:, rows], atol=1e-6, rtol=0)


# --- training ------------------------------------------------------------------------------------------------------


def gradients(model, sample) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**sample, labels=sample["input_ids"]).loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_every_part_learns_except_the_layers_after_the_selected_one():
    names = gradients(tiny_model().train(), video_sample(0)).keys()
    silent = {name for name, _ in tiny_model().named_parameters()} - names
    assert all("vision_tower.encoder.layers.1." in name or "post_layernorm" in name for name in silent)


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(frozen):
    plain, checkpointed = tiny_model().train(), tiny_model().train()
    for model in (plain, checkpointed):
        model.model.vision_tower.requires_grad_(not frozen)
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    assert checkpointed.is_activation_checkpointing
    expected, got = gradients(plain, mixed_sample()), gradients(checkpointed, mixed_sample())
    assert expected.keys() == got.keys()
    assert any("vision_tower" in name for name in expected) != frozen
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


def test_a_frozen_tower_has_no_graph_even_when_embeddings_require_gradients():
    model = tiny_model().train()
    model.model.vision_tower.requires_grad_(False)
    model.enable_input_require_grads()  # as gradient checkpointing and PEFT do, to the tower's patch embedding too
    seen = []
    model.model.vision_tower.register_forward_hook(lambda module, args, output: seen.append(output))
    model(**video_sample(0)).logits.sum().backward()
    assert seen[0].last_hidden_state.grad_fn is None
    assert model.model.multi_modal_projector.layers[1].weight.grad.abs().sum() > 0


def test_a_frozen_tower_still_passes_gradients_to_pixels():
    model = tiny_model()
    model.requires_grad_(False)
    sample = video_sample(0)
    sample["pixel_values_videos"].requires_grad_()
    model(**sample).logits.sum().backward()
    assert sample["pixel_values_videos"].grad.abs().sum() > 0


def test_loss_is_the_mean_cross_entropy_of_the_next_token(model):
    sample = video_sample(0)
    labels = sample["input_ids"].masked_fill(sample["input_ids"] == VIDEO, -100)
    with torch.no_grad():
        output = model(**sample, labels=labels)
    expected = nn.functional.cross_entropy(output.logits[0, :-1], labels[0, 1:])
    torch.testing.assert_close(output.loss, expected, atol=1e-6, rtol=0)


def test_base_model_gives_what_the_head_needs(model):
    # TRL computes the loss from the base model's hidden states, and passes it arguments that it does not know
    sample = video_sample(0)
    with torch.no_grad():
        output = model.base_model(**sample, fused_lm_head=True, output_hidden_states=[-2])
        logits = model.get_output_embeddings()(output.last_hidden_state)
    assert torch.equal(logits, logits_of(model, **sample))
    assert [state is not None for state in output.hidden_states] == [False, True, False]


# --- parts ---------------------------------------------------------------------------------------------------------


def test_resized_embeddings_keep_the_old_logits(model):
    resized = copy.deepcopy(model)
    resized.resize_token_embeddings(VOCABULARY + 8)
    assert resized.config.text_config.vocab_size == VOCABULARY + 8
    logits = logits_of(resized, **video_sample(0))
    assert logits.shape[-1] == VOCABULARY + 8
    torch.testing.assert_close(logits[..., :VOCABULARY], logits_of(model, **video_sample(0)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("text", [{}, {"model_type": "llama"}, {"model_type": "gpt2", "n_inner": 48}])
def test_tied_flag_of_the_text_config_ties_the_whole_model(text):
    model = tiny_model(text={"tie_word_embeddings": True} | text)
    assert model.config.tie_word_embeddings
    assert model.lm_head.weight is model.get_input_embeddings().weight
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert logits_of(model, **video_sample(0)).shape[-1] == VOCABULARY + 3


def test_untied_is_the_default(model):
    assert model.lm_head.weight is not model.get_input_embeddings().weight


def test_a_tower_with_a_class_token_works():
    vision = VISION | {"model_type": "clip_vision_model"}
    del vision["vision_use_head"]
    config = RGPT4DConfig(
        vision_config=vision, text_config=TEXT, image_token_id=IMAGE, video_token_id=VIDEO, frame_end_token_id=FRAME_END
    )
    model = RGPT4DForConditionalGeneration(config).eval()
    pixels = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-2]
        expected = model.model.multi_modal_projector(hidden[:, 1:])
    assert hidden.shape[1] == 17
    torch.testing.assert_close(model.get_image_features(pixels).pooler_output[0], expected[0], atol=1e-6, rtol=0)
