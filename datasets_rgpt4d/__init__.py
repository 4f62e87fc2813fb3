"""Data sets of rgpt4d."""

from .multiple_choice import answer_letter, multiple_choice_prompt, to_messages
from .world4d import CONFIGS, World4D, World4DConfig, save_world4d
from .world4d_questions import TASKS, scene_questions
from .world4d_render import render_frames, render_signals
from .world4d_sampling import combinations, sample_scene
from .world4d_scene import Camera, Room, Scene, SceneObject

__all__ = [
    "CONFIGS",
    "TASKS",
    "Camera",
    "Room",
    "Scene",
    "SceneObject",
    "World4D",
    "World4DConfig",
    "answer_letter",
    "combinations",
    "multiple_choice_prompt",
    "render_frames",
    "render_signals",
    "sample_scene",
    "save_world4d",
    "scene_questions",
    "to_messages",
]
