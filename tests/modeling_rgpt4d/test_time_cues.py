"""Time cues of the processor: seconds burned into frames, a sentence in the prompt; and frames without marks."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.processing_utils import ProcessorMixin

from examples.make_small_model import build_model
from modeling_rgpt4d.image_processing_rgpt4d import RGPT4DImageProcessor
from modeling_rgpt4d.processing_rgpt4d import TIME_CUES, RGPT4DProcessor
from modeling_rgpt4d.region_marks import draw_marks
from modeling_rgpt4d.time_marks import draw_time, time_prompt
from modeling_rgpt4d.video_processing_rgpt4d import RGPT4DVideoProcessor

SIZE = {"height": 56, "width": 56}
GRID = 2
BOX = [{"name": "obj_1", "box": [10, 20, 60, 60]}]
OPTIONS = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}


@pytest.fixture
def make_processor(tiny_tokenizer):
    def make(time_cue: str) -> RGPT4DProcessor:
        return RGPT4DProcessor(
            RGPT4DImageProcessor(size=SIZE),
            RGPT4DVideoProcessor(size=SIZE, num_frames=3),
            tiny_tokenizer,
            frame_grid=GRID,
            time_cue=time_cue,
        )

    return make


def write_video(path, num_frames: int, rate: int = 10) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for i in range(num_frames):
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.full((64, 96, 3), 10 * i, np.uint8), format="rgb24"))
            )
        container.mux(stream.encode(None))
    return str(path)


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> str:
    """20 frames at 10 frames per second."""
    return write_video(tmp_path_factory.mktemp("videos") / "street.mp4", 20)


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(noise(1)[0])


def noise(num_frames: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, 64, 96, 3), dtype=np.uint8)


def video(source, **kwargs) -> dict:
    return {"type": "video", "video": source, **kwargs}


def ask(*content) -> list[dict]:
    return [{"role": "user", "content": [{"type": "text", "text": c} if isinstance(c, str) else c for c in content]}]


def sentence(duration: str, fps: str) -> str:
    return (
        f"The following video frames are sampled from a video {duration} seconds long and recorded at {fps} frames per "
        "second."
    )


# --- the drawing and the sentence ------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [28, 56, 64, 224, 448])
@pytest.mark.parametrize("ground", [0, 128, 255])
def test_a_time_is_white_on_black_in_the_lower_left_corner(side, ground):
    empty = Image.new("RGB", (side, side), (ground,) * 3)
    drawn = np.asarray(draw_time(empty, 12.34))
    changed = (drawn != ground).any(-1)
    rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    assert rows[0] >= side / 2 and (side < 56 or columns[-1] < 0.8 * side)
    box = drawn[rows[0] :, : columns[-1] + 1]
    assert (drawn[-1, 0] == 0).all() and box.max() > 180 and box.min() == 0  # legible on any ground
    assert 0.1 < (box > 100).any(-1).mean() < 0.6
    assert (np.asarray(empty) == ground).all() and np.array_equal(drawn, draw_time(empty, 12.34))


@pytest.mark.parametrize("side", [28, 448])
def test_times_can_be_told_apart(side):
    """They differ by more than a cast to bfloat16 would change."""
    empty = Image.new("RGB", (side, side), (90, 140, 90))
    seen = [np.asarray(draw_time(empty, n / 100)).astype(int)[-40:, :120] for n in range(0, 100, 3)]
    assert min(np.abs(a - b).max() for i, a in enumerate(seen) for b in seen[:i]) > 60


def test_letters_grow_with_the_picture_and_keep_their_place():
    heights = []
    for side in (64, 224, 448):
        boxes = []
        for seconds in (1.23, 456.78):
            drawn = np.asarray(draw_time(Image.new("RGB", (side, side), (255,) * 3), seconds))
            dark = (drawn == 0).all(-1)
            boxes.append((np.flatnonzero(dark.any(1))[0], np.flatnonzero(dark.any(0))[0]))
        assert boxes[0] == boxes[1]
        heights.append(side - boxes[0][0])
    assert heights[0] < heights[1] < heights[2] and 20 < heights[2] < 45


def test_a_time_that_does_not_fit_is_refused():
    draw_time(Image.new("RGB", (28, 28)), 1234.56)
    with pytest.raises(ValueError, match=r"street.mp4: frames of 28 x 28 pixels are too small .* '123456.78 s'"):
        draw_time(Image.new("RGB", (28, 28)), 123456.78, source="street.mp4")


@pytest.mark.parametrize(
    ("duration", "fps", "in_words"),
    [
        (19, 30, ("19", "30")),  # the paper's
        (19.0, 30.0, ("19", "30")),
        (19.0333, 30000 / 1001, ("19.03", "29.97")),
        (119.999, 23.976, ("120", "23.98")),
        (0.1, 0.5, ("0.1", "0.5")),
        (1 / 30, 1 / 100.3, ("0.033", "0.01")),
        (12345.678, 1 / 86400, ("12345.68", "0.000012")),
    ],
)
def test_numbers_of_the_sentence_are_short(duration, fps, in_words):
    assert time_prompt(duration, fps) == sentence(*in_words)


# --- the processor's option ------------------------------------------------------------------------------------------


def test_an_unknown_cue_is_refused(make_processor):
    for cue in ("marks", "tpe", None):
        with pytest.raises(ValueError, match=f"unknown time_cue {cue!r}.*'mark'.*'tpe'.*model"):
            make_processor(cue)


@pytest.mark.parametrize("cue", TIME_CUES)
def test_the_cue_is_saved_and_can_be_changed_when_loading(make_processor, tmp_path, cue):
    make_processor(cue).save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a/processor_config.json").read_text())["time_cue"] == cue
    (tmp_path / "a/config.json").write_text('{"model_type": "rgpt4d"}')
    for loader in (RGPT4DProcessor, AutoProcessor):
        assert loader.from_pretrained(tmp_path / "a").time_cue == cue
        for other in TIME_CUES:
            loaded = loader.from_pretrained(tmp_path / "a", time_cue=other)
            assert loaded.time_cue == other
            loaded.save_pretrained(tmp_path / "b")  # belongs to no part
            assert RGPT4DProcessor.from_pretrained(tmp_path / "b").time_cue == other
            config = json.loads((tmp_path / "b/processor_config.json").read_text())
            parts = [config["image_processor"], config["video_processor"]]
            parts.append(json.loads((tmp_path / "b/tokenizer_config.json").read_text()))
            assert not any("time_cue" in part for part in parts)
    with pytest.raises(ValueError, match="unknown time_cue"):
        RGPT4DProcessor.from_pretrained(tmp_path / "a", time_cue="clock")


def test_a_folder_without_a_cue_has_none(make_processor, tmp_path):
    make_processor("mark").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "processor_config.json").read_text())
    del config["time_cue"]
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    assert RGPT4DProcessor.from_pretrained(tmp_path).time_cue == "none"


@pytest.mark.parametrize("cue", ["tpe", *TIME_CUES])
def test_the_small_model_gets_its_cue_from_one_side(tiny_tokenizer, cue):
    model, processor = build_model(tiny_tokenizer, image_size=32, patch_size=8, width=32, layers=1, time_cue=cue)
    assert (model.config.time_cue, processor.time_cue) == (("tpe", "none") if cue == "tpe" else ("none", cue))


# --- mark ------------------------------------------------------------------------------------------------------------


def test_every_frame_shows_its_own_time_above_the_regions(make_processor, picture):
    frames = noise(10)
    image = {"type": "image", "image": picture, "regions": BOX}
    messages = ask(video(frames, fps=4, regions=BOX), image, "Where is <obj_1>?")
    plain, marked = (make_processor(cue).apply_chat_template(messages, **OPTIONS) for cue in ("none", "mark"))
    assert set(plain) == set(marked)
    for key in set(plain) - {"pixel_values_videos"}:  # pictures, text and times are the same
        assert torch.equal(plain[key], marked[key]), key
    for i, (index, seconds) in enumerate([(0, 0.0), (4, 1.0), (9, 2.25)]):
        frame = Image.fromarray(frames[index])
        resized = (draw_marks(frame, BOX) if i == 0 else frame).resize((56, 56), Image.Resampling.BICUBIC)
        expected = np.asarray(draw_time(resized, seconds)).transpose(2, 0, 1) / 127.5 - 1
        np.testing.assert_allclose(marked["pixel_values_videos"][0, i], expected, rtol=0, atol=1e-6)
        assert not torch.equal(marked["pixel_values_videos"][0, i], plain["pixel_values_videos"][0, i])


def test_a_frame_that_repeats_shows_its_time_each_time(make_processor, mp4, tmp_path):
    one = write_video(tmp_path / "one.mp4", 1)
    batch = [ask(video(one), "?"), ask(video(mp4), "?")]
    pixels = make_processor("mark").apply_chat_template(batch, **OPTIONS, processor_kwargs={"padding": True})[
        "pixel_values_videos"
    ]
    assert torch.equal(pixels[0, 0], pixels[0, 1]) and torch.equal(pixels[0, 0], pixels[0, 2])
    black = torch.from_numpy(np.asarray(draw_time(Image.new("RGB", (56, 56)), 0.0)).transpose(2, 0, 1) / 127.5 - 1)
    assert (pixels[0, 0] - black).abs().mean() < 0.05  # the frame is black, but for the compression


# --- prompt ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(ProcessorMixin, "_adjust_assistant_masks_indices"), reason="needs transformers 5.23")
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_sentence_is_as_if_it_were_written_before_the_frames(make_processor, mp4, picture, side):
    """Ids and masks of every kind, in a batch with several videos, turns, pictures and paddings."""

    def batch(of_file: str, of_array: str) -> list:
        array = video(noise(7), fps=30000 / 1001)
        first = ask(of_file, video(mp4, regions=BOX), "\nIs <obj_1> fast?") + [{"role": "assistant", "content": "Yes."}]
        first += ask({"type": "image", "image": picture}, "And", of_array, array, "?")
        first += [{"role": "assistant", "content": "No"}]
        return [first, ask("Hello") + [{"role": "assistant", "content": "Hi"}]]

    options = {
        **OPTIONS,
        "return_assistant_tokens_mask": True,
        "processor_kwargs": {"padding": True, "padding_side": side, "return_mm_token_type_ids": True},
    }
    by_cue = make_processor("prompt").apply_chat_template(batch("", ""), **options)
    by_hand = batch(sentence("2", "10"), sentence("0.23", "29.97"))
    expected = make_processor("none").apply_chat_template(by_hand, **options)
    assert set(by_cue) == set(expected) >= {"assistant_masks", "mm_token_type_ids", "attention_mask"}
    for key in expected:
        assert torch.equal(torch.as_tensor(by_cue[key]), torch.as_tensor(expected[key])), key
    assert by_cue["assistant_masks"].any(1).all()


def test_messages_without_a_video_have_no_sentence(make_processor, picture):
    messages = ask({"type": "image", "image": picture}, "What?")
    plain, cued = (make_processor(cue).apply_chat_template(messages, **OPTIONS) for cue in ("none", "prompt"))
    assert all(torch.equal(plain[key], cued[key]) for key in plain) and set(plain) == set(cued)


def test_metadata_is_returned_only_to_who_asks(make_processor, mp4):
    processor = make_processor("prompt")
    assert "video_metadata" not in processor(text="<video>", videos=[mp4], return_tensors="pt")
    (told,) = processor(text="<video>", videos=[mp4], return_tensors="pt", return_metadata=True)["video_metadata"]
    assert (told.fps, told.duration, told.total_num_frames) == (pytest.approx(10), pytest.approx(2), 20)


def test_what_engines_ask_is_right_with_the_sentence(make_processor):
    """An engine gives sampled frames and tells of their source; it encodes each replacement by itself."""
    processor = make_processor("prompt")
    told = {"fps": 10.0, "duration": 2.5, "total_num_frames": 25, "frames_indices": [0, 8, 16, 24]}
    text = processor.apply_chat_template(ask({"type": "video"}, {"type": "video"}, "\nWhat?"))
    inputs = processor(
        text=text,
        videos=[noise(4), noise(2)],
        video_metadata=[told, {"fps": 10.0, "frames_indices": [3, 9]}],
        do_sample_frames=False,
        return_tensors="pt",
        return_text_replacement_offsets=True,
        return_mm_token_type_ids=True,
    )
    ids = inputs["input_ids"][0].tolist()
    (offsets,) = inputs["text_replacement_offsets"]
    for offset, num_frames, duration in zip(offsets, (4, 2), ("2.5", "0.7"), strict=True):
        frames = ("<video>" * GRID**2 + "\n") * num_frames
        assert offset["replacement"] == sentence(duration, "10") + frames
    replacements, by_engine = iter(offsets), []
    for token in processor.tokenizer.encode(text, add_special_tokens=False):
        if token == processor.video_token_id:
            by_engine += processor.tokenizer.encode(next(replacements)["replacement"], add_special_tokens=False)
        else:
            by_engine.append(token)
    assert by_engine == ids
    counts = processor._get_num_multimodal_tokens(video_sizes=[(4, 64, 96), (2, 64, 96)])["num_video_tokens"]
    assert sum(counts) == int((torch.as_tensor(inputs["mm_token_type_ids"]) == 2).sum())


def test_a_single_frame_without_duration_has_no_rate(make_processor, tmp_path):
    path = str(tmp_path / "one.flv")
    with av.open(path, "w") as container:
        stream = container.add_stream("flv")
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        frame = av.VideoFrame.from_ndarray(noise(1)[0], format="rgb24")
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            packet.duration = 0
            container.mux(packet)
    processor = make_processor("prompt")
    inputs = processor(text="<video>", videos=[path], return_tensors="pt", return_metadata=True)
    assert (inputs["video_metadata"][0].duration, inputs["video_metadata"][0].fps) == (0, None)
    words = processor.tokenizer.decode(inputs["input_ids"][0])
    assert words.startswith("The following video frames are sampled from a video of a single frame.<video>")


# --- frames without marks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cue", ["none", "mark", "prompt"])
def test_frames_without_marks_are_those_of_the_plain_video(make_processor, mp4, cue):
    """A batch of a video with regions, one without and one that is shorter."""
    processor = make_processor(cue)
    batch = [[video(noise(9), fps=3, regions=BOX), "<obj_1>"], [video(mp4), "?"], [video(noise(1, 1), fps=1), "?"]]
    options = {"padding": True, "fps": 1.0, "return_unmarked": True}
    outputs = processor.apply_chat_template([ask(*c) for c in batch], **OPTIONS, processor_kwargs=options)
    del batch[0][0]["regions"]
    batch[0][1] = "?"
    plain = make_processor("none").apply_chat_template(
        [ask(*c) for c in batch], **OPTIONS, processor_kwargs={"padding": True, "fps": 1.0}
    )
    assert torch.equal(outputs["unmarked_pixel_values_videos"], plain["pixel_values_videos"])
    drawn = (outputs["pixel_values_videos"] != plain["pixel_values_videos"]).flatten(2).any(-1)
    real = outputs["video_timestamps"] >= 0
    assert real.sum(1).tolist() == [3, 2, 1]
    expected = real if cue == "mark" else torch.tensor([[True, False, False], [False] * 3, [False] * 3])
    assert torch.equal(drawn, expected)


def test_frames_without_marks_are_given_only_where_they_differ_and_are_wanted(make_processor, mp4):
    plain, marked = make_processor("none"), make_processor("mark")
    wanted = {"return_unmarked": True}
    for regions in (None, []):
        outputs = plain.apply_chat_template(ask(video(mp4, regions=regions), "?"), **OPTIONS, processor_kwargs=wanted)
        assert "unmarked_pixel_values_videos" not in outputs
    messages = ask(video(mp4, regions=BOX), "<obj_1>")
    assert "unmarked_pixel_values_videos" not in marked.apply_chat_template(messages, **OPTIONS)
    outputs = marked.apply_chat_template(messages, **OPTIONS, processor_kwargs=wanted)
    without = plain.apply_chat_template(messages, **OPTIONS, processor_kwargs=wanted)
    name = "unmarked_pixel_values_videos"
    assert torch.equal(outputs[name], without[name])
    assert name not in marked.model_input_names and name not in marked.video_processor.model_input_names


def test_frames_without_marks_are_cast_like_those_with(make_processor, mp4):
    outputs = make_processor("mark").apply_chat_template(
        ask(video(mp4), "?"), **OPTIONS, processor_kwargs={"return_unmarked": True}
    )
    assert outputs["unmarked_pixel_values_videos"].shape == outputs["pixel_values_videos"].shape == (1, 3, 3, 56, 56)
    outputs.to("cpu", torch.bfloat16)
    assert outputs["unmarked_pixel_values_videos"].dtype == outputs["pixel_values_videos"].dtype == torch.bfloat16
    assert outputs["video_timestamps"].dtype == torch.float32
