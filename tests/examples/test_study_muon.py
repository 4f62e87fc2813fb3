"""The study's optimizer: which parameters go where, and that it steps as torch's Muon and AdamW do."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW, Muon
from transformers import get_cosine_schedule_with_warmup

from examples.make_small_model import build_model
from examples.study_muon import MuonAndAdamW, muon_and_adamw, orthogonalized
from trainer.p4d_trainer import DECODER_FOLDER

LR, WEIGHT_DECAY = 1e-2, 0.1


@pytest.fixture
def model(tiny_tokenizer):
    torch.manual_seed(0)
    return build_model(tiny_tokenizer, image_size=28, patch_size=7, width=32, layers=1)[0]


def parameters():
    """Matrices of three shapes, two alike, and what AdamW has."""
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (3, 5), (6, 4), (16, 16), (7, 2), (4,))]


def steps(values, count, *optimizers):
    for number in range(count):
        for place, value in enumerate(values):
            value.grad = torch.sin(value.detach() + number + place)
        for optimizer in optimizers:
            optimizer.step()


def both(values):
    return MuonAndAdamW(values[:4], values[4:], LR, WEIGHT_DECAY)


def test_it_steps_as_torchs_muon_and_adamw_do():
    found, expected = parameters(), parameters()
    before = [value.detach().clone() for value in found]
    steps(found, 3, both(found))
    muon = Muon(expected[:4], lr=LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    decaying = AdamW(expected[4:5], lr=LR, weight_decay=WEIGHT_DECAY)
    constant = AdamW(expected[5:], lr=LR, weight_decay=0.0)
    steps(expected, 3, muon, decaying, constant)
    for one, other, start in zip(found[:4], expected[:4], before[:4], strict=True):
        # Both compute in bfloat16, but multiply in another order
        assert (one - other).norm() < 0.02 * (other - start).norm()
    for one, other in zip(found[4:], expected[4:], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 8, 5), (2, 5, 8), (1, 6, 6)])
def test_singular_values_become_about_one_and_singular_vectors_stay(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    found = orthogonalized(matrices)
    assert found.shape == shape and found.dtype == torch.bfloat16
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = left.mT @ found.float() @ right.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert diagonal.min() > 0.6 and diagonal.max() < 1.3
    assert (values - torch.diag_embed(diagonal)).abs().max() < 0.05


def test_a_matrix_without_a_gradient_stays_as_it_is():
    values = parameters()
    before = values[0].detach().clone()
    for value in values[1:]:
        value.grad = torch.ones_like(value)
    both(values).step()
    assert torch.equal(values[0], before)


def test_a_scheduler_reaches_all_groups_also_after_a_checkpoint():
    values = parameters()
    optimizer = both(values)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=10)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as accelerate does before the first step
    before = [value.detach().clone() for value in values]
    steps(values, 1, optimizer)  # at a learning rate of zero
    assert all(torch.equal(one, other) for one, other in zip(values, before, strict=True))
    schedule.step()
    assert {group["lr"] for group in optimizer.param_groups} == {LR / 4}
    steps(values, 1, optimizer)
    assert not any(torch.equal(one, other) for one, other in zip(values, before, strict=True))


def test_it_continues_from_its_state():
    values = parameters()
    optimizer = both(values)
    steps(values, 2, optimizer)
    others = [torch.nn.Parameter(value.detach().clone()) for value in values]
    resumed = both(others)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(values, 2, optimizer)
    steps(others, 2, resumed)
    assert all(torch.equal(one, other) for one, other in zip(values, others, strict=True))


def muons(optimizer, model):
    """Names of the parameters that Muon has; all others that are trained are AdamW's, each once."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    held = [id(one) for group in optimizer.param_groups for one in group["params"]]
    assert sorted(held) == sorted(id(one) for one in model.parameters() if one.requires_grad)
    return {names[id(one)] for group in optimizer.param_groups if group["muon"] for one in group["params"]}


def test_matrices_are_muons_also_the_decoders_and_embeddings_are_not(model):
    model.add_module(DECODER_FOLDER, torch.nn.Linear(8, 8))
    found = muons(muon_and_adamw(model, LR, WEIGHT_DECAY), model)
    layer = "model.language_model.layers.0"
    assert {f"{layer}.self_attn.q_proj.weight", f"{layer}.mlp.down_proj.weight"} <= found
    assert any("vision_tower" in name for name in found) and any("projector" in name for name in found)
    assert f"{DECODER_FOLDER}.weight" in found
    assert not any("embed" in name or "norm" in name or "lm_head" in name or name.endswith("bias") for name in found)


def test_of_adapters_muon_has_the_matrices(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=".*vision.*"))
    found = muons(muon_and_adamw(wrapped, LR, WEIGHT_DECAY), wrapped)
    assert {name.rsplit(".", 3)[-3] for name in found} == {"lora_A", "lora_B"}


def test_a_decoder_alone_can_be_trained(model):
    model.requires_grad_(False)
    model.add_module(DECODER_FOLDER, torch.nn.Linear(8, 8))
    assert muons(muon_and_adamw(model, LR, WEIGHT_DECAY), model) == {f"{DECODER_FOLDER}.weight"}
