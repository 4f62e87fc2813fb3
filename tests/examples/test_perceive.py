import json
import runpy
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from examples.make_small_model import build_model
from modeling_rgpt4d import L4PConfig, L4PModel, PerceptionDecoder, PerceptionDecoderConfig, decode_video
from trainer import L4PTeacher, perceive

EXAMPLES = Path(__file__).parents[2] / "examples"
WINDOW = 4
FILES = ["camray.png", "depth.png", "flow.png", "motion.png", "perception.mp4", "perception.png", "signals.safetensors"]
REGIONS = [{"name": "obj_1", "box": [10.0, 20.0, 60.0, 60.0]}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_tokenizer):
    """`run/` as P4DTrainer leaves it, `teacher/`, and `clip.mp4`: 20 frames of 96 x 64 px, 10 a second."""
    folder = tmp_path_factory.mktemp("perceive")
    torch.manual_seed(0)
    model, processor = build_model(tiny_tokenizer, image_size=28, patch_size=7, width=32, layers=1)
    model.save_pretrained(folder / "run")
    processor.save_pretrained(folder / "run")
    l4p = L4PModel(
        L4PConfig(
            image_size=16,
            patch_size=8,
            num_frames=WINDOW,
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=48,
            taps=(1, 2, 3, 4),
            feature_dim=8,
            layer_dims=(8, 8, 8, 8),
            last_dim=8,
        )
    )
    l4p.save_pretrained(folder / "teacher")
    config = PerceptionDecoderConfig(model.config.text_config.hidden_size, l4p.config.latent_shape, hidden_size=16)
    PerceptionDecoder(config).save_pretrained(folder / "run" / "perception_decoder")
    (folder / "run" / "run.json").write_text(json.dumps({"settings": {"teacher": str(folder / "teacher")}}))
    random = np.random.default_rng(0)
    with av.open(str(folder / "clip.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for _ in range(20):
            picture = np.kron(random.integers(0, 256, (8, 12, 3)), np.ones((8, 8, 1))).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return folder


@pytest.fixture
def run_perceive(folder, tmp_path, monkeypatch, capsys):
    """Call it with options: runs the script in this process; returns the folder that it wrote and what it printed."""

    def run(*options, model=folder / "run"):
        monkeypatch.syspath_prepend(EXAMPLES)
        required = ["--model", model, "--video", folder / "clip.mp4", "--output", tmp_path / "out", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["perceive.py", *map(str, [*required, *options])])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / "perceive.py"), run_name="__main__")
        return tmp_path / "out", capsys.readouterr().out

    return run


def inputs_of(folder, processor, num_frames):
    content = [{"type": "video", "video": str(folder / "clip.mp4"), "regions": REGIONS}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": num_frames, "return_unmarked": True},
    )


def test_what_is_written_is_what_the_model_perceives(folder, run_perceive):
    out, said = run_perceive("--region", "obj_1:10,20,60,60", "--num-frames", 10, "--question", "Where is <obj_1>?")
    assert sorted(file.name for file in out.iterdir()) == FILES
    assert len(said.splitlines()) >= 1 and "are in" in said
    arrays = load_file(out / "signals.safetensors")

    model = AutoModelForImageTextToText.from_pretrained(folder / "run", trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder / "run", trust_remote_code=True)
    decoder = PerceptionDecoder.from_pretrained(folder / "run", subfolder="perception_decoder")
    inputs = inputs_of(folder, processor, 10)
    inputs.pop("unmarked_pixel_values_videos")
    windows, signals = perceive(model, decoder, L4PTeacher(L4PModel.from_pretrained(folder / "teacher")), inputs)
    assert windows == [(0, 0), (0, 4), (0, 6)] and arrays["window_starts"].tolist() == [0, 4, 6]
    assert torch.equal(arrays["seconds"], inputs["video_timestamps"][0])
    assert arrays["flow_valid"].tolist() == [0, 1, 1, 1, 0, 1, 1, 1, 1, 1]
    # the last window overlaps the one before it, whose flow of frame 6 stays
    for name, kept in (("depth", [4, 2, 4]), ("flow", [4, 3, 3]), ("motion", [4, 2, 4]), ("camray", [4, 2, 4])):
        parts = [signals[name][0], signals[name][1][:, : kept[1]], signals[name][2][:, 4 - kept[2] :]]
        expected = torch.cat(parts, dim=1)
        torch.testing.assert_close(arrays[name], expected.sigmoid() if name == "motion" else expected)
    assert arrays["camera_centres"].shape == (10, 3)
    with safe_open(out / "signals.safetensors", "pt") as file:
        assert set(arrays) < set(file.metadata())

    video = decode_video(out / "perception.mp4")
    np.testing.assert_allclose(video.timestamps, arrays["seconds"], atol=1 / 60_000)
    assert video.frames.shape == (10, 244, 5 * 336, 3)  # panels of the clip's 3 : 2
    shown = video.frames[:, 20:, :336]
    sampled = decode_video(folder / "clip.mp4", num_frames=10).frames
    for frame, source in zip(shown[1:], sampled[1:], strict=True):
        small = np.asarray(Image.fromarray(source).resize((12, 8), Image.Resampling.BOX), dtype=float)
        seen = np.asarray(Image.fromarray(frame).resize((12, 8), Image.Resampling.BOX), dtype=float)
        assert np.abs(small - seen).mean() < 25 < np.abs(small - seen[::-1]).mean()
    for name in FILES:
        if name.endswith(".png"):
            assert np.asarray(Image.open(out / name).convert("L")).std() > 20, name


def test_compared_with_the_teacher_on_frames_without_marks(folder, run_perceive):
    out, _ = run_perceive("--region", "obj_1:10,20,60,60", "--compare")
    arrays = load_file(out / "signals.safetensors")
    processor = AutoProcessor.from_pretrained(folder / "run", trust_remote_code=True)
    frames = inputs_of(folder, processor, WINDOW)["unmarked_pixel_values_videos"]
    teacher = L4PTeacher(L4PModel.from_pretrained(folder / "teacher"))
    for name, expected in teacher.perceive(frames, [0.5] * 3, [0.5] * 3).signals.items():
        expected = expected[0].sigmoid() if name == "motion" else expected[0]
        torch.testing.assert_close(arrays[f"teacher.{name}"], expected)
        assert arrays[name].shape == expected.shape
    assert decode_video(out / "perception.mp4").frames.shape == (WINDOW, 2 * 244, 5 * 336, 3)


def test_the_question_changes_nothing_that_is_perceived(run_perceive):
    asked, plain = (load_file(run_perceive(*q)[0] / "signals.safetensors") for q in (("--question", "Why?"), ()))
    for name in asked:
        torch.testing.assert_close(asked[name], plain[name])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--num-frames", 3], "--num-frames is 3, but the teacher sees 4 frames at once"),
        (["--num-frames", 24], "clip.mp4 has 20 frames: they cannot be sampled 24 times"),
    ],
)
def test_frames_that_do_not_fit_are_refused(run_perceive, options, message):
    with pytest.raises(SystemExit, match=message):
        run_perceive(*options)


def test_a_run_without_decoder_or_teacher_is_named(folder, run_perceive, tmp_path):
    copy = tmp_path / "plain"
    copy.mkdir()
    for file in (folder / "run").iterdir():
        if file.is_file():
            (copy / file.name).symlink_to(file)
    with pytest.raises(SystemExit, match="plain has no perception_decoder"):
        run_perceive(model=copy)
    (copy / "perception_decoder").symlink_to(folder / "run" / "perception_decoder")
    (copy / "run.json").unlink()
    with pytest.raises(SystemExit, match="plain does not tell its teacher.*--teacher"):
        run_perceive(model=copy)
    with pytest.raises(SystemExit, match="no teacher .*nowhere: give the one"):
        run_perceive("--teacher", tmp_path / "nowhere", model=copy)
    out, _ = run_perceive("--teacher", folder / "teacher", model=copy)
    assert sorted(file.name for file in out.iterdir()) == FILES


def test_a_model_that_fuses_the_teachers_latents_needs_them_to_perceive(folder, run_perceive, tmp_path):
    options = {"geometry_fusion": "positional", "geometry_hidden_size": 24}
    fused = AutoModelForImageTextToText.from_pretrained(folder / "run", trust_remote_code=True, **options)
    with torch.no_grad():
        torch.nn.init.normal_(fused.model.geometry_encoding.weight)
    fused.save_pretrained(tmp_path / "fused")
    for file in (folder / "run").iterdir():
        if not (tmp_path / "fused" / file.name).exists():
            (tmp_path / "fused" / file.name).symlink_to(file)

    processor = AutoProcessor.from_pretrained(folder / "run", trust_remote_code=True)
    decoder = PerceptionDecoder.from_pretrained(folder / "run", subfolder="perception_decoder")
    heads = L4PTeacher(L4PModel.from_pretrained(folder / "teacher"))
    inputs = inputs_of(folder, processor, WINDOW)
    frames = inputs.pop("unmarked_pixel_values_videos")
    with pytest.raises(ValueError, match=r"geometry_fusion is 'positional'.*no video_geometry.*heads.perceive\(frames"):
        perceive(fused, decoder, heads, inputs)
    seen = heads.perceive(frames, processor.video_processor.image_mean, processor.video_processor.image_std, signals=())
    _, signals = perceive(fused, decoder, heads, {**inputs, "video_geometry": seen.latents[:, -1]})

    out, _ = run_perceive("--region", "obj_1:10,20,60,60", model=tmp_path / "fused")
    depth = load_file(out / "signals.safetensors")["depth"]
    torch.testing.assert_close(depth, signals["depth"][0])
    out, _ = run_perceive("--region", "obj_1:10,20,60,60")
    assert not torch.allclose(depth, load_file(out / "signals.safetensors")["depth"])


def test_another_teachers_heads_are_refused(folder, run_perceive, tmp_path):
    other = L4PConfig.from_pretrained(folder / "teacher", hidden_size=32)
    L4PModel(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="the student's perception decoder gives latents of shape"):
        run_perceive("--teacher", tmp_path / "other")
