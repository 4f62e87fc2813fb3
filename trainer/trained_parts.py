"""Which parts of a 4D-RGPT are trained, and how: the eight rows of Table 7 of arXiv 2512.17012."""

from typing import TYPE_CHECKING

from peft import LoraConfig
from transformers import PreTrainedModel

if TYPE_CHECKING:
    from .p4d_config import P4DConfig

# Every linear layer of the language model, and none of the vision tower, whose layers have the same names.
LLM_LINEAR_LAYERS = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def freeze_untrained_parts(model: PreTrainedModel, trainable: list[str]) -> None:
    """Let only the named parts of an `RGPT4DForConditionalGeneration` take gradients.

    Args: `trainable`, any of `"vision"`, `"projector"`, `"llm"`; the output head goes with the LLM, and what a baseline of
    Table 4 adds before the projector goes with the projector.
    """
    parts = {
        "vision": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector, getattr(model.model, "geometry_encoding", None)],
        "llm": [model.model.language_model, model.lm_head],
    }
    for name, modules in parts.items():
        for module in modules:
            if module is not None:
                module.requires_grad_(name in trainable)
    # What stands behind the hidden state that is projected gets no gradient. FSDP2 cannot resume an optimizer whose
    # parameters have none.
    tower, layer = model.model.vision_tower, model.config.hidden_state_index(model.config.vision_feature_layer)
    behind = [*tower.encoder.layers[layer:]] if hasattr(tower, "encoder") else []
    for module in [*behind, getattr(tower, "post_layernorm", None), getattr(tower, "head", None)]:
        if module is not None:
            module.requires_grad_(False)


def llm_lora_config(args: "P4DConfig", geometry_fusion: str = "none") -> LoraConfig:
    """LoRA for the language model; the other parts of `args.trainable` are trained whole and saved with the adapter.

    "Tune-LLM-LoRA" and "Tune-P+LLM-LoRA" of Table 7. The paper gives neither rank nor layers.
    """
    whole = {"vision": ["vision_tower"], "projector": ["multi_modal_projector"]}
    if geometry_fusion == "positional":
        whole["projector"].append("geometry_encoding")
    return LoraConfig(
        r=args.lora_r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        target_modules=LLM_LINEAR_LAYERS,
        modules_to_save=[name for part, names in whole.items() if part in args.trainable for name in names] or None,
        task_type="CAUSAL_LM",
    )


def train_whole_parts_in_float32(model: PreTrainedModel) -> None:
    """The parts that LoRA leaves whole (`modules_to_save`) in float32, whatever the model's dtype is.

    In bfloat16, steps of 1e-5 vanish in weights of 0.02. LoRA's own weights start at zero and are as PEFT and TRL made them: TRL 1.16
    casts all that is trained in a quantised model to bfloat16.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".modules_to_save." in name:
            parameter.data = parameter.data.float()
