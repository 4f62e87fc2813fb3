"""What a training run will cost, before any weight is loaded: parameters, arithmetic, memory of a GPU, time.

Models are built on the meta device: only their shapes exist. A multiplication with an addition counts as two operations, as
in torch.utils.flop_counter; norms, activations and resizing do not count.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig
from transformers.modeling_utils import set_zero3_state

from modeling_rgpt4d import L4PConfig, L4PModel, RGPT4DConfig, RGPT4DForConditionalGeneration
from modeling_rgpt4d.modeling_l4p import SIGNALS, L4PHead
from modeling_rgpt4d.perception_decoder import PerceptionDecoder, PerceptionDecoderConfig

from .p4d_config import P4DConfig
from .trained_parts import LLM_LINEAR_LAYERS, freeze_untrained_parts

Sharding = Literal["none", "fsdp2", "zero3"]
TeacherKind = Literal["none", "online", "cached", "truth"]

GIB = 2**30
# Dense bfloat16 TFLOP/s of the vendors' data sheets. The first name that the device's name holds is taken.
DATA_SHEET_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200": 989,
    "H100 PCIe": 756,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "L4": 121,
    "A10": 125,
}
# Large matrix products of torch reach 727 of the data sheet's 989 TFLOP/s on an H100 (benchmarks/inference.py).
MATRIX_SHARE = 727 / 989
# Of the rate of matrix products, counted without recomputation: Qwen2-7B with checkpointing, 4 x 2,048 tokens, one H200.
UTILISATION = 0.5
# A fused backward pass of attention makes five products where the forward pass makes two: it computes the scores again.
ATTENTION_BACKWARD = 2.5
# Bytes that a decoder layer keeps for its backward pass for each token, as multiples of the width, of the width of keys and of
# the width of the MLP: what autograd saved in a Qwen2 layer in bfloat16, and with autocast over float32 weights.
LAYER_BYTES = {"bfloat16": (20, 4, 8), "autocast": (36, 4, 8)}
GRADIENTS_OF_A_LAYER = 1.5  # its backward pass holds gradients beside what was kept
LOGIT_TILE = 32_768  # elements of the vocabulary at once: TRL's fused head
OUTSIDE_GIB = 2.0  # context, communication and libraries' workspaces, and what the allocator cannot use


@dataclass(frozen=True)
class Flops:
    """Operations of forward and backward pass; `recomputed` are those that gradient checkpointing makes twice."""

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def total(self) -> float:
        """Without what is recomputed: what "utilisation" counts."""
        return self.forward + self.backward

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)


def vision_flops(config: RGPT4DConfig) -> float:
    """Forward pass of the tower on one frame, up to the layer that is projected.

    P patches of width C, MLP I, patches of p pixels: `2 P C 3 p^2`, and a layer `2 P (4 C^2 + 2 C I) + 4 P^2 C`.
    """
    vision = config.vision_config
    patches, width = config.patch_grid**2, vision.hidden_size
    layer = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size) + 4 * patches**2 * width
    embedding, _ = _ends_of_tower(config)
    return embedding + config.hidden_state_index(config.vision_feature_layer) * layer


def _ends_of_tower(config: RGPT4DConfig) -> tuple[float, float]:
    """Forward pass of the tower's patch embedding, and of the last products of its layers, on one frame."""
    vision, patches = config.vision_config, config.patch_grid**2
    layers = config.hidden_state_index(config.vision_feature_layer)
    embedding = 2 * patches * vision.hidden_size * 3 * vision.patch_size**2
    return embedding, 2 * patches * layers * vision.hidden_size * vision.intermediate_size


def projector_flops(config: RGPT4DConfig) -> float:
    """Forward pass of the projector on one frame: `2 g^2` times the weights of its linear layers."""
    return 2 * config.frame_grid**2 * _linear_weights(_meta_student(config).model.multi_modal_projector)


def llm_flops(config: RGPT4DConfig, tokens: int) -> tuple[float, float]:
    """Forward pass of the language model, without its head, on one sequence of S tokens: linear layers and attention.

    `2 S` times the weights of its linear layers; a layer's attention with h heads of d channels `4 S^2 h d`, over all pairs, as
    torch counts it: a kernel that leaves out what the causal mask hides makes half.
    """
    text = config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    linear = 2 * tokens * _linear_weights(_meta_student(config).model.language_model)
    return linear, text.num_hidden_layers * 4 * tokens**2 * text.num_attention_heads * head_dim


def sft_flops(
    config: RGPT4DConfig,
    batch: int,
    tokens: int,
    frames: int,
    answer_tokens: int,
    trainable: Sequence[str] = ("projector", "llm"),
    lora_r: int | None = None,
    checkpointing: bool = True,
) -> Flops:
    """A step of supervised fine-tuning on `batch` sequences of `tokens` tokens, each with one video.

    A linear layer's backward pass is one product for the gradient of its input and, if it is trained, one more for that of its
    weights; pixels have none. Whatever is frozen below the first trained part has no backward pass. Checkpointing stops where
    the last kept tensor is there again, so that a layer's last product is made once. Of the output head `2 D V` are made for each answer token,
    and again in the backward pass. Rank r adds `2 r (in + out)` to each linear layer of the language model and token.

    Args:
        answer_tokens: tokens of a sequence that have labels. (On a CPU TRL's head works on all of them.)
        lora_r: rank, if the language model is trained by LoRA.
        checkpointing: layers of the language model, and of a tower that is trained, run twice.
    """
    tower, projector = batch * frames * vision_flops(config), batch * frames * projector_flops(config)
    linear, attention = (batch * value for value in llm_flops(config, tokens))
    text = config.text_config
    head = 2 * batch * answer_tokens * text.hidden_size * text.vocab_size
    trains_vision, trains_projector, trains_llm = (part in trainable for part in ("vision", "projector", "llm"))
    lora = 0
    if lora_r is not None:
        lora, trains_llm = 2 * batch * tokens * _lora_parameters(config, lora_r), False
    trains_any = bool(trains_llm or lora or trains_projector or trains_vision)
    embedding, last_of_tower = (batch * frames * value for value in _ends_of_tower(config))
    last_of_llm = 0 if lora else 2 * batch * tokens * text.num_hidden_layers * text.hidden_size * text.intermediate_size
    flops = Flops(
        forward=tower + projector + linear + attention + lora + head,
        backward=(2 * tower - embedding) * trains_vision
        + projector * ((trains_vision or trains_projector) + trains_projector)
        + (linear * (1 + trains_llm) + ATTENTION_BACKWARD * attention + 2 * lora) * trains_any
        + head * (1 + trains_llm) * trains_any,
        recomputed=head,
    )
    if checkpointing:
        of_llm = linear + attention + lora - last_of_llm
        flops += Flops(recomputed=of_llm * trains_any + (tower - embedding - last_of_tower) * trains_vision)
    return flops


def decoder_flops(config: PerceptionDecoderConfig, windows: int) -> Flops:
    """The perception decoder on `windows` windows: `2 N' h' w'` times its weights, and twice that in the backward pass."""
    with torch.device("meta"):
        weights = _linear_weights(PerceptionDecoder(config))
    _, frames, height, width, _ = config.latent_shape
    forward = 2 * windows * frames * height * width * weights
    return Flops(forward=forward, backward=2 * forward)


def encoder_flops(config: L4PConfig, windows: int) -> float:
    """The teacher's encoder, forward: T tokens of width C, MLP I: `2 T C 3 t p^2`, a layer `2 T (4 C^2 + 2 C I) + 4 T^2 C`."""
    _, frames, height, width, channels = config.latent_shape
    tokens = frames * height * width
    layer = 2 * tokens * (4 * channels**2 + 2 * channels * config.intermediate_size) + 4 * tokens**2 * channels
    embedding = 2 * tokens * channels * config.num_channels * config.tubelet_size * config.patch_size**2
    return windows * (embedding + config.num_hidden_layers * layer)


def heads_flops(config: L4PConfig, windows: int, signals: Sequence[str] = SIGNALS, backward: bool = False) -> Flops:
    """The frozen heads of `signals`: each convolution `2 k^3 in out` a position, counted as torch counts it on the meta device.

    Args:
        backward: also the gradient of the latents, as for the student's; frozen weights have none.
    """
    forward_of_all = backward_of_all = 0
    for signal in signals:
        forward, back, _ = _run_head(config, signal)
        forward_of_all += windows * forward
        backward_of_all += windows * back * backward
    return Flops(forward=forward_of_all, backward=backward_of_all)


def teacher_flops(config: L4PConfig, windows: int, signals: Sequence[str] = SIGNALS) -> Flops:
    """The online teacher: its encoder and heads, forward."""
    return Flops(forward=encoder_flops(config, windows)) + heads_flops(config, windows, signals)


@dataclass(frozen=True)
class RunPlan:
    """What the estimate needs to know of a run.

    Args:
        args: batch of a GPU, accumulation, trained parts, LoRA, decoder, signals, optimizer, checkpointing.
        gpus: GPUs of all machines.
        samples: rows of the training set; unknown without it, and then no time of the whole run is told.
        text_tokens, answer_tokens: tokens of a sample beside its video, and those of them that are learnt.
        weight_bytes: of a weight of the student as loaded, 4 (float32) or 2.
        four_bit: the language model's linear layers hold four bits a weight (QLoRA).
        teacher_bytes: of a weight of the teacher.
        matrix_tflops: rate of matrix products; no time is told without it.
    """

    student: RGPT4DConfig
    args: P4DConfig
    frames: int
    gpus: int = 1
    sharding: Sharding = "none"
    teacher: L4PConfig | None = None
    teacher_kind: TeacherKind = "none"
    samples: int | None = None
    text_tokens: int = 128
    answer_tokens: int = 32
    weight_bytes: int = 2
    four_bit: bool = False
    teacher_bytes: int = 2
    matrix_tflops: float | None = None
    utilisation: float = UTILISATION


@dataclass
class RunEstimate:
    """The estimate: parameters as (all, trained) by part, FLOPs and bytes of one GPU by part, and seconds."""

    plan: RunPlan
    parameters: dict[str, tuple[int, int]]
    tokens: int  # of a sample
    windows: int  # of a sample
    batch: int  # samples a step, on all GPUs
    flops: dict[str, Flops]  # a step, on one GPU
    memory: dict[str, float]
    steps: int | None
    seconds_a_step: float | None
    remedies: list[str] = field(default_factory=list)

    @property
    def gib(self) -> float:
        """Memory of one GPU."""
        return sum(self.memory.values()) / GIB

    def problem(self, gpu_gib: float) -> str | None:
        """Why the run cannot fit a GPU of so much memory, and what to do; `None` if it can."""
        if self.gib <= gpu_gib:
            return None
        return (
            f"The run needs about {self.gib:.1f} GiB a GPU, but there are {gpu_gib:.1f} GiB. To make it fit:\n"
            + "\n".join(f"  - {remedy}" for remedy in self.remedies)
        )

    def table(self) -> str:
        """All of it, to read."""
        plan, lines = self.plan, []
        lines.append("parameters (millions)            all     trained")
        total = [sum(column) for column in zip(*self.parameters.values(), strict=True)]
        for name, counts in {**self.parameters, "together": total}.items():
            lines.append(f"  {name:24s} {counts[0] / 1e6:10,.1f}  {counts[1] / 1e6:10,.1f}")
        lines.append("")
        lines.append(f"a sample    {plan.frames} frames, {self.tokens:,} tokens, {self.windows} windows of the teacher")
        lines.append(
            f"a step      {self.batch:,} samples = {plan.args.per_device_train_batch_size} x "
            f"{plan.args.gradient_accumulation_steps} accumulated x {plan.gpus} processes, {self.batch * self.tokens:,} tokens"
        )
        lines.append("")
        lines.append("a step on one GPU (TFLOP)    forward    backward  recomputed")
        sft = self.flops["SFT"].total + self.flops["SFT"].recomputed
        for name, flops in {**self.flops, "together": sum(self.flops.values(), Flops())}.items():
            values = "  ".join(f"{v / 1e12:10,.2f}" for v in (flops.forward, flops.backward, flops.recomputed))
            lines.append(f"  {name:22s} {values}")
        everything = sum(f.total + f.recomputed for f in self.flops.values())
        lines.append(f"  all of it is {everything / sft:.2f} times SFT")
        lines.append("")
        lines.append(f"memory of one GPU (GiB), {SHARDING_NAMES[plan.sharding]}")
        for name, size in self.memory.items():
            lines.append(f"  {name:50s} {size / GIB:8.2f}")
        lines.append(f"  {'together':50s} {self.gib:8.2f}")
        lines.append("")
        if self.seconds_a_step is None:
            lines.append("time        unknown: give --matrix_tflops, the rate of matrix products of your GPU")
        else:
            lines.append(
                f"time        {self.seconds_a_step:,.1f} s a step at {plan.utilisation:.2f} of {plan.matrix_tflops:,.0f} TFLOP/s"
            )
        if self.steps is None:
            lines.append("steps       unknown without --data or --max_steps")
        else:
            lines.append(f"steps       {self.steps:,}")
            if self.seconds_a_step is not None:
                lines.append(f"whole run   {self.steps * self.seconds_a_step / 3600:,.1f} h")
        return "\n".join(lines)


SHARDING_NAMES = {
    "none": "whole copies of the model (DDP)",
    "fsdp2": "sharded (FSDP2)",
    "zero3": "sharded (ZeRO-3)",
}


def estimate(plan: RunPlan) -> RunEstimate:
    """Everything that can be told of a run before it starts.

    Memory is told of a GPU with the usual video in each sample. Counted are weights, the two layers and the embeddings that
    sharding gathers, gradients, optimizer states (in the weights' dtype), inputs of checkpointed layers, one layer's
    activations and gradients, tiles of logits, the teacher, and the activations of one of its heads on one window.
    """
    args, student, teacher = plan.args, plan.student, plan.teacher
    if plan.teacher_kind != "none" and teacher is None:
        raise ValueError(f"teacher_kind is {plan.teacher_kind!r}, but no configuration of a teacher is given")
    tokens = plan.frames * (student.frame_grid**2 + 1) + plan.text_tokens
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps
    distils = plan.teacher_kind != "none"
    windows = -(-plan.frames // teacher.num_frames) if distils and plan.frames >= teacher.num_frames else 0
    decoder = None
    if distils and (args.distill_latent or args.signals):
        decoder = PerceptionDecoderConfig(
            student.text_config.hidden_size, teacher.latent_shape, args.decoder_kind, args.decoder_hidden_size
        )
    checkpointing = bool(args.gradient_checkpointing)
    flops = {
        "SFT": sft_flops(
            student,
            batch,
            tokens,
            plan.frames,
            plan.answer_tokens,
            args.trainable,
            args.lora_r if args.llm_lora else None,
            checkpointing,
        )
    }
    if plan.teacher_kind == "online":
        flops["teacher"] = teacher_flops(teacher, batch * windows, args.signals)
    if decoder is not None:
        flops["perception decoder"] = decoder_flops(decoder, batch * windows)
        flops["heads on the student"] = heads_flops(teacher, batch * windows, args.signals, backward=True)

    parameters = count_parameters(student, args, decoder)
    memory = _memory(plan, parameters, tokens, windows)
    seconds = None
    if plan.matrix_tflops:
        seconds = sum(f.total for f in flops.values()) / (plan.utilisation * plan.matrix_tflops * 1e12)
    whole_batch = batch * plan.gpus
    steps = None
    if args.max_steps > 0:
        steps = args.max_steps
    elif plan.samples is not None:
        steps = int(args.num_train_epochs * -(-plan.samples // whole_batch))
    found = RunEstimate(plan, parameters, tokens, windows, whole_batch, flops, memory, steps, seconds)
    found.remedies = _remedies(plan)
    return found


def count_parameters(
    config: RGPT4DConfig, args: P4DConfig, decoder: PerceptionDecoderConfig | None = None
) -> dict[str, tuple[int, int]]:
    """(all, trained) of each part: vision, projector, llm (with its output head), LoRA, perception decoder."""
    model = _meta_student(config)
    freeze_untrained_parts(model, args.trainable)
    core = model.model
    parts = {"vision": [core.vision_tower], "projector": [core.multi_modal_projector]}
    parts["llm"] = [core.language_model, model.lm_head]
    counts = {}
    for name, modules in parts.items():
        unique = {id(parameter): parameter for module in modules for parameter in module.parameters()}.values()
        counts[name] = (sum(p.numel() for p in unique), sum(p.numel() for p in unique if p.requires_grad))
    if args.llm_lora:
        counts["llm"] = (counts["llm"][0], 0)
        counts["LoRA"] = (_lora_parameters(config, args.lora_r),) * 2
    if decoder is not None:
        with torch.device("meta"):
            counts["perception decoder"] = (sum(p.numel() for p in PerceptionDecoder(decoder).parameters()),) * 2
    return counts


def _memory(plan: RunPlan, parameters: dict[str, tuple[int, int]], tokens: int, windows: int) -> dict[str, float]:
    args, student, text = plan.args, plan.student, plan.student.text_config
    shards = plan.gpus if plan.sharding != "none" else 1
    every, trained = (sum(column) for column in zip(*parameters.values(), strict=True))
    # Adapters and the decoder are float32 whatever the model's dtype is
    extra = sum(parameters.get(name, (0, 0))[0] for name in ("LoRA", "perception decoder"))
    of_model = every - extra
    quantised = 0
    if plan.four_bit:
        quantised = _linear_weights(_meta_student(student).model.language_model)
    memory = {
        # 4 bits and a scale in 8 bits for every 64 weights, those quantised again
        "weights": ((of_model - quantised) * plan.weight_bytes + quantised * 0.516 + extra * 4) / shards
    }
    grad_bytes = (trained - extra) * plan.weight_bytes + extra * 4
    memory["gradients"] = grad_bytes / shards
    memory["optimizer states"] = _optimizer_bytes(args.optim, trained, grad_bytes) / shards
    computes_in = 2 if (args.bf16 or args.fp16) else plan.weight_bytes
    if shards > 1:
        layer = _layer_parameters(student)
        embeddings = text.vocab_size * text.hidden_size * (1 if student.tie_word_embeddings else 2)
        with_gradients = 2 if parameters["llm"][1] else 1
        memory["gathered layers"] = (2 * layer + embeddings) * computes_in * with_gradients
    elif plan.gpus > 1:
        memory["buckets of gradients (DDP)"] = grad_bytes
    if shards == 1 and computes_in < plan.weight_bytes:
        memory["casts of trained weights (autocast)"] = trained * computes_in

    stream = LAYER_BYTES["autocast" if shards == 1 and plan.weight_bytes > computes_in else "bfloat16"]
    of_stream, of_keys, of_mlp = (factor * computes_in / 2 for factor in stream)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    keys = text.num_key_value_heads * head_dim
    layer_bytes = of_stream * text.hidden_size + of_keys * keys + of_mlp * text.intermediate_size
    if args.llm_lora:  # the inputs of its seven layers in float32, and once more after dropout
        layer_bytes += (6 * text.hidden_size + text.intermediate_size) * (8 if args.lora_dropout else 4)
    sequence = args.per_device_train_batch_size * tokens
    layers = text.num_hidden_layers
    if args.gradient_checkpointing:
        kept = 2 * computes_in * text.hidden_size if plan.weight_bytes > computes_in and shards == 1 else None
        kept = kept or computes_in * text.hidden_size
        memory["inputs of checkpointed layers"] = layers * sequence * kept
        memory["activations of one layer"] = GRADIENTS_OF_A_LAYER * sequence * layer_bytes
    else:
        memory["activations of all layers"] = sequence * (layers - 1 + GRADIENTS_OF_A_LAYER) * layer_bytes
    memory["vision tower's activations"] = _vision_bytes(plan, computes_in)
    answers = args.per_device_train_batch_size * plan.answer_tokens
    tile = 3 * 4 * answers * min(LOGIT_TILE, text.vocab_size)
    head_gradient = 0
    if parameters["llm"][1]:  # the fused head adds up the gradient of its whole weight in float32
        head_gradient = 4 * text.hidden_size * text.vocab_size
    memory["tiles of logits, the output head's gradient"] = tile + head_gradient
    if plan.teacher_kind != "none":
        memory |= _teacher_memory(plan, windows)
    memory["outside of the tensors"] = OUTSIDE_GIB * GIB
    return memory


def _vision_bytes(plan: RunPlan, computes_in: int) -> float:
    """One layer of a frozen tower: stream, keys, queries, values and the MLP of all patches; all layers if it is trained."""
    vision = plan.student.vision_config
    patches = plan.args.per_device_train_batch_size * plan.frames * plan.student.patch_grid**2
    layer = patches * (6 * vision.hidden_size + 2 * vision.intermediate_size) * computes_in
    if "vision" not in plan.args.trainable:
        return layer
    if plan.args.gradient_checkpointing:
        kept = vision.num_hidden_layers * patches * vision.hidden_size * computes_in
        return kept + GRADIENTS_OF_A_LAYER * 2 * layer
    return 2 * layer * vision.num_hidden_layers


def _teacher_memory(plan: RunPlan, windows: int) -> dict[str, float]:
    args, config = plan.args, plan.teacher
    signals = list(args.signals)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in L4PModel(config).parameters())
    memory = {"teacher": weights * plan.teacher_bytes}  # all of it, also where it only lends its heads
    latents = 1
    for size in config.latent_shape:
        latents *= size
    positions = config.num_frames * config.image_size**2
    of_targets = args.per_device_train_batch_size * windows * (4 * 4 * positions + latents * plan.teacher_bytes)
    # The student's latents and their gradients are float32
    of_student = args.per_device_train_batch_size * windows * 2 * 4 * latents
    memory["targets, the student's latents"] = of_targets + of_student
    if signals and windows:
        saved = max(_run_head(config, signal)[2] for signal in signals) * plan.teacher_bytes / 2
        largest = config.last_dim * positions * plan.teacher_bytes  # before a head's last convolutions
        memory["one head on one window, forward and backward"] = saved + 2 * largest
    return memory


def _optimizer_bytes(optim, trained: int, grad_bytes: float) -> float:
    """AdamW keeps two numbers a weight, in the weight's dtype, or in 8 bits; SGD none; what is not known counts as AdamW."""
    name = str(getattr(optim, "value", optim))
    if "8bit" in name:
        return 2 * trained
    return 0 if name in ("sgd", "adafactor") else 2 * grad_bytes


def _remedies(plan: RunPlan) -> list[str]:
    args, remedies = plan.args, []
    if not args.gradient_checkpointing:
        remedies.append("--gradient_checkpointing true: keeps the inputs of layers alone")
    if plan.gpus > 1 and plan.sharding == "none":
        remedies.append(
            "shard the model: accelerate launch --config_file examples/configs/accelerate/fsdp2.yaml (or zero3.yaml)"
        )
    if not args.llm_lora and "llm" in args.trainable:
        remedies.append("--llm_lora true (examples/configs/one_gpu_lora.yaml): no gradients and states of the LLM")
    elif args.llm_lora and not plan.four_bit:
        remedies.append("--load_in_4bit true: QLoRA")
    if args.per_device_train_batch_size > 1:
        batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
        remedies.append(
            f"--per_device_train_batch_size 1 --gradient_accumulation_steps {batch * steps}: the same batch, less at once"
        )
    if plan.teacher_kind == "online":
        remedies.append("--teacher_cache (examples/cache_teacher.py): no encoder of the teacher runs")
    if plan.gpus == 1 or plan.sharding != "none":
        remedies.append("more GPUs, sharded (examples/configs/accelerate/fsdp2.yaml)")
    return remedies


def matrix_tflops(device_name: str) -> float | None:
    """The rate of matrix products to expect of a GPU: a share of its data sheet; `None` for one that is not in the table."""
    for name, tflops in DATA_SHEET_TFLOPS.items():
        if re.search(rf"\b{re.escape(name)}\b", device_name.replace("-", " ")):
            return tflops * MATRIX_SHARE
    return None


def _meta_student(config: RGPT4DConfig) -> RGPT4DForConditionalGeneration:
    # Under ZeRO-3 transformers would shard and initialise even this.
    with torch.device("meta"), set_zero3_state():
        return RGPT4DForConditionalGeneration(config)


def _run_head(config: L4PConfig, signal: str) -> tuple[int, int, int]:
    """Operations of a head's forward and backward pass on one window, and the bytes that it keeps in between in bfloat16."""
    with torch.device("meta"):
        head = L4PHead(config, signal).to(torch.bfloat16).requires_grad_(False)
    weights = {parameter.untyped_storage()._cdata for parameter in head.parameters()}
    kept = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = tensor, storage.nbytes()  # holds it, so that no other gets its address
        return tensor

    latents = torch.empty(1, *config.latent_shape, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with (
        FlopCounterMode(display=False) as forward,
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        output = head(latents)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops(), sum(size for _, size in kept.values())


def _linear_weights(module: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in module.modules() if isinstance(layer, nn.Linear))


def _lora_parameters(config: PreTrainedConfig, rank: int) -> int:
    layers = (
        module
        for name, module in _meta_student(config).named_modules()
        if isinstance(module, nn.Linear) and re.fullmatch(LLM_LINEAR_LAYERS, name)
    )
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def _layer_parameters(config: RGPT4DConfig) -> int:
    model = _meta_student(config).model.language_model
    return sum(parameter.numel() for parameter in model.layers[0].parameters())
