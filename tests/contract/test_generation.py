"""Ways to generate that transformers checks on its own models. The distribution that test_transformers_contract.py runs
lacks `tests/generation`, so these are ours. Each must give the tokens, or the shapes, of plain greedy decoding."""

import functools

import pytest
import torch
from transformers import DynamicCache

from tests.modeling_rgpt4d.test_modeling_rgpt4d import FRAME_END, IMAGE, VIDEO, VOCABULARY, tiny_model

PROMPT = 27  # tokens


@pytest.fixture(scope="module")
def model():
    return tiny_model(0)


def question(seed: int = 0) -> dict[str, torch.Tensor]:
    """An image, a video of three frames, and words."""
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(11, IMAGE, (6,), generator=generator).tolist()
    ids = [1, *[IMAGE] * 4, FRAME_END, *([VIDEO] * 4 + [FRAME_END]) * 3, *words]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, PROMPT, dtype=torch.long),
        "pixel_values": torch.randn(1, 3, 56, 56, generator=generator),
        "pixel_values_videos": torch.randn(1, 3, 3, 56, 56, generator=generator),
        "video_timestamps": torch.tensor([[0.0, 0.5, 4.0]]),
    }


def answer(model, inputs=None, **options) -> list[list[int]]:
    inputs = question() if inputs is None else inputs
    output = model.generate(**inputs, **{"max_new_tokens": 8, "do_sample": False} | options)
    return output[:, PROMPT:].tolist()


def test_the_pixels_decide_the_answer(model):
    other = question() | {"pixel_values_videos": -question()["pixel_values_videos"]}
    assert answer(model) != answer(model, other)


@pytest.mark.parametrize(
    "options",
    [
        {"use_cache": False},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static", "disable_compile": True},
        {"prefill_chunk_size": 7},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_way_gives_the_greedy_tokens(model, options):
    assert answer(model, **options) == answer(model)


def test_a_cache_of_the_user_gives_the_greedy_tokens(model):
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    assert answer(model, past_key_values=cache) == answer(model)
    assert cache.get_seq_length() == PROMPT + 7


@pytest.mark.parametrize("seed", [0, 1], ids=["the model itself", "another model"])
def test_assisted_decoding_gives_the_greedy_tokens(model, seed):
    # An assistant gets the features that the model has encoded. With the same weights all its drafts are accepted
    assistant, runs = tiny_model(seed), []
    assistant.generation_config.assistant_confidence_threshold = 0.0  # it always drafts as many tokens as it may
    hook = model.register_forward_pre_hook(lambda *args: runs.append(1))
    try:
        tokens = answer(model, assistant_model=assistant)
    finally:
        hook.remove()
    assert tokens == answer(model)
    assert len(runs) <= (2 if seed == 0 else 8)


def test_an_answer_goes_on_from_its_cache(model):
    expected = answer(model)
    first = model.generate(**question(), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    inputs = {"input_ids": first.sequences, "attention_mask": torch.ones_like(first.sequences)}
    output = model.generate(**inputs, past_key_values=first.past_key_values, max_new_tokens=5, do_sample=False)
    assert output[:, PROMPT:].tolist() == expected


def test_embeddings_give_the_greedy_tokens(model):
    inputs = question()
    inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids"))
    assert model.generate(**inputs, max_new_tokens=8, do_sample=False).tolist() == answer(model)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"num_beams": 3, "do_sample": True}, {"do_sample": True}])
def test_several_sequences_of_a_question(model, options):
    torch.manual_seed(0)
    first = answer(model, num_return_sequences=2, **options)
    torch.manual_seed(0)
    assert answer(model, num_return_sequences=2, **options) == first
    assert [len(tokens) for tokens in first] == [8, 8]
    assert not {IMAGE, VIDEO} & {token for tokens in first for token in tokens}


def test_generate_returns_scores_states_and_attentions(model):
    eager = tiny_model(0)
    eager.set_attn_implementation("eager")
    output = eager.generate(
        **question(),
        max_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        output_hidden_states=True,
        output_attentions=True,
    )
    assert output.sequences[:, PROMPT:].tolist() == [answer(model)[0][:3]]
    assert [tuple(scores.shape) for scores in output.scores] == [(1, VOCABULARY)] * 3
    assert [scores.argmax().item() for scores in output.scores] == answer(model)[0][:3]
    # the prompt at once, and then a token each; embeddings and two layers
    assert [[tuple(state.shape) for state in step] for step in output.hidden_states] == [
        [(1, length, 32)] * 3 for length in (PROMPT, 1, 1)
    ]
    assert [[tuple(weights.shape) for weights in step] for step in output.attentions] == [
        [(1, 4, length, PROMPT + i)] * 2 for i, length in enumerate((PROMPT, 1, 1))
    ]


def test_a_step_compiles_without_a_graph_break(model):
    expected, compiled = answer(model), tiny_model(0)
    torch.compiler.reset()
    whole = compiled.forward
    step = torch.compile(whole, fullgraph=True, backend="eager")
    calls = []

    @functools.wraps(whole)
    def forward(*args, input_ids=None, **kwargs):
        is_step = input_ids is not None and input_ids.shape[1] == 1
        calls.append(is_step)
        return (step if is_step else whole)(*args, input_ids=input_ids, **kwargs)

    compiled.forward = forward
    assert answer(compiled, cache_implementation="static", disable_compile=True) == expected
    assert calls == [False] + [True] * 7
