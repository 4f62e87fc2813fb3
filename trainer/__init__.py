"""Training with Perceptual 4D Distillation: settings, trainer, losses, teachers, and pictures of what is perceived."""

from .checkpoints import last_complete_checkpoint
from .collator import P4DCollator
from .losses import explicit_distillation_loss, latent_distillation_loss
from .p4d_config import P4DConfig
from .p4d_trainer import P4DTrainer
from .perception import perceive, stitch
from .perception_pictures import PerceivedVideo, PerceptionPictures, draw_perception, draw_signal
from .perception_video import write_perception_video
from .signal_errors import MeanWithInterval, signal_errors
from .teacher_cache import CachedTeacher, TeacherCache
from .teachers import GroundTruthTeacher, L4PTeacher, PerceptionTargets
from .trained_parts import freeze_untrained_parts, llm_lora_config

__all__ = [
    "CachedTeacher",
    "GroundTruthTeacher",
    "L4PTeacher",
    "MeanWithInterval",
    "P4DCollator",
    "P4DConfig",
    "P4DTrainer",
    "PerceivedVideo",
    "PerceptionPictures",
    "PerceptionTargets",
    "TeacherCache",
    "draw_perception",
    "draw_signal",
    "explicit_distillation_loss",
    "freeze_untrained_parts",
    "last_complete_checkpoint",
    "latent_distillation_loss",
    "llm_lora_config",
    "perceive",
    "signal_errors",
    "stitch",
    "write_perception_video",
]
