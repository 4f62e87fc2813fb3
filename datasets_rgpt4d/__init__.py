"""Data sets of rgpt4d."""

from .data_statistics import data_statistics, statistics_table
from .evaluation_prompts import evaluation_messages, evaluation_prompt
from .media_check import unusable_media
from .mixture import Mixture, SourceShare
from .mmsi_bench import MMSIBenchQuestions
from .multiple_choice import answer_letter, multiple_choice_prompt, to_conversation, to_messages
from .omnispatial import OmniSpatialQuestions
from .r4d_bench import R4DBenchQuestions
from .robofac import RoboFAC
from .sat_real import SATRealBothOrders, SATRealQuestions
from .sat_train import SATStatic, SATTrain
from .schema import training_messages
from .sti_bench import STIBenchQuestions
from .timebench import TimeBenchQuestions, timebench_rows
from .training_shards import write_training_shards
from .vlm4d import VLM4DQuestions, VLM4DSyntheticQuestions
from .vsti_train import VSTITrain
from .vstibench import VSTIBenchQuestions
from .wolf import WolfQA
from .world4d import CONFIGS, World4D, World4DConfig, save_world4d
from .world4d_questions import TASKS, scene_questions
from .world4d_render import render_frames, render_signals
from .world4d_sampling import combinations, sample_scene
from .world4d_scene import Camera, Room, Scene, SceneObject
from .world4d_training import World4DTraining

__all__ = [
    "CONFIGS",
    "TASKS",
    "Camera",
    "MMSIBenchQuestions",
    "Mixture",
    "OmniSpatialQuestions",
    "R4DBenchQuestions",
    "RoboFAC",
    "Room",
    "SATRealBothOrders",
    "SATRealQuestions",
    "SATStatic",
    "SATTrain",
    "STIBenchQuestions",
    "Scene",
    "SceneObject",
    "SourceShare",
    "TimeBenchQuestions",
    "VLM4DQuestions",
    "VLM4DSyntheticQuestions",
    "VSTIBenchQuestions",
    "VSTITrain",
    "WolfQA",
    "World4D",
    "World4DConfig",
    "World4DTraining",
    "answer_letter",
    "combinations",
    "data_statistics",
    "evaluation_messages",
    "evaluation_prompt",
    "multiple_choice_prompt",
    "render_frames",
    "render_signals",
    "sample_scene",
    "save_world4d",
    "scene_questions",
    "statistics_table",
    "timebench_rows",
    "to_conversation",
    "to_messages",
    "training_messages",
    "unusable_media",
    "write_training_shards",
]
