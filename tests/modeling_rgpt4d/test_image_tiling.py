"""NVILA's tiling of a single large picture: which tiles, which ids, and how the scales of `dynamic_s2` are merged."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from modeling_rgpt4d.configuration_rgpt4d import RGPT4DConfig
from modeling_rgpt4d.image_processing_rgpt4d import RGPT4DImageProcessor
from modeling_rgpt4d.image_tiling import tile_grid
from modeling_rgpt4d.modeling_rgpt4d import RGPT4DForConditionalGeneration
from modeling_rgpt4d.processing_rgpt4d import RGPT4DProcessor
from modeling_rgpt4d.video_processing_rgpt4d import RGPT4DVideoProcessor

SIZE = {"height": 56, "width": 56}
SCALES = [56, 112, 168]
PATCHES, WIDTH, DIM = 4, 32, 32  # of a tile along a side, of a vision feature, of a token
OPTIONS = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def processor_of(tokenizer, **image_options) -> RGPT4DProcessor:
    images = RGPT4DImageProcessor(size=SIZE, **image_options)
    return RGPT4DProcessor(images, RGPT4DVideoProcessor(size=SIZE, num_frames=3), tokenizer, frame_grid=2)


def ask(*content) -> list[dict]:
    blocks = [{"type": "text", "text": c} if isinstance(c, str) else {"type": "image", "image": c} for c in content]
    return [{"role": "user", "content": blocks}]


def pixels_of(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def test_grids_equal_the_original(shared_dir):
    samples = json.loads((shared_dir / "parity/nvila/refs/tiling.json").read_text())
    assert len(samples) == 22
    for s in samples:
        grid = tile_grid(s["width"], s["height"], s["image_size"], s["min_tiles"], s["max_tiles"])
        assert grid == tuple(s["cols_rows"]), s


@pytest.mark.parametrize(
    "size, grid",
    [
        ((100, 100), (1, 1)),  # 1 x 1 and 2 x 2 are equally near: small pictures take the first
        ((79, 79), (1, 1)),  # 2 x 2 tiles would have 12,544 pixels; more than half of them win
        ((80, 80), (2, 2)),
        ((300, 100), (3, 1)),
        ((100, 290), (1, 3)),
        ((1000, 10), (4, 1)),
    ],
)
def test_the_nearest_aspect_ratio_wins_and_of_equal_ones_the_larger_if_the_picture_fills_it(size, grid):
    if size == (100, 100):
        assert tile_grid(*size, 100, 1, 4) == grid
    else:
        assert tile_grid(*size, 56, 1, 4) == grid


def test_dynamic_tiles_are_cut_row_by_row_with_the_whole_picture_behind():
    image = picture(168, 112)  # exactly 3 x 2 tiles: nothing is resampled
    features = RGPT4DImageProcessor(size=SIZE, image_aspect_ratio="dynamic", max_tiles=6)(image, return_tensors="pt")
    assert features["num_tiles"] == [7] and features["pixel_values"].shape == (7, 3, 56, 56)
    for i in range(6):
        column, row = i % 3, i // 3
        expected = image.crop((56 * column, 56 * row, 56 * column + 56, 56 * row + 56))
        torch.testing.assert_close(features["pixel_values"][i], pixels_of(expected), atol=1e-6, rtol=0)
    whole = image.resize((56, 56), Image.Resampling.BICUBIC)
    torch.testing.assert_close(features["pixel_values"][6], pixels_of(whole), atol=1e-6, rtol=0)


def test_only_a_picture_that_is_alone_is_tiled(tiny_tokenizer):
    processor = processor_of(tiny_tokenizer, image_aspect_ratio="dynamic", max_tiles=6)
    wide, small = picture(168, 112), picture(60, 60)
    video = {"type": "video", "video": np.zeros((4, 20, 20, 3), np.uint8), "fps": 2}
    with_video = ask(wide, "And?")
    with_video[0]["content"].insert(0, video)
    batch = [ask(wide, "One."), ask(wide, small, "Two."), ask("None."), with_video, ask(small, "Small.")]
    outputs = processor.apply_chat_template(batch, **OPTIONS, processor_kwargs={"padding": True})
    texts = processor.tokenizer.batch_decode(outputs["input_ids"])
    one = "<image>" * 4 + "\n"  # the newline here is the frame's end
    assert f"user\n{(one + chr(10)) * 7}One.<" in texts[0]
    assert f"user\n{one * 2}Two.<" in texts[1] and f"{one}And?<" in texts[3]
    assert f"user\n{one}\nSmall.<" in texts[4]  # one tile is followed by the newline, too
    assert outputs["pixel_values"].shape[0] == 7 + 2 + 1 + 1
    assert set(outputs) == {
        "input_ids", "attention_mask", "pixel_values", "pixel_values_videos", "video_timestamps"
    }  # fmt: skip
    sizes = [(112, 168)]
    assert processor._get_num_multimodal_tokens(image_sizes=sizes)["num_image_tokens"] == [7 * 6]
    assert processor._get_num_multimodal_tokens(image_sizes=sizes * 2)["num_image_tokens"] == [5, 5]


def test_a_newline_that_starts_the_question_merges_as_in_the_original(tiny_tokenizer):
    processor = processor_of(tiny_tokenizer, image_aspect_ratio="dynamic", max_tiles=6)
    ids = processor.apply_chat_template(ask(picture(60, 60), "\nWhat?"), **OPTIONS)["input_ids"][0].tolist()
    last = max(i for i, token in enumerate(ids) if token == processor.image_token_id)
    newlines = tiny_tokenizer.encode("\n\n", add_special_tokens=False)
    assert ids[last + 1 : last + 2 + len(newlines)] == [processor.frame_end_token_id, *newlines]


@pytest.mark.parametrize("case", ["image_dynamic", "image_dynamic_tall", "multi_image"])
def test_pixels_and_prompt_equal_the_original(case, shared_dir):
    folder = shared_dir / "parity/nvila"
    references = load_file(folder / "refs/model_3x3fix_70.safetensors") | load_file(
        folder / "refs/vision_70.safetensors"
    )
    cases = json.loads((folder / "refs/model_3x3fix_70.json").read_text())["cases"]
    tokenizer = AutoTokenizer.from_pretrained(folder / "model_3x3fix_70/llm")
    added = ["<vila/sentinel>", "<image>", "<vila/video>"]  # by the original at load time, in this order
    tokenizer.add_special_tokens({"additional_special_tokens": added})
    size = {"height": 70, "width": 70}
    processor = RGPT4DProcessor(
        RGPT4DImageProcessor(size=size, image_aspect_ratio="dynamic", max_tiles=6),
        RGPT4DVideoProcessor(size=size), tokenizer,
        video_token="<vila/video>", frame_end_placeholder="<vila/sentinel>", frame_grid=2,
    )  # fmt: skip
    parts = cases[case]["prompt_parts"]
    messages = ask(*(p if isinstance(p, str) else Image.open(folder / "refs/inputs" / p[1]) for p in parts))
    outputs = processor.apply_chat_template(messages, **OPTIONS)
    assert torch.equal(outputs["pixel_values"], references[f"{case}/pixel_values"])
    expected = []  # the original has one id for each tile, and puts 2 x 2 embeddings and a newline there later
    for token in references[f"{case}/input_ids"][0].tolist():
        expected += [token] * 4 + [198] if token == processor.image_token_id else [token]
    assert outputs["input_ids"][0].tolist() == expected


# --- dynamic_s2 ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    vision = {"model_type": "siglip_vision_model", "hidden_size": WIDTH, "intermediate_size": 48, "patch_size": 14}
    vision |= {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "vision_use_head": False}
    text = {"model_type": "qwen2", "vocab_size": 96, "hidden_size": DIM, "intermediate_size": 48}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    torch.manual_seed(0)
    config = RGPT4DConfig(
        vision_config=vision, text_config=text, image_token_id=90, video_token_id=91, frame_end_token_id=10,
        projector_type="mlp_downsample", s2_scales=SCALES,
    )  # fmt: skip
    model = RGPT4DForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    return model.eval()


def features_by_place(model, tiles: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """The (rows * 4, columns * 4, C) map of one scale, tile by tile."""
    features = model.model.vision_tower(tiles, output_hidden_states=True).hidden_states[-2]
    rows, columns = grid
    place = torch.zeros(rows * PATCHES, columns * PATCHES, WIDTH)
    for i, tile in enumerate(features):
        top, left = i // columns * PATCHES, i % columns * PATCHES
        place[top : top + PATCHES, left : left + PATCHES] = tile.view(PATCHES, PATCHES, WIDTH)
    return place


def mean_of_source(source: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize by area, written out: an output cell is the mean of the source cells it touches."""
    (height, width, _), (new_height, new_width) = source.shape, size
    rows = []
    for y in range(new_height):
        y0, y1 = y * height // new_height, -(-(y + 1) * height // new_height)
        cells = []
        for x in range(new_width):
            x0, x1 = x * width // new_width, -(-(x + 1) * width // new_width)
            cells.append(source[y0:y1, x0:x1].mean((0, 1)))
        rows.append(torch.stack(cells))
    return torch.stack(rows)


def test_scales_are_merged_place_by_place(model):
    rows, columns = 3, 4
    tiles = torch.randn(1 + 4 + rows * columns, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens = model.model.get_image_features(tiles, torch.tensor([[rows, columns]])).pooler_output
        assert len(tokens) == 1 and tokens[0].shape == (rows * columns * 4, DIM)
        parts = tiles.split([1, 4, rows * columns])
        size = (rows * PATCHES, columns * PATCHES)
        maps = [
            mean_of_source(features_by_place(model, part, grid), size)
            for part, grid in zip(parts, ((1, 1), (2, 2), (rows, columns)), strict=True)
        ]
        merged = torch.cat(maps, dim=-1)
        grid = torch.zeros(rows * 2, columns * 2, DIM)
        for row in range(rows):
            for column in range(columns):
                block = merged[row * PATCHES : (row + 1) * PATCHES, column * PATCHES : (column + 1) * PATCHES]
                block = model.model.multi_modal_projector(block.reshape(1, PATCHES**2, 3 * WIDTH))[0]
                grid[row * 2 : row * 2 + 2, column * 2 : column * 2 + 2] = block.view(2, 2, DIM)
    torch.testing.assert_close(tokens[0], grid.flatten(0, 1), atol=1e-5, rtol=1e-5)


def test_another_scale_can_set_the_size(model, tiny_tokenizer):
    rows, columns = 3, 4
    tiles = torch.randn(1 + 4 + rows * columns, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    model.config.s2_resize_output_to_scale_idx = 1
    with torch.no_grad():
        tokens = model.model.get_image_features(tiles, torch.tensor([[rows, columns]])).pooler_output[0]
        size = (2 * PATCHES, 2 * PATCHES)
        maps = [
            mean_of_source(features_by_place(model, part, grid), size)
            for part, grid in zip(tiles.split([1, 4, rows * columns]), ((1, 1), (2, 2), (rows, columns)), strict=True)
        ]
        first = torch.cat(maps, dim=-1)[:PATCHES, :PATCHES].reshape(1, PATCHES**2, 3 * WIDTH)
        first = model.model.multi_modal_projector(first)[0].view(2, 2, DIM)
    model.config.s2_resize_output_to_scale_idx = -1
    assert tokens.shape == (4 * 4, DIM)
    torch.testing.assert_close(tokens.view(4, 4, DIM)[:2, :2], first, atol=1e-5, rtol=1e-5)
    options = {"image_aspect_ratio": "dynamic_s2", "s2_scales": SCALES, "s2_resize_output_to_scale_idx": 1}
    processor = processor_of(tiny_tokenizer, **options)
    inputs = processor(images=[picture(400, 300)], text=["<image>What?"], return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == 4 * 4


def test_without_tiles_a_frame_stands_for_all_scales(model):
    frames = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        features = model.model.vision_tower(frames, output_hidden_states=True).hidden_states[-2]
        expected = model.model.multi_modal_projector(torch.cat([features] * 3, dim=-1))
        untiled = model.model.get_image_features(frames, torch.tensor([[1, 1], [1, 1]])).pooler_output
        plain = model.model.get_image_features(frames).pooler_output
    for i in range(2):
        assert torch.equal(untiled[i], plain[i])
        torch.testing.assert_close(plain[i], expected[i], atol=1e-5, rtol=1e-5)


def test_a_picture_of_several_scales_passes_from_processor_to_answer(model, tiny_tokenizer):
    processor = processor_of(tiny_tokenizer, image_aspect_ratio="dynamic_s2", s2_scales=SCALES, max_tiles=12)
    alone = processor(images=[picture(400, 300)], text=["<image>What?"], return_tensors="pt")
    assert alone["image_block_sizes"].tolist() == [[3, 4]]
    assert alone["pixel_values"].shape == (1 + 4 + 12, 3, 56, 56)
    assert (alone["input_ids"] == tiny_tokenizer.convert_tokens_to_ids("<image>")).sum() == 12 * 4
    assert processor._get_num_multimodal_tokens(image_sizes=[(300, 400)])["num_image_tokens"] == [12 * 4 + 1]
    both = processor(images=[picture(400, 300), picture(50, 50)], text=["<image><image>What?"], return_tensors="pt")
    assert both["image_block_sizes"].tolist() == [[1, 1], [1, 1]] and both["pixel_values"].shape[0] == 2

    ids = torch.tensor([[1, *[90] * 48, 10, 20, 21]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    inputs |= {key: alone[key] for key in ("pixel_values", "image_block_sizes")}
    greedy = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    beams = model.generate(**inputs, max_new_tokens=4, do_sample=False, num_beams=3)
    assert greedy.shape == beams.shape == (1, 56)
    with torch.no_grad():
        logits = model(**inputs).logits
        moved = inputs | {"pixel_values": inputs["pixel_values"].flip(0)}
        assert (model(**moved).logits[0, -1] - logits[0, -1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.get_image_features(torch.zeros(5, 3, 56, 56), torch.tensor([[2, 2]])), "9 tiles, and 5 are given"),
        (lambda m: RGPT4DImageProcessor(image_aspect_ratio="pad")(picture(9, 9)), "choose one of"),
        (lambda m: RGPT4DImageProcessor(image_aspect_ratio="dynamic_s2")(picture(9, 9)), "needs s2_scales"),
        (lambda m: RGPT4DImageProcessor(image_aspect_ratio="dynamic")(picture(9, 9), tiled=[]), "give one for each"),
        (lambda m: tile_grid(100, 100, 56, 9, 6), "raise max_tiles to 9"),
        (lambda m: RGPT4DConfig(s2_scales=[336, 672]), "must rise from the vision tower's image size 448"),
        (lambda m: RGPT4DConfig(s2_scales=[448, 500]), "multiples"),
        (lambda m: RGPT4DConfig(s2_resize_output_to_scale_idx=1), "choose one of the 1 s2_scales"),
    ],
)
def test_errors_name_the_remedy(call, message, model):
    with pytest.raises(ValueError, match=message):
        call(model.model)
