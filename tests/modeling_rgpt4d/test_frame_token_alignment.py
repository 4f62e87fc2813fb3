"""Eq. 3 reads the hidden states of exactly the frame tokens. Every position of a batch holds its own place as a value, and is
looked for where the text of the conversation says that it stands: `input_ids` have no part in what is expected."""

import re

import numpy as np
import pytest
import torch

from examples.make_small_model import build_model
from modeling_rgpt4d import RGPT4DImageProcessor, RGPT4DProcessor, RGPT4DVideoProcessor
from modeling_rgpt4d.perception_decoder import PerceptionDecoder, PerceptionDecoderConfig, frame_hidden_states
from trainer import P4DCollator, perceive

GRID = 2
RANDOM = np.random.default_rng(0)


def video(num_frames: int) -> dict:
    return {"type": "video", "video": RANDOM.integers(0, 256, (num_frames, 20, 24, 3), dtype=np.uint8), "fps": 2.0}


def image() -> dict:
    return {"type": "image", "image": RANDOM.integers(0, 256, (20, 24, 3), dtype=np.uint8)}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def conversation(*turns: list[dict]) -> list[dict]:
    """Each turn is what the user sends; the assistant answers."""
    return [
        message
        for turn in turns
        for message in (
            {"role": "user", "content": turn},
            {"role": "assistant", "content": [text("It moves to the left.")]},
        )
    ]


# Videos of 1 to 6 frames: alone, two side by side, after text, in later turns, around an image, and rows without any.
CONVERSATIONS = [
    conversation([video(3), text("Which way?")]),
    conversation(
        [text("There is nothing to see here, only a question that is long enough to be the longest row?" * 3)]
    ),
    conversation([video(1), video(6), text("Which of the two is faster?")]),
    conversation([text("First:\n"), video(2), text("\nWhat is it?")], [text("And then?"), image(), video(5), image()]),
    conversation([image(), text("a picture alone")]),
    conversation([text("Hello.")], [text("Compare")], [video(4)]),
]
FRAME_COUNTS = [3, 1, 6, 2, 5, 4]


def frame_token_positions(processor, messages: list[dict], num_frames: list[int]) -> tuple[list[torch.Tensor], int]:
    """Where Eq. 3 finds the tokens of each video of a conversation, from its text: `(N, g, g)` positions each. And the
    length of the conversation.

    A frame and an image are g x g tokens, row by row, and one that ends them. Special tokens cut the text, so that the
    pieces between media can be counted one by one.
    """
    g = processor.frame_grid
    rendered = processor.apply_chat_template(messages, tokenize=False)
    n, y, x = torch.meshgrid(torch.arange(max(num_frames, default=0)), torch.arange(g), torch.arange(g), indexing="ij")
    within_video = n * (g * g + 1) + y * g + x
    videos, position, counts = [], 0, iter(num_frames)
    for piece in re.split("(<video>|<image>)", rendered):
        if piece == "<video>":
            count = next(counts)
            videos.append(position + within_video[:count])
            position += count * (g * g + 1)
        elif piece == "<image>":
            position += g * g + 1
        else:
            position += len(processor.tokenizer(piece, add_special_tokens=False)["input_ids"])
    return videos, position


def expected_places(processor, conversations: list, counts: list[int], side: str) -> list[torch.Tensor]:
    """`(N, g, g, 2)` for each video of a batch: row and position of its tokens."""
    counts = iter(counts)
    rows = []
    for messages in conversations:
        num_videos = sum(block["type"] == "video" for message in messages for block in message["content"])
        rows.append(frame_token_positions(processor, messages, [next(counts) for _ in range(num_videos)]))
    lengths = [length for _, length in rows]
    places = []
    for index, (row, _) in enumerate(rows):
        shift = {"right": 0, "left": max(lengths) - lengths[index], "packed": sum(lengths[:index])}[side]
        for positions in row:
            places.append(torch.stack([torch.full_like(positions, index * (side != "packed")), positions + shift], -1))
    return places


def planted(input_ids: torch.Tensor, width: int = 2) -> torch.Tensor:
    """`(B, S, width)` float32: row and position of each token, then zeros."""
    row, position = torch.meshgrid(*(torch.arange(size) for size in input_ids.shape), indexing="ij")
    places = torch.stack([row, position], dim=-1).float()
    return torch.nn.functional.pad(places, (0, width - 2))


def assert_finds_each_token(find, input_ids: torch.Tensor, counts: list[int], expected: list[torch.Tensor]) -> None:
    found = find(planted(input_ids), input_ids, counts)
    assert [tuple(one.shape) for one in found] == [tuple(one.shape) for one in expected]
    for one, places in zip(found, expected, strict=True):
        assert torch.equal(one, places.float())


def release_slice(
    hidden_states: torch.Tensor, input_ids: torch.Tensor, num_frames: list[int], g: int, video_token_id: int
):
    """What the authors' release reads, for rows of one video each: N g^2 contiguous positions that begin one late,
    although a frame takes g^2 + 1 of them."""
    found = []
    for row, ids, n in zip(hidden_states, input_ids, num_frames, strict=True):
        first = (ids == video_token_id).nonzero()[0] + 1
        found.append(row[first : first + n * g * g].view(n, g, g, -1))
    return found


@pytest.fixture(scope="module")
def small(tiny_tokenizer):
    """A model of 2 x 2 tokens a frame, and its processor."""
    torch.manual_seed(0)
    model, processor = build_model(tiny_tokenizer, image_size=28, patch_size=7, width=32, layers=1)
    assert processor.frame_grid == GRID
    return model.eval(), processor


@pytest.fixture
def processor(small):
    return small[1]


def model_inputs(processor, conversations: list, side: str):
    """All frames of every video, padded on `side`, or packed into one row."""
    inputs = processor.apply_chat_template(
        conversations,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={
            "do_sample_frames": False,
            "padding": True,
            "padding_side": "right" if side == "packed" else side,
        },
    )
    if side == "packed":
        real = inputs.pop("attention_mask").bool()
        inputs["position_ids"] = torch.arange(real.shape[1]).expand_as(real)[real][None]
        inputs["input_ids"] = inputs["input_ids"][real][None]
    return inputs


def finder(processor):
    return lambda hidden_states, input_ids, counts: frame_hidden_states(
        hidden_states, input_ids, processor.video_token_id, counts, processor.frame_grid
    )


@pytest.mark.parametrize("side", ["right", "left", "packed"])
def test_each_frame_token_is_found_in_any_batch(processor, side):
    inputs = model_inputs(processor, CONVERSATIONS, side)
    assert (inputs["video_timestamps"] >= 0).sum(1).tolist() == FRAME_COUNTS  # the negative ones fill up
    expected = expected_places(processor, CONVERSATIONS, FRAME_COUNTS, side)
    assert_finds_each_token(finder(processor), inputs["input_ids"], FRAME_COUNTS, expected)


@pytest.mark.parametrize(("index", "counts"), [(0, [3]), (2, [1, 6]), (3, [2, 5]), (5, [4])])
def test_each_frame_token_is_found_in_a_row_alone(processor, index, counts):
    inputs = model_inputs(processor, [CONVERSATIONS[index]], "right")
    expected = expected_places(processor, [CONVERSATIONS[index]], counts, "right")
    assert_finds_each_token(finder(processor), inputs["input_ids"], counts, expected)


def test_rows_of_text_hold_no_frame_tokens(processor):
    inputs = model_inputs(processor, CONVERSATIONS[1:2], "right")
    assert_finds_each_token(finder(processor), inputs["input_ids"], [], [])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_frames", [1, 2, 4, 16])
def test_each_frame_token_is_found_in_the_collators_batches(processor, num_frames, packed):
    batch = P4DCollator(processor, num_frames, packed=packed)([{"messages": messages} for messages in CONVERSATIONS])
    counts = [num_frames] * len(FRAME_COUNTS)
    expected = expected_places(processor, CONVERSATIONS, counts, "packed" if packed else "right")
    assert_finds_each_token(finder(processor), batch["input_ids"], counts, expected)


def test_the_releases_slice_fails_where_ours_is_right(tiny_tokenizer):
    # the paper's frames: 16 of 11 x 11 tokens
    size = {"height": 28, "width": 28}
    processor = RGPT4DProcessor(
        RGPT4DImageProcessor(size=size), RGPT4DVideoProcessor(size=size), tiny_tokenizer, frame_grid=11
    )
    conversations, counts = [conversation([video(16), text("Which way does it move?")])] * 2, [16, 16]
    inputs = model_inputs(processor, conversations, "right")
    expected = expected_places(processor, conversations, counts, "right")
    assert_finds_each_token(finder(processor), inputs["input_ids"], counts, expected)

    def slice_of_the_release(hidden_states, input_ids, counts):
        return release_slice(hidden_states, input_ids, counts, 11, processor.video_token_id)

    with pytest.raises(AssertionError):
        assert_finds_each_token(slice_of_the_release, inputs["input_ids"], counts, expected)
    found = slice_of_the_release(planted(inputs["input_ids"]), inputs["input_ids"], counts)
    wrong = (torch.stack(found) != torch.stack(expected)).any(-1)
    # One late, and one position more behind at each frame: the second frame alone is met, 15 of 16 are not.
    assert wrong.float().mean().item() == 15 / 16
    assert not wrong[:, 1].any()


class EchoHeads:
    """Heads that give back the latents: what the decoder was given can be seen behind them."""

    num_frames, signals = 2, ("latents",)
    image_size, latent_shape = 8, (1, 2, 2, 2, 4)  # how many windows fit at once

    def decode(self, latents, signals):
        return {name: latents[:, 0] for name in signals}


@pytest.mark.parametrize("side", ["right", "left", "packed"])
def test_the_models_decoder_gets_the_tokens_of_each_window(small, side):
    model, processor = small
    inputs = model_inputs(processor, CONVERSATIONS, side)
    width = model.config.text_config.hidden_size
    decoder = PerceptionDecoder(PerceptionDecoderConfig(width, (1, 2, GRID, GRID, width), kind="linear"))
    with torch.no_grad():
        decoder.project.weight.copy_(torch.eye(width))

    def plant(module, args, output):
        output.last_hidden_state = planted(inputs["input_ids"], width)

    hook = model.model.language_model.register_forward_hook(plant)
    try:
        windows, signals = perceive(model, decoder, EchoHeads(), inputs)
    finally:
        hook.remove()
    expected = expected_places(processor, CONVERSATIONS, FRAME_COUNTS, side)
    # a video of one frame has no window of two; the last window of an odd number overlaps the one before
    assert windows == [(0, 0), (0, 1), (2, 0), (2, 2), (2, 4), (3, 0), (4, 0), (4, 2), (4, 3), (5, 0), (5, 2)]
    for window, latents in zip(windows, signals["latents"], strict=True):
        places = expected[window.video][window.first : window.first + 2]
        assert torch.equal(latents[..., :2], places.float())
        assert not latents[..., 2:].any()
