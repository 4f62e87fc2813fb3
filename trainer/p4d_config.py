from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

SIGNALS = ("depth", "flow", "motion", "camray")
TRAINABLE_PARTS = ("vision", "projector", "llm")


@dataclass
class P4DConfig(SFTConfig):
    r"""Settings of [`P4DTrainer`]: those of `trl.SFTConfig` and the ones of Perceptual 4D Distillation (P4D).

    The total loss is Eq. A8 of arXiv 2512.17012, `L = L_SFT + alpha * L_LD + beta * L_ED`. The defaults are the paper's;
    [`P4DConfig.paper`] and [`P4DConfig.release`] also set the optimisation as published.

    Args:
        trainable (`list[str]`, defaults to `["projector", "llm"]`):
            Parts that are trained, of `"vision"` (E_V), `"projector"` (E_P) and `"llm"` (with its output head); the
            others are frozen (Table 7); `[]`, on a command line `--trainable none`, leaves the perception decoder alone, a
            probe. With a `peft_config` of your own, PEFT decides instead and this must keep its default.
        llm_lora (`bool`, defaults to `False`): train the language model by LoRA, on all its linear layers; the other
            parts of `trainable` are trained whole (Table 7). With a model loaded in 4 bits this is QLoRA.
        lora_r, lora_alpha, lora_dropout: rank, scale and dropout of that LoRA; the paper does not give its own.
        alpha (`float`, defaults to 0.5): weight of latent distillation, L_LD (Eq. 6).
        beta (`float`, defaults to 0.1): weight of explicit distillation, L_ED (Eq. 7).
        lambda_depth, lambda_flow, lambda_motion, lambda_camray (`float`): weight of each signal inside L_ED.
        distill_latent (`bool`, defaults to `True`): `False` leaves L_LD out ("ED-Only" of Table 5).
        signals (`list[str]`, defaults to all four): signals that are decoded and distilled (Table 5); `[]`, on a command
            line `--signals none`, is "LD-Only".
        decoder_kind (`str`, defaults to `"mlp"`): the paper's 3-layer MLP, or the release's `"linear"`.
        decoder_hidden_size (`int`, defaults to 2560): hidden width of the MLP.
        compile_layers (`bool`, defaults to `False`): `torch.compile` every layer of the tower, the language model and the
            teacher, for speed on a GPU; the first steps take some minutes.

    Other defaults than `SFTConfig`: `max_length=None` (a cut prompt would lose frames), `remove_unused_columns=False` and
    `dataset_kwargs={"skip_prepare_dataset": True}` (the collator reads the rows as they are: tokenised beforehand, TRL
    would drop the videos without a word).
    """

    trainable: list[str] = field(
        default_factory=lambda: ["projector", "llm"],
        metadata={"help": "Parts that are trained: any of vision, projector, llm (Table 7), or none."},
    )
    llm_lora: bool = field(default=False, metadata={"help": "Train the language model by LoRA (Table 7)."})
    lora_r: int = field(default=64, metadata={"help": "Rank of the LoRA."})
    lora_alpha: int = field(default=128, metadata={"help": "Scale of the LoRA; its updates count lora_alpha / lora_r."})
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the LoRA."})
    alpha: float = field(default=0.5, metadata={"help": "Weight of latent distillation, 'We set alpha=0.5' (A1.3)."})
    beta: float = field(default=0.1, metadata={"help": "Weight of explicit distillation, 'beta=0.1' (A1.3)."})
    lambda_depth: float = field(default=1.0, metadata={"help": "Weight of depth inside L_ED, 1.0 (A1.3)."})
    lambda_flow: float = field(default=0.1, metadata={"help": "Weight of optical flow inside L_ED, 0.1 (A1.3)."})
    lambda_motion: float = field(default=0.05, metadata={"help": "Weight of motion inside L_ED, 0.05 (A1.3)."})
    lambda_camray: float = field(default=0.05, metadata={"help": "Weight of camera rays inside L_ED, 0.05 (A1.3)."})
    distill_latent: bool = field(default=True, metadata={"help": "Whether to train L_LD."})
    signals: list[str] = field(
        default_factory=lambda: list(SIGNALS),
        metadata={"help": "Signals to distil: any of depth, flow, motion, camray, or none for LD-Only (Table 5)."},
    )
    decoder_kind: str = field(
        default="mlp",
        metadata={"help": "Perception decoder: mlp (paper) or linear (release).", "choices": ["mlp", "linear"]},
    )
    decoder_hidden_size: int = field(
        default=2560, metadata={"help": "Hidden width of the MLP decoder, 'a hidden dimension of 2,560' (A1.1)."}
    )

    compile_layers: bool = field(
        default=False, metadata={"help": "torch.compile each layer of tower, language model and teacher, for speed."}
    )

    max_length: int | None = field(default=None, metadata={"help": "Must stay unset: a cut prompt would lose frames."})
    remove_unused_columns: bool | None = field(
        default=False, metadata={"help": "Must stay False: the collator needs them."}
    )
    dataset_kwargs: dict[str, Any] | None = field(
        default_factory=lambda: {"skip_prepare_dataset": True}, metadata={"help": "Arguments of dataset preparation."}
    )

    def __post_init__(self):
        super().__post_init__()
        # A list on a command line has at least one word; `report_to` takes the same one for nothing
        self.trainable, self.signals = (
            [] if values == ["none"] else values for values in (self.trainable, self.signals)
        )
        for name, values, known in (
            ("trainable", self.trainable, TRAINABLE_PARTS),
            ("signals", self.signals, SIGNALS),
        ):
            if unknown := [value for value in values if value not in known]:
                raise ValueError(f"`{name}` has unknown entries {unknown}; choose from {list(known)}.")
        if self.max_length is not None:
            raise ValueError(
                f"`max_length` is {self.max_length}; leave it unset, because cutting a prompt would lose frames."
            )
        if self.llm_lora and "llm" not in self.trainable:
            raise ValueError("`llm_lora` trains the language model, but `trainable` leaves it out: add 'llm'.")
        for name in ("alpha", "beta", *(f"lambda_{signal}" for signal in SIGNALS)):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` is {getattr(self, name)}; a loss weight must be at least 0.")

    @property
    def signal_weights(self) -> dict[str, float]:
        """lambda_m of Eq. 7 for each signal that is distilled."""
        return {signal: getattr(self, f"lambda_{signal}") for signal in SIGNALS if signal in self.signals}

    @classmethod
    def paper(cls, output_dir: str, **overrides) -> "P4DConfig":
        """The paper's run (A1.3): 5 epochs, learning rate 1e-5, cosine with warm-up 0.03, batch 1,024 on 64 GPUs."""
        settings = {
            "num_train_epochs": 5,
            "learning_rate": 1e-5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 0.03,  # a value below 1 is a ratio of the run
            "per_device_train_batch_size": 16,  # x 64 GPUs = 1,024
        }
        return cls(output_dir=output_dir, **{**settings, **overrides})

    @classmethod
    def release(cls, output_dir: str, **overrides) -> "P4DConfig":
        """The authors' published code, which departs from the paper in weights, decoder, trained parts and epochs.

        It takes means over all frames where Eq. 6 and 7 sum, so its weights are divided here by the number of frames of
        the L4P teacher (8 latent frames, 16 signal frames) to give the same gradient.
        """
        settings = {
            "num_train_epochs": 10,
            "trainable": ["llm"],
            "alpha": 0.01 / 8,
            "beta": 1 / 16,
            "lambda_depth": 0.1,
            "lambda_flow": 0.001,
            "lambda_motion": 0.01,
            "lambda_camray": 1e-5,
            "decoder_kind": "linear",
        }
        return cls.paper(output_dir, **{**settings, **overrides})
