import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from modeling_rgpt4d.image_processing_rgpt4d import RGPT4DImageProcessor
from modeling_rgpt4d.region_marks import draw_marks
from modeling_rgpt4d.video_decoding import decode_video
from modeling_rgpt4d.video_processing_rgpt4d import RGPT4DVideoProcessor, flatten_videos

SIZE = {"height": 56, "width": 56}


def noise(num_frames: int, height: int = 80, width: int = 100, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)


@pytest.fixture
def processor() -> RGPT4DVideoProcessor:
    return RGPT4DVideoProcessor(size=SIZE, num_frames=4)


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


def test_pixels_equal_nvila(shared_dir):
    reference = load_file(shared_dir / "parity/nvila/refs/vision_70.safetensors")["video4/pixel_values"]
    frames = shared_dir / "parity/nvila/refs/inputs/frames"
    processor = RGPT4DVideoProcessor(size={"height": 70, "width": 70}, num_frames=4)
    outputs = processor(str(frames), video_metadata=[{"fps": 10}], return_tensors="pt")
    torch.testing.assert_close(
        outputs["pixel_values_videos"][0], reference.float(), rtol=0, atol=5e-4
    )  # kept in float16


def test_frames_equal_images_to_the_bit(processor):
    video = noise(4)
    frames = processor(video, video_metadata=[{"fps": 1}], return_tensors="pt")["pixel_values_videos"][0]
    images = RGPT4DImageProcessor(size=SIZE)([Image.fromarray(frame) for frame in video], return_tensors="pt")[
        "pixel_values"
    ]
    assert frames.dtype == torch.float32 and torch.equal(frames, images)


def test_frames_are_resized_by_pil_and_lie_between_minus_one_and_one(processor):
    video = noise(4)
    frames = processor(video, video_metadata=[{"fps": 1}])["pixel_values_videos"][0]
    for frame, source in zip(frames, video, strict=True):
        resized = np.asarray(Image.fromarray(source).resize((56, 56), Image.Resampling.BICUBIC), dtype=np.float32)
        np.testing.assert_allclose(frame, resized.transpose(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)


def test_file_gives_frames_and_seconds(processor, mp4):
    outputs = processor(mp4, return_tensors="pt")
    assert outputs["pixel_values_videos"].shape == (1, 4, 3, 56, 56)
    assert outputs["video_timestamps"].dtype == torch.float32
    np.testing.assert_allclose(outputs["video_timestamps"], [[0, 0.6, 1.3, 1.9]], rtol=0, atol=1e-6)
    assert "video_metadata" not in outputs


def test_shorter_videos_are_padded_and_marked(processor, mp4):
    outputs = processor([noise(6), mp4], video_metadata=[{"fps": 2}, {}], fps=1.0)
    pixels, timestamps = outputs["pixel_values_videos"], outputs["video_timestamps"]
    assert pixels.shape == (2, 3, 3, 56, 56)  # 3 s and 2 s at one frame a second
    assert timestamps.tolist() == [[0.0, 1.0, 2.5], [0.0, pytest.approx(1.9), -1.0]]
    assert (pixels[1, 2] == 0).all() and (pixels[1, 1] != 0).any()
    alone = processor(mp4, fps=1.0)
    assert np.array_equal(alone["pixel_values_videos"][0], pixels[1, :2])


def test_do_sample_frames_false_takes_all(processor):
    outputs = processor(noise(7), video_metadata=[{"fps": 7}], do_sample_frames=False)
    assert outputs["pixel_values_videos"].shape[1] == 7
    with pytest.raises(ValueError, match="takes all frames"):
        processor(noise(7), video_metadata=[{"fps": 7}], do_sample_frames=False, num_frames=3)


def test_regions_are_drawn_at_source_size_on_the_first_frame_only(processor):
    video = noise(2)
    regions = [{"name": "R1", "box": [20, 30, 60, 70]}]
    plain = processor(video, video_metadata=[{"fps": 1}])["pixel_values_videos"][0]
    for given in (regions, [regions]):  # one video: its own list will do
        marked = processor(video, video_metadata=[{"fps": 1}], regions=given)["pixel_values_videos"][0]
        drawn = np.asarray(draw_marks(Image.fromarray(video[0]), regions).resize((56, 56), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(marked[0], drawn.transpose(2, 0, 1) / 127.5 - 1, rtol=0, atol=1e-6)
        assert not np.array_equal(marked[0], plain[0])
        assert np.array_equal(marked[2:], plain[2:])
        assert np.array_equal(marked[1], plain[1])  # frame 0 again, as there are 2 frames for 4 places


def test_regions_belong_to_their_video(processor):
    regions = [None, [{"name": "obj_1", "point": [50, 50]}]]
    metadata = [{"fps": 1}, {"fps": 1}]
    marked = processor([noise(4), noise(4, seed=1)], video_metadata=metadata, regions=regions)["pixel_values_videos"]
    plain = processor([noise(4), noise(4, seed=1)], video_metadata=metadata)["pixel_values_videos"]
    assert np.array_equal(marked[0], plain[0]) and not np.array_equal(marked[1, 0], plain[1, 0])
    with pytest.raises(ValueError, match="1 entries for 2 videos"):
        processor([noise(4), noise(4)], video_metadata=metadata, regions=[None])


def test_errors_name_file_and_region(processor, mp4, tmp_path):
    with pytest.raises(ValueError, match=r"street.mp4: region obj_2: box .* frame of 96 x 64 pixels"):
        processor(mp4, regions=[[{"name": "obj_2", "box": [0, 0, 500, 10]}]])
    with pytest.raises(ValueError, match=r"street.mp4: region obj_1: mask of shape \(10, 10\).*\(64, 96\)"):
        processor({"path": mp4, "bytes": None}, regions=[[{"name": "obj_1", "mask": np.ones((10, 10), bool)}]])
    with pytest.raises(ValueError, match="video 1: frames alone have no times"):
        processor([mp4, noise(3)])
    with pytest.raises(ValueError, match="gone.mp4: no such file"):
        processor(str(tmp_path / "gone.mp4"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_center_crop": True}, "do_center_crop"),
        ({"device": "cuda"}, "device"),
        ({"num_frames": 3, "fps": 2.0}, "either num_frames or fps"),
        ({"num_frames": 0}, "number of frames"),
        ({"wrong": 1}, "wrong"),
        ({"size": {"shortest_edge": 30}}, "height"),
    ],
)
def test_options_that_cannot_be_honoured_are_refused(processor, mp4, options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        processor(mp4, **options)


def test_different_sizes_without_resize_are_refused(processor):
    metadata = [{"fps": 1}, {"fps": 1}]
    with pytest.raises(ValueError, match="one size"):
        processor([noise(4), noise(4, 30, 30)], video_metadata=metadata, do_resize=False)
    assert processor([noise(4)], video_metadata=metadata[:1], do_resize=False)["pixel_values_videos"].shape[-2:] == (
        80,
        100,
    )


def test_metadata_is_returned_on_request(processor, mp4):
    (metadata,) = processor(mp4, return_metadata=True)["video_metadata"]
    assert (metadata.total_num_frames, metadata.width, metadata.height) == (20, 96, 64)
    assert metadata.fps == pytest.approx(10, abs=0.01) and metadata.frames_indices.tolist() == [0, 6, 13, 19]


def test_frames_of_an_engine_that_sampled_before_keep_their_times(processor):
    metadata = [{"fps": 30.0, "total_num_frames": 300, "frames_indices": [0, 100, 299]}]
    outputs = processor(noise(3), video_metadata=metadata, do_sample_frames=False)
    np.testing.assert_allclose(outputs["video_timestamps"], [[0, 100 / 30, 299 / 30]], rtol=1e-6)


def test_rescale_and_normalise_can_be_switched_off(processor):
    video = noise(4, 56, 56)
    raw = processor(video, video_metadata=[{"fps": 1}], do_rescale=False, do_normalize=False)["pixel_values_videos"][0]
    assert np.array_equal(raw, video.transpose(0, 3, 1, 2))
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    outputs = processor(video, video_metadata=[{"fps": 1}], image_mean=mean, image_std=std)["pixel_values_videos"][0]
    expected = (video / 255 - mean) / std
    np.testing.assert_allclose(outputs, expected.transpose(0, 3, 1, 2), rtol=0, atol=1e-5)


def test_save_and_load_keeps_everything(processor, tmp_path, mp4):
    processor.save_pretrained(tmp_path)
    loaded = RGPT4DVideoProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    assert np.array_equal(loaded(mp4)["pixel_values_videos"], processor(mp4)["pixel_values_videos"])
    assert RGPT4DVideoProcessor.from_pretrained(tmp_path, num_frames=2)(mp4)["pixel_values_videos"].shape[1] == 2


def test_flatten_videos_keeps_reading_order():
    array = noise(2, 4, 4)
    frames = [Image.fromarray(frame) for frame in array]
    assert flatten_videos("a.mp4") == ["a.mp4"]
    assert flatten_videos([["a.mp4", b"b"], [], [{"path": "c"}]]) == ["a.mp4", b"b", {"path": "c"}]
    assert flatten_videos(frames) == [frames] and flatten_videos([[frames], ["a"]]) == [frames, "a"]
    assert flatten_videos(list(array))[0][1] is not None and len(flatten_videos(list(array))) == 1
    assert len(flatten_videos(np.stack([array] * 3))) == 3
    with pytest.raises(ValueError, match="None"):
        flatten_videos(["a", None])


def test_real_videos_become_model_inputs(processor, shared_dir):
    files = [str(path) for path in sorted((shared_dir / "assets/videos").iterdir())]
    outputs = processor(files, return_tensors="pt")
    assert outputs["pixel_values_videos"].shape == (len(files), 4, 3, 56, 56)
    for path, timestamps in zip(files, outputs["video_timestamps"], strict=True):
        assert timestamps[0] == 0 and (timestamps.diff() > 0).all()
        np.testing.assert_allclose(timestamps, decode_video(path, 4).timestamps, rtol=1e-6)
