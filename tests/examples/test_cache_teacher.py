import importlib
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import av
import numpy as np
import psutil
import pytest
import torch

from modeling_rgpt4d import L4PConfig, L4PModel, RGPT4DImageProcessor, RGPT4DProcessor, RGPT4DVideoProcessor
from trainer import L4PTeacher, P4DCollator
from trainer.teacher_cache import TeacherCache, window_key

EXAMPLES = Path(__file__).parents[2] / "examples"
NUM_VIDEOS, NUM_FRAMES = 40, 6  # windows of 4: two of a video
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")


def write_video(path: Path, num_frames: int, seed: int) -> str:
    noise = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        for _ in range(num_frames):
            picture = noise.integers(0, 256, (32, 48, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


def row(video: str) -> dict:
    region = {"name": "obj_1", "box": [4, 4, 20, 20]}
    content = [{"type": "video", "video": video, "regions": [region]}, {"type": "text", "text": "Where is <obj_1>?"}]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "left"}]}
    return {"messages": [{"role": "user", "content": content}, answer]}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_tokenizer):
    """A folder with a teacher, a student's processor, and rows of which each video has two."""
    folder = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    config = L4PConfig(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        taps=(1, 2, 3, 4),
        feature_dim=4,
        layer_dims=(4, 4, 4, 4),
        last_dim=4,
    )
    L4PModel(config).save_pretrained(folder / "teacher")
    size = {"height": 28, "width": 28}
    images, videos = RGPT4DImageProcessor(size=size), RGPT4DVideoProcessor(size=size)
    RGPT4DProcessor(images, videos, tiny_tokenizer, frame_grid=2).save_pretrained(folder / "student")
    rows = [row(write_video(folder / f"{i}.mp4", 10, seed=i)) for i in range(NUM_VIDEOS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows + rows[::-1]))
    return folder


def options(made: Path, output: Path, *more) -> list[str]:
    given = ["--teacher", made / "teacher", "--depth-scale", "metric", "--model", made / "student", "--num-workers", 1]
    given += ["--data", made / "rows.jsonl", "--output", output, "--num-frames", NUM_FRAMES, *more]
    return [str(option) for option in given]


def start(made: Path, arguments: list[str], launcher: tuple = (), script=EXAMPLES / "cache_teacher.py"):
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(made / "home"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(EXAMPLES.parent),
    }
    command = [sys.executable, *map(str, launcher), str(script), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_tree(process: subprocess.Popen) -> None:
    """SIGKILL for the process and all that it started; torchrun's are sessions of their own."""
    if process.poll() is None:
        whole = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in whole:
            one.suspend()  # so that none can do anything about the death of another
        for one in whole:
            one.kill()
    process.communicate(timeout=60)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    try:
        out, err = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        kill_tree(process)
        raise
    assert process.returncode == status, out + err
    return out + err


def entries(output: Path) -> Counter:
    return Counter(window_key(one["digest"], one["microseconds"]) for one in TeacherCache(output).records())


def check_values(made: Path, output: Path) -> None:
    """Every window of every row is there, and is what the teacher perceives online, rounded."""
    processor = RGPT4DProcessor.from_pretrained(made / "student")
    teacher = L4PTeacher(L4PModel.from_pretrained(made / "teacher"), depth_scale="metric")
    collate = P4DCollator(processor, NUM_FRAMES, targets=TeacherCache(output), window=4)
    for line in (made / "rows.jsonl").read_text().splitlines():
        batch = collate([json.loads(line)])
        frames = batch["unmarked_pixel_values_videos"][0]
        exact = teacher.perceive(torch.stack([frames[:4], frames[2:]]), [0.5] * 3, [0.5] * 3)
        targets = batch["perception_targets"]
        kept = {name: targets[name].view(torch.bfloat16).float() for name in ("latents", "flow", "depth")}
        torch.testing.assert_close(kept["latents"], exact.latents, rtol=2**-8, atol=1e-5)
        torch.testing.assert_close(kept["flow"], exact.signals["flow"], rtol=2**-8, atol=1e-5)
        torch.testing.assert_close(kept["depth"], exact.signals["depth"].log(), rtol=2**-8, atol=1e-5)


def test_killed_at_random_and_resumed_by_other_numbers_of_processes(made, tmp_path):
    output, random_moment = tmp_path / "cache", random.Random(os.getpid())
    small = options(made, output, "--shard-size-mb", 0.1, "--batch-size", 1)
    for launcher in ((), (*TORCHRUN, 3)):
        process = start(made, small, launcher)
        before = set(output.glob("targets-*"))
        # the first moment within the run at which there is something to lose, and then any
        while process.poll() is None and not set(output.glob("targets-*")) - before:
            time.sleep(0.002)
        time.sleep(random_moment.uniform(0, 0.3))
        kill_tree(process)
        there = TeacherCache(output)  # whole, whenever it was
        for shard in there.shards:
            there.verify(shard)
    assert 0 < len(there)
    finish(start(made, small, (*TORCHRUN, 2)))
    found = entries(output)
    assert len(found) == 2 * NUM_VIDEOS
    # What was there is not made again, but for a video of which one window was lost; and a few between the kills' seconds
    assert sum(found.values()) - len(found) <= 4
    check_values(made, output)
    shards = set(output.iterdir())
    assert f"of its {NUM_VIDEOS} videos {NUM_VIDEOS} are there already" in finish(start(made, small))
    assert set(output.iterdir()) == shards
    assert f"{sum(found.values())} windows" in finish(start(made, ["--output", str(output), "--verify"]))


def test_estimate_is_the_real_size_and_a_damaged_shard_is_made_again(made, tmp_path):
    output = tmp_path / "cache"
    said = finish(start(made, options(made, output, "--precision", "int8")))
    a_window = int(said.split("A window takes ")[1].split(" bytes")[0].replace(",", ""))
    (shard,) = output.glob("targets-*")
    assert abs(2 * NUM_VIDEOS * a_window / shard.stat().st_size - 1) < 0.02
    assert f"{NUM_VIDEOS} distinct videos of 6 frames have at most {2 * NUM_VIDEOS} windows" in said
    assert "within half of the scale" in said and "latents 4" in said.split("what is kept: ")[1]
    content = bytearray(shard.read_bytes())
    content[-1000] ^= 4
    shard.write_bytes(content)
    said = finish(start(made, ["--output", str(output), "--verify"]), status=1)
    assert f"{shard} is damaged" in said and "Delete this file" in said
    shard.unlink()
    finish(start(made, options(made, output, "--precision", "int8")))
    assert len(TeacherCache(output)) == 2 * NUM_VIDEOS
    said = finish(start(made, options(made, output, "--precision", "bfloat16")), status=1)
    assert "error: " in said and "is a cache made otherwise" in said and "precision int8, bfloat16" in said


def test_what_cannot_be_cached_is_listed_and_the_rest_is_cached(made, tmp_path):
    short, broken = write_video(tmp_path / "short.mp4", 3, seed=0), tmp_path / "broken.mp4"
    broken.write_bytes(Path(made / "0.mp4").read_bytes()[:500])
    bad = [row(video) for video in (short, str(broken), "missing.mp4")]
    good = [row(str(made / f"{i}.mp4")) for i in range(NUM_VIDEOS)]
    bad += [row(f"missing-{i}.mp4") for i in range(NUM_VIDEOS - len(bad))]
    rows = [one for pair in zip(bad, good, strict=True) for one in pair]
    rows.append({"messages": [{"role": "user", "content": [{"type": "text", "text": "No video"}]}]})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    output = tmp_path / "cache"
    given = options(made, output, "--data", tmp_path / "rows.jsonl", "--batch-size", 1)
    finish(start(made, given, (*TORCHRUN, 2)), status=1)
    reports = {file.name: list(map(json.loads, file.read_text().splitlines())) for file in output.glob("not-cached-*")}
    assert set(reports) == {"not-cached-0-of-2.jsonl"}
    kinds = {Path(one["video"]).name: one["kind"] for report in reports.values() for one in report}
    missing = {
        Path(video).name: "unreadable"
        for video in ["missing.mp4", *(f"missing-{i}.mp4" for i in range(NUM_VIDEOS - 3))]
    }
    assert kinds == {"short.mp4": "too short", "broken.mp4": "unreadable", **missing}
    assert all(one["reason"] for report in reports.values() for one in report)
    assert len(TeacherCache(output)) == 2 * NUM_VIDEOS
    (tmp_path / "rows.jsonl").write_text(json.dumps(row(short)) + "\n")
    finish(start(made, options(made, output, "--data", tmp_path / "rows.jsonl")))  # short alone is no failure
    assert [file.name for file in output.glob("not-cached-*")] == ["not-cached-0-of-1.jsonl"]


def test_a_process_with_failures_does_not_end_the_others(made, tmp_path):
    """torchrun would end them all with it."""
    lines = [
        "import os, sys, time",
        f"sys.path.insert(0, {str(EXAMPLES)!r})",
        "from cache_teacher import until_all_end",
        "rank = int(os.environ['RANK'])",
        "with until_all_end(2):",
        "    time.sleep(3 * rank)",
        "print('end of', rank)",
        "sys.exit(rank == 0)",
    ]
    (tmp_path / "ends.py").write_text("\n".join(lines))
    assert "end of 1" in finish(start(made, [], (*TORCHRUN, 2), tmp_path / "ends.py"), status=1)


def test_a_full_disk_and_a_wrong_number_of_frames_are_told_before_anything_is_written(
    made, tmp_path, monkeypatch, capsys
):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setenv("HF_HOME", str(made / "home"))
    script = importlib.import_module("cache_teacher")
    output = tmp_path / "deep" / "cache"
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1_000_000}))
    monkeypatch.setattr("sys.argv", ["cache_teacher.py", *options(made, output)])
    with pytest.raises(SystemExit, match=r"error: the cache needs 0.00\d GB more.* has 0.001 GB free: free some"):
        script.main()
    assert "distinct videos" in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr("sys.argv", ["cache_teacher.py", *options(made, output, "--estimate")])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 0 and "distinct videos" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["cache_teacher.py", *options(made, output, "--num-frames", 3)])
    with pytest.raises(SystemExit, match="--num-frames 3 is less than a window of the teacher, 4 frames"):
        script.main()
    assert not output.parent.exists()


def test_windows_that_are_not_finite_are_never_kept(made, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    script = importlib.import_module("cache_teacher")
    model = L4PModel.from_pretrained(made / "teacher")
    model.heads["flow"].output[-1].bias.data[0] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    arguments = options(made, tmp_path / "cache", "--teacher", tmp_path / "broken")
    monkeypatch.setattr("sys.argv", ["cache_teacher.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1 and len(TeacherCache(tmp_path / "cache")) == 0
    assert "not finite" in (tmp_path / "cache" / "not-cached-0-of-1.jsonl").read_text()
