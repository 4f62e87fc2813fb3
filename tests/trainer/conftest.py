import numpy as np
import pytest
import torch
from transformers import Qwen2Config, SiglipVisionConfig

from modeling_rgpt4d import (
    L4PConfig,
    L4PModel,
    RGPT4DConfig,
    RGPT4DForConditionalGeneration,
    RGPT4DImageProcessor,
    RGPT4DProcessor,
    RGPT4DVideoProcessor,
)
from trainer import L4PTeacher

NUM_FRAMES = 4


@pytest.fixture(scope="session")
def make_model(tiny_tokenizer):
    """Call it for a fresh model of 32 wide, 2 layers, frames of 28 px and 2 x 2 tokens, always with the same weights."""

    def make():
        torch.manual_seed(0)
        return RGPT4DForConditionalGeneration(
            RGPT4DConfig(
                vision_config=SiglipVisionConfig(
                    image_size=28,
                    patch_size=7,
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    vision_use_head=False,
                ),
                text_config=Qwen2Config(
                    vocab_size=len(tiny_tokenizer),
                    hidden_size=32,
                    intermediate_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=2,
                    num_key_value_heads=1,
                    bos_token_id=None,
                    eos_token_id=tiny_tokenizer.eos_token_id,
                    pad_token_id=tiny_tokenizer.pad_token_id,
                ),
                image_token_id=tiny_tokenizer.convert_tokens_to_ids("<image>"),
                video_token_id=tiny_tokenizer.convert_tokens_to_ids("<video>"),
                frame_end_token_id=tiny_tokenizer.convert_tokens_to_ids("\u010a"),
                projector_type="mlp_downsample",
                vision_feature_layer=-1,
            )
        )

    return make


@pytest.fixture
def processor(tiny_tokenizer):
    size = {"height": 28, "width": 28}
    return RGPT4DProcessor(
        RGPT4DImageProcessor(size=size), RGPT4DVideoProcessor(size=size), tiny_tokenizer, frame_grid=2
    )


@pytest.fixture
def l4p():
    """A tiny L4P: 4 frames of 16 px, 2 x 2 patches, latents of 24 channels at four taps."""
    torch.manual_seed(1)
    return L4PModel(
        L4PConfig(
            image_size=16,
            patch_size=8,
            num_frames=NUM_FRAMES,
            hidden_size=24,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=48,
            taps=(1, 2, 3, 4),
            feature_dim=8,
            layer_dims=(8, 8, 8, 8),
            last_dim=8,
        )
    )


@pytest.fixture
def teacher(l4p):
    return L4PTeacher(l4p, depth_scale="metric")


@pytest.fixture
def rows():
    """Eight conversations: the ones with odd number are text alone, the others have a video of six frames and a region."""
    random = np.random.default_rng(0)
    rows = []
    for index in range(8):
        content = [{"type": "text", "text": f"Question {index}: which way?"}]
        if index % 2 == 0:
            content[0]["text"] += " Where is <obj_1>?" * (1 + index // 2)
            video = {
                "type": "video",
                "video": random.integers(0, 256, (6, 20, 24, 3), dtype=np.uint8),
                "fps": 2.0 + index,
                "regions": [{"name": "obj_1", "box": [4, 4, 16, 16]}],
            }
            content.insert(0, video)
        answer = {"role": "assistant", "content": [{"type": "text", "text": ["left", "to the right"][index // 2 % 2]}]}
        rows.append({"id": str(index), "messages": [{"role": "user", "content": content}, answer]})
    return rows
