import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen2Config, Qwen2Model, SiglipVisionConfig

from modeling_rgpt4d import L4PConfig, L4PModel, PerceptionDecoderConfig, RGPT4DConfig, RGPT4DForConditionalGeneration
from trainer import P4DConfig, freeze_untrained_parts
from trainer.run_estimate import (
    GIB,
    LAYER_BYTES,
    RunPlan,
    count_parameters,
    decoder_flops,
    encoder_flops,
    estimate,
    heads_flops,
    matrix_tflops,
    sft_flops,
    teacher_flops,
)
from trainer.trained_parts import LLM_LINEAR_LAYERS

FRAMES, TEXT = 2, 12


@pytest.fixture
def config():
    """Wide against its sequences, so that attention, whose backward pass depends on the kernel, is a small part."""
    return RGPT4DConfig(
        vision_config=SiglipVisionConfig(
            image_size=28,
            patch_size=7,
            hidden_size=96,
            intermediate_size=160,
            num_hidden_layers=3,
            num_attention_heads=2,
            vision_use_head=False,
        ),
        text_config=Qwen2Config(
            vocab_size=300,
            hidden_size=192,
            intermediate_size=320,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
        image_token_id=290,
        video_token_id=291,
        frame_end_token_id=292,
        projector_type="mlp_downsample",
        time_cue="none",
    )


def counted_step(config, trainable, lora_r=None, checkpointing=False) -> tuple[float, float, int]:
    """FLOPs of a real forward and backward pass on the CPU, and the tokens of its two sequences."""
    model = RGPT4DForConditionalGeneration._from_config(config, attn_implementation="eager")
    freeze_untrained_parts(model, trainable)
    if lora_r is not None:
        whole = ["multi_modal_projector"] if "projector" in trainable else None
        model = get_peft_model(model, LoraConfig(r=lora_r, target_modules=LLM_LINEAR_LAYERS, modules_to_save=whole))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    video = ([config.video_token_id] * config.frame_grid**2 + [config.frame_end_token_id]) * FRAMES
    ids = torch.tensor([video + [5] * TEXT] * 2)
    pixels = torch.randn(2, FRAMES, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as forward:
        loss = model(input_ids=ids, labels=ids, pixel_values_videos=pixels).loss
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops(), ids.shape[1]


@pytest.mark.parametrize(
    "trainable", [["projector", "llm"], ["llm"], ["vision", "projector", "llm"], ["projector"], ["vision"]], ids=str
)
def test_sft_flops_are_those_that_torch_counts(config, trainable):
    forward, backward, tokens = counted_step(config, trainable)
    flops = sft_flops(config, 2, tokens, FRAMES, answer_tokens=tokens, trainable=trainable, checkpointing=False)
    assert flops.forward == pytest.approx(forward, rel=1e-3)
    assert flops.backward == pytest.approx(backward, rel=0.02)


def test_lora_flops_are_those_that_torch_counts(config):
    forward, backward, tokens = counted_step(config, ["projector", "llm"], lora_r=8)
    flops = sft_flops(config, 2, tokens, FRAMES, tokens, ["projector", "llm"], lora_r=8, checkpointing=False)
    assert flops.forward == pytest.approx(forward, rel=1e-3)
    assert flops.backward == pytest.approx(backward, rel=0.02)


@pytest.mark.parametrize(
    "trainable, lora_r",
    [(["projector", "llm"], None), (["vision", "projector", "llm"], None), (["projector", "llm"], 8)],
    ids=str,
)
def test_recomputed_flops_are_those_that_torch_counts(config, trainable, lora_r):
    _, without, tokens = counted_step(config, trainable, lora_r)
    _, with_checkpointing, _ = counted_step(config, trainable, lora_r, checkpointing=True)
    flops = sft_flops(config, 2, tokens, FRAMES, tokens, trainable, lora_r)
    head = (
        2 * 2 * tokens * config.text_config.hidden_size * config.text_config.vocab_size
    )  # only TRL's computes it again
    assert flops.recomputed - head == pytest.approx(with_checkpointing - without, rel=0.02)


def test_flops_of_teacher_and_heads_are_those_that_torch_counts(l4p):
    config, pixels = l4p.config, torch.randn(3, *_window(l4p.config))
    l4p.requires_grad_(False).set_attn_implementation("eager")
    with FlopCounterMode(display=False) as encoder:
        latents = l4p.encode(pixels)
    assert encoder_flops(config, 3) == pytest.approx(encoder.get_total_flops(), rel=0.02)
    with FlopCounterMode(display=False) as forward:
        signals = l4p.decode(latents.requires_grad_(), ["depth", "camray"])
    with FlopCounterMode(display=False) as backward:
        sum(signal.sum() for signal in signals.values()).backward()
    heads = heads_flops(config, 3, ["depth", "camray"], backward=True)
    assert (heads.forward, heads.backward) == (forward.get_total_flops(), backward.get_total_flops())
    together = teacher_flops(config, 3, ["depth", "camray"])
    assert together.forward == encoder_flops(config, 3) + heads.forward and together.backward == 0


def _window(config) -> tuple[int, ...]:
    return (config.num_frames, config.num_channels, config.image_size, config.image_size)


def test_released_teacher_costs_what_was_counted_of_the_original():
    config = L4PConfig()
    assert encoder_flops(config, 1) == pytest.approx(4.6e12, rel=0.01)
    # The original was counted with 2.84 TFLOP for a full-resolution head
    assert heads_flops(config, 1, ["flow"]).forward == pytest.approx(2.84e12, rel=0.025)
    assert heads_flops(config, 1, ["camray"]).forward == pytest.approx(0.27e12, rel=0.01)


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    def make(**options):
        folder = tmp_path_factory.mktemp("run")
        return P4DConfig(str(folder), use_cpu=True, bf16=True, report_to="none", **options)

    return make


def released(args, **options) -> RunPlan:
    return RunPlan(RGPT4DConfig(), args, frames=16, text_tokens=96, teacher=L4PConfig(), **options)


def test_distillation_at_the_8b_size_costs_a_quarter_online_and_an_eighth_cached(settings):
    def ratio(kind):
        flops = estimate(released(settings(per_device_train_batch_size=4), teacher_kind=kind)).flops
        every = sum(part.total + part.recomputed for part in flops.values())
        return every / (flops["SFT"].total + flops["SFT"].recomputed)

    assert ratio("online") == pytest.approx(1.25, abs=0.02)
    assert ratio("cached") == pytest.approx(1.14, abs=0.02)


def test_decoder_flops_are_those_of_its_three_layers():
    config = PerceptionDecoderConfig(in_features=32, latent_shape=(4, 2, 3, 3, 24), hidden_size=40)
    weights = 32 * 40 + 40 * 40 + 40 * 96
    assert decoder_flops(config, 5).forward == 2 * 5 * 18 * weights


@pytest.mark.parametrize("lora", [False, True])
def test_parameters_are_those_of_a_real_model(config, settings, lora):
    counts = count_parameters(config, settings(llm_lora=lora, lora_r=8))
    model = RGPT4DForConditionalGeneration(config)
    freeze_untrained_parts(model, ["projector", "llm"])
    if lora:
        lora_config = LoraConfig(r=8, target_modules=LLM_LINEAR_LAYERS, modules_to_save=["multi_modal_projector"])
        model = get_peft_model(model, lora_config)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(part for _, part in counts.values()) == trained
    assert counts["vision"][1] == 0 and ("LoRA" in counts) == lora


def test_released_sizes_have_their_published_parameters(settings):
    counts = count_parameters(RGPT4DConfig(), settings())
    assert sum(number for number, _ in counts.values()) == 8_087_084_656
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in L4PModel(L4PConfig()).parameters()) == 1_236_300_426


def test_bytes_of_a_layer_are_what_autograd_keeps():
    width, keys, mlp = 128, 64, 448

    def kept(layers):
        sizes = {"hidden_size": width, "intermediate_size": mlp, "num_attention_heads": 4, "num_key_value_heads": 2}
        model = Qwen2Model(Qwen2Config(vocab_size=10, num_hidden_layers=layers, **sizes)).to(torch.bfloat16)
        weights, found = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def note(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                found[storage.data_ptr()] = storage.nbytes(), tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model(inputs_embeds=torch.randn(2, 64, width, dtype=torch.bfloat16, requires_grad=True))
        return sum(size for size, _ in found.values())

    of_stream, of_keys, of_mlp = LAYER_BYTES["bfloat16"]
    a_token = (kept(3) - kept(2)) / 128
    assert of_stream * width + of_keys * keys + of_mlp * mlp == pytest.approx(a_token, rel=0.1)


def test_states_are_shared_out_when_sharded_and_halved_by_bfloat16(settings):
    args = settings(per_device_train_batch_size=1)
    names = ("weights", "gradients", "optimizer states")
    whole = estimate(released(args, weight_bytes=4)).memory
    assert whole["optimizer states"] == 2 * whole["gradients"] == pytest.approx(8 * 7.674e9, rel=0.01)
    sharded = estimate(released(args, weight_bytes=4, gpus=8, sharding="fsdp2")).memory
    half = estimate(released(args, weight_bytes=2)).memory
    for name in names:
        assert sharded[name] == pytest.approx(whole[name] / 8) and half[name] == pytest.approx(whole[name] / 2)
    # More processes with whole copies help nothing
    copies = estimate(released(args, weight_bytes=4, gpus=8)).memory
    assert [copies[name] for name in names] == [whole[name] for name in names]


def test_run_that_cannot_fit_is_told_with_remedies(settings):
    args = settings(per_device_train_batch_size=8, gradient_checkpointing=False)
    problem = estimate(released(args, gpus=2, weight_bytes=4, teacher_kind="online")).problem(80)
    for remedy in ("gradient_checkpointing", "fsdp2.yaml", "llm_lora", "accumulation_steps 8", "teacher_cache"):
        assert remedy in problem
    assert "80.0 GiB" in problem
    lora = estimate(released(settings(per_device_train_batch_size=1, llm_lora=True), teacher_kind="online"))
    assert lora.problem(80) is None and "load_in_4bit" in lora.problem(10)


def test_four_bits_leave_a_quarter_of_the_language_models_layers(settings):
    args = settings(per_device_train_batch_size=1, llm_lora=True)
    whole, small = (estimate(released(args, four_bit=four_bit)).memory["weights"] for four_bit in (False, True))
    assert (whole - small) / GIB == pytest.approx(6.525e9 * (2 - 0.516) / GIB, rel=0.01)


def test_time_and_steps_follow_from_data_batch_and_rate(settings):
    args = settings(per_device_train_batch_size=4, gradient_accumulation_steps=2, num_train_epochs=3)
    found = estimate(released(args, gpus=4, samples=1000, matrix_tflops=700.0))
    assert found.batch == 32 and found.steps == 3 * 32
    flops = sum(part.total for part in found.flops.values())
    assert found.seconds_a_step == pytest.approx(flops / 350e12)
    assert "whole run" in found.table()
    unknown = estimate(released(args))
    assert unknown.steps is None and unknown.seconds_a_step is None and "unknown" in unknown.table()


def test_rate_is_taken_by_the_name_of_the_gpu():
    assert matrix_tflops("NVIDIA H100 80GB HBM3") == pytest.approx(727)
    assert matrix_tflops("NVIDIA H100 PCIe") < 727
    assert matrix_tflops("NVIDIA A100-SXM4-80GB") == pytest.approx(312 * 727 / 989)
    assert matrix_tflops("NVIDIA L40S") > matrix_tflops("NVIDIA L4")
    assert matrix_tflops("NVIDIA A10G") is None and matrix_tflops("") is None


def test_teacher_without_configuration_is_refused(config, settings):
    with pytest.raises(ValueError, match="no configuration of a teacher"):
        estimate(RunPlan(config, settings(), frames=4, teacher_kind="online"))
