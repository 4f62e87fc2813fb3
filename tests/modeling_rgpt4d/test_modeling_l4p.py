from pathlib import Path

import pytest
import torch
from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

from modeling_rgpt4d.configuration_l4p import L4PConfig
from modeling_rgpt4d.modeling_l4p import SIGNALS, L4PModel, kept_interpolation_matrix, sinusoidal_positions


def tiny_config(**changes) -> L4PConfig:
    sizes = dict(
        image_size=32,
        patch_size=8,
        num_frames=4,
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=32,
        taps=(1, 2, 3, 4),
        feature_dim=8,
        layer_dims=(8, 8, 12, 12),
        last_dim=4,
    )
    return L4PConfig(**(sizes | changes))


@pytest.fixture(scope="module")
def model() -> L4PModel:
    torch.manual_seed(0)
    return L4PModel(tiny_config()).eval()


def video_for(config: L4PConfig, batch: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, config.num_frames, 3, config.image_size, config.image_size, generator=generator)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_size": 40, "num_frames": 8},
        {"image_size": 42, "patch_size": 14},  # a grid of 3: nothing is a power of two
        {"num_frames": 6},  # 3 latent frames
        {"tubelet_size": 1},
        {"tubelet_size": 4},
    ],
)
def test_forward_shapes_follow_the_configuration(changes):
    config = tiny_config(**changes)
    with torch.no_grad():
        output = L4PModel(config).eval()(video_for(config))
    frames, side, grid = config.num_frames, config.image_size, config.image_size // config.patch_size
    assert output.latents.shape == (2, 4, frames // config.tubelet_size, grid, grid, config.hidden_size)
    assert output.depth.shape == (2, 1, frames, side, side)
    assert output.flow.shape == (2, 2, frames, side, side)
    assert output.motion.shape == (2, 1, frames, side, side)
    assert output.camray.shape == (2, 6, frames, grid, grid)
    assert (output.depth > 0).all()


def test_position_table_equals_videomae():
    torch.testing.assert_close(sinusoidal_positions(20, 12), get_sinusoid_encoding_table(20, 12), rtol=0, atol=1e-6)


def test_latents_are_streams_after_the_tapped_blocks(model):
    config = tiny_config(taps=(1, 2, 3, 4))
    streams = []
    hooks = [layer.register_forward_hook(lambda _m, _i, out: streams.append(out)) for layer in model.encoder.layers]
    with torch.no_grad():
        latents = model.encode(video_for(config))
    for hook in hooks:
        hook.remove()
    for tap, stream in enumerate(streams):
        # token n = t * h' * w' + y * w' + x
        assert torch.equal(latents[:, tap].flatten(1, 3), stream)


def test_only_the_asked_heads_run(model):
    calls = []
    hooks = [
        head.register_forward_hook(lambda _m, _i, _o, signal=signal: calls.append(signal))
        for signal, head in model.heads.items()
    ]
    with torch.no_grad():
        output = model(video_for(model.config), signals=["camray", "depth"])
        latents_only = model(video_for(model.config), signals=[])
    for hook in hooks:
        hook.remove()
    assert calls == ["camray", "depth"]
    assert output.flow is None and output.motion is None and output.depth is not None
    assert list(latents_only.keys()) == ["latents"]


def test_decode_of_encode_equals_forward(model):
    video = video_for(model.config)
    with torch.no_grad():
        output = model(video)
        decoded = model.decode(model.encode(video))
    assert list(decoded) == ["depth", "flow", "motion", "camray"]
    for signal in SIGNALS:
        assert torch.equal(decoded[signal], output[signal])


def test_gradients_reach_the_latents_through_frozen_heads():
    model = L4PModel(tiny_config()).eval().requires_grad_(False)
    for signal in SIGNALS:
        latents = torch.randn(1, *model.config.latent_shape, requires_grad=True)
        model.decode(latents, [signal])[signal].square().sum().backward()
        for tap in range(4):
            assert latents.grad[:, tap].abs().sum() > 0, f"{signal} does not read tap {tap}"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_inference_mode_made_first_serves_a_backward_pass():
    kept_interpolation_matrix.cache_clear()
    model = L4PModel(tiny_config()).eval().requires_grad_(False)
    latents = torch.randn(1, *model.config.latent_shape, requires_grad=True)
    with torch.inference_mode():
        expected = model.decode(latents, ["depth"])["depth"]
    found = model.decode(latents, ["depth"])["depth"]
    found.sum().backward()
    assert torch.equal(found, expected) and latents.grad.abs().sum() > 0


def test_every_parameter_is_trained():
    model = L4PModel(tiny_config())
    output = model(video_for(model.config))
    sum(output[signal].square().sum() for signal in SIGNALS).backward()
    untrained = [
        name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.abs().sum()
    ]
    assert untrained == []


def test_initial_signals_are_moderate_at_any_width():
    for width in (4, 64):
        torch.manual_seed(0)
        model = L4PModel(tiny_config(feature_dim=width, layer_dims=(width,) * 4, last_dim=width)).eval()
        with torch.no_grad():
            output = model(video_for(model.config))
        for raw in (output.depth.log(), output.flow, output.motion, output.camray):
            assert 1e-3 < raw.std() < 1


def test_half_precision_keeps_float32_signals():
    torch.manual_seed(0)
    model = L4PModel(tiny_config()).eval()
    video = video_for(model.config)
    with torch.no_grad():
        expected = model(video)
        output = model.to(torch.bfloat16)(video)
    assert output.latents.dtype == torch.bfloat16
    for signal in SIGNALS:
        assert output[signal].dtype == torch.float32
        drift = (output[signal] - expected[signal]).abs().mean() / expected[signal].std()
        assert drift < 0.05


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_gradient_checkpointing_keeps_gradients():
    torch.manual_seed(0)
    model = L4PModel(tiny_config()).train()
    video = video_for(model.config)

    def gradient():
        model.zero_grad()
        model(video, signals=["depth"]).depth.sum().backward()
        return model.encoder.layers[0].intermediate.dense.weight.grad.clone()

    expected = gradient()
    model.gradient_checkpointing_enable()
    torch.testing.assert_close(gradient(), expected)


def test_save_and_load_round_trip_restores_the_position_table(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = L4PModel.from_pretrained(tmp_path).eval()
    assert loaded.config.taps == model.config.taps
    assert torch.equal(loaded.encoder.position_embeddings, model.encoder.position_embeddings)
    video = video_for(model.config)
    with torch.no_grad():
        expected, output = model(video), loaded(video)
    for name in expected:
        assert torch.equal(output[name], expected[name])


STRANGER = """
import sys, torch
from transformers import AutoConfig, AutoModel
folder, video, out = sys.argv[1:]
assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "l4p"
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
assert "modeling_rgpt4d" not in sys.modules
with torch.no_grad():
    output = model(torch.load(video))
torch.save(dict(output), out)
model.save_pretrained(folder + "-again")
"""


def test_saved_folder_loads_as_remote_code_without_this_project(model, tmp_path, run_as_stranger):
    folder = tmp_path / "teacher"
    model.save_pretrained(folder)
    video = video_for(model.config)
    torch.save(video, tmp_path / "video.pt")
    run_as_stranger(STRANGER, folder, tmp_path / "video.pt", tmp_path / "out.pt")
    remote = torch.load(tmp_path / "out.pt")
    with torch.no_grad():
        expected = model(video)
    for name in expected:
        torch.testing.assert_close(remote[name], expected[name])
    copied = {path.name for path in Path(str(folder) + "-again").glob("*.py")}
    assert copied == {"configuration_l4p.py", "modeling_l4p.py"}


def test_eager_attention_equals_sdpa(model):
    eager = L4PModel(tiny_config(attn_implementation="eager")).eval()
    eager.load_state_dict(model.state_dict())
    assert eager.config._attn_implementation == "eager" and model.config._attn_implementation == "sdpa"
    video = video_for(model.config)
    with torch.no_grad():
        torch.testing.assert_close(eager.encode(video), model.encode(video))


def test_wrong_input_is_refused_and_both_sides_named(model):
    with pytest.raises(ValueError, match=r"\(batch, 4, 3, 32, 32\); got \(2, 8, 3, 32, 32\)"):
        model.encode(torch.zeros(2, 8, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\(batch, 4, 2, 4, 4, 24\); got \(1, 4, 2, 4, 4, 8\)"):
        model.decode(torch.zeros(1, 4, 2, 4, 4, 8))
    with pytest.raises(ValueError, match=r"unknown signals \['dyn_mask'\]"):
        model.decode(torch.zeros(1, *model.config.latent_shape), ["dyn_mask"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 30}, "image_size 30 is not a multiple of patch_size 8"),
        ({"num_frames": 5}, "num_frames 5 is not a multiple of tubelet_size 2"),
        ({"taps": (1, 2, 4)}, "taps must be 4 ascending"),
        ({"taps": (2, 1, 3, 4)}, "taps must be 4 ascending"),
        ({"num_hidden_layers": 6}, "must be num_hidden_layers 6"),
        ({"layer_dims": (8, 8)}, "layer_dims needs one width"),
        ({"num_attention_heads": 5}, "not a multiple of num_attention_heads 5"),
    ],
)
def test_configuration_refuses_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_default_configuration_is_the_released_giant():
    config = L4PConfig()
    assert config.latent_shape == (4, 8, 16, 16, 1408)
    assert config.grid == 16
