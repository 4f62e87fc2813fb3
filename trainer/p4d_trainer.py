import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl import SFTTrainer
from trl.models.utils import _ForwardRedirection

from modeling_rgpt4d.perception_decoder import PerceptionDecoder, PerceptionDecoderConfig, frame_hidden_states

from .collator import IGNORE_INDEX
from .losses import explicit_distillation_loss, latent_distillation_loss
from .p4d_config import P4DConfig
from .teachers import GroundTruthTeacher, L4PTeacher, PerceptionTargets

DECODER_FOLDER = "perception_decoder"


class P4DTrainer(SFTTrainer):
    r"""Supervised fine-tuning with Perceptual 4D Distillation: `L = L_SFT + alpha L_LD + beta L_ED` (Eq. A8 of arXiv 2512.17012).

    Args:
        model: an `RGPT4DForConditionalGeneration`, or its folder or Hub id.
        args ([`P4DConfig`]): settings; `alpha`, `beta` and the lambdas are the paper's by default.
        teacher ([`L4PTeacher`] or [`GroundTruthTeacher`], *optional*): the frozen 4D perception model. It belongs to the
            trainer and never to the model. Without one the loss is L_SFT alone ("4D-SFT" of Table 4).
        data_collator ([`P4DCollator`]): gives videos with their seconds, and `perception_truth` for ground truth.
        Everything else is as in `trl.SFTTrainer`.

    While it trains, the perception decoder D_4DP (Eq. 3) is a sub-module of the model, so that the optimizer, gradient
    clipping, DDP and FSDP see it. It is written beside every checkpoint, in the folder `perception_decoder`, and never
    into the model's own files. A batch without video gets L_SFT alone.

    Logged for each term, in its natural scale (a mean per token, or per video): `loss_sft`, `loss_ld`, `loss_ed`,
    and `loss_<signal>`, the unweighted Smooth-L1 sum over frames.
    """

    _tag_names = ["rgpt4d", "p4d"]
    _name = "P4D"
    # compute_loss normalises every term over the whole accumulated batch, so Trainer must not divide again.
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: P4DConfig,
        teacher: L4PTeacher | GroundTruthTeacher | None = None,
        **kwargs,
    ):
        if not isinstance(args, P4DConfig):
            raise TypeError(f"P4DTrainer takes its settings as a P4DConfig, got {type(args).__name__}.")
        if kwargs.get("data_collator") is None:
            raise ValueError(
                "P4DTrainer needs `data_collator`, a trainer.P4DCollator: TRL's own would drop the videos."
            )
        super().__init__(model, args, **kwargs)
        core = self._core(self.model)
        if kwargs.get("peft_config") is None:
            freeze_untrained_parts(core, args.trainable)
        elif args.trainable != P4DConfig.__dataclass_fields__["trainable"].default_factory():
            raise ValueError("With `peft_config`, PEFT decides what is trained; leave `trainable` at its default.")
        self.teacher = teacher
        self.perception_decoder: PerceptionDecoder | None = None
        self._redirect = _ForwardRedirection()
        self._num_videos_in_batch: torch.Tensor | None = None
        if teacher is not None:
            if missing := [signal for signal in args.signals if signal not in teacher.signals]:
                raise ValueError(f"`signals` asks for {missing}, but the teacher gives {list(teacher.signals)}.")
            teacher.to(self.accelerator.device)
            self.perception_decoder = PerceptionDecoder(
                PerceptionDecoderConfig(
                    in_features=core.config.get_text_config().hidden_size,
                    latent_shape=teacher.latent_shape,
                    kind=args.decoder_kind,
                    hidden_size=args.decoder_hidden_size,
                )
            ).to(self.accelerator.device)
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
        # The distillation terms are means over the videos of the whole accumulated batch and of all processes, as the
        # SFT term is over tokens: then 2 steps of 4 samples give the gradient of 1 step of 8 for any mix of samples.
        num_videos = sum(len(batch["pixel_values_videos"]) for batch in batch_samples if "pixel_values_videos" in batch)
        num_videos = torch.tensor(num_videos, device=device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            num_videos = self.accelerator.gather(num_videos).sum()
        self._num_videos_in_batch = num_videos
        return batch_samples, num_items_in_batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        r"""Eq. A8. `inputs` is a batch of [`P4DCollator`]; see `trl.SFTTrainer.compute_loss` for the rest.

        Raises: `ValueError` if the videos do not fit the teacher.
        """
        truth = inputs.pop("perception_truth", None)
        if self.teacher is None or "pixel_values_videos" not in inputs:
            loss = super().compute_loss(model, dict(inputs), num_items_in_batch=num_items_in_batch)
            terms = {"loss_sft": self._natural_sft(loss, inputs, num_items_in_batch)}
        else:
            targets = self.perception_targets(inputs, truth)
            # Through the wrapper's own forward, so that DDP and FSDP see one graph with the decoder in it.
            loss, terms = self._redirect(
                model,
                self.accelerator.unwrap_model(model),
                self._sft_and_distillation,
                self._core(model),
                inputs,
                targets,
                num_items_in_batch,
            )
        mode = "train" if self.model.training else "eval"
        for name, value in terms.items():  # after the redirect: no collective may run inside DDP's forward
            self._metrics[mode][name].append(self.accelerator.gather_for_metrics(value.detach()).mean().item())
        return (loss, None) if return_outputs else loss

    def _sft_and_distillation(
        self, core: PreTrainedModel, inputs: dict[str, Any], targets: PerceptionTargets, num_items_in_batch
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        # TRL's fused loss calls the base model and keeps nothing but token losses: a hook sees its hidden states.
        seen = {}
        hook = core.base_model.register_forward_hook(lambda module, args, output: seen.update(hidden=output[0]))
        try:
            with self.accelerator.autocast():
                sft = super().compute_loss(core, dict(inputs), num_items_in_batch=num_items_in_batch)
                latents, signals = self._decode(core, seen["hidden"], inputs)
        finally:
            hook.remove()
        terms = {"loss_sft": self._natural_sft(sft, inputs, num_items_in_batch)}
        zero = sft.new_zeros(len(latents))
        ld = ed = zero
        if self.args.distill_latent:
            if targets.latents is None:
                raise ValueError("The teacher gives no latents; set `distill_latent=False`, or let it give them.")
            ld = latent_distillation_loss(latents, targets.latents, reduction="none")
        if signals:
            ed, values = explicit_distillation_loss(
                signals,
                targets.signals,
                self.args.signal_weights,
                valid=targets.valid,
                motion_kind=self.teacher.motion_kind,
                reduction="none",
            )
            terms.update({f"loss_{name}": value.mean() for name, value in values.items()})
        terms.update(loss_ld=ld.mean(), loss_ed=ed.mean())
        # Eq. A8
        return sft + self._per_video(self.args.alpha * ld + self.args.beta * ed, num_items_in_batch), terms

    def _per_video(self, losses: torch.Tensor, num_items_in_batch) -> torch.Tensor:
        """Sum of `(num_videos,)` losses over their count: of the accumulated batch when training, else of this batch."""
        if num_items_in_batch is None:
            return losses.mean()
        scale = (
            self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        )  # DDP averages gradients
        return losses.sum() * scale / self._num_videos_in_batch

    def _natural_sft(self, loss: torch.Tensor, inputs: dict[str, Any], num_items_in_batch) -> torch.Tensor:
        """Undo TRL's normalisation over the accumulated batch: the mean over this batch's own answer tokens."""
        if num_items_in_batch is None:
            return loss.detach()
        scale = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        num_tokens = (inputs["labels"][:, 1:] != IGNORE_INDEX).sum().clamp(min=1)
        return loss.detach() * num_items_in_batch / (num_tokens * scale)

    def perception_targets(self, inputs: dict[str, Any], truth: dict[str, torch.Tensor] | None) -> PerceptionTargets:
        """What the teacher perceives in the videos of a batch (Eq. 1 and 2), without gradient."""
        processor = self.processing_class.video_processor
        return self.teacher.perceive(
            inputs["pixel_values_videos"],
            image_mean=processor.image_mean,
            image_std=processor.image_std,
            truth=truth,
        )

    def _decode(
        self, core: PreTrainedModel, hidden_states: torch.Tensor, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Eq. 3 and 4: hidden states of the frame tokens -> the student's latents and its decoded signals."""
        num_videos, num_frames = inputs["pixel_values_videos"].shape[:2]
        frames = frame_hidden_states(
            hidden_states,
            inputs["input_ids"],
            core.config.video_token_id,
            num_videos,
            num_frames,
            core.config.frame_grid,
        )
        latents = self.perception_decoder(frames.to(self.perception_decoder.dtype))
        return latents, self.teacher.decode(latents, tuple(self.args.signal_weights)) if self.args.signals else {}

    @torch.no_grad()
    def perceive(self, rows: list[dict[str, Any]]) -> tuple[dict[str, Any], dict[str, torch.Tensor], PerceptionTargets]:
        """What the student perceives now in the videos of `rows`, beside the teacher.

        Returns: the batch that the collator made of `rows`, the student's signals `{name: (num_videos, C, N, H, W)}`, and
        the teacher's targets.
        """
        core = self._core(self.model)
        was_training = core.training
        core.eval()
        inputs = self._prepare_inputs(self.data_collator(rows))
        truth, labels = inputs.pop("perception_truth", None), inputs.pop("labels")
        with self.accelerator.autocast():
            hidden_states = core.base_model(**inputs, use_cache=False).last_hidden_state
            _, signals = self._decode(core, hidden_states, inputs)
        core.train(was_training)
        return {**inputs, "labels": labels}, signals, self.perception_targets(inputs, truth)

    # --------------------------------------------------------------------------------------------------- checkpoints

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        super().save_model(output_dir, _internal_call)
        if self.perception_decoder is not None and self.args.should_save:
            self.perception_decoder.save_pretrained(os.path.join(output_dir or self.args.output_dir, DECODER_FOLDER))

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.perception_decoder is not None:
            folder = os.path.join(resume_from_checkpoint, DECODER_FOLDER)
            if not os.path.isdir(folder):
                raise ValueError(
                    f"{resume_from_checkpoint} has no {DECODER_FOLDER} folder: it comes from a run without a teacher. "
                    "Resume it without one, or start a new run from it."
                )
            saved = PerceptionDecoder.from_pretrained(folder)
            self.perception_decoder.load_state_dict(saved.state_dict())

    def create_model_card(self, *args, **kwargs):
        """Writes nothing: TRL would overwrite README.md with a text-only quick start. `hub_cards` writes the card."""


def freeze_untrained_parts(model: PreTrainedModel, trainable: list[str]) -> None:
    """Let only the named parts of an `RGPT4DForConditionalGeneration` take gradients (Table 7).

    Args: `trainable`, any of `"vision"`, `"projector"`, `"llm"`; the output head goes with the LLM.
    """
    parts = {
        "vision": [model.model.vision_tower],
        "projector": [model.model.multi_modal_projector],
        "llm": [model.model.language_model, model.lm_head],
    }
    for name, modules in parts.items():
        for module in modules:
            module.requires_grad_(name in trainable)
