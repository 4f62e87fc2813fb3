"""What the Hub holds: 4D-RGPT, its processor, and what trains it: the perception decoder and the L4P teacher.

Importing this package makes transformers' Auto classes know `rgpt4d` and `l4p` without remote code.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_l4p import L4PConfig
from .configuration_rgpt4d import RGPT4DConfig
from .image_processing_rgpt4d import RGPT4DImageProcessor
from .l4p_windows import perceive_video
from .modeling_l4p import L4PModel, L4POutput
from .modeling_rgpt4d import RGPT4DForConditionalGeneration, RGPT4DModel, RGPT4DPreTrainedModel
from .perception_decoder import PerceptionDecoder, PerceptionDecoderConfig, frame_hidden_states
from .processing_rgpt4d import RGPT4DProcessor
from .region_marks import draw_marks
from .timestamp_encoding import TimestampEncoding
from .video_decoding import decode_video
from .video_processing_rgpt4d import RGPT4DVideoProcessor

AutoConfig.register("rgpt4d", RGPT4DConfig)
AutoProcessor.register(RGPT4DConfig, RGPT4DProcessor)
AutoImageProcessor.register(RGPT4DConfig, image_processor_classes={"pil": RGPT4DImageProcessor})
# One model behind every name: people call `generate` on what `AutoModel.from_pretrained` returns.
for auto_class in (AutoModel, AutoModelForImageTextToText, AutoModelForMultimodalLM, AutoModelForCausalLM):
    auto_class.register(RGPT4DConfig, RGPT4DForConditionalGeneration)
AutoConfig.register("l4p", L4PConfig)
AutoModel.register(L4PConfig, L4PModel)

__all__ = [
    "L4PConfig",
    "L4PModel",
    "L4POutput",
    "PerceptionDecoder",
    "PerceptionDecoderConfig",
    "RGPT4DConfig",
    "RGPT4DForConditionalGeneration",
    "RGPT4DImageProcessor",
    "RGPT4DModel",
    "RGPT4DPreTrainedModel",
    "RGPT4DProcessor",
    "RGPT4DVideoProcessor",
    "TimestampEncoding",
    "decode_video",
    "draw_marks",
    "frame_hidden_states",
    "perceive_video",
]
