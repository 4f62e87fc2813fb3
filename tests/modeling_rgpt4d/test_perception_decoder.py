import json
import math

import pytest
import torch

from modeling_rgpt4d.perception_decoder import PerceptionDecoder, PerceptionDecoderConfig, frame_hidden_states


def small_config(**changes) -> PerceptionDecoderConfig:
    return PerceptionDecoderConfig(**({"in_features": 6, "latent_shape": (3, 2, 4, 4, 5), "hidden_size": 8} | changes))


def identity_decoder(channels: int, latent_frames: int, grid: int) -> PerceptionDecoder:
    """One tap and an identity for weights: the output is what Rearrange made of the input."""
    config = PerceptionDecoderConfig(channels, (1, latent_frames, grid, grid, channels), kind="linear")
    decoder = PerceptionDecoder(config)
    with torch.no_grad():
        decoder.project.weight.copy_(torch.eye(channels))
    return decoder


@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_decoder_gives_the_teachers_shape_for_any_grid_and_frame_count(kind):
    decoder = PerceptionDecoder(small_config(kind=kind))
    for frames, grid in ((2, 3), (4, 4), (8, 11)):
        assert decoder(torch.randn(2, frames, grid, grid, 6)).shape == (2, 3, 2, 4, 4, 5)
    assert decoder(torch.randn(1, 4, 3, 5, 6)).shape == (1, 3, 2, 4, 4, 5)


def test_rearrange_takes_the_last_frame_of_each_tubelet():
    decoder = identity_decoder(channels=1, latent_frames=2, grid=2)
    frames = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 2, 2, 1)  # frame n holds the value n
    latents = decoder(frames)
    assert latents[0, 0, :, 0, 0, 0].tolist() == [1.0, 3.0]


def test_rearrange_resizes_with_antialias():
    decoder = identity_decoder(channels=1, latent_frames=1, grid=1)
    row = torch.tensor([[[[0.0, 0.0, 0.0, 8.0]]]])
    frames = row.expand(1, 1, 4, 4).unsqueeze(-1)
    # From 4 to 1 the triangle is 4 wide to each side. Distances 1.5, 0.5, 0.5, 1.5 give weights 0.625, 0.875, 0.875,
    # 0.625 of 3. Without antialias, only the two middle samples would be read: 0.
    assert decoder(frames).item() == pytest.approx(8 * 0.625 / 3)


def test_rearrange_keeps_rows_and_columns_apart():
    decoder = identity_decoder(channels=2, latent_frames=1, grid=4)
    y, x = torch.meshgrid(torch.arange(2.0), torch.arange(2.0), indexing="ij")
    latents = decoder(torch.stack((y, x), dim=-1)[None, None])[0, 0, 0]
    # 2 -> 4, bilinear with half-pixel centres: 0, 0.25, 0.75, 1
    ramp = torch.tensor([0.0, 0.25, 0.75, 1.0])
    torch.testing.assert_close(latents[..., 0], ramp[:, None].expand(4, 4))
    torch.testing.assert_close(latents[..., 1], ramp[None, :].expand(4, 4))


def test_taps_are_consecutive_blocks_of_the_last_layer():
    decoder = PerceptionDecoder(small_config(kind="linear"))
    hidden = torch.randn(1, 2, 4, 4, 6)
    latents = decoder(hidden)
    for tap in range(3):
        rows = slice(5 * tap, 5 * tap + 5)
        expected = hidden @ decoder.project.weight[rows].T + decoder.project.bias[rows]
        torch.testing.assert_close(latents[:, tap], expected)


def test_mlp_starts_with_xavier_weights_and_zero_biases():
    torch.manual_seed(0)
    decoder = PerceptionDecoder(PerceptionDecoderConfig(40, (4, 2, 4, 4, 30), hidden_size=50))
    linears = [module for module in decoder.modules() if isinstance(module, torch.nn.Linear)]
    assert [(layer.in_features, layer.out_features) for layer in linears] == [(40, 50), (50, 50), (50, 120)]
    assert sum(isinstance(module, torch.nn.GELU) for module in decoder.modules()) == 2
    for layer in linears:
        bound = math.sqrt(6 / (layer.in_features + layer.out_features))
        assert 0.95 * bound < layer.weight.abs().max() <= bound
        assert not layer.bias.any()


def test_linear_kind_starts_as_the_release():
    torch.manual_seed(0)
    decoder = PerceptionDecoder(PerceptionDecoderConfig(100, (4, 2, 4, 4, 100), kind="linear"))
    assert decoder.project.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert not decoder.project.bias.any()


def test_paper_size_is_the_default():
    assert PerceptionDecoderConfig(in_features=3584, latent_shape=(4, 8, 16, 16, 1408)).hidden_size == 2560


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_save_and_load_round_trip(tmp_path, dtype):
    decoder = PerceptionDecoder(small_config()).to(dtype)
    decoder.save_pretrained(tmp_path / "model" / "perception_decoder")
    loaded = PerceptionDecoder.from_pretrained(tmp_path / "model", subfolder="perception_decoder")
    assert loaded.config == decoder.config and loaded.dtype == dtype
    hidden = torch.randn(1, 4, 3, 3, 6)
    assert torch.equal(loaded(hidden), decoder(hidden))
    folder = tmp_path / "model" / "perception_decoder"
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["latent_shape"] == [3, 2, 4, 4, 5]


def test_decoder_works_under_autocast():
    decoder = PerceptionDecoder(small_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert decoder(torch.randn(1, 4, 3, 3, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_wrong_input_is_refused_and_both_sides_named():
    decoder = PerceptionDecoder(small_config())
    with pytest.raises(ValueError, match="3 frames cannot be shared out to the teacher's 2 latent frames"):
        decoder(torch.zeros(1, 3, 4, 4, 6))
    with pytest.raises(ValueError, match=r"width, 6\); got \(1, 4, 4, 4, 7\)"):
        decoder(torch.zeros(1, 4, 4, 4, 7))
    with pytest.raises(ValueError, match=r"one of \['mlp', 'linear'\]; got 'conv'"):
        small_config(kind="conv")
    with pytest.raises(ValueError, match="latent_shape must be"):
        small_config(latent_shape=(4, 8, 16, 1408))


VIDEO, END, TEXT, PAD = 7, 3, 1, 0


def test_frame_hidden_states_are_exactly_the_frame_tokens():
    # Videos of 2, 1 and 3 frames of 1 x 1 tokens: two in row 0 with text between them, one in row 1, padded on the left.
    input_ids = torch.tensor(
        [
            [TEXT, VIDEO, END, VIDEO, END, TEXT, VIDEO, END, TEXT, TEXT],
            [PAD, PAD, PAD, VIDEO, END, VIDEO, END, VIDEO, END, TEXT],
        ]
    )
    hidden = torch.arange(20.0).view(2, 10, 1)  # each position holds its own flat index
    picked = frame_hidden_states(hidden, input_ids, VIDEO, num_frames=[2, 1, 3], grid=1)
    assert [video.shape for video in picked] == [(2, 1, 1, 1), (1, 1, 1, 1), (3, 1, 1, 1)]
    assert [video.flatten().tolist() for video in picked] == [[1.0, 3.0], [6.0], [13.0, 15.0, 17.0]]


def test_frame_hidden_states_keep_row_major_order_inside_a_frame():
    input_ids = torch.tensor([[VIDEO] * 4 + [END] + [VIDEO] * 4 + [END]])
    hidden = torch.arange(10.0).view(1, 10, 1)
    (picked,) = frame_hidden_states(hidden, input_ids, VIDEO, num_frames=[2], grid=2)
    assert picked[..., 0].tolist() == [[[0, 1], [2, 3]], [[5, 6], [7, 8]]]


def test_frame_hidden_states_pass_gradients_to_frame_tokens_only():
    input_ids = torch.tensor([[TEXT, VIDEO, END, VIDEO, END]])
    hidden = torch.randn(1, 5, 4, requires_grad=True)
    frame_hidden_states(hidden, input_ids, VIDEO, [2], 1)[0].sum().backward()
    assert hidden.grad[0].sum(dim=-1).tolist() == [0, 4, 0, 4, 0]


def test_frame_hidden_states_refuse_a_wrong_count():
    input_ids = torch.tensor([[VIDEO, VIDEO, END]])
    with pytest.raises(ValueError, match=r"hold 2 frame tokens .* videos of \[2\] frames of 2 x 2 tokens are 8"):
        frame_hidden_states(torch.zeros(1, 3, 4), input_ids, VIDEO, num_frames=[2], grid=2)
    with pytest.raises(ValueError, match="do not belong"):
        frame_hidden_states(torch.zeros(1, 4, 4), input_ids, VIDEO, num_frames=[2], grid=1)
