"""`generate(fast=True)` gives the tokens of plain `generate`. On CUDA it is a recorded graph; elsewhere the same loop."""

import copy
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

import modeling_rgpt4d.fast_decoding as fast_decoding
from modeling_rgpt4d.fast_decoding import LENGTH_STEP, RECORDINGS, attend_to_cache
from tests.modeling_rgpt4d.test_modeling_rgpt4d import batched, tiny_model, video_sample

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"))]


@pytest.fixture(scope="module", params=DEVICES)
def model(request):
    return tiny_model().to(request.param)


def one(model, seed: int = 1, **options) -> dict:
    return {key: value.to(model.device) for key, value in video_sample(seed, **options).items()}


def two(model) -> dict:
    samples = [video_sample(1), video_sample(2, num_frames=3, text=9)]
    return {key: value.to(model.device) for key, value in batched(samples, "left").items()}


def both(model, inputs: dict, seed: int | None = None, **options) -> tuple[torch.Tensor, torch.Tensor]:
    outputs = []
    for fast in (False, True):
        if seed is not None:
            torch.manual_seed(seed)
        outputs.append(model.generate(**inputs, fast=fast, **options))
    return tuple(outputs)


@pytest.mark.parametrize("inputs", [one, two])
def test_fast_tokens_equal_plain_tokens(model, inputs):
    plain, fast = both(model, inputs(model), max_new_tokens=12, do_sample=False)
    assert torch.equal(plain, fast)


def test_a_prompt_without_media_works(model):
    inputs = {"input_ids": torch.tensor([[1, 20, 30, 40]], device=model.device)}
    plain, fast = both(model, inputs, max_new_tokens=5, do_sample=False)
    assert torch.equal(plain, fast)


def test_fast_stops_where_plain_stops(model):
    inputs = two(model)
    free = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    prompt = inputs["input_ids"].shape[1]
    ends = [int(free[0, prompt + 2]), int(free[1, prompt + 5])]
    for eos in (ends[0], ends):  # one sequence goes on, or both end before the limit
        plain, fast = both(model, inputs, max_new_tokens=12, do_sample=False, eos_token_id=eos, pad_token_id=0)
        assert torch.equal(plain, fast)
    assert plain.shape[1] < free.shape[1]


def test_sampling_and_processors_equal_plain_ones(model):
    class Shift(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.roll(1, dims=-1)

    options = {"max_new_tokens": 8, "do_sample": True, "top_k": 5, "repetition_penalty": 1.3}
    plain, fast = both(model, two(model), seed=3, logits_processor=LogitsProcessorList([Shift()]), **options)
    assert torch.equal(plain, fast)


def test_a_stopping_criterion_is_heard(model):
    class AfterThree(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            ended = input_ids.shape[1] >= start + 3
            return torch.full((len(input_ids),), ended, dtype=torch.bool, device=input_ids.device)

    inputs = one(model)
    start = inputs["input_ids"].shape[1]
    criteria = StoppingCriteriaList([AfterThree()])
    plain, fast = both(model, inputs, max_new_tokens=9, do_sample=False, stopping_criteria=criteria)
    assert torch.equal(plain, fast) and fast.shape[1] == start + 3


@pytest.mark.parametrize("options", [{}, {"eos": 3}])
def test_a_streamer_gets_each_token_once(model, options):
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens.append(value.reshape(-1).tolist())

        def end(self):
            self.ended = True

    inputs = one(model)
    plain = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0]
    if options:
        start = inputs["input_ids"].shape[1]
        options = {"eos_token_id": int(plain[start + options["eos"]]), "pad_token_id": 0}
    streamers = [Streamer(), Streamer()]
    for fast, streamer in zip((False, True), streamers, strict=True):
        model.generate(**inputs, fast=fast, streamer=streamer, max_new_tokens=6, do_sample=False, **options)
    assert streamers[0].tokens == streamers[1].tokens and streamers[1].ended


def test_one_recording_serves_prompts_up_to_its_length(model):
    model.generate(**one(model), fast=True, max_new_tokens=4, do_sample=False)
    recorded = RECORDINGS[model]
    assert recorded.length == LENGTH_STEP
    for inputs in (one(model, 5, num_frames=2), one(model, 6, text=20), one(model)):
        plain, fast = both(model, inputs, max_new_tokens=7, do_sample=False)
        assert torch.equal(plain, fast)
        assert RECORDINGS[model] is recorded
    plain, fast = both(model, two(model), max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, fast) and RECORDINGS[model] is not recorded


def test_weights_that_changed_are_used(model):
    inputs = one(model)
    model.generate(**inputs, fast=True, max_new_tokens=4, do_sample=False)
    layer = model.model.language_model.layers[0].mlp
    before = layer.up_proj.weight
    layer.up_proj.weight = torch.nn.Parameter(torch.randn_like(before))  # lies elsewhere
    try:
        plain, fast = both(model, inputs, max_new_tokens=6, do_sample=False)
        assert torch.equal(plain, fast)
    finally:
        layer.up_proj.weight = before
    layer.up_proj.weight.data.mul_(-3)  # lies where it lay
    plain, fast = both(model, inputs, max_new_tokens=6, do_sample=False)
    layer.up_proj.weight.data.div_(-3)
    assert torch.equal(plain, fast)


def test_fast_leaves_the_model_as_it_was(model):
    inputs = one(model)
    logits = model(**inputs).logits
    names = set(model.state_dict())
    model.generate(**inputs, fast=True, max_new_tokens=3, do_sample=False)
    assert set(model.state_dict()) == names
    assert torch.equal(model(**inputs).logits, logits)
    assert all(module._compiled_call_impl is None for module in model.modules())
    assert model.model.language_model.config._attn_implementation == "sdpa"


def test_a_model_that_nobody_uses_is_freed_and_a_used_one_can_be_copied():
    model = tiny_model()
    model.generate(**video_sample(1), fast=True, max_new_tokens=3, do_sample=False)
    copy.deepcopy(model)
    freed = weakref.ref(model)
    del model
    assert freed() is None  # by counting references alone: its memory is back at once


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"return_dict_in_generate": True}, {"use_cache": False}])
def test_what_a_recording_cannot_do_is_refused_by_name(model, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        model.generate(**one(model), fast=True, max_new_tokens=3, do_sample=False, **options)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("hf_quantizer", object(), "quantised"),
        ("hf_device_map", {"model.vision_tower": 0, "model.language_model": 1}, "one device"),
    ],
)
def test_weights_that_a_recording_cannot_hold_are_refused(name, value, message):
    model = tiny_model()
    setattr(model, name, value)
    with pytest.raises(ValueError, match=message):
        model.generate(**video_sample(1), fast=True, max_new_tokens=2, do_sample=False)


def test_unmerged_adapters_are_refused():
    adapted = get_peft_model(tiny_model(), LoraConfig(target_modules=r".*language_model.*q_proj"))
    with pytest.raises(ValueError, match="merge"):
        adapted.generate(**video_sample(1), fast=True, max_new_tokens=2, do_sample=False)


def test_attention_of_one_token_equals_sdpa():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 1, 16, generator=generator)
    key, value = (torch.randn(2, 2, 9, 16, generator=generator) for _ in range(2))
    mask = torch.ones(2, 1, 1, 9, dtype=torch.bool)
    mask[0, ..., :3], mask[:, ..., 7:] = False, False
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    attended, _ = attend_to_cache(torch.nn.Module(), query, key, value, mask)
    torch.testing.assert_close(attended, expected.transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_equal_layers_share_one_compilation(monkeypatch):
    # What CUDA does, here with a backend that only counts the graphs: tower, prompt and step, and no more for more layers
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=count))
    torch._dynamo.reset()
    model = tiny_model(text={"num_hidden_layers": 5}, vision={"num_hidden_layers": 4})
    inputs = video_sample(1)
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    blocks = [
        (block, fast_decoding._compiled_block(block, i))
        for part in (model.model.vision_tower, model.model.language_model)
        for i, block in enumerate(fast_decoding._blocks(part))
    ]
    step = fast_decoding.RecordedStep._step

    def compiled_step(self, model):
        with fast_decoding._one_token_layers(model):
            return step(self, model)

    monkeypatch.setattr(fast_decoding.RecordedStep, "_step", compiled_step)
    with fast_decoding._called_by(blocks):
        fast = model.generate(**inputs, fast=True, max_new_tokens=4, do_sample=False)
    torch._dynamo.reset()
    assert torch.equal(plain, fast) and len(graphs) == 3
