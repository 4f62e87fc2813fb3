"""`L4PModel` behind the interface of the reference tensors' checker: released names and a video in, every step out."""

import torch
from torch import Tensor

from modeling_rgpt4d.configuration_l4p import L4PConfig
from modeling_rgpt4d.convert_l4p import SIGNAL_OF_TASK, rename
from modeling_rgpt4d.l4p_windows import perceive_video, window_starts
from modeling_rgpt4d.modeling_l4p import L4PModel, sinusoidal_positions


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


def load_model(case: dict, state_dict: dict[str, Tensor]) -> L4PModel:
    with torch.device("meta"):
        model = L4PModel(config_of(case)).eval()
    tensors, _ = rename(state_dict, model.config.num_hidden_layers)
    model.load_state_dict(tensors, strict=True, assign=True)  # no second copy of the 5 GB of the released size
    encoder = model.encoder
    encoder.position_embeddings = sinusoidal_positions(encoder.patch_embeddings.num_patches, model.config.hidden_size)
    return model


def run(config: dict, state_dict: dict[str, Tensor], video: Tensor) -> dict[str, Tensor]:
    """video: normalised float32 `(B, 3, T, H, W)`. Returns every dense intermediate and output."""
    model = load_model(config, state_dict)

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


def run_windowed(config: dict, state_dict: dict[str, Tensor], video: Tensor) -> dict[str, Tensor]:
    """video: normalised float32 `(1, 3, T, H, W)`. Returns each window's taps and signals, and the merged signals."""
    model = load_model(config, state_dict)
    frames, steps, window = video.transpose(1, 2), {}, model.config.num_frames
    for number, start in enumerate(window_starts(frames.shape[1], window)):
        output = model(frames[:, start : start + window])
        for tap, hook in enumerate(model.config.taps):
            steps[f"window.{number}.encoder.hidden.{hook}"] = output.latents[:, tap].flatten(1, 3)
        for task, signal in SIGNAL_OF_TASK.items():
            steps[f"window.{number}.{task}"] = output[signal]
    merged = perceive_video(model, frames)
    return steps | {f"windowed.{task}": merged[signal] for task, signal in SIGNAL_OF_TASK.items()}
