"""Checks that transformers runs on every model of its own, run on ours: `make contract`.

They come from the source distribution of the installed transformers, whose unpacked folder the environment variable
`TRANSFORMERS_TESTS` names, and are never copied here. That distribution holds `tests/test_*.py` alone. Four files that
these import are absent from it: the checks of generation and of exporting, which are therefore not run; values for the
check of configurations without parts; and a function that fetches media, for which `local_medium` stands. From a git
checkout of the same version, which has them, the first three would be used. That was never tried.
"""

import functools
import importlib
import os
import re
import sys
import tempfile
import unittest
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import av
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.auto import modeling_auto

from examples.make_small_model import build_tokenizer
from modeling_rgpt4d import (
    RGPT4DConfig,
    RGPT4DForConditionalGeneration,
    RGPT4DImageProcessor,
    RGPT4DModel,
    RGPT4DProcessor,
    RGPT4DVideoProcessor,
)
from modeling_rgpt4d.video_processing_rgpt4d import flatten_videos
from tests.modeling_rgpt4d.test_modeling_rgpt4d import TEXT as TINY_TEXT
from tests.modeling_rgpt4d.test_modeling_rgpt4d import VISION


def folder_of_checks() -> Path:
    """The folder named by `TRANSFORMERS_TESTS`, if it fits the installed transformers; skips this module otherwise."""
    name = os.environ.get("TRANSFORMERS_TESTS")
    if not name:
        pytest.skip("TRANSFORMERS_TESTS names no folder; `make contract` fetches it", allow_module_level=True)
    folder = Path(name).resolve()
    init = folder / "src" / "transformers" / "__init__.py"
    if not (folder / "tests" / "test_modeling_common.py").is_file() or not init.is_file():
        pytest.skip(f"{folder} holds no transformers source with its tests", allow_module_level=True)
    version = re.search(r'^__version__ = "(.+)"$', init.read_text(encoding="utf-8"), re.MULTILINE)
    if version is None or version[1] != transformers.__version__:
        found = version[1] if version else "an unknown version"
        pytest.skip(f"{folder} is of {found}, and {transformers.__version__} is installed", allow_module_level=True)
    return folder


FOLDER = folder_of_checks()
STAND_INS = {
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    # read for configurations without parts only, and ours has two
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def import_checks(name: str) -> ModuleType:
    """Import `tests/<name>.py` of transformers, in a package of another name: `tests` is ours."""
    return importlib.import_module(f"transformers_checks.{name}")


def prepare_package():
    package = ModuleType("transformers_checks")
    package.__path__ = [str(FOLDER / "tests")]
    sys.modules[package.__name__] = package
    for name, content in STAND_INS.items():
        if not (FOLDER / "tests" / name.replace(".", "/")).with_suffix(".py").is_file():
            parent, _ = name.split(".")
            for part in (parent, name):
                module = sys.modules.setdefault(f"{package.__name__}.{part}", ModuleType(f"{package.__name__}.{part}"))
            vars(module).update(content)
    fetch = ModuleType("fetch_hub_objects_for_ci")
    fetch.url_to_local_path = local_medium
    sys.modules[fetch.__name__] = fetch


MEDIA = tempfile.TemporaryDirectory(prefix="contract-media-")


def local_medium(url: str) -> str:
    """What stands in for the pictures and videos that the checks take from the Hub, made of noise: 11 frames a video."""
    path = Path(MEDIA.name) / url.rsplit("/", 1)[-1]
    noise = np.random.default_rng(0)
    if path.suffix in (".png", ".jpg"):
        Image.fromarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(path)
    elif path.suffix == ".mp4":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("mpeg4", rate=Fraction(30))
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            for _ in range(11):
                frame = av.VideoFrame.from_ndarray(noise.integers(0, 256, (48, 64, 3), dtype=np.uint8), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return str(path)


prepare_package()
# The checks choose heads and labels by the names of classes
modeling_auto.MODEL_MAPPING_NAMES["rgpt4d"] = "RGPT4DModel"
modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["rgpt4d"] = "RGPT4DForConditionalGeneration"
modeling = import_checks("test_modeling_common")
with patch("transformers.utils.direct_transformers_import"):  # needs an `__init__.py` that the distribution lacks
    configuration = import_checks("test_configuration_common")
processing = import_checks("test_processing_common")
image_processing = import_checks("test_image_processing_common")

# Placeholders stay below the smallest table that the checks shrink embeddings to, and above all words
IMAGE, VIDEO, FRAME_END = 78, 79, 10
TEXT = TINY_TEXT | {"bos_token_id": 1, "eos_token_id": 2}


class RGPT4DModelTester:
    """A tiny model, and questions that each come with an image and a video of two or three frames."""

    def __init__(self):
        # 7 because the check of attention back ends fills smaller batches up with random pixels and ids
        self.batch_size, self.seq_length, self.is_training = 7, 28, True
        self.text_config, self.vision_config = TEXT, VISION
        # the checks read these from here
        self.hidden_size, self.vocab_size = TEXT["hidden_size"], TEXT["vocab_size"]
        self.num_hidden_layers, self.num_attention_heads = TEXT["num_hidden_layers"], TEXT["num_attention_heads"]

    def get_config(self) -> RGPT4DConfig:
        return RGPT4DConfig(
            text_config=TEXT,
            vision_config=VISION,
            image_token_id=IMAGE,
            video_token_id=VIDEO,
            frame_end_token_id=FRAME_END,
            time_cue="tpe",
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        tokens = config.frame_grid**2
        input_ids = torch.randint(11, IMAGE, (self.batch_size, self.seq_length))
        times = torch.randint(1, 5_000_000, (self.batch_size, 3)).cumsum(1)
        times[1::2, 2] = -1  # every other video has a frame less
        for ids, num_frames in zip(input_ids, (times >= 0).sum(1).tolist(), strict=True):
            media = [IMAGE] * tokens + [FRAME_END] + ([VIDEO] * tokens + [FRAME_END]) * num_frames
            ids[2 : 2 + len(media)] = torch.tensor(media)
        inputs = {
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
            "pixel_values": torch.rand(self.batch_size, 3, 56, 56) * 2 - 1,
            "pixel_values_videos": torch.rand(self.batch_size, 3, 3, 56, 56) * 2 - 1,
            "video_timestamps": times,  # microseconds, because the checks cast all floats to half precision
        }
        return config, inputs


class RGPT4DModelTest(modeling.ModelTesterMixin, modeling.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (RGPT4DModel, RGPT4DForConditionalGeneration)
    _is_composite = True
    additional_model_inputs = ["pixel_values", "pixel_values_videos", "video_timestamps"]
    # What comes after `vision_feature_layer` in the tower is not used, as in LLaVA. Which parameters learn is tested in
    # tests/modeling_rgpt4d
    test_all_params_have_gradient = False
    test_can_init_all_missing_weights_before_2023 = True  # runs it for a file without a year, too
    # The tower sees frames, and only real ones, so its output has no axis of videos. `pooler_output` has, and is checked
    skip_test_video_features_output_shape = True

    def setUp(self):
        self.model_tester = RGPT4DModelTester()
        self.config_tester = configuration.ConfigTester(self, config_class=RGPT4DConfig, has_text_modality=False)
        # Random ids are words: our model refuses placeholders without pixels
        ids_tensor = modeling.ids_tensor
        words = patch.object(
            modeling, "ids_tensor", lambda shape, size, **kw: ids_tensor(shape, min(size, IMAGE), **kw)
        )
        words.start()
        self.addCleanup(words.stop)

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_generation_tester_mixin_inheritance(self):
        if modeling.GenerationTesterMixin is STAND_INS["generation.test_utils"]["GenerationTesterMixin"]:
            self.skipTest("not in the distribution: tests/generation (see test_generation.py here) and tests/exporters")
        super().test_generation_tester_mixin_inheritance()


def with_times(preprocess):
    """The checks give frames alone. They have no times, and for our processor they must: here they get 30 a second."""

    @functools.wraps(preprocess)
    def wrapped(self, videos, **kwargs):
        flat = flatten_videos(videos)
        if not kwargs.get("video_metadata") and not isinstance(flat[0], str):
            kwargs["video_metadata"] = [{"fps": 30}] * len(flat)
        return preprocess(self, videos, **kwargs)

    return wrapped


class RGPT4DProcessorTest(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = RGPT4DProcessor

    @classmethod
    def setUpClass(cls):
        # As in transformers, where a processor is no remote code: saving one enters a map of its files
        cls.enterClassContext(patch.object(RGPT4DProcessor, "_auto_class", None))
        preprocess = with_times(RGPT4DVideoProcessor.preprocess)
        cls.enterClassContext(patch.object(RGPT4DVideoProcessor, "preprocess", preprocess))
        # `AutoVideoProcessor` needs torchvision
        auto = {name: processing.MODALITY_TO_AUTOPROCESSOR_MAPPING[name] for name in ("image_processor", "tokenizer")}
        auto["video_processor"] = RGPT4DVideoProcessor
        cls.enterClassContext(patch.object(processing, "MODALITY_TO_AUTOPROCESSOR_MAPPING", auto))
        super().setUpClass()

    @classmethod
    def _setup_image_processor(cls):
        return RGPT4DImageProcessor(size={"height": 56, "width": 56})

    @classmethod
    def _setup_video_processor(cls):
        return RGPT4DVideoProcessor(size={"height": 56, "width": 56})

    @classmethod
    def _setup_tokenizer(cls):
        return build_tokenizer(["lower newer", "upper older longer string", "What is shown in this video?"] * 2, 400)

    @staticmethod
    def prepare_processor_dict():
        return {"frame_grid": 2}

    @property
    def video_sampling_expectations(self):  # of 11 frames, 30 a second
        return [
            {"num_frames": 3, "fps": None, "expected_dim": 1, "output_length": 3},
            {"num_frames": None, "fps": 10, "expected_dim": 1, "output_length": 4},  # at 0, 0.1, 0.2 and 0.3 s
            {"do_sample_frames": False, "expected_dim": 1, "output_length": 11},
            {"expected_dim": 1, "output_length": 16},  # as the processor says; frames of a short video repeat
        ]

    def test_replacement_offsets(self):
        # The text ends a frame by a placeholder, whose id is then exchanged. Engines encode the replacements instead, so
        # these hold the token itself, and are not that part of the text: tests/modeling_rgpt4d/test_vllm_contract.py
        self.skipTest("replacements are written for engines and are not a part of our text")

    def test_apply_chat_template_video_frame_sampling(self):
        # It ends with a list of pictures' paths as one video. For ours each path of a list is a video
        with self.assertRaisesRegex(ValueError, "1 placeholders <video> and 2 videos are given"):
            super().test_apply_chat_template_video_frame_sampling()


class RGPT4DImageProcessingTester(image_processing.ImageProcessingTester):
    def __init__(self, parent, **kwargs):
        super().__init__(parent, **{"size": {"height": 18, "width": 20}} | kwargs)

    def _get_image_processing_classes(self):
        return {"pil": RGPT4DImageProcessor}


class RGPT4DImageProcessingTest(image_processing.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = RGPT4DImageProcessingTester

    def test_new_models_require_torchvision_backend(self):
        self.skipTest("ours works without torchvision, by PIL alone, whose pixels are those that NVILA was trained on")
