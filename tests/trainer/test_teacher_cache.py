import base64
import copy
import io
import json
import os
import pickle
import random
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from modeling_rgpt4d.modeling_l4p import SIGNALS
from trainer import L4PTeacher, P4DCollator, P4DConfig, P4DTrainer
from trainer.distillation_windows import cut, distillation_windows, video_lengths
from trainer.teacher_cache import (
    CachedTeacher,
    TeacherCache,
    TeacherCacheWriter,
    entry_num_bytes,
    fingerprint,
    make_manifest,
    microseconds,
    pack,
    perceive_raw,
    relative_rms,
    unpack_latents,
    video_digest,
)

NUM_FRAMES = 4
HALF = [0.5] * 3


@pytest.fixture
def fill(tmp_path, processor):
    """`fill(teacher, rows)`: a cache of all windows of the rows, each video by itself. Returns its folder."""

    def make(teacher, rows, precision="bfloat16", latents=True, num_frames=NUM_FRAMES, name="cache", shard_bytes=1):
        manifest = make_manifest(teacher, processor.video_processor, precision, latents)
        writer = TeacherCacheWriter(tmp_path / name, manifest, shard_bytes=shard_bytes)
        for row in rows:
            for video in [block for block in row["messages"][0]["content"] if block["type"] == "video"]:
                inputs = processor.video_processor(
                    [video["video"]], video_metadata=[{"fps": video["fps"]}], num_frames=num_frames, return_tensors="pt"
                )
                times = inputs["video_timestamps"]
                windows = distillation_windows(video_lengths(times), NUM_FRAMES, times)
                frames = cut(inputs["pixel_values_videos"], windows, NUM_FRAMES)
                for i, (window, moments) in enumerate(zip(frames, cut(times, windows, NUM_FRAMES), strict=True)):
                    found, raw = perceive_raw(teacher, window[None], HALF, HALF)
                    packed = pack(found if latents else None, raw, precision)
                    record = {"video": row["id"], "digest": video_digest(video), "sampled": num_frames}
                    record |= {"window": [i, len(windows)], "microseconds": microseconds(moments), "rms": {}}
                    writer.add(record, {n: tensor[0] for n, tensor in packed.items()})
        writer.flush()
        return tmp_path / name

    return make


@pytest.fixture
def videos(rows):
    return [row for row in rows if row["messages"][0]["content"][0]["type"] == "video"]


def windows_of(batch):
    times = batch["video_timestamps"]
    windows = distillation_windows(video_lengths(times), NUM_FRAMES, times)
    return torch.stack(cut(batch["unmarked_pixel_values_videos"], windows, NUM_FRAMES))


@pytest.mark.parametrize("num_frames", [4, 6])  # one window, and two that overlap
@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cached_targets_are_the_online_ones_within_the_stated_error(
    l4p, processor, videos, fill, dtype, precision, num_frames
):
    online = L4PTeacher(l4p.to(dtype), depth_scale="metric")
    with torch.no_grad():  # residual streams have a few channels far larger than the others
        l4p.encoder.layers[0].output.dense.bias[3] = 50.0
    cache = TeacherCache(fill(online, videos, precision, num_frames=num_frames))
    cached = CachedTeacher(L4PTeacher(copy.deepcopy(l4p), depth_scale="metric"), cache)
    collate = P4DCollator(processor, num_frames, targets=cache, window=NUM_FRAMES)
    for row in videos:
        batch = collate([row])
        frames = windows_of(batch)
        assert len(frames) == (1 if num_frames == 4 else 2)
        found = cached.perceive(frames, HALF, HALF, batch["perception_targets"])
        one_by_one = [online.perceive(frame[None], HALF, HALF) for frame in frames]
        latents = torch.cat([one.latents for one in one_by_one]).float()
        error = (found.latents.float() - latents).abs()
        if precision == "int8":
            scale = latents.abs().amax(dim=(2, 3, 4), keepdim=True) / 127
            assert (error <= scale / 2 * (1 + 1e-5)).all() and error.max() > 0
        elif dtype == torch.bfloat16:
            assert torch.equal(found.latents.float(), latents) and found.latents.dtype == torch.bfloat16
        else:
            assert (error <= 2**-8 * latents.abs()).all() and error.max() > 0
        assert list(found.signals) == list(SIGNALS) and found.valid == {}
        for name, values in found.signals.items():
            exact = torch.cat([one.signals[name] for one in one_by_one])
            if dtype == torch.bfloat16:
                assert torch.equal(values, exact)
            elif name == "depth":
                assert ((values - exact).abs() <= (2**-8 * exact.log().abs() + 1e-6) * exact).all()
            else:
                assert ((values - exact).abs() <= 2**-8 * exact.abs()).all()


def test_8_bits_hold_the_stated_error_for_channels_of_very_different_size():
    latents = torch.randn(2, 4, 2, 3, 3, 6, generator=torch.Generator().manual_seed(0))
    latents *= torch.tensor([1e-4, 1.0, 1e3, 0.0, 1e-38, 1.0])
    packed = pack(latents, {}, "int8")
    assert packed["latents"].dtype == torch.int8 and packed["latents_scale"].shape == (2, 4, 6)
    error = (unpack_latents(packed) - latents).abs().amax(dim=(2, 3, 4))
    assert (error <= packed["latents_scale"] / 2 * (1 + 1e-5)).all()
    assert (packed["latents_scale"][..., 0] < 1e-4).all()  # a small channel does not get a large one's scale
    expected = (unpack_latents(packed) - latents).flatten(1).norm(dim=1) / latents.flatten(1).norm(dim=1)
    torch.testing.assert_close(relative_rms(packed, latents, {})["latents"], expected)


def test_relative_rms_tells_values_that_are_not_finite():
    depth = torch.ones(3, 1, 2, 2, 2)
    depth[1, 0, 0, 0, 0], depth[2, 0, 0, 0, 0] = float("nan"), float("inf")
    assert relative_rms(pack(None, {"depth": depth}, "bfloat16"), None, {"depth": depth})[
        "depth"
    ].isfinite().tolist() == [
        True,
        False,
        False,
    ]


def test_order_of_batches_does_not_matter(teacher, processor, videos, fill):
    cache = TeacherCache(fill(teacher, videos, shard_bytes=10**9))
    collate = P4DCollator(processor, NUM_FRAMES, targets=cache)
    one_by_one = {row["id"]: collate([row])["perception_targets"]["depth"][0] for row in videos}
    shuffled = random.Random(0).sample(videos, len(videos)) + [videos[0]]
    together = collate(shuffled)["perception_targets"]["depth"]
    for row, depth in zip(shuffled, together, strict=True):
        assert torch.equal(depth, one_by_one[row["id"]])
    assert len({depth.numpy().tobytes() for depth in one_by_one.values()}) == len(videos)


def test_training_on_a_cache_has_the_losses_of_the_online_teacher(
    teacher, l4p, make_model, processor, videos, fill, tmp_path
):
    teacher = L4PTeacher(l4p.bfloat16(), depth_scale="metric")
    cache = TeacherCache(fill(teacher, videos))
    cached = CachedTeacher(L4PTeacher(copy.deepcopy(l4p), depth_scale="metric"), cache)
    losses = []
    for source, targets in ((teacher, None), (cached, cache)):
        args = P4DConfig(str(tmp_path / "run"), bf16=False, use_cpu=True, report_to="none", decoder_hidden_size=16)
        trainer = P4DTrainer(
            make_model(),
            args,
            teacher=source,
            train_dataset=Dataset.from_dict({"messages": [""]}),
            processing_class=processor,
            data_collator=P4DCollator(processor, NUM_FRAMES, targets=targets),
        )
        # one video: a batch of several may be summed in another order than each by itself
        losses.append(trainer.compute_loss(trainer.model.eval(), trainer.data_collator(videos[:1])).item())
    assert losses[0] == losses[1]


def test_a_short_video_has_no_targets(teacher, processor, videos, fill):
    videos[0]["messages"][0]["content"][0]["video"] = videos[0]["messages"][0]["content"][0]["video"][:3]
    cache = TeacherCache(fill(teacher, videos[:1]))
    assert len(cache) == 0
    assert "perception_targets" not in P4DCollator(processor, NUM_FRAMES, targets=cache)(videos[:1])


def test_targets_travel_as_integers_and_the_cache_to_other_processes(teacher, processor, videos, fill):
    """DeepSpeed casts floats of a batch to its own dtype."""
    cache = pickle.loads(pickle.dumps(TeacherCache(fill(teacher, videos[:1], "int8"))))
    targets = P4DCollator(processor, NUM_FRAMES, targets=cache)(videos[:1])["perception_targets"]
    assert set(targets) == {"latents", "latents_scale", *SIGNALS}
    assert not any(tensor.is_floating_point() for tensor in targets.values())


# --------------------------------------------------------------------------------------------------------------- damage


def read_all(folder):
    cache = TeacherCache(folder)
    for shard in cache.shards:
        cache.verify(shard)


def test_a_flipped_byte_anywhere_in_a_shard_is_found(teacher, videos, fill):
    folder = fill(teacher, videos[:2], "int8", shard_bytes=10**9)
    (shard,) = folder.glob("targets-*")
    read_all(folder)
    content = shard.read_bytes()
    end_of_header = 8 + int.from_bytes(content[:8], "little")
    positions = [*range(16), *range(16, end_of_header, 23), *range(end_of_header, len(content), 211), len(content) - 1]
    for position in positions:
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        shard.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{shard} is damaged.*Delete this file and run examples/cache_teacher.py"):
            read_all(folder)
    shard.write_bytes(content)
    read_all(folder)


def test_training_never_gets_a_damaged_value(teacher, processor, videos, fill):
    folder = fill(teacher, videos[:1])
    cache = TeacherCache(folder)  # the damage comes later
    (shard,) = folder.glob("targets-*")
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match="of entry .* are not what was written"):
        P4DCollator(processor, NUM_FRAMES, targets=cache)(videos[:1])
    shard.unlink()
    with pytest.raises(ValueError, match="cannot be read"):
        P4DCollator(processor, NUM_FRAMES, targets=cache)(videos[:1])


def test_cut_longer_foreign_and_renamed_shards_are_found(teacher, videos, fill):
    folder = fill(teacher, videos[:1])
    (shard,) = folder.glob("targets-*")
    content = shard.read_bytes()
    for wrong in (b"", content[:5], content[:8], content[:300], content[:-1], content + b"\0", b"no shard at all"):
        shard.write_bytes(wrong)
        with pytest.raises(ValueError, match="is damaged"):
            TeacherCache(folder)
    shard.unlink()
    (folder / "targets-00000-abc.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        TeacherCache(folder)


def test_a_shard_of_another_cache_and_a_changed_manifest_are_refused(teacher, videos, fill):
    folder, other = fill(teacher, videos[:1]), fill(teacher, videos[1:2], "int8", name="other")
    for shard in other.glob("targets-*"):
        shutil.copy(shard, folder)
    with pytest.raises(ValueError, match="belongs to another cache"):
        TeacherCache(folder)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {"depth_scale": "per_window_scale"}))
    with pytest.raises(ValueError, match="manifest.json beside it was changed"):
        TeacherCache(other)
    with pytest.raises(ValueError, match="no teacher cache"):
        TeacherCache(folder.parent)


# -------------------------------------------------------------------------------------------------------- what is refused


def test_another_teacher_is_refused_and_its_encoder_is_needed_only_for_that(teacher, l4p, videos, fill):
    cache = TeacherCache(fill(teacher, videos[:1]))
    other = copy.deepcopy(l4p)
    with torch.no_grad():
        next(iter(other.heads["flow"].parameters())).flatten()[0] += 1e-3
    with pytest.raises(ValueError, match="another teacher .its weights or settings differ"):
        CachedTeacher(L4PTeacher(other, depth_scale="metric"), cache)
    with pytest.raises(ValueError, match="ran in float32 and this is bfloat16"):
        CachedTeacher(L4PTeacher(copy.deepcopy(l4p).bfloat16(), depth_scale="metric"), cache)
    with pytest.raises(ValueError, match="depth_scale is 'metric', and here it is 'per_window_scale'"):
        CachedTeacher(L4PTeacher(copy.deepcopy(l4p)), cache)
    heads = L4PTeacher(copy.deepcopy(l4p), depth_scale="metric")
    cached = CachedTeacher(heads, cache).to("cpu")
    assert not any(name.startswith("encoder") for name, _ in heads.model.named_parameters())
    latents = torch.randn(1, *cached.latent_shape)
    assert torch.equal(cached.decode(latents, ["flow"])["flow"], teacher.decode(latents, ["flow"])["flow"])
    with pytest.raises(ValueError, match="no encoder left"):
        CachedTeacher(heads, cache)
    with pytest.raises(ValueError, match="samples 8 frames"):
        cached.check_student(8)
    names = ("num_frames", "image_size", "latent_shape", "signals", "depth_scale", "motion_kind")
    assert [getattr(cached, name) for name in names] == [getattr(teacher, name) for name in names]


def test_fingerprint_sees_settings_and_not_memory_formats(l4p):
    whole = fingerprint(l4p)
    other = copy.deepcopy(l4p)
    other.heads.to(memory_format=torch.channels_last_3d)
    assert fingerprint(other) == whole
    other.config.image_mean = (0.5, 0.5, 0.5)
    assert fingerprint(other) != whole


def test_other_frames_and_another_size_are_refused(teacher, l4p, processor, videos, fill):
    cache = TeacherCache(fill(teacher, videos[:1]))
    batch = P4DCollator(processor, NUM_FRAMES, targets=cache)(videos[:1])
    cached = CachedTeacher(L4PTeacher(copy.deepcopy(l4p), depth_scale="metric"), cache)
    cached.check_frames(processor.video_processor)
    with pytest.raises(ValueError, match="32 x 28 pixels"):
        cached.perceive(torch.zeros(1, 4, 3, 32, 28), HALF, HALF, batch["perception_targets"])
    with pytest.raises(ValueError, match="carries no latents"):
        cached.perceive(windows_of(batch), HALF, HALF)
    with pytest.raises(ValueError, match="the batch's latents"):
        cached.perceive(windows_of(batch).repeat(2, 1, 1, 1, 1), HALF, HALF, batch["perception_targets"])
    processor.video_processor.size = {"height": 32, "width": 28}
    with pytest.raises(ValueError, match="resized by .*'height': 28.*'height': 32"):
        cached.check_frames(processor.video_processor)


def test_a_missing_window_names_video_seconds_and_command(teacher, processor, videos, fill):
    cache = TeacherCache(fill(teacher, videos[:1]))
    with pytest.raises(ValueError, match=r"no window of 4 frames from 0.000 to 1.250 s.*cache_teacher.py --output"):
        P4DCollator(processor, NUM_FRAMES, targets=cache)(videos[1:2])
    with pytest.raises(ValueError, match="no window of 4 frames"):  # the same video, sampled otherwise
        P4DCollator(processor, 5, targets=cache, window=NUM_FRAMES)(videos[:1])
    video = videos[0]["messages"][0]["content"][0]
    video["video"] = video["video"].copy()
    video["video"][2, 0, 0, 0] ^= 1
    with pytest.raises(ValueError, match="no window of 4 frames"):  # other frames
        P4DCollator(processor, NUM_FRAMES, targets=cache)(videos[:1])


def test_parts_can_be_left_out_and_not_asked_for(teacher, l4p, processor, videos, fill):
    few = L4PTeacher(l4p, depth_scale="metric", signals=["depth", "camray"])
    folder = fill(few, videos[:1], latents=False)
    with pytest.raises(ValueError, match="has no flow, latents; it has camray, depth and no latents"):
        TeacherCache(folder, signals=["flow", "depth"], latents=True)
    cache = TeacherCache(folder, signals=["depth"])
    batch = P4DCollator(processor, NUM_FRAMES, targets=cache)(videos[:1])
    assert set(batch["perception_targets"]) == {"depth"}
    cached = CachedTeacher(L4PTeacher(copy.deepcopy(l4p), depth_scale="metric"), cache)
    assert (cached.signals, cached.gives_latents) == (("depth",), False)
    found = cached.perceive(windows_of(batch), HALF, HALF, batch["perception_targets"])
    assert found.latents is None and list(found.signals) == ["depth"]
    with pytest.raises(ValueError, match=r"gives \['depth'\], not \['flow'\]"):
        cached.perceive(windows_of(batch), HALF, HALF, batch["perception_targets"], ["flow"])
    folder = fill(teacher, videos[:1], name="whole")
    cache = TeacherCache(folder, latents=False)
    cached = CachedTeacher(L4PTeacher(copy.deepcopy(l4p), depth_scale="metric"), cache)
    batch = P4DCollator(processor, NUM_FRAMES, targets=cache)(videos[:1])
    found = cached.perceive(windows_of(batch), HALF, HALF, batch["perception_targets"], ["flow"])
    assert found.latents is None and list(found.signals) == ["flow"]


# ---------------------------------------------------------------------------------------------------------------- writing


def test_a_cache_made_otherwise_is_not_added_to(teacher, processor, videos, fill):
    folder = fill(teacher, videos[:1])
    fill(teacher, videos[1:2])  # the same settings: added
    assert len(TeacherCache(folder)) == 2
    with pytest.raises(ValueError, match="precision bfloat16, int8"):
        fill(teacher, videos[:1], "int8")
    with pytest.raises(ValueError, match="unknown precision 'int4'"):
        make_manifest(teacher, processor.video_processor, "int4")
    with pytest.raises(ValueError, match="nothing to keep"):
        make_manifest(L4PTeacher(teacher.model, signals=[]), processor.video_processor, latents=False)
    (folder / "manifest.json").unlink()
    with pytest.raises(ValueError, match="holds shards without manifest.json"):
        fill(teacher, videos[:1])


def test_entries_written_twice_do_no_harm(teacher, videos, fill):
    folder = fill(teacher, videos, shard_bytes=1)
    fill(teacher, videos, shard_bytes=10**9)
    assert len(TeacherCache(folder)) == len(videos) == len(list(folder.glob("targets-*"))) - 1
    read_all(folder)


def test_unfinished_files_are_not_read_and_old_ones_removed(teacher, videos, fill):
    folder = fill(teacher, videos[:1])
    recent, old = folder / ".targets-00000-a.part", folder / ".targets-00001-b.part"
    for file in (recent, old):
        file.write_bytes(b"half a shard")
    os.utime(old, (0, 0))
    read_all(folder)
    fill(teacher, videos[:1])
    assert recent.exists() and not old.exists()


def test_a_full_disk_leaves_nothing_unfinished(teacher, videos, fill, monkeypatch):
    folder = fill(teacher, videos[:1])
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        fill(teacher, videos[1:2])
    monkeypatch.undo()
    assert not list(folder.glob(".*.part")) and len(TeacherCache(folder)) == 1


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
def test_estimated_size_is_the_real_one_within_2_percent(teacher, l4p, videos, fill, precision):
    folder = fill(teacher, videos, precision, shard_bytes=10**9)
    (shard,) = folder.glob("targets-*")
    expected = len(videos) * entry_num_bytes(l4p.config, SIGNALS, True, precision)
    assert abs(expected / shard.stat().st_size - 1) < 0.02


# -------------------------------------------------------------------------------------------------------- keys of videos


def test_digest_is_of_the_content_wherever_it_is(tmp_path):
    file, copied, other = tmp_path / "a.mp4", tmp_path / "b" / "c.mp4", tmp_path / "d.mp4"
    copied.parent.mkdir()
    file.write_bytes(b"content")
    copied.write_bytes(b"content")
    other.write_bytes(b"Content")
    url = "data:video/mp4;base64," + base64.b64encode(b"content").decode()
    same = [
        str(file),
        copied,
        b"content",
        {"path": str(file), "bytes": None},
        {"path": "nowhere", "bytes": b"content"},
        url,
    ]
    digests = {video_digest({"type": "video", key: source}) for source in same for key in ("video", "path", "url")}
    assert len(digests) == 1
    assert video_digest({"video": str(other)}) not in digests
    file.write_bytes(b"content, changed")
    assert video_digest({"video": str(file)}) not in digests
    with pytest.raises(ValueError, match="nowhere.mp4: no such file"):
        video_digest({"video": "nowhere.mp4"})
    with pytest.raises(ValueError, match="without a source"):
        video_digest({"type": "video"})


def test_digest_of_frames_sees_pictures_order_names_and_rate(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    for i, frame in enumerate(frames):
        stream = io.BytesIO()
        Image.fromarray(frame).save(stream, "png")
        (tmp_path / f"frame_{i}.png").write_bytes(stream.getvalue())
    pictures = [Image.fromarray(frame) for frame in frames]
    first = {
        "folder": video_digest({"video": str(tmp_path), "fps": 2.0}),
        "pictures": video_digest({"video": pictures, "fps": 2.0}),
        "array": video_digest({"video": frames, "fps": 2.0}),
    }
    assert video_digest({"video": torch.from_numpy(frames), "fps": 2.0}) == first["array"]
    assert video_digest({"video": list(frames), "fps": 2.0}) == first["pictures"]
    others = [
        video_digest({"video": str(tmp_path), "fps": 3.0}),
        video_digest({"video": pictures[::-1], "fps": 2.0}),
        video_digest({"video": frames[:, :, ::-1], "fps": 2.0}),
        video_digest({"video": frames.reshape(3, 5, 4, 3), "fps": 2.0}),
    ]
    (tmp_path / "frame_1.png").rename(tmp_path / "frame_9.png")
    others.append(video_digest({"video": str(tmp_path), "fps": 2.0}))
    assert len({*first.values(), *others}) == 8


def test_microseconds_are_those_of_either_unit():
    seconds = torch.tensor([0.0, 1 / 3, 1000.1], dtype=torch.float32)
    assert microseconds(seconds) == [0, 333333, 1000099976]  # the float32 nearest to 1000.1
    assert microseconds(torch.tensor([0, 333333])) == [0, 333333]
