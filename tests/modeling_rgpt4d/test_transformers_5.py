"""What has cost ports of NVILA to transformers 5 their accuracy without a message: one test a cause.

The letters are those of modeling_rgpt4d/PARITY.md, where each is measured with several versions.
"""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig
from transformers.image_processing_backends import PilBackend

from modeling_rgpt4d.convert_nvila import convert_nvila, convert_to_nvila
from tests.modeling_rgpt4d.test_convert_nvila import SAMPLING, Parts, sample
from tests.modeling_rgpt4d.test_modeling_rgpt4d import batched, tiny_model, video_sample


@pytest.fixture(scope="module")
def parts():
    return Parts()


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    scratch = tmp_path_factory.mktemp("converted")
    convert_nvila(parts.save(scratch / "source"), scratch / "model")
    return scratch / "model"


@pytest.fixture
def model(folder):
    return AutoModelForImageTextToText.from_pretrained(folder).eval()


def test_every_tensor_equals_the_file(model, folder):  # A
    stored = load_file(folder / "model.safetensors")
    assert stored.keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, stored[name]), name


def test_position_ids_count_up(model):  # B
    buffers = {n: b for n, b in model.named_buffers() if n.endswith("position_ids")}
    assert buffers, "the tower should have them"
    for buffer in buffers.values():
        assert torch.equal(buffer.flatten(), torch.arange(buffer.numel()))
    # and no other buffer is left to chance: two loads are equal
    again = AutoModelForImageTextToText.from_pretrained(model.name_or_path)
    for (name, buffer), other in zip(model.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(buffer, other), name


def test_generation_is_greedy_whatever_the_source_says(model, parts, folder):  # C
    assert SAMPLING["do_sample"] and json.loads((folder / "conversion.json").read_text())["dropped_sampling_values"]
    inputs = sample(parts)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    answers = []
    for config in (None, GenerationConfig(), GenerationConfig(max_new_tokens=8)):
        for seed in range(3):
            torch.manual_seed(seed)
            options = {} if config is not None and config.max_new_tokens else {"max_new_tokens": 8}
            answers.append(model.generate(**inputs, generation_config=config, **options).tolist())
    assert all(answer == answers[0] for answer in answers)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_model_keeps_its_rotary_frequencies(folder, dtype):  # D
    loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype)
    cast = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).to(dtype)
    half = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    half = half.bfloat16() if dtype == torch.bfloat16 else half.half()
    frequencies = {n: b for n, b in loaded.named_buffers() if "inv_freq" in n}
    assert frequencies
    for other in (cast, half):
        assert {p.dtype for p in other.parameters()} == {dtype}
        for name, buffer in frequencies.items():
            assert other.get_buffer(name).dtype == torch.float32 == buffer.dtype
            assert torch.equal(other.get_buffer(name), buffer)
    ids = torch.randint(0, 200, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, cast(input_ids=ids).logits)


def test_rope_theta_survives_both_ways(model, parts, folder, tmp_path):  # E
    theta = parts.llm_config["rope_theta"]
    assert model.config.text_config.rope_parameters["rope_theta"] == theta
    inverse = model.model.language_model.rotary_emb.inv_freq
    expected = theta ** -(torch.arange(len(inverse), dtype=torch.float64) / len(inverse))
    torch.testing.assert_close(inverse.double(), expected, rtol=1e-6, atol=0)
    # a folder that knows no source: its configs are written anew, for readers of transformers 4 and 5
    model.save_pretrained(tmp_path / "saved")
    AutoProcessor.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    convert_to_nvila(tmp_path / "saved", tmp_path / "back")
    written = json.loads((tmp_path / "back" / "llm" / "config.json").read_text())
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == theta


def test_left_padded_batch_equals_singles():  # F
    model = tiny_model()
    samples = [video_sample(1, num_frames=2), video_sample(2, num_frames=4, text=9), video_sample(3, text=3)]
    batch = batched(samples, "left")
    assert len({len(s["input_ids"][0]) for s in samples}) == 3
    with torch.no_grad():
        logits = model(**batch).logits
        for row, one in zip(logits, samples, strict=True):
            length = one["input_ids"].shape[1]
            torch.testing.assert_close(row[-length:], model(**one).logits[0], atol=1e-5, rtol=1e-5)


def test_pictures_are_resized_by_pil(folder):  # G
    processor = AutoProcessor.from_pretrained(folder)
    assert isinstance(processor.image_processor, PilBackend)
    generator = torch.Generator().manual_seed(0)
    array = torch.randint(0, 256, (75, 133, 3), generator=generator, dtype=torch.uint8).numpy()
    side = processor.image_processor.size["height"]
    resized = Image.fromarray(array).resize((side, side), Image.Resampling.BICUBIC)
    expected = torch.tensor(list(resized.tobytes())).view(side, side, 3).permute(2, 0, 1) / 127.5 - 1
    frames = processor.video_processor([array] * 2, video_metadata=[{"fps": 1}], num_frames=2, return_tensors="pt")
    pixels = processor.image_processor(Image.fromarray(array), return_tensors="pt")["pixel_values"]
    for value in (pixels[0], *frames["pixel_values_videos"][0]):
        torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
