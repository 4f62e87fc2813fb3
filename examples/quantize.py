"""Load a 4D-RGPT with 8- or 4-bit weights (bitsandbytes), and tell how far its logits move from those of the whole model.

    python examples/quantize.py --model runs/p4d --bits 4 --video clip.mp4 --region obj_1:225,255,525,560 \
        --question "Which way does <obj_1> move?" --output runs/p4d-4bit

Both models read the question and the whole model's answer, and are compared where this answer is predicted.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from generate import parse_region
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

# They hold a small part of the weights, and everything that the language model sees passes through the others than the head
NOT_QUANTIZED = ["model.vision_tower", "model.geometry_encoding", "model.multi_modal_projector", "lm_head"]


def quantization_config(bits: int, dtype: torch.dtype) -> BitsAndBytesConfig:
    """Of the language model alone: LLM.int8(), or 4-bit NormalFloat that computes in `dtype`."""
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=NOT_QUANTIZED)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=NOT_QUANTIZED,
    )


def compare(logits: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """Logits of both, `(positions, vocab_size)` -> their differences, the Kullback-Leibler divergence of the quantised
    distribution from the reference's (nats, mean over positions), and how often both prefer the same token."""
    logits, reference = logits.double(), reference.double()
    difference = (logits - reference).abs()
    expected = reference.log_softmax(-1)
    divergence = (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1).mean()
    return {
        "positions": len(logits),
        "max_difference": difference.max().item(),
        "mean_difference": difference.mean().item(),
        "kl_divergence": divergence.item(),
        "argmax_agreement": (logits.argmax(-1) == reference.argmax(-1)).double().mean().item(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id")
    parser.add_argument("--bits", type=int, choices=(8, 4), default=8, help="of a weight (default: %(default)s)")
    parser.add_argument("--video", required=True, help="video file")
    parser.add_argument("--question", required=True, help="may name regions: <obj_1>, <obj_2>, ...")
    parser.add_argument("--region", type=parse_region, action="append", default=[], help="name:x1,y1,x2,y2 or name:x,y")
    parser.add_argument(
        "--num-frames", type=int, default=16, help="frames sampled from the video (default: %(default)s)"
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, help="longest answer (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for the quantised model (default: it is not kept)")
    args = parser.parse_args()
    if args.output is not None and args.output.exists():
        raise SystemExit(f"{args.output} exists; remove it or choose another --output.")

    device = "cuda" if torch.cuda.is_available() else "cpu"
    processor = AutoProcessor.from_pretrained(args.model, trust_remote_code=True)
    content = [
        {"type": "video", "video": args.video, "regions": args.region},
        {"type": "text", "text": args.question},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": args.num_frames},
    ).to(device)

    model = AutoModelForImageTextToText.from_pretrained(args.model, trust_remote_code=True, device_map=device)
    dtype, whole_bytes = model.dtype, model.get_memory_footprint()
    with torch.no_grad():
        answer = model.generate(**inputs, max_new_tokens=args.max_new_tokens, do_sample=False)
        num_answer = answer.shape[1] - inputs["input_ids"].shape[1]
        inputs["input_ids"], inputs["attention_mask"] = answer, torch.ones_like(answer)
        expected = model(**inputs, logits_to_keep=num_answer + 1).logits[0, :-1]
        del model
        quantized = AutoModelForImageTextToText.from_pretrained(
            args.model,
            trust_remote_code=True,
            device_map=device,
            dtype=dtype,
            quantization_config=quantization_config(args.bits, dtype),
        )
        if args.output is not None:
            # Before its first use: on some CPUs bitsandbytes then packs the 4-bit weights anew, and saves them so
            unfinished = args.output.with_name(f".{args.output.name}.part")
            shutil.rmtree(unfinished, ignore_errors=True)
            quantized.save_pretrained(unfinished)
            processor.save_pretrained(unfinished)
            unfinished.replace(args.output)
        logits = quantized(**inputs, logits_to_keep=num_answer + 1).logits[0, :-1]
    memory = {"mib": quantized.get_memory_footprint() / 2**20, "mib_unquantized": whole_bytes / 2**20}
    print(json.dumps({"bits": args.bits, "dtype": str(dtype), "device": device, **compare(logits, expected), **memory}))


if __name__ == "__main__":
    main()
