"""Training with Perceptual 4D Distillation: settings, trainer, losses, teachers, and pictures of what is perceived."""

from .collator import P4DCollator
from .losses import explicit_distillation_loss, latent_distillation_loss
from .p4d_config import P4DConfig
from .p4d_trainer import P4DTrainer, freeze_untrained_parts
from .perception_pictures import PerceptionPictures, draw_perception
from .signal_errors import MeanWithInterval, signal_errors
from .teachers import GroundTruthTeacher, L4PTeacher, PerceptionTargets

__all__ = [
    "GroundTruthTeacher",
    "L4PTeacher",
    "MeanWithInterval",
    "P4DCollator",
    "P4DConfig",
    "P4DTrainer",
    "PerceptionPictures",
    "PerceptionTargets",
    "draw_perception",
    "explicit_distillation_loss",
    "freeze_untrained_parts",
    "latent_distillation_loss",
    "signal_errors",
]
