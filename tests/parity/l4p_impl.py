"""`L4PModel` behind the interface of the reference tensors' checker: released names and a video in, every step out."""

import torch
from torch import Tensor

from modeling_rgpt4d.configuration_l4p import L4PConfig
from modeling_rgpt4d.modeling_l4p import L4PModel

PREFIX = "l4p_model."
SIGNAL_OF_TASK = {"depth": "depth", "flow_2d_backward": "flow", "dyn_mask": "motion", "camray": "camray"}

BLOCK_NAMES = {  # released name in a block -> ours; attn.qkv and its biases are split below
    "attn.proj": "attention.output.dense",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
ATTENTION = "attention.attention"


def config_of(case: dict) -> L4PConfig:
    encoder = case["encoder"]
    return L4PConfig(
        image_size=encoder["img_size"],
        patch_size=encoder["patch_size"],
        num_frames=encoder["all_frames"],
        tubelet_size=encoder["tubelet_size"],
        hidden_size=encoder["embed_dim"],
        num_hidden_layers=case["hooks_idx"][-1],  # the blocks after the last hook serve the tracking head only
        num_attention_heads=encoder["num_heads"],
        intermediate_size=encoder["mlp_hidden"],
        layer_norm_eps=encoder["norm_eps"],
        taps=case["hooks_idx"],
        feature_dim=case["feature_dim"],
        layer_dims=case["layer_dims"],
        last_dim=case["last_dim"],
    )


def rename(state_dict: dict[str, Tensor], num_hidden_layers: int) -> dict[str, Tensor]:
    """The released tensors that the dense signals need, under the names of `L4PModel`."""
    ours = {}
    for name, tensor in state_dict.items():
        if name.startswith(PREFIX + "video_encoder."):
            ours.update(encoder_tensor(name.removeprefix(PREFIX + "video_encoder."), tensor, num_hidden_layers))
        else:
            task, rest = name.removeprefix(PREFIX + "task_heads.").split(".task_head.dpt.")
            new_name = head_name(rest)
            if new_name is not None:
                ours[f"heads.{SIGNAL_OF_TASK[task]}.{new_name}"] = tensor
    return ours


def encoder_tensor(name: str, tensor: Tensor, num_hidden_layers: int) -> dict[str, Tensor]:
    part, _, rest = name.partition(".")
    if part == "norm":
        return {}  # the final norm: tracking head only
    if part == "patch_embed":
        return {f"encoder.patch_embeddings.projection.{rest.removeprefix('proj.')}": tensor}
    index, _, rest = rest.partition(".")
    if int(index) >= num_hidden_layers:
        return {}
    layer = f"encoder.layers.{index}"
    if rest == "attn.qkv.weight":
        parts = zip(("query", "key", "value"), tensor.chunk(3), strict=True)
        return {f"{layer}.{ATTENTION}.{part}.weight": rows for part, rows in parts}
    if rest in ("attn.q_bias", "attn.v_bias"):
        return {f"{layer}.{ATTENTION}.{'query' if rest[5] == 'q' else 'value'}.bias": tensor}
    module, _, kind = rest.rpartition(".")
    return {f"{layer}.{BLOCK_NAMES[module]}.{kind}": tensor}


def head_name(name: str) -> str | None:
    part, _, rest = name.partition(".")
    if part == "act_postprocess":
        level, index, kind = rest.split(".")
        return f"reassemble.{level}.{('project', 'resample')[int(index)]}.{kind}"
    if part in ("head1", "head2"):
        index, kind = rest.split(".")
        return f"project.{kind}" if part == "head1" else f"output.{index}.{kind}"
    block, _, rest = rest.partition(".")
    if block == "layer_rn":
        return None  # a second name of layer{1..4}_rn
    if block.endswith("_rn"):
        return f"laterals.{int(block[len('layer')]) - 1}.{rest}"
    level = int(block[-1]) - 1
    if level == 3 and rest.startswith("resConfUnit1"):
        return None  # never used by the release
    for released, ours in (("resConfUnit1", "lateral_unit"), ("resConfUnit2", "unit"), ("out_conv", "project")):
        rest = rest.replace(released, ours)
    return f"fusion.{level}.{rest}"


def run(config: dict, state_dict: dict[str, Tensor], video: Tensor) -> dict[str, Tensor]:
    """video: normalised float32 `(B, 3, T, H, W)`. Returns every dense intermediate and output."""
    model_config = config_of(config)
    model = L4PModel(model_config).eval()
    model.load_state_dict(rename(state_dict, model_config.num_hidden_layers), strict=True)

    steps: dict[str, Tensor] = {}

    def keep(module: torch.nn.Module, name: str):
        module.register_forward_hook(lambda _module, _inputs, output: steps.__setitem__(name, output))

    encoder = model.encoder
    keep(encoder.patch_embeddings, "encoder.patch_embed")
    encoder.layers[0].register_forward_pre_hook(lambda _module, inputs: steps.update({"encoder.hidden.0": inputs[0]}))
    for index, layer in enumerate(encoder.layers, start=1):
        keep(layer, f"encoder.hidden.{index}")
    for task, signal in SIGNAL_OF_TASK.items():
        head = model.heads[signal]
        for level in range(4):
            keep(head.reassemble[level], f"heads.{task}.reassemble.{level}")
            keep(head.laterals[level], f"heads.{task}.layer_rn.{level}")
            keep(head.fusion[level], f"heads.{task}.fusion.{level + 1}")
        keep(head.project, f"heads.{task}.head1")
        keep(head.output, f"heads.{task}.out_raw")

    output = model(video.transpose(1, 2))
    steps["encoder.pos_embed"] = encoder.position_embeddings
    for task, signal in SIGNAL_OF_TASK.items():
        steps[f"heads.{task}.out"] = output[signal]
    return steps
