"""4D-Concat and 4D-PE: the teacher's latents as an input of the model (Table 4)."""

import runpy
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.make_small_model import build_model
from modeling_rgpt4d.geometry_fusion import rearrange_geometry
from modeling_rgpt4d.modeling_l4p import L4PModel
from modeling_rgpt4d.modeling_rgpt4d import RGPT4DForConditionalGeneration
from modeling_rgpt4d.timestamp_encoding import TimestampEncoding
from tests.modeling_rgpt4d.test_modeling_l4p import tiny_config as tiny_teacher_config
from tests.modeling_rgpt4d.test_modeling_rgpt4d import (
    FRAME_END,
    IMAGE,
    VIDEO,
    batched,
    gradients,
    greedy,
    logits_of,
    media,
    mixed_sample,
    tiny_config,
    tiny_model,
    video_sample,
)

WIDTH = 6  # c'
FUSIONS = ["concat", "positional"]
NEW_WEIGHT = {
    "concat": "model.multi_modal_projector.geometry.weight",
    "positional": "model.geometry_encoding.weight",
}


@pytest.fixture(scope="module", params=FUSIONS)
def model(request):
    """All weights are drawn, those of the geometry, too: as after training."""
    return fused_model(request.param)


def fused_model(fusion: str, **options) -> RGPT4DForConditionalGeneration:
    return tiny_model(geometry_fusion=fusion, geometry_hidden_size=WIDTH, **options)


def latents(seed: int, num_videos: int = 1, latent_frames: int = 2, grid: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + seed)
    return 30 * torch.randn(num_videos, latent_frames, grid, grid, WIDTH, generator=generator)


def sample_with_geometry(seed: int, num_frames: int = 4, **options) -> dict[str, torch.Tensor]:
    geometry = latents(seed, latent_frames=num_frames // 2)
    return video_sample(seed, num_frames, **options) | {"video_geometry": geometry}


def mixed_with_geometry() -> dict[str, torch.Tensor]:
    """Two images, and two videos of 2 and 3 frames, padded to 3: one latent frame for each."""
    return mixed_sample() | {"video_geometry": latents(3, num_videos=2, latent_frames=3)}


# --- configuration -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        ({"geometry_fusion": "add"}, "'concat'"),
        ({"geometry_fusion": "concat"}, "1408 for the released L4P"),
        ({"geometry_fusion": "positional", "geometry_hidden_size": -1}, "geometry_hidden_size is -1"),
    ],
)
def test_config_errors_name_the_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**options)


def test_without_fusion_the_model_is_the_one_before():
    plain = tiny_model()
    assert plain.config.geometry_fusion == "none"
    assert not [name for name, _ in plain.named_modules() if "geometry" in name]
    for fusion in FUSIONS:
        assert fused_model(fusion).state_dict().keys() - plain.state_dict().keys() == {NEW_WEIGHT[fusion]}


# --- rearrangement -------------------------------------------------------------------------------------------------


def test_a_latent_frame_lands_on_the_frames_of_its_tubelet():
    geometry = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])[:, :, None, None, None].expand(2, 3, 2, 2, 5)
    frames = rearrange_geometry(geometry, num_frames=6, side=4)
    assert frames.shape == (2, 6, 16, 5)
    expected = torch.tensor([[1.0, 1, 2, 2, 3, 3], [4.0, 4, 5, 5, 6, 6]])
    assert torch.equal(frames, expected[:, :, None, None].expand(2, 6, 16, 5))


def test_the_grid_of_the_teacher_is_brought_to_the_patches_row_by_row():
    # Patch centres of 4 lie at 1/4 and 3/4 between those of 2: by hand
    top, bottom = [0.0, 1.0, 3.0, 4.0], [8.0, 9.0, 11.0, 12.0]
    between = [[(3 * a + b) / 4 for a, b in zip(top, bottom, strict=True)]]
    between += [[(a + 3 * b) / 4 for a, b in zip(top, bottom, strict=True)]]
    geometry = torch.tensor([[0.0, 4.0], [8.0, 12.0]])[None, None, :, :, None]
    frames = rearrange_geometry(geometry, num_frames=1, side=4)
    torch.testing.assert_close(frames[0, 0, :, 0], torch.tensor(top + between[0] + between[1] + bottom))
    halves = rearrange_geometry(geometry.to(torch.bfloat16), 1, 4)
    assert halves.dtype == torch.bfloat16
    torch.testing.assert_close(halves.float(), frames, atol=0, rtol=2**-8)
    # an equal grid is left as it is, and one that is not square fits, too
    assert torch.equal(rearrange_geometry(geometry, 1, 2)[0, 0, :, 0], torch.tensor([0.0, 4.0, 8.0, 12.0]))
    assert rearrange_geometry(torch.zeros(1, 2, 3, 5, 7), 4, 2).shape == (1, 4, 4, 7)


def normed(geometry: torch.Tensor) -> torch.Tensor:
    centred = geometry - geometry.mean(-1, keepdim=True)
    return centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()


def features_of(model, sample) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the model gives for a video, its features before fusion, and its geometry at the patches."""
    with torch.no_grad():
        output = model.get_video_features(
            sample["pixel_values_videos"], sample["video_timestamps"], video_geometry=sample["video_geometry"]
        )
        tower = model.model.vision_tower(sample["pixel_values_videos"][0], output_hidden_states=True)
        features = tower.hidden_states[-2] + TimestampEncoding(32)(sample["video_timestamps"][0])[:, None]
    geometry = rearrange_geometry(normed(sample["video_geometry"]), len(features), side=4)[0]
    return output.pooler_output[0], features, geometry


def test_positional_adds_a_linear_map_of_the_latents_to_the_features():
    model, sample = fused_model("positional"), sample_with_geometry(0)
    got, features, geometry = features_of(model, sample)
    with torch.no_grad():
        features = features + geometry @ model.model.geometry_encoding.weight.T
        expected = model.model.multi_modal_projector.layers(features).flatten(0, 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("projector_type, k", [("mlp_downsample", 2), ("mlp_downsample_3x3_fix", 3)])
def test_concat_is_one_wide_layer_over_features_and_latents_side_by_side(projector_type, k):
    model, sample = fused_model("concat", projector_type=projector_type), sample_with_geometry(0)
    got, features, geometry = features_of(model, sample)
    projector = model.model.multi_modal_projector
    to_blocks, norm, linear, *rest = projector.layers
    wide = torch.cat(
        [linear.weight.unflatten(1, (k * k, -1)), projector.geometry.weight.unflatten(1, (k * k, WIDTH))], dim=2
    ).flatten(1)
    with torch.no_grad():
        blocks = norm(to_blocks(features)).unflatten(2, (k * k, -1))
        blocks = torch.cat([blocks, to_blocks(geometry).unflatten(2, (k * k, -1))], dim=3).flatten(2)
        assert blocks.shape[2] == k * k * (32 + WIDTH) == wide.shape[1]
        expected = nn.Sequential(*rest)(nn.functional.linear(blocks, wide, linear.bias)).flatten(0, 1)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def test_latents_decide_the_logits_and_their_scale_does_not(model):
    sample = sample_with_geometry(0)
    logits = logits_of(model, **sample)
    other = logits_of(model, **sample | {"video_geometry": latents(7)})
    assert (logits - other).abs().max() > 0.05
    swapped = logits_of(model, **sample | {"video_geometry": sample["video_geometry"].flip(1)})
    assert (logits - swapped).abs().max() > 0.05  # the order of time counts
    larger = logits_of(model, **sample | {"video_geometry": 100 * sample["video_geometry"]})
    torch.testing.assert_close(logits, larger, atol=1e-4, rtol=0)


# --- start, save and load ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_pretrained_model_with_fusion_starts_as_it_was(tmp_path, fusion, dtype):
    plain, sample = tiny_model().to(dtype), sample_with_geometry(0)
    plain.save_pretrained(tmp_path)
    fused, report = RGPT4DForConditionalGeneration.from_pretrained(
        tmp_path, geometry_fusion=fusion, geometry_hidden_size=WIDTH, output_loading_info=True, dtype=dtype
    )
    assert set(report["missing_keys"]) == {NEW_WEIGHT[fusion]} and not report["mismatched_keys"]
    assert not fused.state_dict()[NEW_WEIGHT[fusion]].any()
    expected = logits_of(plain, **{key: value for key, value in sample.items() if key != "video_geometry"})
    assert torch.equal(logits_of(fused, **sample), expected)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_a_new_model_with_fusion_starts_with_zeros(fusion):
    model = RGPT4DForConditionalGeneration(tiny_config(geometry_fusion=fusion, geometry_hidden_size=WIDTH))
    assert not model.state_dict()[NEW_WEIGHT[fusion]].any()


def test_a_saved_model_keeps_its_fusion_and_can_be_loaded_without(model, tmp_path):
    sample = sample_with_geometry(0)
    model.save_pretrained(tmp_path)
    again, report = RGPT4DForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and again.config.geometry_fusion == model.config.geometry_fusion
    assert torch.equal(logits_of(again, **sample), logits_of(model, **sample))
    plain = RGPT4DForConditionalGeneration.from_pretrained(tmp_path, geometry_fusion="none")
    del sample["video_geometry"]
    assert logits_of(plain, **sample).isfinite().all()


STRANGER = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

folder, inputs, resaved = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
inputs = load_file(inputs)
logits, answer = inputs.pop("logits"), inputs.pop("answer")
with torch.no_grad():
    assert torch.equal(model(**inputs).logits, logits)
assert torch.equal(model.generate(**inputs, max_new_tokens=6, do_sample=False), answer)
model.save_pretrained(resaved)
"""


def test_a_stranger_loads_generates_and_saves_a_fused_model(tmp_path, run_as_stranger):
    model, sample = fused_model("concat"), mixed_with_geometry()
    model.save_pretrained(tmp_path / "first")
    told = {"logits": logits_of(model, **sample), "answer": model.generate(**sample, max_new_tokens=6, do_sample=False)}
    save_file(sample | told, tmp_path / "inputs.safetensors")
    for folder, resaved in (("first", "second"), ("second", "third")):
        run_as_stranger(STRANGER, tmp_path / folder, tmp_path / "inputs.safetensors", tmp_path / resaved)
        assert (tmp_path / resaved / "geometry_fusion.py").is_file()


# --- batches, images, generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_batch_equals_singles_and_padding_drops_the_geometry_too(model, side):
    samples = [sample_with_geometry(0, 4), sample_with_geometry(1, 2, text=9)]
    geometries = [sample["video_geometry"] for sample in samples]
    batch = batched([{k: v for k, v in sample.items() if k != "video_geometry"} for sample in samples], side)
    padding = torch.full_like(geometries[1], torch.nan)  # any use of it would show
    batch["video_geometry"] = torch.cat([geometries[0], torch.cat([geometries[1], padding], dim=1)])
    logits = logits_of(model, **batch)
    for row, sample in zip(logits, samples, strict=True):
        length = sample["input_ids"].shape[1]
        row = row[-length:] if side == "left" else row[:length]
        torch.testing.assert_close(row, logits_of(model, **sample)[0], atol=1e-5, rtol=0)
    if side == "left":
        assert greedy(model, batch) == [greedy(model, sample)[0] for sample in samples]


def test_several_videos_and_images_in_one_sample_keep_their_geometry(model):
    sample = mixed_with_geometry()
    with torch.no_grad():
        together = model(**sample).video_hidden_states
    for index, length in enumerate((2, 3)):
        alone = model.get_video_features(
            sample["pixel_values_videos"][index : index + 1, :length],
            sample["video_timestamps"][index : index + 1, :length],
            video_geometry=sample["video_geometry"][index : index + 1, :length],
        )
        torch.testing.assert_close(together[index], alone.pooler_output[0].detach(), atol=1e-5, rtol=0)


def test_images_and_texts_are_seen_as_without_fusion(model):
    plain = tiny_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    ids = torch.tensor([[1, *media(4, IMAGE), 20, 21]])
    pixels = torch.randn(1, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    for inputs in ({"input_ids": ids, "pixel_values": pixels}, {"input_ids": torch.tensor([[1, 5, 7]])}):
        assert torch.equal(logits_of(model, **inputs), logits_of(plain, **inputs))


def test_an_image_of_several_scales_works_with_fusion(model):
    scales = {"s2_scales": [56, 112], "s2_resize_output_to_scale_idx": -1}
    scaled = fused_model(model.config.geometry_fusion, **scales)
    pixels, blocks = torch.randn(5 + 1, 3, 56, 56), torch.tensor([[2, 2], [1, 1]])
    with torch.no_grad():
        features = scaled.get_image_features(pixels, blocks).pooler_output
        video = scaled.get_video_features(torch.randn(1, 2, 3, 56, 56), torch.zeros(1, 2), video_geometry=latents(0))
    assert [len(image) for image in features] == [4 * 4, 4] and len(video.pooler_output[0]) == 2 * 4


@pytest.mark.parametrize("make", [lambda: sample_with_geometry(0), mixed_with_geometry])
def test_generation_is_the_same_with_and_without_every_cache(model, make):
    expected = greedy(model, make())
    assert len(set(expected[0])) > 1
    assert greedy(model, make(), use_cache=False) == expected
    assert greedy(model, make(), cache_implementation="static", disable_compile=True) == expected
    assert greedy(model, make(), prefill_chunk_size=7) == expected
    assert greedy(model, make(), fast=True) == expected


def beams(model, sample) -> tuple[list[list[int]], torch.Tensor]:
    options = {"num_beams": 3, "max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True}
    output = model.generate(**sample, **options)
    return output.sequences.tolist(), output.sequences_scores


def test_beams_of_a_batch_equal_beams_of_singles(model):
    first, second = mixed_with_geometry(), mixed_with_geometry()
    second["video_geometry"] = latents(4, num_videos=2, latent_frames=3)
    both = {key: torch.cat([first[key], second[key]]) for key in first}
    (one, score_of_one), (other, score_of_other) = beams(model, first), beams(model, second)
    assert (score_of_one - score_of_other).abs() > 1e-3
    answers, scores = beams(model, both)
    assert answers == one + other
    torch.testing.assert_close(scores, torch.cat([score_of_one, score_of_other]), atol=1e-5, rtol=0)


def test_encoder_outputs_equal_pixels_and_latents(model):
    sample = sample_with_geometry(0)
    expected = logits_of(model, **sample)
    video = [sample.pop(key) for key in ("pixel_values_videos", "video_timestamps", "video_geometry")]
    with torch.no_grad():
        encoded = model.get_video_features(video[0], video[1], video_geometry=video[2])
    assert torch.equal(logits_of(model, **sample, mm_encoder_outputs={"video": encoded}), expected)
    with pytest.raises(ValueError, match="give both, or leave out both"):
        model(**sample, mm_encoder_outputs={"video": encoded}, video_geometry=video[2])


# --- errors --------------------------------------------------------------------------------------------------------


def test_missing_geometry_is_an_error(model):
    with pytest.raises(ValueError, match=r"L4PModel.encode\(frames\)\[:, -1\]"):
        model(**video_sample(0))
    with pytest.raises(ValueError, match="geometry_fusion='none'"):
        model.generate(**video_sample(0), max_new_tokens=1)


def test_geometry_without_a_video_is_an_error(model):
    sample = video_sample(0)
    only_text = {"input_ids": torch.full((1, 3), 5), "video_geometry": latents(0)}
    encoded = model.get_video_features(**{k: v for k, v in sample_with_geometry(0).items() if "video" in k})
    again = {"input_ids": sample["input_ids"], "mm_encoder_outputs": {"video": encoded}, "video_geometry": latents(0)}
    for inputs in (only_text, again):
        with pytest.raises(ValueError, match="video_geometry goes with pixel_values_videos"):
            model(**inputs)
        for fast in (False, True):
            with pytest.raises(ValueError, match="video_geometry goes with pixel_values_videos"):
                model.generate(**inputs, max_new_tokens=1, fast=fast)


def test_superfluous_geometry_is_an_error():
    plain = tiny_model()
    with pytest.raises(ValueError, match="leave it out"):
        plain(**sample_with_geometry(0))
    with pytest.raises(ValueError, match="leave it out"):
        plain.generate(**sample_with_geometry(0), max_new_tokens=1)


@pytest.mark.parametrize(
    "shape",
    [
        (1, 2, 3, 3, WIDTH + 1),
        (2, 2, 3, 3, WIDTH),
        (1, 3, 3, 3, WIDTH),  # 4 frames cannot be shared out to 3
        (1, 0, 3, 3, WIDTH),
        (1, 4, 2, 3, 3, WIDTH),  # all taps
    ],
)
def test_geometry_of_another_shape_is_refused(model, shape):
    with pytest.raises(ValueError, match=rf"\(1, N', h', w', {WIDTH}\), where N' divides the 4 frames"):
        model(**video_sample(0) | {"video_geometry": torch.zeros(shape)})


# --- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradients_reach_the_new_weights_from_their_start(fusion):
    model = fused_model(fusion).train()
    model.model.vision_tower.requires_grad_(False)
    weight = model.get_parameter(NEW_WEIGHT[fusion])
    with torch.no_grad():
        weight.zero_()
    assert gradients(model, mixed_with_geometry())[NEW_WEIGHT[fusion]].abs().max() > 1e-4
    # A batch of images alone has the same parameters in its graph, as DDP needs; its gradient there is zero
    ids = torch.tensor([[1, *media(4, IMAGE), 20, FRAME_END]])
    assert VIDEO not in ids
    alone = gradients(model, {"input_ids": ids, "pixel_values": torch.randn(1, 3, 56, 56)})
    assert not alone[NEW_WEIGHT[fusion]].any()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_gradient_checkpointing_gives_the_same_gradients(fusion):
    plain, checkpointed = fused_model(fusion).train(), fused_model(fusion).train()
    checkpointed.activation_checkpointing_enable({"use_reentrant": False})
    expected, got = (gradients(model, mixed_with_geometry()) for model in (plain, checkpointed))
    assert expected.keys() == got.keys() and NEW_WEIGHT[fusion] in expected
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, atol=1e-6, rtol=1e-5, msg=name)


# --- the scripts ---------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[2] / "examples"
REGION = {"name": "obj_1", "box": [10, 20, 60, 60]}
QUESTION = "Which way does <obj_1> move?"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """`model/` with fusion, `plain/` without, `teacher/`, `clip.mp4` and `backwards.mp4`."""
    folder = tmp_path_factory.mktemp("fusion")
    torch.manual_seed(0)
    model, processor = build_model(tiny_tokenizer, image_size=32, patch_size=8, width=64, layers=2)
    model.save_pretrained(folder / "plain")
    teacher = L4PModel(tiny_teacher_config())
    for parameter in teacher.encoder.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that one tap differs from the next
    teacher.save_pretrained(folder / "teacher")
    fused = RGPT4DForConditionalGeneration.from_pretrained(
        folder / "plain", geometry_fusion="positional", geometry_hidden_size=teacher.config.hidden_size
    )
    with torch.no_grad():
        for parameter in fused.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.15)  # wide, so that what is seen decides what is said
    fused.save_pretrained(folder / "model")
    for name in ("plain", "model"):
        processor.save_pretrained(folder / name)
    for name, pictures in {"clip.mp4": range(20), "backwards.mp4": range(19, -1, -1)}.items():
        with av.open(str(folder / name), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
            for i in pictures:
                picture = np.full((64, 96, 3), 10 * i, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            container.mux(stream.encode(None))
    return folder


def expected_answer(folder, num_new_tokens: int) -> str:
    """The steps by hand; the teacher sees the frames without the mark."""
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    teacher = L4PModel.from_pretrained(folder / "teacher").eval()

    def read(regions, text):
        content = [{"type": "video", "video": str(folder / "clip.mp4"), "regions": regions}]
        return processor.apply_chat_template(
            [{"role": "user", "content": [*content, {"type": "text", "text": text}]}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"num_frames": 4},
        )

    inputs, unmarked = read([REGION], QUESTION), read([], "Nothing is marked.")["pixel_values_videos"]
    assert not torch.equal(inputs["pixel_values_videos"], unmarked)
    student, config = processor.video_processor, teacher.config
    student_mean, student_std, mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (student.image_mean, student.image_std, config.image_mean, config.image_std)
    )
    with torch.no_grad():
        geometry = teacher.encode((unmarked * student_std + student_mean - mean) / std)[:, -1]
    output = model.generate(**inputs, video_geometry=geometry, max_new_tokens=num_new_tokens, do_sample=False)
    return processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.fixture
def ask(folder, monkeypatch, capsys):
    def run(model: str, *options) -> str:
        options = ["--model", folder / model, "--video", folder / "clip.mp4", "--num-frames", 4, *options]
        options += ["--region", "obj_1:10,20,60,60", "--question", QUESTION, "--max-new-tokens", 12]
        monkeypatch.setattr(sys, "argv", ["generate.py", *map(str, options)])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / "generate.py"), run_name="__main__")
        return capsys.readouterr().out.strip()

    return run


def test_generate_script_gives_the_teachers_latents(folder, ask):
    assert ask("model", "--teacher", folder / "teacher") == expected_answer(folder, 12)


def test_generate_script_says_whether_a_teacher_is_needed(folder, ask):
    with pytest.raises(SystemExit, match="--teacher FOLDER"):
        ask("model")
    with pytest.raises(SystemExit, match="leave out --teacher"):
        ask("plain", "--teacher", folder / "teacher")


def test_evaluation_gives_each_video_its_latents(folder, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    script = runpy.run_path(str(EXAMPLES / "answering.py"))

    def question(name):
        content = [
            {"type": "video", "video": str(folder / name), "regions": [REGION]},
            {"type": "text", "text": QUESTION},
        ]
        return script["Question"]("clips", name, lambda: [{"role": "user", "content": content}])

    def replies(names, batch_size):
        answerer = script["ModelAnswerer"](
            str(folder / "model"),
            "cpu",
            num_frames=4,
            batch_size=batch_size,
            max_new_tokens=8,
            teacher=str(folder / "teacher"),
        )
        answers = list(answerer.answers(map(question, names)))
        assert [answer.error for answer in answers] == [None] * len(names)
        return [answer.reply for answer in answers]

    names = ["clip.mp4", "backwards.mp4"]
    together = replies(names, 2)
    assert together[0] != together[1]
    assert together == replies(names, 1)


def test_video_too_short_for_its_geometry_ends_with_a_message(folder, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    script = runpy.run_path(str(EXAMPLES / "generate.py"))
    processor = AutoProcessor.from_pretrained(folder / "model")
    model = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    teacher = script["load_teacher"](model, str(folder / "teacher"))
    short = {"pixel_values_videos": torch.zeros(1, 4, 3, 32, 32), "video_timestamps": torch.tensor([[0, 1, 2, -1]])}
    with pytest.raises(SystemExit, match="fewer than the 4 frames"):
        script["add_geometry"](short, teacher, processor)
