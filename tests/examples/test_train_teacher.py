import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from datasets_rgpt4d.world4d_render import render_signals
from examples import train_teacher
from modeling_rgpt4d.configuration_l4p import L4PConfig
from modeling_rgpt4d.modeling_l4p import L4PModel

TINY = (
    "--steps 4 --save-steps 2 --batch-size 1 --eval-clips 2 --workers 0 --num-frames 4 --image-size 16 --patch-size 8 "
    "--hidden-size 16 --heads 2 --feature-dim 4 --last-dim 4"
).split()
WORLD = train_teacher.WORLD4D["tiny"]


@pytest.fixture(autouse=True)
def few_clips(monkeypatch):
    monkeypatch.setattr(train_teacher, "AVERAGE_CLIPS", 2)


def run(monkeypatch, output_dir: Path, *options: str) -> None:
    monkeypatch.setattr(sys, "argv", ["train_teacher.py", "--output-dir", str(output_dir), *TINY, *options])
    train_teacher.main()


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    output_dir = tmp_path_factory.mktemp("teacher")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(train_teacher, "AVERAGE_CLIPS", 2)
        run(monkeypatch, output_dir)
    return output_dir


def test_run_writes_a_teacher_with_its_code_and_errors(finished):
    model = L4PModel.from_pretrained(finished)
    assert model.config.latent_shape == (4, 2, 2, 2, 16)
    assert (finished / "modeling_l4p.py").exists() and (finished / "configuration_l4p.py").exists()
    record = json.loads((finished / "teacher_errors.json").read_text())
    assert set(record["errors"]) == {
        "depth_abs_rel", "depth_delta_1.25", "flow_epe_px", "motion_iou", "ray_angle_deg", "camera_centre_m"
    }  # fmt: skip
    for sides in record["errors"].values():
        for side in ("teacher", "baseline"):
            assert sides[side]["low"] <= sides[side]["mean"] <= sides[side]["high"] and 1 <= sides[side]["n"] <= 2
    log = [json.loads(line) for line in (finished / "training_log.jsonl").read_text().splitlines()]
    assert {"loss", "loss_depth", "loss_flow", "loss_motion", "loss_camray", "learning_rate"} <= set(log[0])


def test_finished_run_is_left_alone(finished, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    run(monkeypatch, finished)
    assert "holds this teacher already" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    with pytest.raises(SystemExit, match=r"'steps': \(4, 5\)"):
        run(monkeypatch, finished, "--steps", "5")


def test_interrupted_run_ends_as_an_uninterrupted_one(finished, monkeypatch, tmp_path):
    losses_of = train_teacher.signal_losses
    calls = []

    def interrupt_in_step_4(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return losses_of(*args)

    monkeypatch.setattr(train_teacher, "signal_losses", interrupt_in_step_4)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, tmp_path)
    assert train_teacher.last_whole_checkpoint(tmp_path).name == "checkpoint-2"
    half_written = tmp_path / "checkpoint-3"
    half_written.mkdir()
    (half_written / "model.safetensors").write_bytes(b"cut off")

    calls.clear()
    monkeypatch.setattr(train_teacher, "signal_losses", lambda *args: calls.append(1) or losses_of(*args))
    run(monkeypatch, tmp_path)
    assert len(calls) == 2  # steps 3 and 4
    resumed, straight = load_file(tmp_path / "model.safetensors"), load_file(finished / "model.safetensors")
    assert set(resumed) == set(straight)
    for name, tensor in straight.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-5, atol=1e-6)


def test_clips_are_scenes_of_their_split_with_exact_signals():
    config = L4PConfig(image_size=16, patch_size=8, num_frames=4)
    for split in ("train", "test"):
        clip = train_teacher.World4DClips(WORLD, split, 3, config)[2]
        scene = WORLD.scene(split, 2)
        last = scene.num_frames - 1
        times = np.array([0, round(last / 3), round(2 * last / 3), last]) / scene.fps
        expected = render_signals(scene, times, 16, 2)
        for name in ("depth", "flow", "flow_valid", "motion", "camray"):
            assert torch.equal(clip[name], expected[name])
        assert clip["pixel_values"].shape == (4, 3, 16, 16)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
        rgb = clip["pixel_values"] * std + mean
        assert -1e-5 < rgb.min() and rgb.max() < 1 + 1e-5


def test_losses_by_hand_and_only_where_flow_is_valid():
    predicted = {
        "depth": torch.full((1, 1, 2, 1, 2), torch.e),
        "flow": torch.zeros(1, 2, 2, 1, 2, requires_grad=True),
        "motion": torch.zeros(1, 1, 2, 1, 2),
        "camray": torch.zeros(1, 6, 2, 1, 1),
    }
    truth = {
        "depth": torch.ones(1, 1, 2, 1, 2),
        "flow": torch.full((1, 2, 2, 1, 2), 3.0),
        "flow_valid": torch.tensor([[False, False], [True, False]]).view(1, 1, 2, 1, 2),
        "motion": torch.ones(1, 1, 2, 1, 2),
        "camray": torch.tensor([2.0, 2, 2, 0.5, 0.5, 0.5]).view(1, 6, 1, 1, 1).expand(1, 6, 2, 1, 1),
    }
    losses = train_teacher.signal_losses(predicted, truth)
    assert losses["depth"].item() == pytest.approx(1.0)  # |log e - log 1|
    assert losses["flow"].item() == 2.5  # smooth-L1 of 3
    assert losses["motion"].item() == pytest.approx(0.693147, abs=1e-5)  # -log sigmoid(0)
    assert losses["camray"].item() == 2.0 + 3.5 * 0.25  # directions, and squares of moments
    losses["flow"].backward()
    assert predicted["flow"].grad.count_nonzero() == 2  # u and v of the one valid pixel


def test_training_starts_at_the_average():
    torch.manual_seed(0)
    config = L4PConfig(
        image_size=16,
        patch_size=8,
        num_frames=4,
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        taps=(1, 2, 3, 4),
        feature_dim=4,
        layer_dims=(4, 4, 4, 4),
        last_dim=4,
    )
    model = L4PModel(config)
    clips = train_teacher.World4DClips(WORLD, "train", 2, config)
    average = train_teacher.average_truth(clips, batch_size=1, workers=0)
    torch.testing.assert_close(average["depth"], (clips[0]["depth"] * clips[1]["depth"]).sqrt()[None])
    torch.testing.assert_close(average["motion"], (clips[0]["motion"] + clips[1]["motion"])[None] / 2)
    train_teacher.start_at_average(model, average)
    with torch.no_grad():
        signals = model(clips[0]["pixel_values"][None])
    assert (signals.depth.log().mean() - average["depth"].log().mean()).abs() < 0.2
    assert (signals.motion.sigmoid().mean() - average["motion"].mean()).abs() < 0.1
    assert (signals.camray - average["camray"]).mean().abs() < 0.2
