"""Latency and memory of inference beside peers of the same transformers, and beside the floor of the device.

Weights are random: speed does not depend on their values. Every model gets one question about the same number of frames,
at the resolution that it takes itself, and answers with the same number of tokens.

    python benchmarks/inference.py --output runs/inference.json

What is measured, all as medians with minimum and maximum:
- prefill: `generate` of one token, from pixels on the device to the token's id: what a user waits for the first word;
- answer: `generate` of `--new-tokens` tokens; step: (answer - prefill) / (new tokens - 1);
- batch: answers to `--batch` videos at once, in videos and in tokens a second, beside those of one;
- memory: the allocator's peak above the weights.
"default" is plain `generate`, "static" is `cache_implementation="static"` of transformers, which compiles a step, and "fast"
is `fast=True`, which only ours has. The floor is the work over the rates measured in the same run: operations of the matrix
products over the rate of a large product, bytes of the weights over the rate of a large copy.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import (
    AutoConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2_5_VLForConditionalGeneration,
)

from modeling_rgpt4d import PerceptionDecoder, PerceptionDecoderConfig, RGPT4DConfig, RGPT4DForConditionalGeneration

QWEN2_7B = {
    "vocab_size": 152_064,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32_768,
}
SIGLIP_SO400M = {
    "model_type": "siglip_vision_model",
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_attention_heads": 16,
    "patch_size": 14,
    "vision_use_head": False,
}
TINY_TEXT = QWEN2_7B | {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
TINY_VISION = SIGLIP_SO400M | {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
PROMPT = 60  # tokens of text beside the video


def build(model_class: type[PreTrainedModel], config, device: str) -> PreTrainedModel:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        return model_class._from_config(config, dtype=dtype).eval()


def prompt(video_tokens: list[int], batch: int, device: str) -> dict[str, torch.Tensor]:
    text = [5] * (PROMPT // 2)
    ids = torch.tensor([text + video_tokens + text], device=device).repeat(batch, 1)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def ours(tiny: bool, frames: int, device: str) -> tuple[PreTrainedModel, Callable[[int], dict]]:
    size = 56 if tiny else 448
    config = RGPT4DConfig(
        vision_config=(TINY_VISION | {"num_hidden_layers": 3} if tiny else SIGLIP_SO400M | {"num_hidden_layers": 27})
        | {"image_size": size},
        text_config={"model_type": "qwen2"} | (TINY_TEXT if tiny else QWEN2_7B | {"vocab_size": 151_651}),
        **({"image_token_id": 500, "video_token_id": 501, "frame_end_token_id": 198} if tiny else {}),
    )
    model = build(RGPT4DForConditionalGeneration, config, device)

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        ids = ([config.video_token_id] * config.frame_grid**2 + [config.frame_end_token_id]) * frames
        return prompt(ids, batch, device) | {
            "pixel_values_videos": torch.randn(batch, frames, 3, size, size, device=device, dtype=model.dtype),
            "video_timestamps": torch.arange(frames, device=device).float().repeat(batch, 1),
        }

    return model, inputs


def llava_onevision(tiny: bool, frames: int, device: str) -> tuple[PreTrainedModel, Callable[[int], dict]]:
    size = 56 if tiny else 384
    config = AutoConfig.for_model(
        "llava_onevision",
        vision_config=(TINY_VISION | {"num_hidden_layers": 3} if tiny else SIGLIP_SO400M | {"num_hidden_layers": 26})
        | {"image_size": size},
        text_config={"model_type": "qwen2"} | (TINY_TEXT if tiny else QWEN2_7B),
        **({"image_token_index": 500, "video_token_index": 501} if tiny else {}),
    )
    model = build(LlavaOnevisionForConditionalGeneration, config, device)
    tokens = frames * (-(-(size // 14) // 2)) ** 2 + 1  # pooled 2 x 2, and one newline for the video

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        return prompt([config.video_token_id] * tokens, batch, device) | {
            "pixel_values_videos": torch.randn(batch, frames, 3, size, size, device=device, dtype=model.dtype)
        }

    return model, inputs


def qwen2_5_vl(tiny: bool, frames: int, device: str) -> tuple[PreTrainedModel, Callable[[int], dict]]:
    size = 56 if tiny else 448
    vision = {"out_hidden_size": (TINY_TEXT if tiny else QWEN2_7B)["hidden_size"]}
    if tiny:
        vision |= {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "fullatt_block_indexes": [1]}
    head = 16 if tiny else 128
    config = AutoConfig.for_model(
        "qwen2_5_vl",
        vision_config=vision,
        text_config=(TINY_TEXT if tiny else QWEN2_7B)
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e6,
                "mrope_section": [head // 8, head * 3 // 16, head * 3 // 16],
            }
        },
        **({"image_token_id": 500, "video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503} if tiny else {}),
    )  # fmt: skip
    model = build(Qwen2_5_VLForConditionalGeneration, config, device)
    grid = (frames // 2, size // 14, size // 14)  # two frames make one, and 2 x 2 patches one token
    tokens = grid[0] * grid[1] * grid[2] // 4

    def inputs(batch: int) -> dict[str, torch.Tensor]:
        ids = [config.vision_start_token_id] + [config.video_token_id] * tokens + [config.vision_end_token_id]
        made = prompt(ids, batch, device)
        patches = batch * grid[0] * grid[1] * grid[2]
        return made | {
            "mm_token_type_ids": (made["input_ids"] == config.video_token_id).int() * 2,
            "pixel_values_videos": torch.randn(patches, 3 * 2 * 14 * 14, device=device, dtype=model.dtype),
            "video_grid_thw": torch.tensor([grid] * batch, device=device),
        }

    return model, inputs


MODELS = {"ours": ours, "llava_onevision": llava_onevision, "qwen2_5_vl": qwen2_5_vl}
MODES = {"default": {}, "static": {"cache_implementation": "static"}, "fast": {"fast": True}}


def measure(call: Callable[[], object], repeats: int, device: str, warmup: int = 2) -> dict[str, float]:
    """Milliseconds of `call`, the device's work included."""
    times = []
    for i in range(warmup + repeats):
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        if device == "cuda":
            torch.cuda.synchronize()
        if i >= warmup:
            times.append(1e3 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "min": min(times), "max": max(times)}


def rates(device: str) -> dict[str, float]:
    """What the device does at best: matrix products (operations a second) and copies (bytes read and written a second)."""
    n, size = (8192, 2**31) if device == "cuda" else (256, 2**22)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    product = measure(lambda: a @ b, 20, device)["median"]
    source = torch.randint(0, 255, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), 20, device)["median"]
    return {"matrix_flops": 2 * n**3 / product * 1e3, "copy_bytes": 2 * size / copy * 1e3}


def floor(model: PreTrainedModel, inputs: dict, rate: dict[str, float]) -> dict[str, float]:
    """Milliseconds that prefill and step take at least: their matrix products, with all of the tower, and their bytes of
    weights and of the cache."""
    text = model.config.get_text_config()
    tower = next(m for name, m in model.named_modules() if name.rsplit(".", 1)[-1] in ("vision_tower", "visual"))
    decoder = model.model.language_model
    weights = sum(p.numel() for p in decoder.layers.parameters())
    tokens = inputs["input_ids"].numel()
    pixels = inputs["pixel_values_videos"]
    patches = pixels.shape[0] if pixels.ndim == 2 else pixels.shape[:2].numel() * (pixels.shape[-1] // 14) ** 2
    flops = 2 * weights * tokens + 2 * sum(p.numel() for p in tower.parameters()) * patches
    length, batch = tokens / len(inputs["input_ids"]), len(inputs["input_ids"])
    flops += batch * 2 * length**2 * text.hidden_size * text.num_hidden_layers  # causal: half of 4 n^2 d a layer
    head = model.get_output_embeddings().weight
    bytes_ = weights * head.element_size() + head.numel() * head.element_size()
    bytes_ += (
        tokens
        * 2
        * text.num_key_value_heads
        * (text.hidden_size // text.num_attention_heads)
        * (text.num_hidden_layers * head.element_size())
    )
    return {"prefill": flops / rate["matrix_flops"] * 1e3, "step": bytes_ / rate["copy_bytes"] * 1e3}


def benchmark(name: str, args, device: str, rate: dict[str, float]) -> dict:
    model, make = MODELS[name](args.tiny, args.frames, device)
    record = {"parameters": sum(p.numel() for p in model.parameters())}
    record["weights_gib"] = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**30
    modes = [mode for mode in args.modes if mode != "fast" or name == "ours"]
    for batch in dict.fromkeys((1, args.batch)):
        inputs = make(batch)
        record.setdefault("prompt_tokens", inputs["input_ids"].shape[1])
        limits = floor(model, inputs, rate)
        for mode in modes:
            if mode == "static" and batch > 1:  # compiles anew for every batch size, and is measured for one video
                continue

            def answer(num_tokens: int, inputs=inputs, mode=mode):
                return model.generate(
                    **inputs, **MODES[mode], do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens
                )

            start = time.perf_counter()
            answer(args.new_tokens)
            first_s = time.perf_counter() - start
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            whole = measure(lambda: answer(args.new_tokens), args.repeats, device)
            peak = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else None
            prefill = measure(lambda: answer(1), args.repeats, device)
            record[f"{mode}, batch {batch}"] = {
                "prefill_ms": prefill,
                "answer_ms": whole,
                "step_ms": (whole["median"] - prefill["median"]) / (args.new_tokens - 1),
                "videos_per_s": batch / whole["median"] * 1e3,
                "tokens_per_s_while_decoding": batch * (args.new_tokens - 1) / (whole["median"] - prefill["median"]) * 1e3,
                "first_call_s": first_s,
                "floor_ms": limits,
                "memory_above_weights_gib": None if peak is None else peak - record["weights_gib"],
            }  # fmt: skip
            print_row(name, f"{mode}, batch {batch}", record)
    if name == "ours" and "fast" in args.modes:
        record["with P4D's decoder"] = beside_decoder(model, make(1), args, device)
    return record


def beside_decoder(model, inputs: dict, args, device: str) -> dict:
    """Ours with the perception decoder attached as P4D's training attaches it: it is never run, so nothing may change."""

    def answer():
        return model.generate(
            **inputs, fast=True, do_sample=False, max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens
        )

    with torch.no_grad():
        without = measure(answer, args.repeats, device)
        logits, names = model(**inputs, logits_to_keep=1).logits, set(model.state_dict())
        config = PerceptionDecoderConfig(model.config.text_config.hidden_size, latent_shape=(4, 8, 16, 16, 1408))
        model.model.add_module("perception_decoder", PerceptionDecoder(config).to(model.device, model.dtype))
        attached = measure(answer, args.repeats, device)
        record = {
            "answer_ms_with": attached,
            "answer_ms_without": without,
            "logits_equal": torch.equal(logits, model(**inputs, logits_to_keep=1).logits),
            "names_equal": {n for n in model.state_dict() if "perception_decoder" not in n} == names,
        }
    del model.model.perception_decoder
    ratio = attached["median"] / without["median"]
    print(
        f"ours with P4D's decoder attached: {ratio:.3f} of the time, logits equal: {record['logits_equal']}", flush=True
    )
    return record


def print_row(name: str, kind: str, record: dict):
    row = record[kind]
    memory = row["memory_above_weights_gib"]
    print(
        f"{name:16s} {kind:18s} prefill {row['prefill_ms']['median']:7.1f} ms (floor {row['floor_ms']['prefill']:6.1f})  "
        f"step {row['step_ms']:6.2f} ms (floor {row['floor_ms']['step']:5.2f})  answer {row['answer_ms']['median']:7.1f} ms  "
        f"{row['videos_per_s']:6.2f} videos/s  first call {row['first_call_s']:5.1f} s"
        + ("" if memory is None else f"  memory above weights {memory:.2f} GiB"),
        flush=True,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME", help=", ".join(MODELS)
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), metavar="MODE", help=", ".join(MODES))
    parser.add_argument("--frames", type=int, default=16, help="frames of a video, an even number")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--batch", type=int, default=8, help="videos at once, beside one")
    parser.add_argument("--repeats", type=int, default=5, help="counted runs, after two that are not")
    parser.add_argument("--tiny", action="store_true", help="small random models, to try the command on a CPU")
    parser.add_argument("--output", type=Path, help="write the record as JSON")
    args = parser.parse_args()
    if args.frames % 2:
        parser.error("--frames must be even: Qwen2.5-VL joins frames in pairs")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        parser.error("the 8B models need a CUDA device; add --tiny to try the command on a CPU")

    rate = rates(device)
    record = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or "cpu",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__},
        "settings": {key: value for key, value in vars(args).items() if key != "output"},
        "rates": rate,
        "models": {},
    }  # fmt: skip
    print(f"{record['device']}, {record['versions']}", flush=True)
    print(
        f"matrix products {rate['matrix_flops'] / 1e12:.0f} TFLOP/s, copies {rate['copy_bytes'] / 1e12:.2f} TB/s",
        flush=True,
    )
    for name in args.models:
        record["models"][name] = benchmark(name, args, device, rate)
        if device == "cuda":
            torch._dynamo.reset()
            gc.collect()  # the next model's memory is measured from none
            torch.cuda.empty_cache()
        if args.output:  # after each model: an interrupted run keeps what it has
            args.output.parent.mkdir(parents=True, exist_ok=True)
            temporary = args.output.with_suffix(".tmp")
            temporary.write_text(json.dumps(record, indent=1, default=str) + "\n")
            os.replace(temporary, args.output)


if __name__ == "__main__":
    main()
