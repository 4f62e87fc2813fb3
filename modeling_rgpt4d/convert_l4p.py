"""The released L4P checkpoint to a folder that plain transformers loads: encoder and the four dense heads, as safetensors.

    python -m modeling_rgpt4d.convert_l4p l4p_depth_flow_2d3dtrack_camray_dynseg_v1.ckpt l4p

The source is a Lightning file, opened with weights-only unpickling. What only its tracking head reads (that head, the blocks
after the last tap, the final norm) is left out and named in the report; 1.236 of 1.420 billion parameters remain. The released
weights are non-commercial, and so is what this writes.
"""

import argparse
import json
import re
import sys
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from .checkpoint_files import check_output, quoted, read_json, whole_folder, write_json
from .configuration_l4p import L4PConfig
from .modeling_l4p import L4PModel

PREFIX = "l4p_model."
SIGNAL_OF_TASK = {"depth": "depth", "flow_2d_backward": "flow", "dyn_mask": "motion", "camray": "camray"}
TRACKING_TASK = "track_2d"
BLOCK_NAMES = {  # released name in a block -> ours; attn.qkv and its biases are split below
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
ATTENTION = "attention.attention"
FUSION_NAMES = {"resConfUnit1": "lateral_unit", "resConfUnit2": "unit", "out_conv": "project"}

BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
REASSEMBLE = re.compile(r"act_postprocess\.(\d)\.([01])\.(weight|bias)")
LATERAL = re.compile(r"scratch\.layer([1-4])_rn\.(weight)")
ALIAS = re.compile(r"scratch\.layer_rn\.([0-3])\.(weight)")
FUSION = re.compile(r"scratch\.refinenet([1-4])\.(resConfUnit1|resConfUnit2|out_conv)\.(.+)")
OUTPUT = re.compile(r"(head1\.0|head2\.[02])\.(weight|bias)")


def rename(state_dict: dict[str, Tensor], num_hidden_layers: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The released tensors under the names of `L4PModel`.

    Args:
        state_dict: released name -> tensor.
        num_hidden_layers: blocks that the dense heads read; 36 in the release, the last of `L4PConfig.taps`.

    Returns: our name -> tensor; released name -> why it is left out.
    Raises: `ValueError` that names every tensor that is not of the released architecture, or a second name of a tensor that
        holds other values.
    """
    ours, unused, unknown = {}, {}, []
    for name, tensor in state_dict.items():
        if name.startswith(f"{PREFIX}video_encoder."):
            found, why = _encoder_tensor(name.removeprefix(f"{PREFIX}video_encoder."), tensor, num_hidden_layers)
        elif name.startswith(f"{PREFIX}task_heads.{TRACKING_TASK}."):
            found, why = {}, "tracking head"
        elif match := re.fullmatch(rf"{re.escape(PREFIX)}task_heads\.(\w+)\.task_head\.dpt\.(.+)", name):
            found, why = _head_tensor(match[1], match[2], tensor, state_dict)
        else:
            found, why = {}, None
        ours |= found
        if why is not None:
            unused[name] = why
        elif not found:
            unknown.append(name)
    if unknown:
        raise ValueError(f"{len(unknown)} tensors are not of L4P as released: {quoted(unknown)}")
    return ours, unused


def _encoder_tensor(name: str, tensor: Tensor, num_hidden_layers: int) -> tuple[dict[str, Tensor], str | None]:
    if name in ("norm.weight", "norm.bias"):
        return {}, "final norm, read by the tracking head alone"
    if name in ("patch_embed.proj.weight", "patch_embed.proj.bias"):
        return {f"encoder.patch_embeddings.projection.{name.rpartition('.')[2]}": tensor}, None
    match = BLOCK.fullmatch(name)
    if match is None:
        return {}, None
    index, rest = int(match[1]), match[2]
    if index >= num_hidden_layers:
        return {}, "block after the last tap, read by the tracking head alone"
    layer = f"encoder.layers.{index}"
    if rest == "attn.qkv.weight":  # rows of queries, keys and values
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        # clones: three views of one tensor would count as shared when they are saved
        return {f"{layer}.{ATTENTION}.{part}.weight": rows.clone() for part, rows in parts}, None
    if rest in ("attn.q_bias", "attn.v_bias"):  # the keys have none
        return {f"{layer}.{ATTENTION}.{'query' if rest[5] == 'q' else 'value'}.bias": tensor}, None
    module, _, kind = rest.rpartition(".")
    return ({f"{layer}.{BLOCK_NAMES[module]}.{kind}": tensor} if module in BLOCK_NAMES else {}), None


def _head_tensor(
    task: str, name: str, tensor: Tensor, state_dict: dict[str, Tensor]
) -> tuple[dict[str, Tensor], str | None]:
    if task not in SIGNAL_OF_TASK:
        return {}, None
    head = f"heads.{SIGNAL_OF_TASK[task]}"
    if match := REASSEMBLE.fullmatch(name):
        return {f"{head}.reassemble.{match[1]}.{('project', 'resample')[int(match[2])]}.{match[3]}": tensor}, None
    if match := LATERAL.fullmatch(name):
        return {f"{head}.laterals.{int(match[1]) - 1}.{match[2]}": tensor}, None
    if match := ALIAS.fullmatch(name):
        other = f"{PREFIX}task_heads.{task}.task_head.dpt.scratch.layer{int(match[1]) + 1}_rn.{match[2]}"
        if other in state_dict and tensor.device.type != "meta" and not torch.equal(tensor, state_dict[other]):
            raise ValueError(f"{name} of task {task} must equal {other}: they are two names of one tensor")
        return {}, "second name of a tensor"
    if match := FUSION.fullmatch(name):
        level = int(match[1]) - 1
        if level == 3 and match[2] == "resConfUnit1":
            return {}, "lateral unit of the deepest level, read by nothing"
        return {f"{head}.fusion.{level}.{FUSION_NAMES[match[2]]}.{match[3]}": tensor}, None
    if match := OUTPUT.fullmatch(name):
        part, kind = match[1], match[2]
        return {f"{head}.project.{kind}" if part == "head1.0" else f"{head}.output.{part[-1]}.{kind}": tensor}, None
    return {}, None


def read_checkpoint(source: Path) -> dict[str, Tensor]:
    """The `state_dict` of a Lightning file, or the tensors of a safetensors file; memory-mapped, on the CPU.

    Raises: `ValueError` that names the file if it is missing, damaged, or holds more than weights-only unpickling opens.
    """
    if not source.is_file():
        raise ValueError(f"{source} is no file; expected L4P's checkpoint (.ckpt)")
    if source.suffix == ".safetensors":
        try:
            return load_file(source)
        except SafetensorError as error:
            raise ValueError(f"{source} is damaged or cut short ({error}): download it again") from error
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # weights_only refuses with an error that has no public class
        raise ValueError(
            f"{source} could not be opened as weights alone ({error}). It is damaged, cut short, or holds code; download it again"
        ) from error
    state_dict = content.get("state_dict", content) if isinstance(content, dict) else None
    if not state_dict or not all(isinstance(tensor, Tensor) for tensor in state_dict.values()):
        raise ValueError(f"{source} holds no state_dict of tensors; expected a Lightning checkpoint of L4P")
    return state_dict


def convert_l4p(
    source: str | Path, output: str | Path, config: L4PConfig | None = None, max_shard_size: int | str = "5GB"
) -> dict:
    """Convert a checkpoint to a folder that `L4PModel` and `AutoModel` (with `trust_remote_code=True`) load.

    Args:
        source: the Lightning file, or its tensors as safetensors.
        output: folder to make; it must not exist, or be empty.
        config: of another size than the released one.
        max_shard_size: of one file of weights, in bytes or as "5GB".

    Returns: the report, which is also `conversion.json` in `output`.
    Raises: `ValueError` if the checkpoint is not L4P's, or not whole; then nothing is left behind.
    """
    source, output = Path(source), Path(output)
    check_output(output)
    config = L4PConfig() if config is None else config
    tensors, unused = rename(read_checkpoint(source), config.num_hidden_layers)
    with torch.device("meta"):
        model = L4PModel(config)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    missing = [f"{name} {tuple(shapes[name])}" for name in shapes.keys() - tensors.keys()]
    wrong = [
        f"{name} is {tuple(tensor.shape)}, expected {tuple(shapes[name])}"
        for name, tensor in tensors.items()
        if name in shapes and tensor.shape != shapes[name]
    ]
    extra = tensors.keys() - shapes.keys()
    if missing or wrong or extra:
        problems = (("missing", missing), ("of another shape", wrong), ("without a place", list(extra)))
        listed = "; ".join(f"{len(names)} {kind}: {quoted(names)}" for kind, names in problems if names)
        raise ValueError(f"{source}: tensors are not as the config says (here by the names of L4PModel): {listed}")
    model.load_state_dict(tensors, assign=True)
    counts: dict[str, int] = {}
    for why in unused.values():
        counts[why] = counts.get(why, 0) + 1
    report = {
        "source": str(source),
        "versions": {"transformers": transformers.__version__, "torch": torch.__version__},
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "dtypes": sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}),
        "left_out": counts,
        "unused_tensors": sorted(unused),
    }
    with whole_folder(output, sum(tensor.nbytes for tensor in tensors.values())) as unfinished:
        model.save_pretrained(unfinished, max_shard_size=max_shard_size)
        write_json(unfinished / "conversion.json", report)
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m modeling_rgpt4d.convert_l4p",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, help="L4P's checkpoint (.ckpt)")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument(
        "--config", type=Path, help="config.json of an L4PConfig, for another size than the released one"
    )
    parser.add_argument("--max-shard-size", default="5GB", help="of one file of weights (default: %(default)s)")
    args = parser.parse_args(arguments)
    try:
        config = None if args.config is None else L4PConfig(**read_json(args.config))
        report = convert_l4p(args.source, args.output, config, args.max_shard_size)
    except (ValueError, TypeError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was left behind")
    print(json.dumps(report | {"unused_tensors": len(report["unused_tensors"])}, indent=2))
    print(f'model = L4PModel.from_pretrained("{args.output}")')


if __name__ == "__main__":
    main()

__all__ = ["convert_l4p", "read_checkpoint", "rename"]
