import re
from unittest.mock import MagicMock

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import TrainerState

from modeling_rgpt4d import decode_video
from trainer import (
    P4DCollator,
    PerceivedVideo,
    PerceptionPictures,
    draw_perception,
    draw_signal,
    perception_video,
    write_perception_video,
)
from trainer.perception_pictures import colour_legend, signal_picture
from trainer.teachers import PerceptionTargets

SIGNALS = {"depth": 1, "flow": 2, "motion": 1, "camray": 6}


def perceived(num_frames=6, sides=("student",), size=(8, 8), **options) -> PerceivedVideo:
    generator = torch.Generator().manual_seed(0)
    signals = {
        side: {name: torch.rand(c, num_frames, *size, generator=generator) for name, c in SIGNALS.items()}
        for side in sides
    }
    frames = np.random.default_rng(0).integers(0, 256, (num_frames, 20, 20, 3), dtype=np.uint8)
    return PerceivedVideo(frames, np.arange(num_frames) / 2, signals, **({"window": num_frames} | options))


@pytest.mark.parametrize("name", SIGNALS)
def test_frames_painted_together_have_the_colours_of_frames_painted_alone(name):
    signal = torch.rand(SIGNALS[name], 3, 5, 4)
    together = signal_picture(name, signal)
    assert together.shape == (3, 5, 4, 3) and 0 <= together.min() < together.max() <= 1
    for frame in range(3):
        np.testing.assert_array_equal(signal_picture(name, signal[:, frame], signal), together[frame])


def test_colours_are_those_of_the_legend():
    depth = torch.tensor([1.0, 1.0, 4.0, 4.0]).view(1, 1, 4)
    near, *_, far = signal_picture("depth", depth)[0].mean(-1)
    assert (
        near > 0.8
        and far < 0.1
        and "near (1)" in colour_legend("depth", depth)
        and "far (4)" in colour_legend("depth", depth)
    )
    flow = torch.tensor([[0.0, 10.0], [0.0, 0.0]]).view(2, 1, 2)  # at rest; 10 px to the right
    still, right = signal_picture("flow", flow)[0]
    assert still.tolist() == [1, 1, 1] and right[0] == 1 and right[1:].max() < 0.02
    assert re.search(r"is (9\.9|10\.0) px", colour_legend("flow", flow))
    forward = torch.tensor([0, 0, 2.0, 9, 9, 9]).view(6, 1, 1)  # of any length, whatever the moment
    assert signal_picture("camray", forward)[0, 0].tolist() == [0.5, 0.5, 1]
    with pytest.raises(ValueError, match="no signal is called 'colour'"):
        signal_picture("colour", depth)


def test_colours_are_the_same_at_all_times_and_on_both_sides():
    video = perceived(4, sides=("student", "teacher"))
    for side in video.sides:
        video.sides[side]["depth"][:, :, 0, 0] = 0.5
    painted = np.concatenate([video.pictures(side, "depth")[:, 0, 0] for side in video.sides])
    assert len(np.unique(painted, axis=0)) == 1
    # and without a teacher the student's own values set them, of all its frames
    assert len(np.unique(perceived(4).pictures("student", "depth").reshape(-1, 3), axis=0)) > 50


def test_flow_is_valid_where_a_window_holds_the_frame_before():
    assert perceived(6, window=3, window_starts=[0, 3]).flow_valid.tolist() == [False, True, True, False, True, True]
    assert perceived(5, window=3, window_starts=[0, 2]).flow_valid.tolist() == [False, True, True, True, True]
    video = perceived(6, window=3, window_starts=[0, 3])
    video.sides["student"]["flow"][:, [0, 3]] = 1000.0  # means nothing: neither seen nor in the range of colours
    painted = video.pictures("student", "flow")
    assert len(np.unique(painted[[0, 3]])) == 1 and painted[1].std() > 10


@pytest.mark.parametrize("sides", [("student",), ("student", "teacher")])
def test_pictures_are_written_whole_and_show_something(tmp_path, sides):
    video = perceived(6, sides=sides, window=3, window_starts=[0, 3], aspect_ratio=2.0)
    draw_perception(tmp_path / "all" / "perception.png", video, "a title")
    for signal in video.signals:
        draw_signal(tmp_path / "all" / f"{signal}.png", video, signal)
    files = sorted((tmp_path / "all").iterdir())
    assert [file.name for file in files] == ["camray.png", "depth.png", "flow.png", "motion.png", "perception.png"]
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    assert all(picture.std() > 20 for picture in pictures)


@pytest.mark.parametrize("encoder", ["libx264", "mpeg4"])
def test_video_shows_each_panel_at_the_time_of_its_frame(tmp_path, monkeypatch, encoder):
    if encoder == "mpeg4":  # as where FFmpeg was built without H.264
        monkeypatch.setattr(perception_video.av.codec, "Codec", MagicMock(side_effect=ValueError))
    seconds = np.array([0.0, 1 / 30, 0.5, 1.25], dtype=np.float32)
    video = perceived(4, aspect_ratio=1.5, window=2, window_starts=[0, 2])
    video.seconds = seconds
    video.sides["student"]["motion"] = torch.tensor([0.0, 1.0, 0.0, 1.0]).view(1, 4, 1, 1).expand(1, 4, 8, 8)
    write_perception_video(tmp_path / "perception.mp4", video)
    assert [file.name for file in tmp_path.iterdir()] == ["perception.mp4"]
    with av.open(str(tmp_path / "perception.mp4")) as container:
        assert container.streams.video[0].codec.name == {"libx264": "h264"}.get(encoder, encoder)
    decoded = decode_video(tmp_path / "perception.mp4")
    np.testing.assert_allclose(decoded.timestamps, seconds, atol=1 / 60_000)
    assert decoded.duration == pytest.approx(1.25 + 1.25 / 3, abs=1e-3)  # the last frame is seen, too
    assert decoded.frames.shape == (4, 244, 5 * 336, 3)
    frame, depth, flow, motion, rays = np.split(decoded.frames[:, 20:], 5, axis=2)
    assert all(panel[index].std() > 10 for panel in (frame, depth, rays) for index in range(4))
    assert [round(float(panel.mean()) / 255) for panel in motion] == [0, 1, 0, 1]
    assert all(panel.std() > 25 for panel in flow[[1, 3]]) and all(
        np.median(panel) == pytest.approx(217, abs=3) for panel in flow[[0, 2]]
    )
    labels = decoded.frames[:, :20]
    assert all(label.max() > 200 for label in np.split(labels[0], 5, axis=1))


def test_video_of_times_that_do_not_rise_is_refused_and_leaves_nothing(tmp_path):
    video = perceived(3)
    video.seconds = np.array([0.0, 0.5, 0.5])
    with pytest.raises(ValueError, match="later than the one before"):
        write_perception_video(tmp_path / "perception.mp4", video)
    assert not list(tmp_path.iterdir())


class TrainerOfLongVideos:
    """What `PerceptionPictures` needs of a trainer, for videos of several windows."""

    def __init__(self, processor, teacher):
        self.processing_class, self.teacher, self.perception_decoder = processor, teacher, object()
        self.collate = P4DCollator(processor, num_frames=6)

    def perceive(self, rows):
        video = perceived(self.teacher.num_frames)
        signals = {name: torch.stack([values, values]) for name, values in video.sides["student"].items()}
        return self.collate(rows), signals, PerceptionTargets(latents=None, signals=dict(signals))


def test_a_video_of_several_windows_is_drawn_by_its_first(processor, teacher, rows, tmp_path):
    drawn = PerceptionPictures(TrainerOfLongVideos(processor, teacher), rows[0], [0], tmp_path)
    drawn.on_train_begin(None, TrainerState(), None)
    assert [file.name for file in tmp_path.iterdir()] == ["perception_step_000000.png"]
