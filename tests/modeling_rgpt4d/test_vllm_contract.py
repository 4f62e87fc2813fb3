"""What vLLM's Transformers back end needs of a model with remote code (examples/serving.md), without the engine.

The last tests let vLLM's own processor read a request. They run where vllm is installed, which needs no GPU for them.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from examples.make_small_model import build_model
from modeling_rgpt4d import RGPT4DModel

PAGE = (Path(__file__).parents[2] / "examples" / "serving.md").read_text(encoding="utf-8")
(COMMAND,) = re.findall(r"^vllm serve .*$", PAGE, re.MULTILINE)
WORDS = shlex.split(COMMAND)
OVERRIDES = json.loads(WORDS[WORDS.index("--hf-overrides") + 1])
PROCESSOR_OPTIONS = json.loads(WORDS[WORDS.index("--mm-processor-kwargs") + 1])
REGIONS = [{"name": "obj_1", "box": [10, 20, 60, 60]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("vllm") / "model"
    torch.manual_seed(0)
    for part in build_model(tiny_tokenizer, image_size=32, patch_size=8, width=64, layers=2):
        part.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return RGPT4DModel.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def video(num_frames: int = 4) -> tuple[np.ndarray, dict]:
    """Frames that the engine has sampled from a video of 20 frames, and what it tells about them."""
    frames = np.random.default_rng(num_frames).integers(0, 256, (num_frames, 64, 96, 3), dtype=np.uint8)
    indices = np.linspace(0, 19, num_frames).astype(int).tolist()
    told = {"fps": 10.0, "duration": 2.0, "total_num_frames": 20, "frames_indices": indices, "video_backend": "opencv"}
    return frames, told


def read(processor, text: str, *videos, **options):
    """The call that the back end makes."""
    return processor(
        text=text,
        videos=[frames for frames, _ in videos],
        video_metadata=[told for _, told in videos],
        do_sample_frames=False,
        return_tensors="pt",
        **options,
    )


def prompt(processor, text: str, num_videos: int = 1) -> str:
    content = [*[{"type": "video"}] * num_videos, {"type": "text", "text": text}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def test_the_override_of_the_page_makes_the_model_without_its_head(folder, run_as_stranger):
    printed = run_as_stranger(
        "import json, sys, torch; from transformers import AutoConfig, AutoModel\n"
        "config = AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "config.update(json.loads(sys.argv[2]))\n"
        "with torch.device('meta'):\n"
        "    model = AutoModel.from_config(config, dtype=torch.bfloat16, trust_remote_code=True)\n"
        "print(type(model).__name__, model.is_backend_compatible())",
        folder,
        json.dumps(OVERRIDES),
    )
    assert printed.split() == ["RGPT4DModel", "True"]


def test_parts_are_found_by_name(model):
    assert model.get_decoder() is model.language_model
    for modality in ("image", "video"):
        assert model.get_encoder(modality=modality) is model.vision_tower
    assert model.config.get_text_config() is model.config.text_config
    assert model.base_model_prefix == "model"  # the prefix of its weights in a saved folder


def test_tokens_are_counted_before_there_is_a_medium(processor):
    frames, told = video(4)
    ids = read(processor, "<video>", (frames, told))["input_ids"]
    counts = processor._get_num_multimodal_tokens(image_sizes=[(64, 96)], video_sizes=[(4, 64, 96)])
    assert counts["num_video_tokens"] == [ids.shape[1]]
    image = processor(text="<image>", images=[frames[0]], return_tensors="pt")
    assert counts["num_image_tokens"] == [image["input_ids"].shape[1]]
    assert counts["num_image_patches"] == [image["pixel_values"].shape[0]]


@pytest.mark.parametrize("question", ["How fast?", "\nHow fast?"])
def test_replacements_encoded_by_themselves_give_the_ids_of_the_processor(processor, question):
    """The engine tokenises the prompt with one token for each medium, and exchanges these for the encoded replacements."""
    text = prompt(processor, question, num_videos=2)
    inputs = read(processor, text, video(4), video(2), return_text_replacement_offsets=True)
    replacements = iter(inputs["text_replacement_offsets"][0])
    ids = []
    for token in processor.tokenizer.encode(text, add_special_tokens=False):
        if token == processor.video_token_id:
            ids += processor.tokenizer.encode(next(replacements)["replacement"], add_special_tokens=False)
        else:
            ids.append(token)
    assert ids == inputs["input_ids"][0].tolist()
    assert processor.frame_end_placeholder_id not in ids


def test_every_field_is_declared_and_has_a_row_for_each_video(processor):
    inputs = read(processor, "<video><video>", video(4), video(2), **PROCESSOR_OPTIONS)
    fields = set(inputs) - {"input_ids", "attention_mask"}
    assert fields == {"pixel_values_videos", "video_timestamps"} <= set(processor.video_processor.model_input_names)
    assert {len(inputs[field]) for field in fields} == {2}


def test_times_in_microseconds_survive_a_cast_and_give_the_features_of_seconds(model, processor):
    seconds = read(processor, "<video><video>", video(4), video(2))
    inputs = read(processor, "<video><video>", video(4), video(2), **PROCESSOR_OPTIONS)
    assert inputs["video_timestamps"].dtype == torch.int64
    assert inputs["video_timestamps"].tolist() == [[0, 600_000, 1_200_000, 1_900_000], [0, 1_900_000, -1, -1]]
    with torch.no_grad():
        expected, features = (
            model.get_video_features(x["pixel_values_videos"], x["video_timestamps"]).pooler_output
            for x in (seconds, inputs)
        )
    for one, other in zip(features, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match="timestamp_unit"):
        read(processor, "<video>", video(4), timestamp_unit="ms")


def test_a_video_by_itself_has_the_features_that_it_has_in_a_batch(model, processor):
    batch = read(processor, "<video><video>", video(4), video(2), **PROCESSOR_OPTIONS)
    with torch.no_grad():
        expected = model.get_video_features(batch["pixel_values_videos"], batch["video_timestamps"]).pooler_output
        for sample, features in zip((video(4), video(2)), expected, strict=True):
            one = read(processor, "<video>", sample, **PROCESSOR_OPTIONS)
            # so the engine hands on videos of different lengths: its rows in a list
            output = model.get_video_features(
                one["pixel_values_videos"], list(one["video_timestamps"]), return_dict=True
            )
            torch.testing.assert_close(output.pooler_output[0], features, atol=1e-5, rtol=0)
            assert len(features) == (one["input_ids"] == processor.video_token_id).sum()


# --- vLLM's own code ------------------------------------------------------------------------------------------------


def engine_of(folder):
    """What vLLM makes of the page's command: its processor."""
    from vllm.config import ModelConfig
    from vllm.multimodal import MULTIMODAL_REGISTRY

    config = ModelConfig(
        model=str(folder),
        trust_remote_code=True,
        model_impl="transformers",
        dtype="bfloat16",
        max_model_len=2048,
        hf_overrides=OVERRIDES,
        mm_processor_kwargs=PROCESSOR_OPTIONS,
    )
    assert config._model_info.architecture == "TransformersMultiModalForCausalLM"
    return MULTIMODAL_REGISTRY.create_processor(config)


@pytest.fixture(scope="module")
def engine(folder):
    pytest.importorskip("vllm", reason="vllm is not installed")
    return engine_of(folder)


def engine_reads(engine, text: str, options: dict, **media):
    from vllm.multimodal.processing.context import TimingContext
    from vllm.multimodal.processing.inputs import ProcessorInputs

    ids = engine.info.get_tokenizer().encode(text, add_special_tokens=False)
    items = engine.info.parse_mm_data(media)
    return engine.apply(ProcessorInputs(ids, items, hf_processor_mm_kwargs=options), TimingContext())


def test_vllm_reads_videos_and_regions_as_we_do(engine, processor):
    text = prompt(processor, "How fast?", num_videos=2)
    sent = [(frames, {**told, "do_sample_frames": False}) for frames, told in (video(4), video(2))]
    read_by_engine = engine_reads(engine, text, {"videos_kwargs": {"regions": [REGIONS, None]}}, video=sent)
    ours = read(processor, text, video(4), video(2), regions=[REGIONS, None], **PROCESSOR_OPTIONS)
    plain = read(processor, text, video(4), video(2))["pixel_values_videos"]
    assert not torch.equal(plain, ours["pixel_values_videos"])
    assert read_by_engine["prompt_token_ids"] == ours["input_ids"][0].tolist()
    for i, item in enumerate(read_by_engine["mm_kwargs"]["video"]):
        assert torch.equal(item["pixel_values_videos"].data, ours["pixel_values_videos"][i].bfloat16())
        assert torch.equal(item["video_timestamps"].data, ours["video_timestamps"][i])


def test_vllm_reads_a_picture_as_we_do(engine, processor):
    picture = Image.fromarray(video(1)[0][0])
    text = prompt(processor, "What is it?").replace("<video>", "<image>")
    read_by_engine = engine_reads(engine, text, {}, image=[picture])
    ours = processor(text=text, images=[picture], return_tensors="pt")
    assert read_by_engine["prompt_token_ids"] == ours["input_ids"][0].tolist()
    assert torch.equal(read_by_engine["mm_kwargs"]["image"][0]["pixel_values"].data, ours["pixel_values"].bfloat16())


def test_vllm_reads_a_tiled_picture_as_we_do(folder, tmp_path):
    pytest.importorskip("vllm", reason="vllm is not installed")
    shutil.copytree(folder, tmp_path / "tiled")
    processor = AutoProcessor.from_pretrained(tmp_path / "tiled")
    processor.image_processor.image_aspect_ratio, processor.image_processor.max_tiles = "dynamic", 6
    processor.save_pretrained(tmp_path / "tiled")
    engine = engine_of(tmp_path / "tiled")
    picture = Image.fromarray(video(1)[0][0])
    text = prompt(processor, "What is it?").replace("<video>", "<image>")
    ours = processor(text=text, images=[picture], return_tensors="pt")
    assert len(ours["pixel_values"]) == 7
    read_by_engine = engine_reads(engine, text, {}, image=[picture])
    assert read_by_engine["prompt_token_ids"] == ours["input_ids"][0].tolist()
    assert torch.equal(read_by_engine["mm_kwargs"]["image"][0]["pixel_values"].data, ours["pixel_values"].bfloat16())
