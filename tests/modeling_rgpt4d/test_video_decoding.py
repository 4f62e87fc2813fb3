import json
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from modeling_rgpt4d import video_decoding
from modeling_rgpt4d.video_decoding import decode_video, uniform_indices

HEIGHT, WIDTH = 48, 64


def grey(index: int) -> int:
    """The brightness that stands for a frame's index: 48 levels, 5 apart, so lossy coding cannot confuse them."""
    return 10 + index % 48 * 5


def picture(index: int) -> np.ndarray:
    """A frame that tells its index, with a black corner at the top left that tells its orientation."""
    frame = np.full((HEIGHT, WIDTH, 3), grey(index), np.uint8)
    frame[: HEIGHT // 2, : WIDTH // 2] = 0
    return frame


def textured(index: int) -> np.ndarray:
    """A moving texture with noise: lossy coding leaves something in every picture, so no two decoded ones are equal."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (HEIGHT // 4 + 4, WIDTH // 4 + 24, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    view = scene[index % 16 : index % 16 + HEIGHT, 2 * index % 96 : 2 * index % 96 + WIDTH].astype(np.int16)
    return np.clip(view + np.random.default_rng(index).integers(-20, 20, view.shape), 0, 255).astype(np.uint8)


def write_video(
    path: Path, num_frames=40, codec="libx264", pts=None, unit=Fraction(1, 25), options=None, muxer=None, draw=picture
) -> Path:
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height = WIDTH, HEIGHT
        stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
        stream.codec_context.time_base = unit
        for i in range(num_frames):
            frame = av.VideoFrame.from_ndarray(draw(i), format="rgb24")
            frame.pts, frame.time_base = (i if pts is None else pts[i]), unit
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.fixture(scope="module")
def mp4(tmp_path_factory) -> Path:
    """100 frames at 25 per second, B-frames, a key frame every 10, index at the front."""
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    return write_video(path, 100, options={"bf": "3", "g": "10"}, muxer={"movflags": "faststart"})


def indices_seen(frames: np.ndarray, total: int) -> list[int]:
    levels = np.array([grey(i) for i in range(total)])
    return [int(np.abs(levels - float(frame[-8:, -8:].mean())).argmin()) for frame in frames]


def test_uniform_indices_equal_nvila(shared_dir):
    cases = json.loads((shared_dir / "parity/nvila/refs/frame_indices.json").read_text())
    cases = [case for case in cases if "indices" in case]
    assert len(cases) >= 10
    for case in cases:
        assert uniform_indices(case["frame_count"], case["num_frames"]).tolist() == case["indices"]


@pytest.mark.parametrize("num_frames", [1, 2, 7, 16, 40, 64])
@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("b_frames.mp4", "libx264", {"bf": "3", "g": "10"}),
        ("one_group.mp4", "libx264", {"bf": "2"}),
        ("open_group.mp4", "libx264", {"bf": "3", "g": "10", "x264-params": "open-gop=1"}),
        ("hevc.mkv", "libx265", {"bf": "3", "g": "10", "x265-params": "log-level=none:open-gop=1"}),
        ("vp9.webm", "libvpx-vp9", {"cpu-used": "8", "deadline": "realtime", "g": "10"}),
        ("mpeg4.avi", "mpeg4", {"bf": "2", "g": "10", "b": "8M"}),
        ("stream.ts", "libx264", {"bf": "3", "g": "10"}),
    ],
)
def test_sampled_frames_and_times_are_exact(tmp_path, name, codec, options, num_frames):
    try:
        path = write_video(tmp_path / name, 40, codec, options=options)
    except (av.codec.codec.UnknownCodecError, av.error.FFmpegError) as error:
        pytest.skip(f"this PyAV cannot encode {codec}: {error}")
    video = decode_video(path, num_frames)
    assert video.frames.shape == (num_frames, HEIGHT, WIDTH, 3) and video.frames.dtype == np.uint8
    assert video.total_num_frames == 40
    assert video.indices.tolist() == uniform_indices(40, num_frames).tolist()
    assert indices_seen(video.frames, 40) == video.indices.tolist()
    np.testing.assert_allclose(video.timestamps, video.indices / 25, rtol=0, atol=1e-6)
    assert video.timestamps.dtype == np.float64
    assert video.duration == pytest.approx(40 / 25, abs=1e-3)


def test_gif_has_its_own_times(tmp_path):
    pts = np.cumsum([0, 10, 5, 30, 7, 20, 11, 3, 40, 8]).tolist()
    path = write_video(tmp_path / "clip.gif", 10, "gif", pts=pts, unit=Fraction(1, 100))
    video = decode_video(path, 4)
    np.testing.assert_allclose(video.timestamps, np.array(pts)[[0, 3, 6, 9]] / 100, rtol=0, atol=1e-6)
    assert np.array_equal(video.frames, decode_video(path).frames[[0, 3, 6, 9]])
    assert len(np.unique(decode_video(path).frames, axis=0)) > 1


def test_variable_frame_rate_keeps_true_times(tmp_path):
    pts = np.cumsum(np.random.default_rng(0).integers(1, 200, 40)).tolist()
    video = decode_video(
        write_video(tmp_path / "vfr.mp4", 40, pts=pts, unit=Fraction(1, 1000), options={"bf": "2"}), 16
    )
    expected = (np.array(pts) - pts[0])[uniform_indices(40, 16)] / 1000
    assert indices_seen(video.frames, 40) == uniform_indices(40, 16).tolist()
    np.testing.assert_allclose(video.timestamps, expected, rtol=0, atol=1e-6)
    assert np.ptp(np.diff(video.timestamps)) > 0.05


def test_fewer_frames_than_asked_repeat_with_their_own_times(tmp_path):
    video = decode_video(write_video(tmp_path / "short.mp4", 3), 8)
    assert indices_seen(video.frames, 3) == [0, 0, 1, 1, 1, 1, 2, 2]
    np.testing.assert_allclose(video.timestamps, np.array([0, 0, 1, 1, 1, 1, 2, 2]) / 25, rtol=0, atol=1e-6)


def test_sample_fps_takes_frames_per_second(mp4):
    video = decode_video(mp4, sample_fps=2)
    assert video.indices.tolist() == uniform_indices(100, 8).tolist()  # 4 s
    assert len(decode_video(mp4, sample_fps=0.01).frames) == 1


@pytest.mark.parametrize(
    ("turn", "corner"),  # degrees clockwise, where the black corner of the stored frame is shown
    [(0, "top left"), (90, "top right"), (180, "bottom right"), (270, "bottom left"), ("mirror", "top right")],
)
def test_rotation_flag_is_applied(tmp_path, mp4, turn, corner):
    a, b, c, d = {0: (1, 0, 0, 1), 90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0), "mirror": (-1, 0, 0, 1)}[
        turn
    ]
    content = mp4.read_bytes()
    start = content.find(b"tkhd") + 4 + 4 + 20 + 16  # version 0 of the track header: matrix after times, ids and layer
    assert struct.unpack(">9i", content[start : start + 36])[0] == 65536
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    video = decode_video(content[:start] + matrix + content[start + 36 :], 2)
    assert video.frames.shape[1:3] == video.source_size == ((WIDTH, HEIGHT) if turn in (90, 270) else (HEIGHT, WIDTH))
    last = video.frames[-1].mean(-1)
    height, width = last.shape
    dark = {
        f"{row} {column}": last[y : y + height // 2 - 4, x : x + width // 2 - 4].mean() < 8
        for row, y in (("top", 0), ("bottom", height // 2 + 4))
        for column, x in (("left", 0), ("right", width // 2 + 4))
    }
    assert [name for name, is_dark in dark.items() if is_dark] == [corner]


def test_every_way_to_give_a_file_is_the_same(mp4):
    expected = decode_video(mp4, 5)
    content = mp4.read_bytes()
    for source in (str(mp4), content, {"path": str(mp4), "bytes": None}, {"path": None, "bytes": content}):
        video = decode_video(source, 5)
        assert np.array_equal(video.frames, expected.frames) and np.array_equal(video.timestamps, expected.timestamps)


def test_files_too_large_to_keep_in_memory_are_read_twice(mp4, monkeypatch):
    expected = decode_video(mp4, 7)
    monkeypatch.setattr(video_decoding, "MAX_KEPT_BYTES", 100)
    video = decode_video(mp4, 7)
    assert np.array_equal(video.frames, expected.frames) and np.array_equal(video.timestamps, expected.timestamps)


def test_packets_that_lie_are_not_trusted(mp4, monkeypatch):
    expected = decode_video(mp4, 7)
    list_packets = video_decoding._list_packets

    def with_one_that_shows_nothing(*args):
        packets = list_packets(*args)
        packets.pts.append(10**9)
        packets.is_shown.append(True)
        packets.is_key.append(False)
        return packets

    monkeypatch.setattr(video_decoding, "_list_packets", with_one_that_shows_nothing)
    monkeypatch.setattr(video_decoding, "_is_disposable", lambda *_: True)
    video = decode_video(mp4, 7)  # the last frame never comes: everything is decoded instead
    assert video.total_num_frames == 100
    assert np.array_equal(video.frames, expected.frames) and np.array_equal(video.timestamps, expected.timestamps)


def test_only_the_packets_that_are_needed_are_decoded():
    packets = video_decoding._Packets([0, 3, 1, 2, 4, 7, 5, 6], [True] * 8, [True, False, False, False] * 2, None, 1)
    assert packets.ranges([0, 6]) == [(0, 1), (4, 8)]
    assert packets.ranges([2, 4]) == [(0, 5)]
    open_group = video_decoding._Packets(
        [0, 2, 1, 5, 3, 4], [True] * 6, [True, False, False, True, False, False], None, 1
    )
    assert open_group.ranges([5]) == [(3, 4)] and open_group.ranges([4]) == [(0, 6)]


X264_OPTIONS = {
    "defaults": {},
    "closed_groups": {"bf": "3", "g": "12"},
    "open_groups": {"bf": "3", "g": "12", "x264-params": "open-gop=1"},
    "b_pyramid": {"bf": "7", "x264-params": "b-pyramid=normal:b-adapt=0:keyint=20:scenecut=0"},
    "no_pyramid": {"bf": "4", "x264-params": "b-pyramid=none:b-adapt=0:keyint=20:scenecut=0"},
    "many_references": {
        "bf": "5",
        "x264-params": "ref=8:b-adapt=2:keyint=33:aud=1:nal-hrd=vbr:vbv-maxrate=900:vbv-bufsize=900",
    },
    "interlaced": {"bf": "3", "g": "12", "flags": "+ildct+ilme"},
    "intra_refresh": {"bf": "0", "x264-params": "intra-refresh=1:keyint=10"},
    "baseline": {"profile": "baseline", "g": "10"},
}


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [(f"{name}.mp4", "libx264", options) for name, options in X264_OPTIONS.items()]
    + [
        ("b_frames.mkv", "libx264", X264_OPTIONS["closed_groups"]),
        ("stream.ts", "libx264", X264_OPTIONS["closed_groups"]),
        ("hevc.mp4", "libx265", {"x265-params": "log-level=none:bframes=4:b-pyramid=1:keyint=12:temporal-layers=3"}),
        ("clip.webm", "libvpx-vp9", {"cpu-used": "8", "deadline": "realtime", "g": "12"}),
        ("mpeg4.avi", "mpeg4", {"bf": "2", "g": "12", "b": "2M"}),
    ],
)
def test_sampled_frames_equal_the_bits_of_a_full_decode(tmp_path, name, codec, options):
    try:
        path = write_video(tmp_path / name, 60, codec, options=options, draw=textured)
    except (av.codec.codec.UnknownCodecError, av.error.FFmpegError) as error:
        pytest.skip(f"this PyAV cannot encode {codec}: {error}")
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        whole = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    assert len(np.unique(whole, axis=0)) == len(whole) == 60
    for num_frames in (1, 2, 5, 16, 60, 70):
        video = decode_video(path, num_frames)
        assert np.array_equal(video.frames, whole[uniform_indices(60, num_frames)]), num_frames


@pytest.mark.parametrize("name", X264_OPTIONS)
def test_packets_are_skipped_where_ffmpeg_finds_no_reference(tmp_path, name):
    path = write_video(tmp_path / "clip.mp4", 60, options=X264_OPTIONS[name], draw=textured)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        listed = [packet for packet in container.demux(stream) if packet.size]
        times = [packet.pts for packet in listed]
        kept = [packet is not None for packet in video_decoding._without_skipped(stream, listed, wanted=())]
        wanted = times[10:40:3]
        given = list(video_decoding._without_skipped(stream, listed, wanted))
    with av.open(str(path)) as container:  # an independent reading: what FFmpeg decodes when it leaves them out
        container.streams.video[0].codec_context.skip_frame = "NONREF"
        referred_to = {frame.pts for frame in container.decode(video=0)}
    assert {pts for pts, is_kept in zip(times, kept, strict=True) if is_kept} == referred_to
    assert (sum(kept) < 60) == (name not in ("intra_refresh", "baseline"))
    assert None not in given[10:40:3] + given[11:41:3]  # the wanted ones, and those that may be their second fields


@pytest.mark.parametrize(("suffix", "codec"), [("ts", "libx264"), ("mp4", "libx265"), ("avi", "mpeg4")])
def test_packets_of_other_kinds_are_not_skipped(tmp_path, monkeypatch, suffix, codec):
    options = {"x265-params": "log-level=none"} if codec == "libx265" else {"bf": "3"}
    try:
        path = write_video(tmp_path / f"clip.{suffix}", 20, codec, options=options)
    except (av.codec.codec.UnknownCodecError, av.error.FFmpegError) as error:
        pytest.skip(f"this PyAV cannot encode {codec}: {error}")
    monkeypatch.setattr(video_decoding, "_is_disposable", lambda *_: True)
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        listed = [packet for packet in container.demux(stream) if packet.size]
        assert None not in list(video_decoding._without_skipped(stream, listed, wanted=()))


def test_units_that_are_not_understood_are_not_skipped():
    lone = b"\0\0\0\2\x01\xff"  # a slice with nal_ref_idc 0
    assert video_decoding._is_disposable(lone, 4)
    assert video_decoding._is_disposable(b"\0\0\0\2\x09\x10" + lone + lone, 4)
    for content in (
        b"",
        b"\0\0\0\2\x09\x10",  # a delimiter alone
        b"\0\0\0\2\x21\xff",  # a slice that is referred to
        lone + b"\0\0\0\2\x21\xff",
        b"\0\0\0\2\x67\xff" + lone,  # parameters of those that follow
        b"\0\0\0\2\x0a\xff" + lone,  # the end of a sequence
        lone[:-1],
        lone + b"\0",
        b"\0\0\0\0" + lone,
    ):
        assert not video_decoding._is_disposable(content, 4), content


def test_each_frame_is_called_once_a_position(tmp_path):
    positions = []

    def halve(frame, position):
        positions.append(position)
        return frame[::2, ::2]

    video = decode_video(write_video(tmp_path / "short.mp4", 3), 5, each_frame=halve)
    assert sorted(positions) == [0, 1, 2, 3, 4]
    assert video.frames.shape == (5, HEIGHT // 2, WIDTH // 2, 3) and video.source_size == (HEIGHT, WIDTH)


@pytest.mark.parametrize("kind", ["numpy", "channels_first", "torch", "pil", "list", "folder"])
def test_frames_with_a_rate(tmp_path, kind):
    array = np.stack([picture(i) for i in range(12)])
    source = {
        "numpy": array,
        "channels_first": torch.from_numpy(array).permute(0, 3, 1, 2),
        "torch": torch.from_numpy(array),
        "pil": [Image.fromarray(frame) for frame in array],
        "list": list(array),
        "folder": tmp_path,
    }[kind]
    if kind == "folder":
        for i, frame in enumerate(array):  # no leading zeros: frame_2 must come before frame_10
            Image.fromarray(frame).save(tmp_path / f"frame_{i}.png")
        (tmp_path / "notes.txt").write_text("not a frame")
    video = decode_video(source, 5, fps=10)
    assert np.array_equal(video.frames, array[uniform_indices(12, 5)])
    np.testing.assert_allclose(video.timestamps, uniform_indices(12, 5) / 10, rtol=0, atol=1e-12)
    assert video.duration == pytest.approx(1.2)


def test_frames_sampled_before_keep_their_source_times():
    array = np.stack([picture(i) for i in range(3)])
    video = decode_video(array, fps=30, source_indices=[0, 45, 90])
    assert video.timestamps.tolist() == [0.0, 1.5, 3.0]


def test_truncated_files_are_refused(tmp_path, mp4):
    for name, codec in (
        ("end.mp4", "libx264"),
        ("clip.webm", "libvpx-vp9"),
        ("clip.gif", "gif"),
        ("clip.avi", "mpeg4"),
    ):
        options = {"cpu-used": "8", "deadline": "realtime"} if codec == "libvpx-vp9" else {}
        whole = write_video(tmp_path / name, 40, codec, options=options)
        cut = tmp_path / f"cut_{name}"
        cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 6 // 10])
        with pytest.raises(ValueError, match=f"cut_{name}.*truncated"):
            decode_video(cut, 4)
    with pytest.raises(ValueError, match="truncated"):  # index at the front: only sizes tell
        decode_video(mp4.read_bytes()[: mp4.stat().st_size * 9 // 10], 4)


def test_damaged_file_is_refused(tmp_path, mp4):
    content = bytearray(mp4.read_bytes())
    start = content.find(b"mdat") + 4
    content[start + 200 : start + 1200] = bytes(1000)
    (tmp_path / "damaged.mp4").write_bytes(content)
    with pytest.raises(ValueError, match="damaged.mp4"):
        decode_video(tmp_path / "damaged.mp4", 50)


def write_bad(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    if name == "empty.mp4":
        path.write_bytes(b"")
    elif name == "text.txt":
        path.write_text("FFmpeg would draw this text as a video\n" * 100)
    elif name == "photo.jpg":
        Image.fromarray(picture(0)).save(path)
    elif name == "playlist.m3u8":
        path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nclip.ts\n#EXT-X-ENDLIST\n")
        write_video(tmp_path / "clip.ts", 5)
    elif name == "sound.wav":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
    elif name == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize(
    "name", ["missing.mp4", "empty.mp4", "text.txt", "photo.jpg", "playlist.m3u8", "sound.wav", "folder"]
)
def test_what_is_no_video_is_refused_by_name(tmp_path, name):
    path = write_bad(tmp_path, name)
    with pytest.raises(ValueError, match=name) as error:
        decode_video(path, 4, fps=25 if name == "folder" else None)
    assert "expected" in str(error.value).lower()


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (np.zeros((3, 4, 5, 3), np.uint8), {}, '"fps": 30'),
        (np.zeros((3, 4, 5, 3), np.uint8), {"fps": 0}, "fps must be positive"),
        (np.zeros((3, 4, 5, 3), np.float32), {"fps": 1}, "uint8"),
        (np.zeros((3, 4, 5), np.uint8), {"fps": 1}, r"\(N, H, W, 3\)"),
        (np.zeros((0, 4, 5, 3), np.uint8), {"fps": 1}, "no frames"),
        ([np.zeros((4, 5, 3), np.uint8), np.zeros((4, 6, 3), np.uint8)], {"fps": 1}, "one size"),
        (["a.png", "b.png"], {"fps": 1}, "PIL pictures or arrays"),
        ([], {"fps": 1}, "no frames"),
        (42, {}, "cannot read a video from int"),
        ({"name": "x"}, {}, "'path' or 'bytes'"),
        ("https://example.org/clip.mp4", {}, "download"),
        (np.zeros((3, 4, 5, 3), np.uint8), {"fps": 1, "num_frames": 0}, "at least 1"),
        (np.zeros((3, 4, 5, 3), np.uint8), {"fps": 1, "num_frames": 2, "sample_fps": 1}, "either"),
        (np.zeros((3, 4, 5, 3), np.uint8), {"fps": 1, "source_indices": [0, 1]}, "3 frames but 2 indices"),
    ],
)
def test_bad_arguments_are_refused_with_the_remedy(source, options, message):
    with pytest.raises(ValueError, match=message):
        decode_video(source, **options)


def test_a_rate_for_a_file_is_refused(mp4):
    with pytest.raises(ValueError, match="clip.mp4.*leave out fps=30"):
        decode_video(mp4, 4, fps=30)


def test_unreadable_frame_of_a_folder_is_named(tmp_path):
    Image.fromarray(picture(0)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_text("no picture")
    with pytest.raises(ValueError, match="1.png"):
        decode_video(tmp_path, fps=5)


def test_real_videos_sampled_equal_decoded_whole(shared_dir):
    files = sorted((shared_dir / "assets/videos").iterdir())
    assert {path.suffix for path in files} == {".mp4", ".gif", ".webm"}
    for path in files:
        with av.open(str(path)) as container:  # an independent reading: everything, in order, by the decoder alone
            stream = container.streams.video[0]
            pts = [frame.pts for frame in container.decode(stream)]
            seconds = np.array([float((p - pts[0]) * stream.time_base) for p in pts])
        video = decode_video(path, 9)
        picked = uniform_indices(len(pts), 9)
        assert video.total_num_frames == len(pts), path.name
        np.testing.assert_allclose(video.timestamps, seconds[picked], rtol=0, atol=1e-6, err_msg=path.name)
        wanted = {pts[i] for i in picked[:4]}
        with av.open(str(path)) as container:
            shown = []
            for frame in container.decode(video=0):
                if frame.pts in wanted:
                    shown.append(frame.to_ndarray(format="rgb24"))
                    if len(shown) == len(wanted):
                        break
        assert np.array_equal(video.frames[:4], np.stack(shown)), path.name
