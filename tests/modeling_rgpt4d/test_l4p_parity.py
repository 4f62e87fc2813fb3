import importlib.util
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

IMPLEMENTATION = Path(__file__).parents[1] / "parity" / "l4p_impl.py"

# What the dense model has no part in: the normed stream after the blocks that only the tracking head reads, and poses
# solved from rays.
NOT_DENSE = {
    "encoder.hidden.8",
    "heads.traj3d.intrinsics_b44t",
    "heads.traj3d.pose_with_given_intrinsics_b16t",
}


def load_module(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_l4p_equals_reference_at_every_step(shared_dir, monkeypatch, capsys):
    folder = shared_dir / "parity" / "l4p"
    monkeypatch.setattr(sys, "path", [*sys.path])  # the checker adds its own folder
    check = load_module("l4p_check", folder / "check.py")
    implementation = load_module("l4p_impl", IMPLEMENTATION)

    case = folder / "small56"
    config = json.loads((case / "config.json").read_text())
    reference = load_file(case / "reference.safetensors")
    video = check.normalise(load_file(case / "input.safetensors")["video_uint8"])
    with torch.no_grad():
        steps = implementation.run(config, load_file(case / "state_dict.safetensors"), video)

    assert set(steps) == set(reference) - NOT_DENSE
    assert check.compare(reference, steps, config, rtol=1e-5, atol=1e-5, only=""), capsys.readouterr().out


def test_released_names_cover_the_giant_model(shared_dir):
    manifest = json.loads((shared_dir / "parity" / "l4p" / "giant_manifest.json").read_text())
    implementation = load_module("l4p_impl", IMPLEMENTATION)
    with torch.device("meta"):
        model = implementation.L4PModel(implementation.L4PConfig())
        released = {
            entry["name"]: torch.empty(entry["shape"]) for entry in manifest["entries"] if entry["part"] != "track_2d"
        }
    ours, unused = implementation.rename(released, model.config.num_hidden_layers)
    needed = {entry["name"] for entry in manifest["entries"] if entry["needed_for_dense"]}
    assert released.keys() - unused.keys() == needed
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in ours.items()} == expected
    assert model.num_parameters() == 1_236_300_426  # counted on the original: what the dense outputs read


def test_windows_are_merged_as_the_original_merges_them(shared_dir, monkeypatch, capsys):
    folder = shared_dir / "parity" / "l4p"
    monkeypatch.setattr(sys, "path", [*sys.path])
    check, implementation = load_module("l4p_check", folder / "check.py"), load_module("l4p_impl", IMPLEMENTATION)
    case = folder / "small56"
    config = json.loads((case / "config.json").read_text())
    reference = load_file(case / "windowed.safetensors")
    video = check.normalise(reference.pop("video_uint8"))
    with torch.no_grad():
        steps = implementation.run_windowed(config, load_file(case / "state_dict.safetensors"), video)
    assert set(steps) == set(reference)
    assert check.compare(reference, steps, config, rtol=1e-5, atol=1e-5, only=""), capsys.readouterr().out
