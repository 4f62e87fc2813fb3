"""Make a small 4D-RGPT with random weights, and a tokenizer learned from a data set's texts: what a laptop can train.

python examples/make_small_model.py --data runs/world4d --output runs/small
"""

import argparse
import shutil
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

import torch
from datasets import load_dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, SiglipVisionConfig

from datasets_rgpt4d import to_messages
from modeling_rgpt4d import (
    RGPT4DConfig,
    RGPT4DForConditionalGeneration,
    RGPT4DImageProcessor,
    RGPT4DProcessor,
    RGPT4DVideoProcessor,
)
from modeling_rgpt4d.time_marks import time_prompt

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>", "<|frame_end|>"]


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE from `texts`. It has the chat tokens of Qwen2 and the placeholders of `RGPT4DProcessor`.

    Args:
        texts: the sentences to learn from, in a fixed order (the result depends on nothing else).
        vocab_size: upper bound of the number of tokens; the 256 bytes and 6 special tokens are always there.
    """
    tokenizer = Tokenizer(models.BPE())
    # Words are cut at spaces and line ends only, so that a number or a JSON key that recurs is one token of its own: a
    # small model then reads "1.5" as one thing, and questions are short.
    words = pre_tokenizers.Split(Regex(r" ?[^\s]+|\s"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        additional_special_tokens=SPECIAL_TOKENS[1:],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, image_size: int, patch_size: int, width: int, layers: int, time_cue: str = "tpe"
):
    """A 4D-RGPT with random weights and its processor: SigLIP of width `width`, 2x2 projector, Qwen2 of width `2 * width`.

    Args:
        image_size, patch_size: pixels; each frame becomes `(image_size / patch_size / 2) ** 2` tokens.
        width, layers: of the vision tower; the language model has twice the width and as many layers.
        time_cue: `"tpe"`, which is a part of the model, or one of the processor's, `"none"`, `"mark"` and `"prompt"`.
    """
    config = RGPT4DConfig(
        vision_config=SiglipVisionConfig(
            image_size=image_size,
            patch_size=patch_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 32,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=2 * width,
            intermediate_size=6 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 16,
            num_key_value_heads=width // 32,
            max_position_embeddings=4096,
            # 0.02 suits widths of thousands. With it a model of width 192 tells the colours of marked objects no better than
            # by chance after 500 steps of region captions; so, every second one.
            initializer_range=(2 * width) ** -0.5,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tokenizer.convert_tokens_to_ids("<video>"),
        frame_end_token_id=tokenizer.convert_tokens_to_ids("\u010a"),  # the newline, as byte-level BPE writes it
        projector_type="mlp_downsample",
        vision_feature_layer=-1,  # all layers are trained from scratch, so none is left out as in NVILA's -2
        time_cue="tpe" if time_cue == "tpe" else "none",
    )
    model = RGPT4DForConditionalGeneration(config)
    model.generation_config.update(
        do_sample=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    size = {"height": image_size, "width": image_size}
    processor = RGPT4DProcessor(
        RGPT4DImageProcessor(size=size),
        RGPT4DVideoProcessor(size=size),
        tokenizer,
        frame_grid=config.frame_grid,
        time_cue="none" if time_cue == "tpe" else time_cue,
    )
    return model, processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", required=True, help="folder of a World4D data set; its training texts make the tokenizer"
    )
    parser.add_argument("--output", required=True, type=Path, help="folder for model, processor and tokenizer")
    parser.add_argument("--image-size", type=int, default=64, help="side of a frame in pixels (default: %(default)s)")
    parser.add_argument("--patch-size", type=int, default=8, help="side of a patch in pixels (default: %(default)s)")
    parser.add_argument("--width", type=int, default=96, help="width of the vision tower (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=3, help="layers of each transformer (default: %(default)s)")
    parser.add_argument("--vocab-size", type=int, default=1024, help="tokens at most (default: %(default)s)")
    parser.add_argument(
        "--time-cue", choices=["tpe", "none", "mark", "prompt"], default="tpe", help="how the model is told the time"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the random weights (default: %(default)s)")
    args = parser.parse_args()
    if args.output.exists():
        raise SystemExit(f"{args.output} exists; remove it or choose another --output.")

    train = load_dataset(args.data, split="train").remove_columns("video")
    messages = (message for row in train for message in to_messages({**row, "video": ""}))
    texts = (block["text"] for message in messages for block in message["content"] if block["type"] == "text")
    torch.manual_seed(args.seed)
    if args.time_cue == "prompt":  # its words become tokens, too
        sentences = (
            time_prompt(duration + 1 / fps, fps)  # the last frame is shown for a while, too
            for duration, fps in zip(train["duration_s"], train["fps"], strict=True)
        )
        texts = chain(texts, sentences)
    model, processor = build_model(
        build_tokenizer(texts, args.vocab_size),
        args.image_size,
        args.patch_size,
        args.width,
        args.layers,
        args.time_cue,
    )
    unfinished = args.output.with_name(f".{args.output.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    processor.save_pretrained(unfinished)
    unfinished.replace(args.output)
    print(f"{args.output}: {model.num_parameters():,} parameters, {len(processor.tokenizer)} tokens")


if __name__ == "__main__":
    main()
