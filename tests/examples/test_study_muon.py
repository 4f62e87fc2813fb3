"""The study's optimizer: which parameters go where, and that its parts do what they do alone."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.optim import AdamW, Muon
from transformers import get_cosine_schedule_with_warmup

from examples.make_small_model import build_model
from examples.study_muon import MuonAndAdamW, muon_and_adamw
from trainer.p4d_trainer import DECODER_FOLDER

LR, WEIGHT_DECAY = 1e-2, 0.1


@pytest.fixture
def model(tiny_tokenizer):
    torch.manual_seed(0)
    return build_model(tiny_tokenizer, image_size=28, patch_size=7, width=32, layers=1)[0]


def parameters():
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 4), (3, 5), (7, 2), (4,))]


def steps(values, count, *optimizers):
    for number in range(count):
        for place, value in enumerate(values):
            value.grad = torch.sin(value.detach() + number + place)
        for optimizer in optimizers:
            optimizer.step()


def both(values):
    return MuonAndAdamW(values[:2], values[2:], LR, WEIGHT_DECAY)


def test_it_steps_as_its_parts_do_alone():
    found, expected = parameters(), parameters()
    steps(found, 3, both(found))
    muon = Muon(expected[:2], lr=LR, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw")
    decaying = AdamW(expected[2:3], lr=LR, weight_decay=WEIGHT_DECAY)
    constant = AdamW(expected[3:], lr=LR, weight_decay=0.0)
    steps(expected, 3, muon, decaying, constant)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_scheduler_reaches_both_parts_also_after_a_checkpoint():
    values = parameters()
    optimizer = both(values)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_warmup_steps=4, num_training_steps=10)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # as accelerate does before the first step
    before = [value.detach().clone() for value in values]
    steps(values, 1, optimizer)  # at a learning rate of zero
    assert all(torch.equal(one, other) for one, other in zip(values, before, strict=True))
    schedule.step()
    rates = {group["lr"] for part in optimizer.parts for group in part.param_groups}
    assert rates == {LR / 4}
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
    return {
        names[id(one)]
        for part in optimizer.parts
        if isinstance(part, Muon)
        for group in part.param_groups
        for one in group["params"]
    }


def test_matrices_are_muons_and_embeddings_and_the_decoder_are_not(model):
    model.add_module(DECODER_FOLDER, torch.nn.Linear(8, 8))
    found = muons(muon_and_adamw(model, LR, WEIGHT_DECAY), model)
    layer = "model.language_model.layers.0"
    assert {f"{layer}.self_attn.q_proj.weight", f"{layer}.mlp.down_proj.weight"} <= found
    assert any("vision_tower" in name for name in found) and any("projector" in name for name in found)
    assert not any("embed" in name or "norm" in name or DECODER_FOLDER in name or "lm_head" in name for name in found)


def test_of_adapters_muon_has_the_matrices(model):
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=".*vision.*"))
    found = muons(muon_and_adamw(wrapped, LR, WEIGHT_DECAY), wrapped)
    assert {name.rsplit(".", 3)[-3] for name in found} == {"lora_A", "lora_B"}


def test_a_model_of_which_only_the_decoder_is_trained_has_adamw_alone(model):
    model.requires_grad_(False)
    model.add_module(DECODER_FOLDER, torch.nn.Linear(8, 8))
    assert muons(muon_and_adamw(model, LR, WEIGHT_DECAY), model) == set()
