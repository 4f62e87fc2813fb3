"""`model.generate(..., fast=True)`: the same tokens, each from one replay of a CUDA graph.

A step of decoding reads every weight once and computes little, so its floor is the time that takes: 14 GB for 8B
parameters in bfloat16. What keeps an eager step far from it is the launching of some two thousand small kernels and a
wait for the device after every token. Here a whole step is recorded once as a CUDA graph, and the host reads whether the
answer has ended one token late, while the device works on.

Reading a prompt is bound by arithmetic instead; there the many small operations around the matrix products are compiled.

Layers are compiled one by one and not as a whole: equal layers share one compilation, which takes seconds and not
minutes. For that a layer must not know its place in the stack, so each is handed the part of the cache that is its own.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast

# transformers 5.24 renamed `past_key_values` to `cache`, in arguments and in outputs
CACHE = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
# Caches grow in such steps, so that prompts of similar lengths share a recording.
LENGTH_STEP = 512
# One new token makes a matrix product a weighted sum of columns; inductor then writes it itself and, so tuned, fused with
# what stands around it, reads weights faster than the library's product does.
STEP_OPTIONS = {"coordinate_descent_tuning": True}
# For each model its last recording, and the compiled calls of its layers. Not attributes of the model, which must stay
# something that can be copied, and must be freed when nobody uses it.
RECORDINGS: WeakKeyDictionary = WeakKeyDictionary()
COMPILED_LAYERS: WeakKeyDictionary = WeakKeyDictionary()
# Layers of the tower and of the language model count together, in every kind of shape: more than dynamo's usual 8.
RECOMPILE_LIMIT = 64


def decode_by_graph(
    model,
    input_ids: torch.LongTensor,
    logits_processor,
    stopping_criteria,
    generation_config,
    streamer=None,
    **model_kwargs,
) -> torch.LongTensor:
    """Greedy decoding and sampling like `GenerationMixin.generate`, which calls this with what it has prepared.

    Args:
        input_ids: `(batch_size, prompt_length)`, padded on the left.
        logits_processor, stopping_criteria, generation_config, model_kwargs: as `generate` hands them to a decoding method.
        streamer: gets each token one step late.

    Returns: `(batch_size, prompt_length + new_tokens)`.
    Raises: `ValueError` for what a recorded step cannot do: beams, outputs beside the ids, adapters that are not merged,
        quantised weights, models spread over several devices, layers that do not attend to everything before.
    """
    _check_supported(model, generation_config)
    device, (batch_size, prompt_length) = input_ids.device, input_ids.shape
    max_length, pad_token = generation_config.max_length, generation_config._pad_token_tensor
    has_eos = generation_config._eos_token_tensor is not None
    if model_kwargs.get("position_ids") is None:
        model_kwargs["position_ids"] = torch.arange(prompt_length, device=device).expand(batch_size, -1)
    prompt_mask = model_kwargs.get("attention_mask")  # without padding `generate` has dropped it

    step = RecordedStep.of(model, batch_size, max_length)
    step.cache.read_prompt(True)
    inputs = model.prepare_inputs_for_generation(
        input_ids, is_first_iteration=True, **{**model_kwargs, CACHE: step.cache}
    )
    logits = model(**inputs, return_dict=True).logits[:, -1].float()
    step.start(model, prompt_mask, model_kwargs["position_ids"][:, -1:] + 1, prompt_length)

    unfinished = torch.ones(batch_size, dtype=torch.long, device=device)
    previous = None  # of the token before: whether all sequences had ended, the tokens, and when the host may read them
    for length in range(prompt_length + 1, max_length + 1):
        scores = logits_processor(input_ids, logits)
        if generation_config.do_sample:
            tokens = torch.multinomial(scores.softmax(-1), num_samples=1).squeeze(1)
        else:
            tokens = scores.argmax(-1)
        if has_eos:
            tokens = tokens * unfinished + pad_token * (1 - unfinished)
        input_ids = torch.cat((input_ids, tokens[:, None]), dim=-1)
        unfinished = unfinished & ~stopping_criteria(input_ids, None)
        current = _copy_to_host(unfinished.max() == 0, tokens if streamer is not None else None)
        if previous is not None:
            has_ended, told = _wait_for(previous)
            if streamer is not None:
                streamer.put(told)
            if has_ended:  # this token came after the end
                input_ids, current = input_ids[:, :-1], None
                break
        previous = current
        if length < max_length:
            logits = step(model, tokens)
    if streamer is not None:
        if current is not None:
            streamer.put(_wait_for(current)[1])
        streamer.end()
    return input_ids


def _copy_to_host(has_ended: torch.Tensor, tokens: torch.Tensor | None) -> tuple:
    """Begin to copy, without waiting for the device."""
    on_host = [None if tensor is None else tensor.to("cpu", non_blocking=True) for tensor in (has_ended, tokens)]
    event = None
    if has_ended.is_cuda:
        event = torch.cuda.Event()
        event.record()
    return (*on_host, event)


def _wait_for(copied: tuple) -> tuple[bool, torch.Tensor | None]:
    has_ended, tokens, event = copied
    if event is not None:
        event.synchronize()
    return bool(has_ended), tokens


class PlacedLayer(CacheLayerMixin):
    """Keys and values of one layer, `(B, K, length, d)`, that stay where they are.

    A prompt is written to the front and attends to itself; afterwards one token at a time is written at `place`, a tensor of
    one index that all layers share, and attends to everything.
    """

    is_sliding = False

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, place: torch.Tensor):
        super().__init__()
        self.keys, self.values, self.place = keys, values, place
        self.is_initialized, self.is_prompt = True, True

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """Store `(B, K, n, d)` of a prompt, or of one token (n = 1). Returns: the keys and values to attend to."""
        if self.is_prompt:
            length = key_states.shape[-2]
            self.keys[:, :, :length].copy_(key_states)
            self.values[:, :, :length].copy_(value_states)
            return key_states, value_states
        self.keys.index_copy_(2, self.place, key_states)
        self.values.index_copy_(2, self.place, value_states)
        return self.keys, self.values

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor):
        pass

    def get_seq_length(self) -> int:
        return 0  # asked before a prompt only: a step brings its own positions and mask

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self.keys.shape[-2]


class PlacedCache(Cache):
    """A `PlacedLayer` for every layer of the decoder that `config` describes, `length` positions long, filled with zeros."""

    def __init__(self, config, batch_size: int, length: int, place: torch.Tensor, dtype: torch.dtype):
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        shape = (batch_size, heads, length, head_dim)
        super().__init__(
            layers=[
                PlacedLayer(*(torch.zeros(shape, dtype=dtype, device=place.device) for _ in range(2)), place)
                for _ in range(config.num_hidden_layers)
            ]
        )

    def read_prompt(self, is_prompt: bool):
        """Whether what comes next is a prompt or a token behind it."""
        for layer in self.layers:
            layer.is_prompt = is_prompt


class RecordedStep:
    """One step of decoding on tensors that stay where they are: on CUDA a recorded graph, elsewhere the plain model."""

    def __init__(self, model, batch_size: int, length: int):
        self.batch_size, self.length = batch_size, length
        self.weights = _addresses(model)
        device = model.lm_head.weight.device
        self.tokens = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.position_ids = torch.zeros(batch_size, 1, dtype=torch.long, device=device)
        self.place = torch.zeros(1, dtype=torch.long, device=device)
        self.places = torch.arange(length, device=device)
        # True where the new token attends to
        self.mask = torch.zeros(batch_size, 1, 1, length, dtype=torch.bool, device=device)
        config = model.config.get_text_config(decoder=True)
        self.cache = PlacedCache(config, batch_size, length, self.place, model.lm_head.weight.dtype)
        self.graph, self.logits = None, None

    @classmethod
    def of(cls, model, batch_size: int, length: int) -> "RecordedStep":
        """The model's last recording if it serves, else a new one. Only one is kept, because its cache takes memory."""
        step = RECORDINGS.get(model)
        serves = step is not None and step.batch_size == batch_size and step.length >= length
        if not serves or step.weights != _addresses(model):
            RECORDINGS.pop(model, None)
            del step  # frees the old cache before the new one is made
            RECORDINGS[model] = cls(model, batch_size, -(-length // LENGTH_STEP) * LENGTH_STEP)
        return RECORDINGS[model]

    def start(self, model, prompt_mask: torch.Tensor | None, position_ids: torch.Tensor, prompt_length: int):
        """Go on behind a prompt that is in the cache; record the step if this is the first one."""
        self.cache.read_prompt(False)
        self._set_place(prompt_mask, position_ids, prompt_length)
        if self.graph is None and self.tokens.is_cuda:
            self._record(model)
            self._set_place(prompt_mask, position_ids, prompt_length)

    def _set_place(self, prompt_mask: torch.Tensor | None, position_ids: torch.Tensor, prompt_length: int):
        self.place.fill_(prompt_length)
        self.position_ids.copy_(position_ids)
        self.mask.zero_()
        self.mask[..., :prompt_length] = True if prompt_mask is None else prompt_mask[:, None, None].bool()

    def _record(self, model):
        with _one_token_layers(model):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(
                stream
            ):  # compiles, and lets libraries choose their kernels, outside of the recording
                for _ in range(2):
                    self._step(model)
                    self.place.sub_(1)  # stays inside the cache
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph):
                self.logits = self._step(model)

    def _step(self, model) -> torch.Tensor:
        self.mask.logical_or_(self.places == self.place)
        outputs = model(
            input_ids=self.tokens,
            attention_mask=self.mask,
            position_ids=self.position_ids,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
            **{CACHE: self.cache},
        )
        self.position_ids.add_(1)
        self.place.add_(1)
        return outputs.logits[:, -1].float()

    def __call__(self, model, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens `(batch_size,)` -> logits `(batch_size, vocab_size)` float32, overwritten by the next call."""
        self.tokens.copy_(tokens[:, None])
        if self.graph is None:
            return self._step(model)
        self.graph.replay()
        return self.logits


def _addresses(model) -> tuple[int, ...]:
    """Where the weights lie, which a recording holds on to: a model that was moved or got other weights needs a new one."""
    return tuple(p.data_ptr() for part in (model.model.language_model, model.lm_head) for p in part.parameters())


def attend_to_cache(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention of one new token `(B, H, 1, d)` to keys and values `(B, K, L, d)`, H a multiple of K, where the bool mask
    `(B, 1, 1, L)` is True. Returns: `(B, 1, H, d)` in the values' dtype, and None for the weights.

    The heads that share a key head are the rows of one small matrix product, so keys and values are read once. The library's
    kernels repeat them for every head where there is a mask.
    """
    batch_size, num_heads, _, dim = query.shape
    rows = query.reshape(batch_size, key.shape[1], -1, dim)
    scores = rows @ key.transpose(-1, -2) * (dim**-0.5 if scaling is None else scaling)
    weights = scores.masked_fill(~attention_mask, float("-inf")).softmax(-1, dtype=torch.float32).to(value.dtype)
    return (weights @ value).reshape(batch_size, 1, num_heads, dim), None


ONE_TOKEN_ATTENTION = "rgpt4d_one_token"
AttentionInterface.register(ONE_TOKEN_ATTENTION, attend_to_cache)
AttentionMaskInterface.register(ONE_TOKEN_ATTENTION, sdpa_mask)


def _blocks(model: nn.Module) -> list[nn.Module]:
    """The equal blocks that a transformer is stacked of: its longest list of modules."""
    return list(max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=[]))


def _compiled_block(block: nn.Module, index: int, **options) -> Callable:
    """`block`'s call, compiled. If it takes a cache, it gets the `index`-th layer of it, and does not use its own index."""
    compiled = torch.compile(block._call_impl, **options)

    def call(*args, **kwargs):
        if isinstance(kwargs.get(CACHE), PlacedCache):
            kwargs[CACHE] = kwargs[CACHE].layers[index]
        return compiled(*args, **kwargs)

    return call


@contextmanager
def _called_by(calls: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Inside, each module is called by the function beside it; `nn.Module.compile` puts its result at the same place."""
    before = [module._compiled_call_impl for module, _ in calls]
    for module, call in calls:
        module._compiled_call_impl = call
    try:
        with torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT):
            yield
    finally:
        for (module, _), call in zip(calls, before, strict=True):
            module._compiled_call_impl = call


@contextmanager
def compiled_prompt(model) -> Iterator[None]:
    """Inside, the layers of the vision tower and of the language model are compiled for prompts, on CUDA."""
    if not model.lm_head.weight.is_cuda:
        yield
        return
    calls = COMPILED_LAYERS.get(model)
    if calls is None:
        parts = (model.model.vision_tower, model.model.language_model)
        calls = [(block, _compiled_block(block, i)) for part in parts for i, block in enumerate(_blocks(part))]
        COMPILED_LAYERS[model] = calls
    with _called_by(calls):
        yield


@contextmanager
def _one_token_layers(model) -> Iterator[None]:
    """While a step is recorded: layers compiled for one token, and the attention above."""
    decoder = model.model.language_model
    calls = [(block, _compiled_block(block, i, options=STEP_OPTIONS)) for i, block in enumerate(_blocks(decoder))]
    attention = decoder.config._attn_implementation
    if decoder._supports_attention_backend:
        decoder.config._attn_implementation = ONE_TOKEN_ATTENTION
    try:
        with _called_by(calls):
            yield
    finally:
        decoder.config._attn_implementation = attention


def _check_supported(model, generation_config):
    refused = {
        "num_beams": generation_config.num_beams not in (None, 1),
        "return_dict_in_generate": generation_config.return_dict_in_generate,
        "prefill_chunk_size": generation_config.prefill_chunk_size is not None,
        "use_cache=False": generation_config.use_cache is False,
    }
    names = [name for name, is_set in refused.items() if is_set]
    if names:
        raise ValueError(f"fast=True cannot do {', '.join(names)}: leave them out, or leave out fast")
    if any(hasattr(module, "lora_A") for module in model.model.language_model.modules()):
        raise ValueError("fast=True records the weights as they are: merge the adapter first (merge_and_unload)")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("fast=True was never tried with quantised weights: leave out fast")
    if len(set((getattr(model, "hf_device_map", None) or {}).values())) > 1:
        raise ValueError(
            "fast=True records the work of one device: load the model without device_map, or leave out fast"
        )
    config = model.config.get_text_config(decoder=True)
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or []):
        raise ValueError("fast=True needs layers of full attention, and the language model has others: leave out fast")


__all__ = ["CACHE", "compiled_prompt", "decode_by_graph"]
