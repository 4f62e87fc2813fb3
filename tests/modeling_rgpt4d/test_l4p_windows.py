import pytest
import torch

from modeling_rgpt4d.configuration_l4p import L4PConfig
from modeling_rgpt4d.l4p_windows import align_depth, perceive_video, window_starts
from modeling_rgpt4d.modeling_l4p import SIGNALS, L4PModel


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = L4PConfig(
        image_size=28, num_frames=8, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        taps=(1, 2, 3, 4), feature_dim=8, layer_dims=(8, 8, 8, 8), last_dim=8,
    )  # fmt: skip
    return L4PModel(config).eval()


@pytest.fixture(scope="module")
def video():
    return torch.randn(2, 16, 3, 28, 28, generator=torch.Generator().manual_seed(1))


def test_windows_overlap_by_half_and_end_with_the_video():
    assert list(window_starts(16, 16)) == [0]
    assert list(window_starts(40, 16)) == [0, 8, 16, 24]
    for num_frames, fitting in ((9, 16), (20, 24)):
        with pytest.raises(ValueError, match=f"give it {fitting} frames"):
            window_starts(num_frames, 16)


def test_one_window_is_the_model_itself(model, video):
    with torch.no_grad():
        expected = model(video[:, :8])
    merged = perceive_video(model, video[:, :8])
    assert merged.keys() == set(SIGNALS)
    for signal in SIGNALS:
        assert torch.equal(merged[signal], expected[signal])


def test_later_windows_overwrite_but_for_the_flow_of_their_first_frame(model, video):
    with torch.no_grad():
        windows = [model(video[:, start : start + 8]) for start in (0, 4, 8)]
    merged = perceive_video(model, video, signals=("flow", "motion", "camray"))
    assert merged.keys() == {"flow", "motion", "camray"}
    for signal in ("motion", "camray"):
        expected = torch.cat((windows[0][signal][:, :, :4], windows[1][signal][:, :, :4], windows[2][signal]), dim=2)
        assert torch.equal(merged[signal], expected)
    flows = [window.flow for window in windows]
    # frames 4 and 8 are first frames of a window, and have the flow of the window before
    expected = torch.cat((flows[0][:, :, :5], flows[1][:, :, 1:5], flows[2][:, :, 1:]), dim=2)
    assert torch.equal(merged["flow"], expected)


def test_depth_of_a_later_window_takes_the_scale_of_the_earlier_one(model, video):
    with torch.no_grad():
        first, second = (model(video[:, start : start + 8], signals=("depth",)).depth for start in (0, 4))
    merged = perceive_video(model, video[:, :12], signals=("depth",))["depth"]
    assert torch.equal(merged[:, :, :4], first[:, :, :4])
    torch.testing.assert_close(merged[:, :, 4:], align_depth(second, first[:, :, 4:]))


def test_scale_and_shift_of_inverse_depth_are_recovered_for_each_video():
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(2, 1, 6, 5, 7, generator=generator) * 4 + 1
    scale, shift = torch.tensor([0.5, 3.0]).view(2, 1, 1, 1, 1), torch.tensor([0.1, -0.02]).view(2, 1, 1, 1, 1)
    seen = 1 / ((1 / truth - shift) / scale)
    torch.testing.assert_close(align_depth(seen, truth[:, :, :4]), truth, atol=1e-5, rtol=1e-5)


def test_depth_that_is_unknown_or_behind_the_fit_is_zero():
    depth = torch.tensor([1.0, 2.0, 4.0, 0.0, 1000.0]).view(1, 1, 1, 1, 5).repeat(1, 1, 2, 1, 1)
    reference = torch.tensor([1.25, 5.0, 0.0, 0.0, 0.0]).view(1, 1, 1, 1, 5)
    aligned = align_depth(depth, reference)
    inverse = torch.tensor([1.0, 0.5, 0.25, 0.0, 0.001], dtype=torch.float64)
    wanted = torch.tensor([0.8, 0.2, 0.0, 0.0, 0.0], dtype=torch.float64)
    (a, b), *_ = torch.linalg.lstsq(torch.stack((inverse, torch.ones(5)), dim=1).double(), wanted[:, None])
    fitted = a * inverse + b
    expected = torch.where(fitted > 0, 1 / fitted, 0).float()
    assert (expected == 0).any()
    torch.testing.assert_close(aligned[0, 0, 0, 0], expected)
    assert torch.equal(align_depth(torch.zeros(1, 1, 2, 3, 3), torch.ones(1, 1, 1, 3, 3)), torch.zeros(1, 1, 2, 3, 3))
    constant = align_depth(torch.full((1, 1, 2, 3, 3), 2.0), torch.full((1, 1, 1, 3, 3), 5.0))
    torch.testing.assert_close(constant, torch.full((1, 1, 2, 3, 3), 5.0))
