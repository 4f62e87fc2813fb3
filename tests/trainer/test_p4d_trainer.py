import json

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors import safe_open
from torch.distributed.utils import _apply_to_tensors
from torch.utils.data import SequentialSampler
from transformers import BitsAndBytesConfig

from examples.train import NOT_QUANTIZED
from modeling_rgpt4d import RGPT4DForConditionalGeneration
from modeling_rgpt4d.perception_decoder import PerceptionDecoder
from trainer import GroundTruthTeacher, L4PTeacher, P4DCollator, P4DConfig, P4DTrainer, PerceptionPictures
from trainer.losses import explicit_distillation_loss, latent_distillation_loss

NUM_FRAMES = 4
LLM_LINEARS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@pytest.fixture
def make_trainer(make_model, processor, rows, tmp_path):
    """`make_trainer(teacher=..., **P4DConfig settings)`: the rows in their order, one CPU process, no dropout, no decay."""

    def make(teacher=None, model=None, truth=None, train_rows=None, peft_config=None, **settings):
        train_rows = rows if train_rows is None else train_rows
        defaults = {
            "output_dir": str(tmp_path / "run"),
            "per_device_train_batch_size": 4,
            "max_steps": 2,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "trainable": ["vision", "projector", "llm"],
            "decoder_hidden_size": 16,
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "report_to": "none",
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "no",
            "train_sampling_strategy": "sequential",
        }
        if peft_config is not None:
            del defaults["trainable"]
        args = P4DConfig(**{**defaults, **settings})
        dataset = Dataset.from_dict({"index": range(len(train_rows))})
        return P4DTrainer(
            model or make_model(),
            args,
            teacher=teacher,
            train_dataset=dataset.with_transform(lambda batch: {"row": [train_rows[i] for i in batch["index"]]}),
            processing_class=processor,
            data_collator=RowCollator(P4DCollator(processor, NUM_FRAMES, truth)),
            peft_config=peft_config,
        )

    return make


class RowCollator:
    """The rows hold arrays, which `datasets` would copy into its table; they travel behind an index instead."""

    def __init__(self, collate):
        self.collate = collate

    def __call__(self, examples):
        return self.collate([example.get("row", example) for example in examples])


def weights(trainer):
    return {name: value.clone() for name, value in trainer._core(trainer.model).state_dict().items()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def test_sampling_is_sequential(make_trainer):
    sampler = make_trainer().get_train_dataloader().base_dataloader.sampler
    assert isinstance(sampler, SequentialSampler)


def test_loss_is_equation_a8(make_trainer, teacher, rows, processor):
    trainer = make_trainer(teacher, alpha=0.5, beta=0.1)
    batch = P4DCollator(processor, NUM_FRAMES)(rows[:4])
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        unmarked = batch.pop("unmarked_pixel_values_videos")
        sft = trainer.model(**batch).loss
        hidden = trainer.model.model(**{k: v for k, v in batch.items() if k != "labels"}).last_hidden_state
        mask = batch["input_ids"] == trainer.model.config.video_token_id
        latents = trainer.perception_decoder(hidden[mask].view(2, NUM_FRAMES, 2, 2, -1))
        targets = teacher.perceive(unmarked, [0.5] * 3, [0.5] * 3)
        ld = latent_distillation_loss(latents, targets.latents)
        lambdas = {"depth": 1.0, "flow": 0.1, "motion": 0.05, "camray": 0.05}
        signals = teacher.decode(latents, tuple(lambdas))
        ed, _ = explicit_distillation_loss(signals, targets.signals, lambdas)
    torch.testing.assert_close(loss, sft + 0.5 * ld + 0.1 * ed)
    assert ld > 0 and ed > 0


def test_without_teacher_loss_is_sft_alone(make_trainer, rows, processor):
    trainer = make_trainer()
    batch = P4DCollator(processor, NUM_FRAMES, for_teacher=False)(rows[:4])
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(trainer.model, dict(batch)), trainer.model(**batch).loss)


def test_zero_weights_train_the_same_student_as_sft(make_trainer, teacher, tmp_path):
    plain, distilled = make_trainer(), make_trainer(teacher, alpha=0.0, beta=0.0, max_grad_norm=0.0)
    plain.args.max_grad_norm = 0.0
    plain.train()
    distilled.train()
    expected = weights(plain)
    found = weights(distilled)
    assert {name for name in found if not name.startswith("perception_decoder.")} == set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6)


def test_every_term_is_logged_in_its_natural_scale(make_trainer, teacher):
    one, two = (
        make_trainer(teacher),
        make_trainer(teacher, gradient_accumulation_steps=2, per_device_train_batch_size=2),
    )
    one.train()
    two.train()
    for name in ("loss_sft", "loss_ld", "loss_ed", "loss_depth", "loss_flow", "loss_motion", "loss_camray"):
        assert len(logged(one, name)) == 2, name
        assert logged(one, name)[0] > 0, name
    # one video in each micro-batch of two: the mean of the micro-batches is the mean of the videos
    assert logged(two, "loss_ld")[0] == pytest.approx(logged(one, "loss_ld")[0], rel=1e-5)


@pytest.mark.parametrize("order", [range(8), (0, 2, 4, 1, 6, 3, 5, 7)])
def test_accumulation_of_2x4_equals_1x8(make_trainer, teacher, rows, order):
    rows = [rows[i] for i in order]  # the second order has 3 videos in one micro-batch and 1 in the other
    whole = make_trainer(teacher, train_rows=rows, per_device_train_batch_size=8, max_steps=1)
    parts = make_trainer(teacher, train_rows=rows, gradient_accumulation_steps=2, max_steps=1)
    parts.perception_decoder.load_state_dict(whole.perception_decoder.state_dict())
    whole.train()
    parts.train()
    assert logged(parts, "loss")[0] == pytest.approx(logged(whole, "loss")[0], rel=1e-5)
    assert logged(parts, "grad_norm")[0] == pytest.approx(logged(whole, "grad_norm")[0], rel=1e-4)


def test_batch_without_video_trains_on_its_text(make_trainer, teacher, rows):
    trainer = make_trainer(teacher, train_rows=[rows[1], rows[3], rows[5], rows[7]], max_steps=1)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(logged(trainer, "loss_sft")[0], rel=1e-5)
    assert not logged(trainer, "loss_ld")


@pytest.mark.parametrize("trainable", [["projector", "llm"], ["llm"], ["vision"]])
def test_only_trainable_parts_change(make_trainer, teacher, make_model, trainable):
    before = make_model().state_dict()
    trainer = make_trainer(teacher, trainable=trainable, max_steps=1)
    trainer.train()
    names = {
        "vision": "model.vision_tower.",
        "projector": "model.multi_modal_projector.",
        "llm": "model.language_model.",
    }
    after = weights(trainer)
    for part, prefix in names.items():
        changed = any(not torch.equal(after[name], before[name]) for name in before if name.startswith(prefix))
        assert changed == (part in trainable), part


def test_subset_of_terms_trains_and_runs_no_other_head(make_trainer, teacher):
    trainer = make_trainer(teacher, signals=["depth"], distill_latent=False, max_steps=1)
    trainer.train()
    assert not logged(trainer, "loss_ld")
    assert logged(trainer, "loss_depth") and not logged(trainer, "loss_flow")
    trainer = make_trainer(teacher, signals=[], max_steps=1)
    trainer.train()
    assert not logged(trainer, "loss_ed") and logged(trainer, "loss_ld")[0] > 0


def test_ground_truth_teacher_trains_on_what_the_batch_carries(make_trainer, teacher):
    shapes = {"depth": (1, 4, 16, 16), "flow": (2, 4, 16, 16), "motion": (1, 4, 16, 16), "camray": (6, 4, 2, 2)}

    def truth(row, video, seconds):
        return {name: torch.full(shape, 0.5) for name, shape in shapes.items()}

    trainer = make_trainer(GroundTruthTeacher(teacher), truth=truth, distill_latent=False, max_steps=20)
    trainer.train()
    assert logged(trainer, "loss_depth")[-1] < logged(trainer, "loss_depth")[0]
    with pytest.raises(ValueError, match="distill_latent"):
        make_trainer(GroundTruthTeacher(teacher), truth=truth).train()


def test_exported_model_holds_no_training_module(make_trainer, teacher, tmp_path, make_model):
    trainer = make_trainer(teacher, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    expected = set(make_model().state_dict())
    for folder in (tmp_path / "run" / "checkpoint-1", tmp_path / "final"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert set(file.keys()) == expected
        assert not (folder / "README.md").exists()
        decoder = PerceptionDecoder.from_pretrained(folder / "perception_decoder")
        assert decoder.config == trainer.perception_decoder.config
    for name, value in trainer.perception_decoder.state_dict().items():
        assert torch.equal(decoder.state_dict()[name], value)


def test_exported_model_answers_as_the_trained_one(make_trainer, teacher, tmp_path, rows, processor):
    trainer = make_trainer(teacher)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    model = RGPT4DForConditionalGeneration.from_pretrained(tmp_path / "final")
    batch = P4DCollator(processor, NUM_FRAMES, for_teacher=False)(rows[:4])
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch).logits, trainer.model.eval()(**batch).logits)


def test_resume_repeats_the_unbroken_run(make_trainer, teacher, tmp_path):
    unbroken = make_trainer(teacher, max_steps=4, output_dir=str(tmp_path / "unbroken"))
    start = {name: value.clone() for name, value in unbroken.perception_decoder.state_dict().items()}
    unbroken.train()
    first = make_trainer(teacher, max_steps=4, save_strategy="steps", save_steps=2)
    first.perception_decoder.load_state_dict(start)
    first.train()
    resumed = make_trainer(teacher, max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logged(resumed, "loss")[-2:] == logged(unbroken, "loss")[-2:]
    expected = weights(unbroken)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name


def test_resume_of_a_run_without_teacher_is_refused(make_trainer, teacher, tmp_path):
    make_trainer(max_steps=1, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="without a teacher"):
        make_trainer(teacher).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-1"))


def test_lora_trains_adapters_and_decoder(make_trainer, teacher, tmp_path):
    trainer = make_trainer(
        teacher, peft_config=LoraConfig(r=2, target_modules=LLM_LINEARS), save_strategy="steps", save_steps=2
    )
    decoder_before = {name: value.clone() for name, value in trainer.perception_decoder.state_dict().items()}
    before = weights(trainer)
    trainer.train()
    after = weights(trainer)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all("lora_" in name or name.startswith("perception_decoder.") for name in changed)
    assert any("lora_" in name for name in changed)
    assert any(
        not torch.equal(value, decoder_before[name]) for name, value in trainer.perception_decoder.state_dict().items()
    )
    with safe_open(tmp_path / "run" / "checkpoint-2" / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in key for key in file.keys())


def test_gradient_checkpointing_gives_the_same_loss(make_trainer, teacher):
    plain, checkpointed = make_trainer(teacher), make_trainer(teacher, gradient_checkpointing=True)
    checkpointed.perception_decoder.load_state_dict(plain.perception_decoder.state_dict())
    plain.train()
    checkpointed.train()
    assert logged(checkpointed, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)


def test_fewer_frames_than_the_teacher_sees_are_refused_at_the_start(make_model, teacher, processor, tmp_path):
    args = P4DConfig(str(tmp_path), bf16=False, use_cpu=True)
    dataset = Dataset.from_dict({"messages": [[]]})
    arguments = {"train_dataset": dataset, "processing_class": processor}
    with pytest.raises(ValueError, match="samples 3 frames .* windows of 4: set its num_frames"):
        P4DTrainer(make_model(), args, teacher=teacher, data_collator=P4DCollator(processor, 3), **arguments)
    with pytest.raises(ValueError, match="windows of 8 frames, but the teacher sees 4: give the collator window=4"):
        collator = P4DCollator(processor, 8, targets=lambda row, video, seconds: {})
        P4DTrainer(make_model(), args, teacher=teacher, data_collator=collator, **arguments)


def test_longer_videos_are_distilled_window_by_window(make_trainer, teacher, processor, rows):
    trainer = make_trainer(teacher, max_steps=1)
    collate = P4DCollator(processor, num_frames=6)  # windows of frames 0 to 3 and 2 to 5
    trainer.data_collator = RowCollator(collate)
    batch = trainer._prepare_inputs(collate(rows[:1]))
    lengths, windows, targets = trainer._ask_teacher(trainer.model, batch)
    assert (lengths, windows) == ([6], [(0, 0), (0, 2)])
    frames = collate(rows[:1])["unmarked_pixel_values_videos"]
    expected = teacher.perceive(torch.cat([frames[:, :4], frames[:, 2:]]), [0.5] * 3, [0.5] * 3)
    torch.testing.assert_close(targets.latents, expected.latents)
    trainer.train()
    assert logged(trainer, "loss_ld")[0] > 0


def test_videos_shorter_than_a_window_train_on_their_text_and_are_counted(make_trainer, teacher, rows):
    short = [dict(row) for row in rows]
    video = rows[2]["messages"][0]["content"][0]
    content = [{**video, "video": video["video"][:3]}, rows[2]["messages"][0]["content"][1]]
    short[2] = {**rows[2], "messages": [{"role": "user", "content": content}, rows[2]["messages"][1]]}
    trainer = make_trainer(teacher, train_rows=short, max_steps=2)
    trainer.train()
    assert logged(trainer, "videos_too_short") == [1, 1]
    assert len(logged(trainer, "loss_ld")) == 2


class NaNTeacher:
    """Another teacher's perceptions, with a NaN in what it sees in the first window of each batch."""

    def __init__(self, teacher, signal):
        self.teacher, self.signal = teacher, signal

    def __getattr__(self, name):
        return getattr(self.teacher, name)

    def perceive(self, *args, **kwargs):
        targets = self.teacher.perceive(*args, **kwargs)
        values = (targets.latents if self.signal is None else targets.signals[self.signal])[0]
        values[(-1,) * values.ndim] = torch.nan
        return targets


@pytest.mark.parametrize("signal", [None, "depth", "flow", "motion", "camray"])
def test_windows_with_nan_are_skipped_and_counted(make_trainer, teacher, rows, signal):
    with_nan = make_trainer(NaNTeacher(teacher, signal), max_steps=1)
    plain = make_trainer(teacher, max_steps=1)
    with_nan.perception_decoder.load_state_dict(plain.perception_decoder.state_dict())
    for trainer in (with_nan, plain):
        trainer._num_windows_in_batch = torch.tensor(1)

    def ld_of(trainer, rows):
        batch = trainer._prepare_inputs(trainer.data_collator(rows))
        lengths, windows, targets = trainer._ask_teacher(trainer.model, batch)
        model_inputs = {name: value for name, value in batch.items() if name != "labels"}
        hidden = trainer.model.model(**model_inputs).last_hidden_state
        return trainer._distillation_terms(trainer.model, hidden, batch, lengths, windows, targets)

    found, expected = ld_of(with_nan, rows[:4]), ld_of(plain, rows[:4])
    for name in expected:
        assert found[name][0] == 0
        torch.testing.assert_close(found[name][1], expected[name][1])
    with_nan.train()
    assert logged(with_nan, "windows_skipped")[-1] == 2  # the one above and one in training
    assert all(value.isfinite().all() for value in weights(with_nan).values())


def test_gradient_norms_are_those_of_the_terms(make_trainer, teacher, rows, processor):
    trainer = make_trainer(teacher, max_steps=1)
    batch = P4DCollator(processor, NUM_FRAMES)(rows[:4])
    seen = {}
    hook = trainer.model.model.register_forward_hook(lambda module, args, output: seen.update(hidden=output[0]))
    lengths, windows, targets = trainer._ask_teacher(trainer.model, batch)
    trainer.model.model(**{name: value for name, value in batch.items() if name != "labels"})
    terms = trainer._distillation_terms(trainer.model, seen["hidden"], batch, lengths, windows, targets)
    scales = {"ld": 0.5, "depth": 0.1, "flow": 0.01, "motion": 0.005, "camray": 0.005}
    expected = {
        name: torch.autograd.grad(scale * terms[name].mean(), seen["hidden"], retain_graph=True)[0].norm().item()
        for name, scale in scales.items()
    }
    hook.remove()
    trainer.train()
    for name, value in expected.items():
        assert value > 0
        assert logged(trainer, f"grad_norm_{name}")[0] == pytest.approx(value, rel=1e-4), name
    assert logged(trainer, "grad_norm_sft")[0] > 0


def test_gradient_norms_do_not_change_the_training(make_trainer, teacher):
    every_step, never = make_trainer(teacher), make_trainer(teacher, logging_steps=100)
    never.perception_decoder.load_state_dict(every_step.perception_decoder.state_dict())
    every_step.train()
    never.train()
    for name, value in weights(every_step).items():
        torch.testing.assert_close(weights(never)[name], value, rtol=0, atol=0)


def test_losses_are_logged_as_they_are_where_outputs_are_rounded(make_trainer, teacher):
    def rounding(wrapped, core, method, *args):  # as FSDP2's mixed precision does
        return _apply_to_tensors(lambda tensor: tensor.bfloat16(), method(*args))

    plain, rounded = make_trainer(teacher, max_steps=1), make_trainer(teacher, max_steps=1)
    rounded.perception_decoder.load_state_dict(plain.perception_decoder.state_dict())
    rounded._redirect = rounding
    plain.train()
    rounded.train()
    for name in ("loss", "loss_sft", "loss_ld", "loss_depth"):
        assert logged(rounded, name) == logged(plain, name), name
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(rounded)[name], value, rtol=0, atol=0)


def test_compiled_layers_train_as_plain_ones(make_trainer, l4p, monkeypatch):
    compiled = []

    def compile_traced(self):  # traced as on a GPU, but not translated for this processor, which takes a minute
        compiled.append(type(self).__name__)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_traced)
    plain = make_trainer(L4PTeacher(l4p), gradient_checkpointing=True)
    plain_decoder = plain.perception_decoder.state_dict()
    plain_decoder = {name: value.clone() for name, value in plain_decoder.items()}
    plain.train()
    assert not compiled
    fast = make_trainer(L4PTeacher(l4p), gradient_checkpointing=True, compile_layers=True)
    assert {name: compiled.count(name) for name in set(compiled)} == {
        "SiglipEncoderLayer": 2,
        "Qwen2DecoderLayer": 2,
        "VideoMAELayer": 4,
        "L4PHead": 4,
    }
    fast.perception_decoder.load_state_dict(plain_decoder)
    fast.train()
    for name, value in weights(plain).items():
        torch.testing.assert_close(weights(fast)[name], value, rtol=1e-5, atol=1e-6)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    fast.perceive([fast.train_dataset[0]])  # a batch of another size, without gradients
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


def test_packed_rows_train_as_padded_ones(make_trainer, teacher, processor):
    padded, packed = make_trainer(teacher, max_steps=1), make_trainer(teacher, max_steps=1)
    packed.data_collator = RowCollator(P4DCollator(processor, NUM_FRAMES, packed=True))
    packed.perception_decoder.load_state_dict(padded.perception_decoder.state_dict())
    padded.train()
    packed.train()
    for name in ("loss", "loss_sft", "loss_ld", "loss_depth", "grad_norm", "num_tokens"):
        assert logged(packed, name)[0] == pytest.approx(logged(padded, name)[0], rel=1e-4), name


TABLE_7 = {
    "Zero-shot": ([], False, set()),
    "Tune-All": (["vision", "projector", "llm"], False, {"vision", "projector", "llm"}),
    "Tune-V": (["vision"], False, {"vision"}),
    "Tune-P": (["projector"], False, {"projector"}),
    "Tune-LLM": (["llm"], False, {"llm"}),
    "Tune-LLM-LoRA": (["llm"], True, {"lora"}),
    "Tune-P+LLM-LoRA": (["projector", "llm"], True, {"projector", "lora"}),
    "Tune-P+LLM": (["projector", "llm"], False, {"projector", "llm"}),
}


@pytest.mark.parametrize("row", TABLE_7)
def test_rows_of_table_7_change_their_parts_alone(make_trainer, teacher, row):
    trainable, llm_lora, expected = TABLE_7[row]
    trainer = make_trainer(teacher, trainable=trainable, llm_lora=llm_lora, lora_r=2, lora_dropout=0.0, max_steps=2)
    before = weights(trainer)
    trainer.train()
    changed = {name for name, value in weights(trainer).items() if not torch.equal(value, before[name])}

    def part(name):
        if "lora_" in name:
            return "lora"
        places = {"vision_tower": "vision", "multi_modal_projector": "projector", "perception_decoder": "decoder"}
        return next((part for place, part in places.items() if place in name), "llm")

    assert {part(name) for name in changed} == expected | {"decoder"}
    assert not any("original_module" in name for name in changed)


def test_lora_row_resumes_and_merges_with_its_projector(make_trainer, make_model, teacher, tmp_path, rows, processor):
    settings = {"trainable": ["projector", "llm"], "llm_lora": True, "lora_r": 2, "lora_dropout": 0.0, "max_steps": 4}
    unbroken = make_trainer(teacher, output_dir=str(tmp_path / "unbroken"), **settings)
    decoder = {name: value.clone() for name, value in unbroken.perception_decoder.state_dict().items()}
    start = {name: value.clone() for name, value in unbroken.model.state_dict().items()}
    unbroken.train()
    first = make_trainer(teacher, save_strategy="steps", save_steps=2, **settings)
    first.model.load_state_dict(start)
    first.perception_decoder.load_state_dict(decoder)
    first.train()
    resumed = make_trainer(teacher, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert logged(resumed, "loss")[-2:] == logged(unbroken, "loss")[-2:]
    resumed.save_model(str(tmp_path / "final"))
    loaded = PeftModel.from_pretrained(make_model(), tmp_path / "final").merge_and_unload().eval()
    batch = P4DCollator(processor, NUM_FRAMES, for_teacher=False)(rows[:4])
    with torch.no_grad():
        expected = trainer_model_logits(resumed, batch)
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fusion, kept", [("positional", "geometry_encoding"), ("concat", "multi_modal_projector")])
def test_adapter_of_a_baseline_of_table_4_holds_its_projection(
    make_trainer, make_model, teacher, tmp_path, rows, processor, fusion, kept
):
    config = make_model().config
    config.geometry_fusion, config.geometry_hidden_size = fusion, teacher.latent_shape[-1]
    base = RGPT4DForConditionalGeneration(config)
    base.save_pretrained(tmp_path / "base")
    settings = {
        "trainable": ["projector", "llm"],
        "llm_lora": True,
        "lora_r": 2,
        "distill_latent": False,
        "signals": [],
    }
    trainer = make_trainer(teacher, model=base, **settings)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    with safe_open(tmp_path / "final" / "adapter_model.safetensors", "pt") as file:
        whole = [key for key in file.keys() if "lora_" not in key]
        projection = [key for key in whole if "geometry" in key]
        assert len(projection) == 1 and kept in projection[0]
        assert file.get_tensor(projection[0]).abs().max() > 0  # it starts at zero
    batch = trainer._prepare_inputs(P4DCollator(processor, NUM_FRAMES)(rows[:4]))
    trainer._ask_teacher(trainer._core(trainer.model), batch)
    assert batch["video_geometry"].shape[0] == 2
    loaded = RGPT4DForConditionalGeneration.from_pretrained(tmp_path / "base")
    loaded = PeftModel.from_pretrained(loaded, tmp_path / "final").eval()
    with torch.no_grad():
        assert torch.equal(loaded(**batch).logits, trainer_model_logits(trainer, batch))


def test_quantised_language_model_trains_by_lora(make_trainer, make_model, teacher, tmp_path):
    pytest.importorskip("bitsandbytes", reason='the extra "quantize" is not installed')
    make_model().save_pretrained(tmp_path / "base")
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=NOT_QUANTIZED)
    model = RGPT4DForConditionalGeneration.from_pretrained(
        tmp_path / "base", quantization_config=quantization, device_map={"": "cpu"}, dtype=torch.float32
    )
    quantised = {name for name, value in model.named_parameters() if value.dtype == torch.uint8}
    assert quantised and all("language_model.layers" in name for name in quantised)
    before = {name: value.clone() for name, value in model.named_parameters()}
    settings = {"trainable": ["projector", "llm"], "llm_lora": True, "lora_r": 2, "lora_dropout": 0.0}
    trainer = make_trainer(teacher, model=model, **settings)
    trainer.train()
    assert all(loss > 0 for loss in logged(trainer, "loss_ld")) and len(logged(trainer, "loss")) == 2
    after = weights(trainer)
    assert {value.dtype for name, value in after.items() if "modules_to_save" in name} == {torch.float32}
    assert any("lora_B" in name and value.abs().max() > 0 for name, value in after.items())
    for name, value in trainer._core(trainer.model).named_parameters():
        if name.replace(".base_layer", "") in quantised:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name


def test_projector_beside_lora_learns_in_float32(make_trainer, make_model, teacher):
    settings = {"trainable": ["projector", "llm"], "llm_lora": True, "lora_r": 2, "max_steps": 1, "bf16": True}
    trainer = make_trainer(teacher, model=make_model().bfloat16(), **settings)
    dtypes = {name: value.dtype for name, value in trainer.model.named_parameters() if value.requires_grad}
    assert {dtype for name, dtype in dtypes.items() if "modules_to_save" in name} == {torch.float32}
    assert any("modules_to_save" in name for name in dtypes)
    trainer.train()
    assert logged(trainer, "loss_ld")[0] > 0


def trainer_model_logits(trainer, batch):
    return trainer.model.eval()(**batch).logits


def test_pictures_are_drawn_at_the_chosen_steps(make_trainer, teacher, rows, tmp_path):
    trainer = make_trainer(teacher)
    trainer.add_callback(PerceptionPictures(trainer, rows[0], [0, 2], tmp_path / "pictures"))
    before = {name: value.clone() for name, value in weights(trainer).items()}
    trainer.perceive([rows[0]])
    assert trainer.model.training
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())
    trainer.train()
    names = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert names == ["perception_step_000000.png", "perception_step_000002.png"]
    with pytest.raises(ValueError, match="needs a trainer with a teacher"):
        PerceptionPictures(make_trainer(), rows[0], [0], tmp_path)


def test_signals_that_are_not_distilled_can_be_watched(make_trainer, teacher, l4p, rows, tmp_path):
    trainer = make_trainer(teacher, signals=[])
    _, student, targets = trainer.perceive([rows[0]])
    assert list(student) == list(targets.signals) == ["depth", "flow", "motion", "camray"]
    assert all(
        values.isfinite().all() and values.shape == targets.signals[name].shape for name, values in student.items()
    )
    with pytest.raises(ValueError, match="gives no signals"):
        PerceptionPictures(make_trainer(L4PTeacher(l4p, signals=()), signals=[]), rows[0], [0], tmp_path)


def test_evaluation_reports_every_term_and_trains_nothing(make_trainer, teacher, rows):
    trainer = make_trainer(teacher, per_device_eval_batch_size=4)
    before = weights(trainer)
    dataset = Dataset.from_dict({"index": range(4)}).with_transform(lambda b: {"row": [rows[i] for i in b["index"]]})
    metrics = trainer.evaluate(dataset)
    latest = {name: value for entry in trainer.state.log_history for name, value in entry.items()}
    terms = latest["eval_loss_sft"] + 0.5 * latest["eval_loss_ld"] + 0.1 * latest["eval_loss_ed"]
    assert metrics["eval_loss"] == pytest.approx(terms, rel=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in weights(trainer).items())


@pytest.mark.parametrize("marked", [True, False])
def test_teacher_gets_frames_and_targets_that_deepspeed_has_not_rounded(
    make_trainer, teacher, rows, processor, monkeypatch, marked
):
    class Plugin:  # all that Trainer asks of a DeepSpeed that computes in bfloat16
        class hf_ds_config:
            dtype = staticmethod(lambda: torch.bfloat16)

    trainer = make_trainer(teacher)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", Plugin, raising=False)
    batch = P4DCollator(processor, NUM_FRAMES, truth_of_seconds)(rows[:4])
    seen = batch["unmarked_pixel_values_videos"]
    if not marked:
        seen, _ = batch["pixel_values_videos"], batch.pop("unmarked_pixel_values_videos")
    prepared = trainer._prepare_inputs(dict(batch))
    assert prepared["pixel_values_videos"].dtype == torch.bfloat16
    assert torch.equal(prepared["unmarked_pixel_values_videos"], seen)
    assert torch.equal(prepared["perception_targets"]["depth"], batch["perception_targets"]["depth"])


def truth_of_seconds(row, video, seconds):
    return {"depth": seconds / 3}


def test_missing_collator_is_named(make_model, processor, tmp_path):
    args = P4DConfig(str(tmp_path), bf16=False, use_cpu=True)
    with pytest.raises(ValueError, match="P4DCollator"):
        P4DTrainer(make_model(), args, train_dataset=Dataset.from_dict({"messages": [[]]}), processing_class=processor)


TRAJECTORIES = {
    "sft": {"alpha": 0.0, "beta": 0.0},
    "latent": {"alpha": 0.5, "beta": 0.0},
    "explicit": {"alpha": 0.0, "beta": 0.1},
    "lora": {"alpha": 0.5, "beta": 0.1, "peft_config": LoraConfig(r=2, target_modules=LLM_LINEARS)},
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_losses_follow_the_recorded_trajectory(make_trainer, teacher, name, request):
    """Guards against silent change. After a wanted change: `pytest -k trajectory --record-trajectories`."""
    file = request.path.parent.parent / "artifacts" / "p4d_trajectories.json"
    recorded = json.loads(file.read_text()) if file.exists() else {}
    release, recording = torch.__version__.split("+")[0], request.config.getoption("--record-trajectories")
    if not recording and release != recorded["torch"]:
        pytest.skip(f"recorded with torch {recorded['torch']}; {release} draws other initial weights")
    trainer = make_trainer(
        teacher, max_steps=20, per_device_train_batch_size=2, num_train_epochs=5, **TRAJECTORIES[name]
    )
    trainer.train()
    losses = logged(trainer, "loss")
    if recording:
        file.parent.mkdir(exist_ok=True)
        recorded |= {"torch": release, name: [round(loss, 6) for loss in losses]}
        file.write_text(json.dumps(recorded, indent=1) + "\n")
    else:
        assert losses == pytest.approx(recorded[name], rel=5e-3)
