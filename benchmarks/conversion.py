"""Memory and speed of the NVILA converter, on a checkpoint of random bfloat16 weights of any size.

    python benchmarks/conversion.py --gigabytes 2

Prints the peak memory of a process that converts, beside that of a process which has only imported the converter, the
largest file of weights and the largest tensor. The conversion runs twice: the first time may wait for the disk.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import pre_tokenizers
from transformers import SiglipVisionConfig, SiglipVisionModel

ROOT = Path(__file__).resolve().parents[1]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "[BOS]", "[PAD]"]
DIM, INNER, WIDTH = 2048, 8192, 64  # of the language model, of its MLP, of the vision tower
LAYER = {
    "input_layernorm.weight": (DIM,),
    "post_attention_layernorm.weight": (DIM,),
    "self_attn.q_proj.weight": (DIM, DIM),
    "self_attn.q_proj.bias": (DIM,),
    "self_attn.k_proj.weight": (DIM, DIM),
    "self_attn.k_proj.bias": (DIM,),
    "self_attn.v_proj.weight": (DIM, DIM),
    "self_attn.v_proj.bias": (DIM,),
    "self_attn.o_proj.weight": (DIM, DIM),
    "mlp.gate_proj.weight": (INNER, DIM),
    "mlp.up_proj.weight": (INNER, DIM),
    "mlp.down_proj.weight": (DIM, INNER),
}
CONVERT = """
import json, resource, sys, time
from modeling_rgpt4d.convert_nvila import convert_nvila
megabytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)
source, output, max_shard_size = sys.argv[1:]
imported, start = megabytes(), time.perf_counter()
convert_nvila(source, output, max_shard_size=max_shard_size)
print(json.dumps({"imported": imported, "seconds": time.perf_counter() - start, "peak": megabytes()}))
"""


def write_source(folder: Path, num_bytes: float, shard_bytes: float) -> None:
    """A checkpoint in NVILA's layout with about `num_bytes` in its language model, in shards of `shard_bytes`."""
    torch.manual_seed(0)
    per_layer = 2 * sum(torch.Size(shape).numel() for shape in LAYER.values())
    num_layers = max(1, round(num_bytes / per_layer))
    rows = 256 + len(SPECIAL)
    llm = {"model.embed_tokens.weight": (rows, DIM), "lm_head.weight": (rows, DIM), "model.norm.weight": (DIM,)}
    llm |= {f"model.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in LAYER.items()}
    projector = {"1": (9 * WIDTH, None), "2": (3 * WIDTH, 9 * WIDTH), "4": (3 * WIDTH, None), "5": (DIM, 3 * WIDTH)}
    projector |= {"7": (DIM, DIM)}
    projector = {
        f"layers.{i}.{kind}": (rows,) if kind == "bias" or columns is None else (rows, columns)
        for i, (rows, columns) in projector.items()
        for kind in ("weight", "bias")
    }
    vision_config = {
        "model_type": "siglip_vision_model",
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": 56,
        "patch_size": 14,
        "vision_use_head": False,
    }
    tower = SiglipVisionModel(SiglipVisionConfig(**vision_config)).state_dict()
    vision = {f"vision_model.{name}": tuple(tensor.shape) for name, tensor in tower.items()}
    for part, shapes in (("llm", llm), ("vision_tower", vision), ("mm_projector", projector)):
        (folder / part).mkdir(parents=True)
        write_shards(folder / part, shapes, shard_bytes)

    special = {token: 256 + i for i, token in enumerate(SPECIAL)}
    llm_config = {
        "model_type": "qwen2",
        "vocab_size": rows,
        "hidden_size": DIM,
        "intermediate_size": INNER,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "rope_theta": 1_000_000.0,
    }
    tokenizer_config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {str(i): {"content": token, "special": True} for token, i in special.items()},
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
    }
    for name, content in (
        ("config.json", {"model_type": "llava_llama"}),
        ("llm/config.json", llm_config),
        ("llm/tokenizer_config.json", tokenizer_config),
        ("llm/added_tokens.json", special),
        ("llm/vocab.json", {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}),
        ("vision_tower/config.json", vision_config),
        ("vision_tower/preprocessor_config.json", {"size": {"height": 56, "width": 56}}),
        ("mm_projector/config.json", {"mm_projector_type": "mlp_downsample_3x3_fix"}),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "llm" / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def write_shards(folder: Path, shapes: dict[str, tuple[int, ...]], shard_bytes: float) -> None:
    shards: list[list[str]] = [[]]
    held = 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if shards[-1] and held + size > shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    weight_map = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        save_file({name: torch.randn(shapes[name]).to(torch.bfloat16) for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        index = folder / "model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of weights (default: %(default)s)")
    parser.add_argument(
        "--shard-megabytes", type=float, default=500.0, help="of source and output (default: %(default)s)"
    )
    parser.add_argument("--folder", help="where to write, deleted at the end (default: a temporary folder)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        source = Path(temporary) / "source"
        # In a process of its own: on Linux a child starts with the peak memory of its parent
        write = (source, args.gigabytes * 1e9, args.shard_megabytes * 1e6)
        writer = multiprocessing.get_context("spawn").Process(target=write_source, args=write)
        writer.start()
        writer.join()
        files = list(source.rglob("*.safetensors"))
        total, largest = (f(file.stat().st_size for file in files) / 1e6 for f in (sum, max))
        tensor = 2 * INNER * DIM / 1e6
        print(f"source: {total:.0f} MB in {len(files)} files, largest {largest:.0f} MB, largest tensor {tensor:.0f} MB")
        for run in (1, 2):
            command = [sys.executable, "-c", CONVERT, source, source.with_name(f"output-{run}")]
            command.append(f"{args.shard_megabytes}MB")
            done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
            seen = json.loads(done.stdout.splitlines()[-1])
            print(
                f"run {run}: peak {seen['peak']:.0f} MB, after imports {seen['imported']:.0f} MB, so "
                f"{seen['peak'] - seen['imported']:.0f} MB for the conversion; {seen['seconds']:.1f} s, "
                f"{total / seen['seconds']:.0f} MB/s"
            )


if __name__ == "__main__":
    main()
