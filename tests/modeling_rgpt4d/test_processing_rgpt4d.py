import base64
import copy
import hashlib
import json
import textwrap
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from modeling_rgpt4d.image_processing_rgpt4d import RGPT4DImageProcessor
from modeling_rgpt4d.processing_rgpt4d import RGPT4DBatchFeature, RGPT4DProcessor
from modeling_rgpt4d.region_marks import draw_marks
from modeling_rgpt4d.video_processing_rgpt4d import RGPT4DVideoProcessor

SIZE = {"height": 56, "width": 56}
GRID = 2
FRAME = "<video>" * GRID**2 + "\n"
IMAGE = "<image>" * GRID**2 + "\n"
BOX = [{"name": "obj_1", "box": [10, 20, 60, 60]}]
OPTIONS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture
def processor(tiny_tokenizer) -> RGPT4DProcessor:
    return RGPT4DProcessor(
        RGPT4DImageProcessor(size=SIZE), RGPT4DVideoProcessor(size=SIZE, num_frames=3), tiny_tokenizer, frame_grid=GRID
    )


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> str:
    path = str(tmp_path_factory.mktemp("videos") / "street.mp4")
    with av.open(path, "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(20):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((64, 96, 3), 10 * i, np.uint8), format="rgb24"))
            )
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))


def ask(*content) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}]


def video(source, **kwargs) -> dict:
    return {"type": "video", "video": source, **kwargs}


def image(source, **kwargs) -> dict:
    return {"type": "image", "image": source, **kwargs}


def test_template_is_that_of_nvila(processor):
    messages = ask(" Hello ") + [{"role": "assistant", "content": "Yes \n"}] + ask("And?")
    assert processor.apply_chat_template(messages, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nYes<|im_end|>\n<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\n"
    )
    system = [{"role": "system", "content": ""}]
    assert processor.apply_chat_template(system + ask("Hi")) == (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    )


def test_nvila_prompt_and_ids_are_reproduced(shared_dir):
    folder = shared_dir / "parity/nvila"
    reference = load_file(folder / "refs/model_3x3fix_70.safetensors")
    cases = json.loads((folder / "refs/model_3x3fix_70.json").read_text())["cases"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model_3x3fix_70/llm")
    added = ["<vila/sentinel>", "<image>", "<vila/video>"]  # by the original at load time, in this order
    tokenizer.add_special_tokens({"additional_special_tokens": [*added, "<|frame_end|>"]})
    size = {"height": 70, "width": 70}
    processor = RGPT4DProcessor(
        RGPT4DImageProcessor(size=size), RGPT4DVideoProcessor(size=size, num_frames=4), tokenizer,
        video_token="<vila/video>", frame_grid=2,
    )  # fmt: skip
    inputs = folder / "refs/inputs"
    for name in ("text", "image_resize", "multi_image", "video4_token"):
        blocks = []
        for part in cases["video4" if name == "video4_token" else name]["prompt_parts"]:
            if isinstance(part, str):
                blocks.append({"type": "text", "text": part})
            elif part[0] == "image":
                blocks.append(image(str(inputs / part[1])))
            else:
                blocks.append(video(str(inputs / part[1]), fps=10))
        messages = [{"role": "user", "content": blocks}]
        ids = processor.apply_chat_template(messages, add_generation_prompt=True, **OPTIONS)["input_ids"][0].tolist()
        expected = []  # the original has one id for each medium, and puts 2 x 2 embeddings and a newline there later
        for token in reference[f"{name}/input_ids"][0].tolist():
            num_frames = {processor.image_token_id: 1, processor.video_token_id: 4}.get(token)
            expected += [token] if num_frames is None else ([token] * 4 + [processor.frame_end_token_id]) * num_frames
        assert ids == expected, name


def test_a_video_becomes_frames_that_end_with_the_newline(processor, mp4):
    outputs = processor.apply_chat_template(ask(video(mp4), "How?"), **OPTIONS, processor_kwargs={"num_frames": 5})
    assert isinstance(outputs, RGPT4DBatchFeature)
    assert set(outputs) == {"input_ids", "attention_mask", "pixel_values_videos", "video_timestamps"}
    assert outputs["pixel_values_videos"].shape == (1, 5, 3, 56, 56)
    assert outputs["video_timestamps"].shape == (1, 5)
    decoded = processor.tokenizer.decode(outputs["input_ids"][0])
    assert f"<|im_start|>user\n{FRAME * 5}How?<|im_end|>" in decoded
    assert (outputs["input_ids"] == processor.video_token_id).sum() == 5 * GRID**2
    assert processor.frame_end_placeholder_id not in outputs["input_ids"]


def test_a_question_that_starts_with_a_newline_does_not_merge(processor, mp4):
    outputs = processor.apply_chat_template(ask(video(mp4), "\nHow?"), **OPTIONS)
    ids = outputs["input_ids"][0].tolist()
    last = max(i for i, token in enumerate(ids) if token == processor.video_token_id)
    newline = processor.tokenizer.encode("\n")
    assert ids[last + 1 : last + 3] == newline * 2


def test_images_and_videos_of_a_batch_stay_in_reading_order(processor, mp4, picture):
    dark, bright = Image.new("RGB", (30, 30), (0, 0, 0)), Image.new("RGB", (30, 30), (255, 255, 255))
    frames = np.full((4, 20, 20, 3), 255, np.uint8)
    batch = [
        ask(image(dark), "a", video(mp4), "b"),
        ask("only text"),
        ask(video(frames, fps=2), "c", image(bright), image(picture)),
    ]
    outputs = processor.apply_chat_template(batch, **OPTIONS, processor_kwargs={"padding": True})
    texts = processor.tokenizer.batch_decode(outputs["input_ids"])
    assert f"user\n{IMAGE}a{FRAME * 3}b<" in texts[0] and "user\nonly text<" in texts[1]
    assert f"user\n{FRAME * 3}c{IMAGE * 2}<" in texts[2]
    assert outputs["pixel_values"].shape == (3, 3, 56, 56)
    assert outputs["pixel_values"].mean((1, 2, 3))[:2].tolist() == [-1.0, 1.0]
    assert outputs["pixel_values_videos"].shape == (2, 3, 3, 56, 56)
    assert (outputs["pixel_values_videos"][1] == 1).all()
    np.testing.assert_allclose(outputs["video_timestamps"], [[0, 1.0, 1.9], [0, 1.0, 1.5]], rtol=0, atol=1e-6)
    for i, messages in enumerate(batch):  # padding changes nothing else
        alone = processor.apply_chat_template(messages, **OPTIONS)["input_ids"][0]
        assert torch.equal(outputs["input_ids"][i][outputs["attention_mask"][i].bool()], alone)


def test_videos_of_different_lengths_get_tokens_for_their_own_frames(processor, mp4):
    batch = [ask(video(mp4)), ask(video(np.zeros((30, 8, 8, 3), np.uint8), fps=10))]
    outputs = processor.apply_chat_template(batch, **OPTIONS, processor_kwargs={"padding": True, "fps": 1.0})
    assert (outputs["video_timestamps"] >= 0).sum(1).tolist() == [2, 3]
    assert (outputs["input_ids"] == processor.video_token_id).sum(1).tolist() == [2 * GRID**2, 3 * GRID**2]


@pytest.mark.parametrize("tensors", [None, "np", "pt"])
def test_outputs_of_every_kind_are_equal(processor, mp4, tensors):
    options = {**OPTIONS, "return_tensors": tensors}
    outputs = processor.apply_chat_template(ask(video(mp4), "How?"), **options)
    expected = processor.apply_chat_template(ask(video(mp4), "How?"), **OPTIONS)
    for key in expected:
        np.testing.assert_array_equal(np.asarray(outputs[key]), expected[key].numpy())


@pytest.mark.parametrize("spelling", ["<obj_1>", "<R1>", "<R_1>"])
def test_names_are_written_one_way_in_every_turn(processor, mp4, spelling):
    messages = ask(video(mp4, regions=BOX), f"Is {spelling} fast?")
    messages += [{"role": "assistant", "content": f"{spelling} is."}] + ask(f"And {spelling}?")
    for rendered in (
        processor.apply_chat_template(messages),
        processor.tokenizer.decode(processor.apply_chat_template(messages, **OPTIONS)["input_ids"][0]),
    ):
        assert rendered.count("<obj_1>") == 3 and "<R" not in rendered


def test_regions_of_messages_are_drawn(processor, mp4, picture):
    mask = np.zeros((64, 96), bool)
    mask[10:40, 20:50] = True
    for region in ({"box": [10, 20, 60, 60]}, {"mask": mask}, {"point": [30, 30]}):
        regions = [{"name": "R1", **region}]
        messages = ask(
            video(np.asarray(picture)[None], fps=1, regions=regions), image(picture, regions=regions), "<obj_1>?"
        )
        outputs = processor.apply_chat_template(messages, **OPTIONS, processor_kwargs={"num_frames": 1})
        drawn = processor.image_processor(draw_marks(picture, regions), return_tensors="pt")["pixel_values"]
        assert torch.equal(outputs["pixel_values"], drawn)
        assert torch.equal(outputs["pixel_values_videos"][0], drawn)


def test_regions_can_be_given_without_messages(processor, mp4, picture):
    through_messages = processor.apply_chat_template(
        [ask(video(mp4), "a"), ask(image(picture, regions=BOX), video(mp4, regions=BOX), "<obj_1>")],
        **OPTIONS, processor_kwargs={"padding": True},
    )  # fmt: skip
    texts = processor.apply_chat_template([ask(video(mp4), "a"), ask(image(picture), video(mp4), "<obj_1>")])
    direct = processor(
        text=texts, images=[picture], videos=[[mp4], [mp4]], regions=[None, BOX], image_regions=[BOX], padding=True,
        return_tensors="pt",
    )  # fmt: skip
    assert set(direct) == set(through_messages)
    for key in direct:
        assert torch.equal(direct[key], through_messages[key]), key


@pytest.mark.parametrize(
    "messages",
    [
        ask(video("CLIP", regions=BOX), "Is <obj_1> near <obj_2>?"),
        ask(video("CLIP", regions=BOX), "Is <R2> fast?"),
        ask(video("CLIP"), "Is <obj_2> fast?"),
        ask("Is <obj_2> fast?"),
        ask(video("CLIP", regions=BOX), "Is <obj_1> fast?") + [{"role": "assistant", "content": "No, <obj_2> is."}],
        [{"role": "system", "content": "Watch <obj_2>"}] + ask(video("CLIP", regions=BOX), "Well?"),
    ],
)
def test_a_name_that_is_used_but_not_given_is_refused(processor, mp4, messages):
    for message in messages:
        for block in message["content"] if isinstance(message["content"], list) else []:
            if block.get("video") == "CLIP":
                block["video"] = mp4
    with pytest.raises(ValueError, match=r"uses <obj_2>.*\"marked\": \[\"obj_2\"\]"):
        processor.apply_chat_template(messages, **OPTIONS)


def test_names_belong_to_their_own_conversation(processor, mp4):
    batch = [ask(video(mp4, regions=BOX), "Hi"), ask(video(mp4), "Is <obj_1> fast?")]
    with pytest.raises(ValueError, match="conversation 1 uses <obj_1>, and the regions given are: none"):
        processor.apply_chat_template(batch, **OPTIONS, processor_kwargs={"padding": True})


def test_pictures_that_are_marked_already_need_no_regions(processor, mp4, picture):
    messages = ask(image(picture, marked=["obj_1", "R2"]), video(mp4), "Is <obj_1> near <obj_2>?")
    outputs = processor.apply_chat_template(messages, **OPTIONS)
    assert torch.equal(outputs["pixel_values"], processor.image_processor(picture, return_tensors="pt")["pixel_values"])
    with pytest.raises(ValueError, match="<obj_3>"):
        processor.apply_chat_template(ask(image(picture, marked=["obj_1"]), "<obj_3>"), **OPTIONS)


def test_messages_and_options_are_not_changed(processor, mp4, picture):
    messages = ask(video(mp4, regions=[{"name": "R1", "box": [1, 2, 30, 40]}]), image(picture), "Is <R1> fast?")
    before, options = copy.deepcopy(messages), {"num_frames": 2}
    processor.apply_chat_template(messages, **OPTIONS, processor_kwargs=options)
    processor.apply_chat_template(messages)
    assert messages == before and options == {"num_frames": 2}


def test_rows_of_struct_columns_work(processor, mp4):
    content = Path(mp4).read_bytes()
    messages = [{"role": "user", "name": None, "content": [
        {"type": "video", "text": None, "image": None, "fps": None, "marked": None,
         "video": {"path": None, "bytes": content}, "regions": [{"name": "obj_1", "box": [1, 2, 30, 40], "mask": None}]},
        {"type": "text", "text": "<obj_1>?", "image": None, "video": None, "regions": None},
    ]}]  # fmt: skip
    outputs = processor.apply_chat_template(messages, **OPTIONS)
    by_path = processor.apply_chat_template(
        ask(video(mp4, regions=[{"name": "obj_1", "box": [1, 2, 30, 40]}]), "<obj_1>?"), **OPTIONS
    )
    for key in by_path:
        assert torch.equal(outputs[key], by_path[key])


def test_assistant_mask_of_an_old_transformers_is_refused(processor, monkeypatch):
    monkeypatch.delattr("transformers.processing_utils.ProcessorMixin._adjust_assistant_masks_indices", raising=False)
    with pytest.raises(ValueError, match="needs transformers 5.23"):
        processor.apply_chat_template(ask("Hi"), **OPTIONS, return_assistant_tokens_mask=True)


@pytest.mark.skipif(not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"), reason="needs transformers 5.23")
@pytest.mark.parametrize("side", ["left", "right"])
def test_assistant_mask_is_exactly_the_answers_and_their_ends(processor, mp4, picture, side):
    first = ask(video(mp4, regions=BOX), "\nIs <R1> fast?") + [{"role": "assistant", "content": "Yes, <R1> is."}]
    first += ask(image(picture), "And now?") + [{"role": "assistant", "content": [{"type": "text", "text": "No"}]}]
    second = ask("Hello") + [{"role": "assistant", "content": "Hi"}]
    outputs = processor.apply_chat_template(
        [first, second], **OPTIONS, return_assistant_tokens_mask=True,
        processor_kwargs={"padding": True, "padding_side": side},
    )  # fmt: skip
    mask = outputs["assistant_masks"].bool()
    decoded = [processor.tokenizer.decode(ids[keep]) for ids, keep in zip(outputs["input_ids"], mask, strict=True)]
    assert decoded == ["Yes, <obj_1> is.<|im_end|>No<|im_end|>", "Hi<|im_end|>"]
    assert mask.shape == outputs["input_ids"].shape and not (mask & ~outputs["attention_mask"].bool()).any()
    assert "offset_mapping" not in outputs and "text_replacement_offsets" not in outputs


def test_final_message_can_be_continued(processor, mp4):
    messages = ask(video(mp4), "How?") + [{"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    ids = processor.apply_chat_template(messages, **OPTIONS, continue_final_message=True)["input_ids"][0]
    assert processor.tokenizer.decode(ids).endswith("<|im_start|>assistant\nIt is")


def test_times_stay_float32_when_the_batch_is_cast(processor):
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    messages = ask(video(frames, fps=1 / 100.3), "How?")
    outputs = processor.apply_chat_template(messages, **OPTIONS, processor_kwargs={"num_frames": 2})
    for cast in (outputs.to("cpu", torch.bfloat16), outputs.to(torch.float16), outputs.to(dtype=torch.bfloat16)):
        assert cast is outputs
        assert cast["video_timestamps"].dtype == torch.float32 and cast["pixel_values_videos"].dtype != torch.float32
        assert cast["video_timestamps"][0, 1] == pytest.approx(100.3, abs=1e-4)
    assert outputs.to("meta")["video_timestamps"].device.type == "meta"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (ask(video(np.zeros((3, 8, 8, 3), np.uint8)), "?"), '"fps": 30'),
        (ask(video("gone.mp4"), "?"), "gone.mp4: no such file"),
        (ask(image("gone.png"), "?"), "gone.png: no such file"),
        (ask({"type": "video", "video": "a.mp4", "region": []}, "?"), "unknown keys.*region"),
        (ask({"type": "video", "video": "a.mp4", "path": "b.mp4"}, "?"), "several sources"),
        (ask({"type": "audio", "audio": "a.wav"}, "?"), "audio"),
        (ask({"type": "video"}, "?"), "1 placeholders <video> and 0 videos"),
        (ask("What does <image> mean?"), "1 placeholders <image> and 0 images"),
        (ask("A <|frame_end|> here"), "the processor itself inserts"),
        (ask(image(Image.new("RGB", (9, 9)), marked=["car"]), "?"), "car"),
        ([], "list of messages"),
    ],
)
def test_bad_messages_are_refused(processor, messages, message):
    with pytest.raises(ValueError, match=message):
        processor.apply_chat_template(messages, **OPTIONS)


def test_region_outside_the_frame_names_file_and_region(processor, mp4):
    messages = ask(video(mp4, regions=[{"name": "R3", "box": [0, 0, 500, 10]}]), "<R3>")
    with pytest.raises(ValueError, match=r"street.mp4: region obj_3: box .* frame of 96 x 64 pixels; expected"):
        processor.apply_chat_template(messages, **OPTIONS)


def test_regions_given_twice_are_refused(processor, mp4):
    with pytest.raises(ValueError, match="regions.*give them once"):
        processor.apply_chat_template(ask(video(mp4, regions=BOX)), **OPTIONS, processor_kwargs={"regions": [BOX]})


def test_wrong_parts_are_refused(tiny_tokenizer):
    image_processor, video_processor = RGPT4DImageProcessor(), RGPT4DVideoProcessor()
    with pytest.raises(TypeError, match="video_processor"):
        RGPT4DProcessor(image_processor, image_processor, tiny_tokenizer)
    with pytest.raises(ValueError, match="must be one token"):
        RGPT4DProcessor(image_processor, video_processor, tiny_tokenizer, frame_end_placeholder="<|not there|>")
    with pytest.raises(ValueError, match="frame_grid"):
        RGPT4DProcessor(image_processor, video_processor, tiny_tokenizer, frame_grid=0)


def test_token_counts_for_engines_equal_the_real_ones(processor, mp4, picture):
    counts = processor._get_num_multimodal_tokens(image_sizes=[(64, 96)] * 2, video_sizes=[(3, 64, 96), (5, 8, 8)])
    assert counts["num_image_tokens"] == [GRID**2 + 1] * 2 and counts["num_image_patches"] == [1, 1]
    assert counts["num_video_tokens"] == [3 * (GRID**2 + 1), 5 * (GRID**2 + 1)]
    expanded = processor.tokenizer.encode(processor.replace_video_token({"video_timestamps": [[0, 1, 2, -1]]}, 0))
    assert len(expanded) == counts["num_video_tokens"][0]
    assert "num_video_tokens" not in processor._get_num_multimodal_tokens(image_sizes=[(1, 1)])


def test_model_input_names(processor):
    assert {"input_ids", "pixel_values", "pixel_values_videos", "video_timestamps"} <= set(processor.model_input_names)


def test_save_and_load_keeps_everything(processor, mp4, tmp_path):
    processor.save_pretrained(tmp_path)
    loaded = RGPT4DProcessor.from_pretrained(tmp_path)
    ours, theirs = ({k: v for k, v in p.to_dict().items() if k != "auto_map"} for p in (processor, loaded))
    assert theirs == ours and loaded.chat_template == processor.chat_template
    messages = ask(video(mp4, regions=BOX), "Is <R1> fast?")
    ours, theirs = (p.apply_chat_template(messages, **OPTIONS) for p in (processor, loaded))
    for key in ours:
        assert torch.equal(ours[key], theirs[key])


def test_folder_loads_in_a_process_without_the_project(processor, mp4, tmp_path, run_as_stranger):
    """By remote code alone, offline: a folder with nothing but the processor, and one with a model's config beside it."""
    folders = [str(tmp_path / "processor"), str(tmp_path / "model")]
    for folder in folders:
        processor.save_pretrained(folder)
    auto_map = {"AutoProcessor": "processing_rgpt4d.RGPT4DProcessor"}
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": "rgpt4d", "auto_map": auto_map}))
    messages = ask(video(mp4, regions=BOX), "Is <R1> fast?")
    expected = processor.apply_chat_template(messages, **OPTIONS)
    digest = hashlib.sha256(expected["pixel_values_videos"].numpy().tobytes()).hexdigest()
    script = f"""
        import hashlib
        from transformers import AutoProcessor
        for folder in {folders!r}:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
            assert type(processor).__module__.startswith("transformers_modules"), type(processor).__module__
            outputs = processor.apply_chat_template({messages!r}, tokenize=True, return_dict=True, return_tensors="pt")
            digest = hashlib.sha256(outputs["pixel_values_videos"].numpy().tobytes()).hexdigest()
            print(outputs["input_ids"].tolist(), digest)
    """
    printed = run_as_stranger(textwrap.dedent(script))
    assert printed.splitlines()[-2:] == [f"{expected['input_ids'].tolist()} {digest}"] * 2


def test_a_video_in_a_data_url_is_that_of_its_file(processor, mp4):
    content = base64.b64encode(Path(mp4).read_bytes()).decode()
    block = {"type": "video_url", "video_url": {"url": f"data:video/mp4;base64,{content}"}, "regions": BOX}
    expected = processor.apply_chat_template(ask(video(mp4, regions=BOX), "Is <obj_1> red?"), **OPTIONS)
    inputs = processor.apply_chat_template(ask(block, "Is <obj_1> red?"), **OPTIONS)
    assert inputs.keys() == expected.keys()
    assert all(torch.equal(inputs[name], expected[name]) for name in inputs)
    for url in ("data:video/mp4;base64,@@", "data:video/mp4,AAAA"):
        with pytest.raises(ValueError, match="data URL must be"):
            processor.apply_chat_template(ask({"type": "video", "url": url}, "?"), **OPTIONS)
