import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from transformers import AutoConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import SFTTrainer
from trl.models.utils import _ForwardRedirection

from modeling_rgpt4d.perception_decoder import PerceptionDecoder, PerceptionDecoderConfig

from .collator import IGNORE_INDEX
from .decoded_distillation import decoded_distillation, usable_windows, without
from .distillation_windows import Window, cut, distillation_windows, video_lengths
from .losses import latent_distillation_loss
from .p4d_config import P4DConfig
from .perception import perceive, student_latents
from .sharded_modules import (
    full_state_dict,
    gather_output_head,
    idle_pass_of_decoder,
    idle_passes_of_vision,
    is_sharded,
    used_elsewhere_only,
)
from .teacher_cache import CachedTeacher
from .teachers import PerceptionTargets, Teacher
from .trained_parts import freeze_untrained_parts, llm_lora_config, train_whole_parts_in_float32

DECODER_FOLDER = "perception_decoder"
OF_TEACHER = ("unmarked_pixel_values_videos", "perception_targets")  # what a batch carries that is not for the model


class P4DTrainer(SFTTrainer):
    r"""Supervised fine-tuning with Perceptual 4D Distillation: `L = L_SFT + alpha L_LD + beta L_ED` (Eq. A8 of arXiv 2512.17012).

    Args:
        model: an `RGPT4DForConditionalGeneration`, or its folder or Hub id.
        args ([`P4DConfig`]): settings; `alpha`, `beta` and the lambdas are the paper's by default.
        teacher ([`L4PTeacher`], [`CachedTeacher`] or [`GroundTruthTeacher`], *optional*): the frozen 4D perception model. It
            belongs to the trainer and never to the model. Without one the loss is L_SFT alone ("4D-SFT" of Table 4). A
            model with `config.geometry_fusion` ("4D-Concat", "4D-PE") gets its latents as input.
        data_collator ([`P4DCollator`]): gives videos with their seconds, and `perception_targets` for a cache or the truth.
        Everything else is as in `trl.SFTTrainer`.

    While it trains, the perception decoder D_4DP (Eq. 3) is a sub-module of the model, so that the optimizer, gradient
    clipping, DDP and FSDP see it. It is written beside every checkpoint, in the folder `perception_decoder`, and never
    into the model's own files.

    What is distilled is a window of the teacher's number of frames; a longer video has several, a shorter one none, and
    a batch without any gets L_SFT alone. LD and ED are means over the windows of the whole accumulated batch. A window
    whose targets are not finite adds nothing.

    Logged for each term, in its natural scale (a mean per token, or per window): `loss_sft`, `loss_ld`, `loss_ed`,
    and `loss_<signal>`, the unweighted Smooth-L1 sum over frames; for the steps that are logged `grad_norm_<term>`, the norm of
    the gradient that the term, with its weight in Eq. A8, sends to the last hidden states; and since the start
    `videos_too_short` and `windows_skipped`.
    """

    _tag_names = ["rgpt4d", "p4d"]
    _name = "P4D"
    # compute_loss normalises every term over the whole accumulated batch, so Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: P4DConfig,
        teacher: Teacher | None = None,
        **kwargs,
    ):
        if not isinstance(args, P4DConfig):
            raise TypeError(f"P4DTrainer takes its settings as a P4DConfig, got {type(args).__name__}.")
        if kwargs.get("data_collator") is None:
            raise ValueError(
                "P4DTrainer needs `data_collator`, a trainer.P4DCollator: TRL's own would drop the videos."
            )
        own_peft = kwargs.get("peft_config") is not None
        if own_peft and (
            args.llm_lora or args.trainable != P4DConfig.__dataclass_fields__["trainable"].default_factory()
        ):
            raise ValueError(
                "With `peft_config`, PEFT decides what is trained: leave `trainable` and `llm_lora` at their defaults."
            )
        if args.llm_lora:
            of_model = (
                AutoConfig.from_pretrained(model, trust_remote_code=True) if isinstance(model, str) else model.config
            )
            kwargs["peft_config"] = llm_lora_config(args, of_model.geometry_fusion)
        super().__init__(model, args, **kwargs)
        core = self._core(self.model)
        if is_deepspeed_zero3_enabled():
            # There transformers 5.24 keeps renamings that no weight of the checkpoint needed, and would save by their reverse
            core._weight_conversions = []
        if kwargs.get("peft_config") is None:
            freeze_untrained_parts(core, args.trainable)
        elif not self.is_deepspeed_enabled and (args.bf16 or core.dtype == torch.float32):
            # DeepSpeed's engine wants one dtype, and keeps float32 copies itself; without autocast all want one dtype
            train_whole_parts_in_float32(self.model)
        self.teacher = teacher
        self.perception_decoder: PerceptionDecoder | None = None
        self._redirect = _ForwardRedirection()
        self._num_windows_in_batch: torch.Tensor | None = None
        self._gradient_norms: dict[str, torch.Tensor] = {}
        self._counts = {"videos_too_short": 0, "windows_skipped": 0}
        if teacher is not None:
            self._set_up_teacher(core, teacher)
        elif core.config.geometry_fusion != "none":
            raise ValueError(
                f"The model's geometry_fusion is {core.config.geometry_fusion!r}: it needs a `teacher` for its input."
            )
        if args.compile_layers:
            for layer in (*core.model.vision_tower.encoder.layers, *core.model.language_model.layers):
                layer.compile()
            if teacher is not None:
                teacher.compile_layers()

    def _set_up_teacher(self, core: PreTrainedModel, teacher: Teacher) -> None:
        if missing := [signal for signal in self.args.signals if signal not in teacher.signals]:
            raise ValueError(f"`signals` asks for {missing}, but the teacher gives {list(teacher.signals)}.")
        frames = getattr(self.data_collator, "num_frames", None)
        window = getattr(self.data_collator, "window", None) or frames
        if frames is not None and frames < teacher.num_frames:
            raise ValueError(
                f"The collator samples {frames} frames of a video, but the teacher sees windows of {teacher.num_frames}: "
                f"set its num_frames to at least {teacher.num_frames}, or use a teacher of {frames} frames."
            )
        if getattr(self.data_collator, "targets", None) is not None and window != teacher.num_frames:
            raise ValueError(
                f"The collator's targets are for windows of {window} frames, but the teacher sees {teacher.num_frames}: "
                f"give the collator window={teacher.num_frames}."
            )
        if isinstance(teacher, CachedTeacher):
            teacher.check_frames(self.processing_class.video_processor)
        if self.args.distill_latent and not getattr(teacher, "gives_latents", True):
            raise ValueError("The teacher gives no latents; set `distill_latent=False`, or let it give them.")
        teacher.to(self.accelerator.device)
        if not self.args.distill_latent and not self.args.signals:
            if core.config.geometry_fusion == "none":
                raise ValueError(
                    "Nothing is learnt from the teacher: set `distill_latent`, name `signals`, or leave it out."
                )
            return
        self.perception_decoder = PerceptionDecoder(
            PerceptionDecoderConfig(
                in_features=core.config.get_text_config().hidden_size,
                latent_shape=teacher.latent_shape,
                kind=self.args.decoder_kind,
                hidden_size=self.args.decoder_hidden_size,
            )
        ).to(self.accelerator.device)
        if self.is_deepspeed_enabled:
            self.perception_decoder.to(core.dtype)  # its engine wants one dtype, and keeps float32 copies itself
        core.add_module(DECODER_FOLDER, self.perception_decoder)
        keys = {f"{DECODER_FOLDER}.{key}" for key in self.perception_decoder.state_dict()}
        core._keys_to_ignore_on_save = set(core._keys_to_ignore_on_save or ()) | keys

    def _core(self, model: nn.Module) -> PreTrainedModel:
        """The bare `RGPT4DForConditionalGeneration` inside DDP, FSDP and PEFT wrappers."""
        model = self.accelerator.unwrap_model(model)
        return model.get_base_model() if hasattr(model, "get_base_model") else model

    # ------------------------------------------------------------------------------------------------------- the loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batch_samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        # The distillation terms are means over the windows of the whole accumulated batch and of all processes, as the
        # SFT term is over tokens: then 2 steps of 4 samples give the gradient of 1 step of 8 for any mix of samples.
        num_windows = torch.tensor(sum(len(self._windows(batch)[1]) for batch in batch_samples), device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_windows = self.accelerator.gather(num_windows).sum()
        self._num_windows_in_batch = num_windows.clamp(min=1)
        return batch_samples, num_items_in_batch

    def _windows(self, inputs: dict[str, Any]) -> tuple[list[int], list[Window]]:
        """Frames of each video of a batch, and the windows that the teacher sees of them."""
        if self.teacher is None or "pixel_values_videos" not in inputs:
            return [], []
        timestamps = inputs["video_timestamps"]
        lengths = video_lengths(timestamps)
        return lengths, distillation_windows(lengths, self.teacher.num_frames, timestamps)

    def _prepare_inputs(self, inputs):
        times = inputs.get("video_timestamps")
        if times is not None and times.is_floating_point() and is_sharded(self.model_wrapped):
            # FSDP2's and DeepSpeed's mixed precision cast all float inputs; whole microseconds pass unharmed.
            inputs = {**inputs, "video_timestamps": (times.double() * 1e6).round().long()}
        if self.teacher is None or not self.is_deepspeed_enabled or "pixel_values_videos" not in inputs:
            return super()._prepare_inputs(inputs)
        # Trainer casts all to the dtype of DeepSpeed's engine, and would round what the teacher sees and what it is to give.
        inputs = {"unmarked_pixel_values_videos": inputs["pixel_values_videos"], **inputs}
        of_teacher = {name: inputs.pop(name) for name in OF_TEACHER if name in inputs}
        return {**super()._prepare_inputs(inputs), **send_to_device(of_teacher, self.accelerator.device)}

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        r"""Eq. A8. `inputs` is a batch of [`P4DCollator`]; see `trl.SFTTrainer.compute_loss` for the rest.

        Raises: `ValueError` if what the batch carries does not fit the teacher.
        """
        core, mode = self._core(model), "train" if self.model.training else "eval"
        lengths, windows, targets = self._ask_teacher(core, inputs)
        idle = self._idle_passes(model, inputs, windows)
        decoder_apart = self._decoder_apart() if self._is_logged_step() and torch.is_grad_enabled() else None
        # Through the wrapper's own forward, so that DDP and FSDP see one graph with the decoder in it.
        loss, found = self._redirect(
            model,
            self.accelerator.unwrap_model(model),
            self._sft_and_distillation,
            core,
            inputs,
            lengths,
            windows,
            targets,
            idle,
            decoder_apart,
            num_items_in_batch,
        )
        loss = loss + (found.loss - loss.detach())
        # after the redirect: no collective may run inside DDP's forward
        self._record(mode, [f"loss_{name}" for name in self._terms], found.terms)
        return (loss, None) if return_outputs else loss

    def _ask_teacher(
        self, core: PreTrainedModel, inputs: dict[str, Any], signals: Sequence[str] | None = None
    ) -> tuple[list[int], list[Window], PerceptionTargets | None]:
        """Frames of each video, the windows of the batch, and what the teacher perceives in them (Eq. 1 and 2): `signals`, by
        default those that are distilled.

        Takes from `inputs` what is not the model's, and adds the geometry that the baselines of Table 4 read.
        """
        unmarked = inputs.pop("unmarked_pixel_values_videos", None)
        carried = inputs.pop("perception_targets", None)
        lengths, windows = self._windows(inputs)
        fused = core.config.geometry_fusion != "none" and bool(lengths)
        if fused and set(lengths) != {self.teacher.num_frames}:
            raise ValueError(
                f"The videos have {lengths} frames, but geometry_fusion needs the latents of each in one window of the "
                f"teacher: sample {self.teacher.num_frames} frames of every video."
            )
        self._counts["videos_too_short"] += len(lengths) - len({window.video for window in windows})
        if not windows:
            return lengths, windows, None
        # The teacher sees the frames without marks: a number drawn on them is no part of the scene.
        videos = inputs["pixel_values_videos"] if unmarked is None else unmarked
        processor = self.processing_class.video_processor
        targets = self.teacher.perceive(
            torch.stack(cut(videos, windows, self.teacher.num_frames)),
            image_mean=processor.image_mean,
            image_std=processor.image_std,
            targets=carried,
            signals=self.args.signals if signals is None else signals,
        )
        if (fused or self.args.distill_latent) and targets.latents is None:
            raise ValueError("The teacher gives no latents; set `distill_latent=False`, or let it give them.")
        if fused:
            inputs["video_geometry"] = targets.latents[:, -1]  # F_4D: the deepest tap
        return lengths, windows, targets

    def _idle_passes(self, model: nn.Module, inputs: dict[str, Any], windows: list[Window]) -> tuple[int, bool]:
        """Passes of the vision parts, and of the decoder, that other processes make in this step and this one need not."""
        if self.accelerator.num_processes == 1 or not is_sharded(model):
            return 0, False
        used = ["pixel_values" in inputs, "pixel_values_videos" in inputs, bool(windows)]
        image, video, window = used_elsewhere_only(self.accelerator, used)
        return image + video, window

    def _sft_and_distillation(
        self,
        core: PreTrainedModel,
        inputs: dict[str, Any],
        lengths: list[int],
        windows: list[Window],
        targets: PerceptionTargets | None,
        idle: tuple[int, bool],
        decoder_apart: PerceptionDecoder | None,
        num_items_in_batch,
    ) -> tuple[torch.Tensor, SimpleNamespace]:
        """The loss; and `loss` again with `terms`: of each term its sum and what it is a sum of (tokens or windows).

        FSDP2's mixed precision rounds all tensors that it finds in tuples, dicts and dataclasses of the output, but looks into
        no other object.
        """
        idle_vision, idle_decoder = idle
        num_tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        per_token = self._natural_sft(1.0, num_tokens, num_items_in_batch)
        # TRL's fused loss calls the base model and keeps nothing but token losses: a hook sees its hidden states.
        seen = {}

        def see(module, args, output):
            seen["hidden"] = output["last_hidden_state"]
            if self._watches(seen["hidden"]):
                output["last_hidden_state"] = seen["hidden"].view_as(seen["hidden"])
                output["last_hidden_state"].register_hook(keep_norm)
            return output

        def keep_norm(gradient):
            self._gradient_norms["sft"] = gradient.float().norm() * per_token

        hook = core.base_model.register_forward_hook(see)
        try:
            gather_output_head(core)
            with self.accelerator.autocast(), idle_passes_of_vision(core, idle_vision):
                sft = super().compute_loss(core, dict(inputs), num_items_in_batch=num_items_in_batch)
        finally:
            hook.remove()
        losses = {}
        if windows and self.perception_decoder is not None:
            with self.accelerator.autocast():
                losses = self._distillation_terms(
                    core, seen["hidden"], inputs, lengths, windows, targets, decoder_apart
                )
        terms = {"loss_sft": (sft.detach() * per_token * num_tokens, num_tokens)}
        for name, values in losses.items():
            terms[f"loss_{name}"] = (values.detach().sum(), len(windows))
        loss = sft
        # Eq. A8, with Eq. 7 written out
        for name, values in losses.items():
            if weight := self._weight(name):
                loss = loss + self._per_window(weight * values, num_items_in_batch)
        if idle_decoder:
            loss = loss + idle_pass_of_decoder(core, self.perception_decoder, seen["hidden"])
        return loss, SimpleNamespace(loss=loss.detach(), terms=terms)

    def _distillation_terms(
        self,
        core: PreTrainedModel,
        hidden_states: torch.Tensor,
        inputs: dict[str, Any],
        lengths: list[int],
        windows: list[Window],
        targets: PerceptionTargets,
        decoder_apart: PerceptionDecoder | None = None,
    ) -> dict[str, torch.Tensor]:
        """Eq. 3, 4, 6, and each signal's term of Eq. 7: `"ld"` and signals -> `(W,)`, zero for a window without finite targets.

        With `decoder_apart` the norm of each term's gradient is kept, too.
        """
        args = self.args
        usable = usable_windows(targets, args.signals, args.distill_latent)
        targets = without(targets, usable)
        self._counts["windows_skipped"] = self._counts["windows_skipped"] + (~usable).sum()

        def decode(decoder, hidden):
            return self.student_latents(decoder, hidden, inputs, core.config, lengths, windows)

        latents = decode(self.perception_decoder, hidden_states)
        terms = {}
        if args.distill_latent:
            terms["ld"] = latent_distillation_loss(latents, targets.latents, reduction="none")
        trained = [signal for signal in args.signals if self._weight(signal)]
        terms |= decoded_distillation(self.teacher, latents, targets, args.signals, trained)
        terms = {name: values * usable for name, values in terms.items()}
        if decoder_apart is not None and hidden_states.requires_grad:
            apart = hidden_states.detach().requires_grad_()
            latents_apart = decode(decoder_apart, apart)
            for name, values in terms.items():
                if values.requires_grad:
                    (of_latents,) = torch.autograd.grad(self._weight(name) * values.mean(), latents, retain_graph=True)
                    of_latents = of_latents.to(latents_apart.dtype)
                    (of_hidden,) = torch.autograd.grad(latents_apart, apart, of_latents, retain_graph=True)
                    self._gradient_norms[name] = of_hidden.float().norm()
        return terms

    def student_latents(
        self,
        decoder: PerceptionDecoder,
        hidden_states: torch.Tensor,
        inputs: dict[str, Any],
        config,
        lengths: list[int],
        windows: list[Window],
    ) -> torch.Tensor:
        """Eq. 3, see `perception.student_latents`; `inputs` is the batch, `config` the model's."""
        return student_latents(
            decoder, hidden_states, inputs["input_ids"], config, lengths, windows, self.teacher.num_frames
        )

    def _weight(self, term: str) -> float:
        """What a term of `_distillation_terms` counts in Eq. A8: alpha, or beta lambda_m."""
        return self.args.alpha if term == "ld" else self.args.beta * self.args.signal_weights[term]

    def _per_window(self, losses: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """Sum of `(W,)` losses over their count: of the accumulated batch when training, else of this batch."""
        if num_items_in_batch is None:
            return losses.mean()
        return losses.sum() * self._gradient_scale() / self._num_windows_in_batch

    def _natural_sft(self, loss: torch.Tensor | float, num_tokens: torch.Tensor, num_items_in_batch):
        """Undo TRL's normalisation over the accumulated batch: the mean over this batch's own answer tokens."""
        if num_items_in_batch is None:
            return loss
        return loss * num_items_in_batch / (num_tokens * self._gradient_scale())

    def _gradient_scale(self) -> int:
        """DDP and FSDP average gradients over processes, where the counts are of all processes."""
        return self.accelerator.num_processes if self.args.average_tokens_across_devices else 1

    # -------------------------------------------------------------------------------------------------------- logging

    def _watches(self, hidden_states: torch.Tensor) -> bool:
        """Whether `grad_norm_<term>` is wanted of this pass."""
        return self._is_logged_step() and torch.is_grad_enabled() and hidden_states.requires_grad

    def _decoder_apart(self) -> PerceptionDecoder | None:
        """A whole copy of the decoder, for gradients of single terms: where the weights are spread over processes, no such
        backward pass may go through the model's own, for it would take it for the last. All processes must call it together.
        """
        if self.perception_decoder is None:
            return None
        with torch.device("meta"):  # no random number is drawn
            copy = PerceptionDecoder(self.perception_decoder.config)
        copy.load_state_dict(full_state_dict(self.perception_decoder), assign=True)
        return copy.requires_grad_(False)

    def training_step(self, *args, **kwargs):
        self._gradient_norms = {}
        loss = super().training_step(*args, **kwargs)
        if self._is_logged_step():
            norms = {f"grad_norm_{name}": (norm, 1) for name, norm in self._gradient_norms.items()}
            self._record("train", [f"grad_norm_{name}" for name in self._terms], norms)
        return loss

    def _is_logged_step(self) -> bool:
        step, every = self.state.global_step + 1, self.state.logging_steps
        return self.model.training and ((every and step % every == 0) or (self.args.logging_first_step and step == 1))

    def _record(self, mode: str, names: list[str], terms: dict[str, tuple[torch.Tensor, float]]) -> None:
        """Means over all processes, of which some may have no window in this step."""
        nothing = torch.zeros((), device=self.accelerator.device)
        table = torch.stack(
            [torch.stack([nothing + part for part in terms.get(name, (nothing, nothing))]) for name in names]
        )
        table = self.accelerator.reduce(table.detach().float(), reduction="sum").tolist()
        means = {name: total / count for name, (total, count) in zip(names, table, strict=True) if count}
        if self.args.signals and f"loss_{self.args.signals[0]}" in means:
            means["loss_ed"] = sum(
                weight * means[f"loss_{signal}"] for signal, weight in self.args.signal_weights.items()
            )  # Eq. 7
        for name, value in means.items():
            self._metrics[mode][name].append(value)
        if self.teacher is not None and "loss_sft" in names:
            counts = torch.stack([nothing + count for count in self._counts.values()])
            counts = self.accelerator.reduce(counts, reduction="sum").tolist()
            for name, count in zip(self._counts, counts, strict=True):
                self._metrics[mode][name] = [int(count)]

    @property
    def _terms(self) -> list[str]:
        if self.perception_decoder is None:
            return ["sft"]
        return ["sft", *["ld"] * self.args.distill_latent, *self.args.signals]

    # ------------------------------------------------------------------------------------------------------ perceiving

    @torch.no_grad()
    def perceive(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, torch.Tensor], PerceptionTargets]:
        """What the student perceives now in the videos of `rows`, beside the teacher.

        Returns: the batch that the collator made of `rows`, the student's signals `{name: (num_windows, C, N, H, W)}`, all
        that the teacher gives, also those that are not distilled, and the teacher's targets.
        """
        core = self._core(self.model)
        was_training = core.training
        core.eval()
        inputs = self._prepare_inputs(self.data_collator(rows))
        labels = inputs.pop("labels")
        # Layers that were compiled for training would be compiled again for this batch.
        with torch.compiler.set_stance("force_eager"):
            _, _, targets = self._ask_teacher(core, inputs, self.teacher.signals)
            with self.accelerator.autocast():
                _, signals = perceive(core, self.perception_decoder, self.teacher, inputs)
        core.train(was_training)
        return {**inputs, "labels": labels}, signals, targets

    # --------------------------------------------------------------------------------------------------- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if self.perception_decoder is not None:
            weights = full_state_dict(self.perception_decoder)
            if self.args.should_save:
                folder = os.path.join(output_dir or self.args.output_dir, DECODER_FOLDER)
                self.perception_decoder.save_pretrained(folder, weights)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.perception_decoder is None:
            return
        folder = os.path.join(resume_from_checkpoint, DECODER_FOLDER)
        if not os.path.isdir(folder):
            raise ValueError(
                f"{resume_from_checkpoint} has no {DECODER_FOLDER} folder: it comes from a run without a teacher. "
                "Resume it without one, or start a new run from it."
            )
        saved = PerceptionDecoder.from_pretrained(folder)
        if saved.config != self.perception_decoder.config:
            raise ValueError(
                f"The perception decoder of {resume_from_checkpoint} is {saved.config}, but this teacher and these "
                f"settings make {self.perception_decoder.config}: resume with the teacher of that run."
            )
        if not self.is_fsdp_enabled:  # there the Trainer's own checkpoint of the whole model has it
            self.perception_decoder.load_state_dict(saved.state_dict())

    def create_model_card(self, *args, **kwargs):
        """Writes nothing: TRL would overwrite README.md with a text-only quick start. `hub_cards` writes the card."""
