"""Serve a 4D-RGPT to OpenAI clients: `transformers serve`, with videos and marked regions. Takes all of its options.

    python examples/serve.py runs/p4d --port 8000

A block of a message may be {"type": "video_url", "video_url": {"url": ...}, "regions": [...]}: see examples/ask_server.py.
"""

import sys

import transformers
from transformers.cli.transformers import app
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils.import_utils import is_serve_available

from modeling_rgpt4d import RGPT4DConfig, RGPT4DForConditionalGeneration


def register_model() -> None:
    """Let the server find the class, which it looks up by name: remote code alone is not enough for it."""
    name = RGPT4DForConditionalGeneration.__name__
    setattr(transformers, name, RGPT4DForConditionalGeneration)
    # Not among the multimodal ones: of those the server wants the sound of a video, too
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[RGPT4DConfig.model_type] = name


def keep_regions() -> None:
    """Hand messages to the processor as they came. The server's own reading of them drops what is beside an address."""
    from fastapi.responses import JSONResponse
    from transformers.cli.serving import chat_completion

    class RegionChatHandler(chat_completion.ChatCompletionHandler):
        @staticmethod
        def get_processor_inputs_from_messages(messages, modality):
            return messages

        async def handle_request(self, body, request_id):
            try:
                return await super().handle_request(body, request_id)
            except ValueError as error:  # the processor says what is wrong with the message; the client should read it
                return JSONResponse({"error": {"message": str(error), "type": "invalid_request_error"}}, 400)

    chat_completion.ChatCompletionHandler = RegionChatHandler


def main() -> None:
    register_model()
    if is_serve_available():  # otherwise the server itself says what is missing
        keep_regions()
    app(["serve", *sys.argv[1:]], prog_name="serve.py")


if __name__ == "__main__":
    main()
