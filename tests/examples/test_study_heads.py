"""examples/study_heads.py: the folded convolutions against those that they replace."""

from pathlib import Path

import pytest
import torch
from torch import nn

from modeling_rgpt4d import L4PConfig, L4PModel

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(EXAMPLES)
    from study_heads import FoldedConv3d, fold_narrow_convolutions


@pytest.mark.parametrize("taps", [1, 3])
@pytest.mark.parametrize("width", [4, 12, 6])  # the last is no multiple of four
def test_a_folded_convolution_gives_the_same_values_and_gradients(taps, width):
    torch.manual_seed(0)
    conv = nn.Conv3d(8, 5, taps, padding=taps // 2).requires_grad_(False)
    x = torch.randn(2, 8, 3, 5, width).to(memory_format=torch.channels_last_3d)
    plain, folded = x.clone().requires_grad_(), x.clone().requires_grad_()
    expected, found = conv(plain), FoldedConv3d(conv, 4)(folded)
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (found * weight).sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(folded.grad, plain.grad)


def test_heads_with_folded_convolutions_decode_the_same():
    torch.manual_seed(0)
    sizes = {"image_size": 32, "patch_size": 8, "num_frames": 4, "hidden_size": 24, "intermediate_size": 48}
    layers = {"num_hidden_layers": 4, "num_attention_heads": 2, "taps": (1, 2, 3, 4), "layer_dims": (8, 8, 16, 48)}
    model = L4PModel(L4PConfig(**sizes, **layers, feature_dim=8, last_dim=8)).eval().requires_grad_(False)
    model.heads.to(memory_format=torch.channels_last_3d)
    latents = torch.randn(2, *model.config.latent_shape)
    expected = model.decode(latents)
    fold_narrow_convolutions(model.heads)
    folded = [module for module in model.modules() if isinstance(module, FoldedConv3d)]
    assert len(folded) > 40
    found = model.decode(latents)
    for signal in expected:
        torch.testing.assert_close(found[signal], expected[signal], rtol=1e-4, atol=1e-5)
    wide = [m for m in model.modules() if isinstance(m, nn.Conv3d) and m.in_channels > 16]
    assert wide  # those stay as they are
