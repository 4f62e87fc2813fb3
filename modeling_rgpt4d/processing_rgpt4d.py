"""Conversations with pictures, videos and named regions to the inputs of 4D-RGPT."""

import base64
import re
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.image_utils import make_flat_list_of_images
from transformers.processing_utils import MultiModalData, ProcessorMixin

from .image_processing_rgpt4d import RGPT4DImageProcessor
from .region_marks import names_in_text, region_name, rewrite_names
from .time_marks import time_prompt
from .video_processing_rgpt4d import RGPT4DVideoProcessor, VideoProcessorMixin, flatten_videos, per_video

try:  # under `sanitize_control_tokens` a user's own "<video>" is marked as plain text; this pattern passes over it
    from transformers.processing_utils import _UNMARKED as UNMARKED
except ImportError:
    UNMARKED = ""

try:  # messages may be objects of dataclasses or of pydantic, as the clients of servers give them
    from transformers.utils.chat_template_utils import _message_objects_to_dicts as messages_as_dicts
except ImportError:  # before transformers 5.24 they are dicts

    def messages_as_dicts(messages: Any) -> Any:
        return messages


# The "qwen2" conversation of NVILA: its system prompt has no full stop, every message is stripped, media stand where they
# are written. The generation tags tell which tokens the loss is on: the answer and the token that ends it.
CHAT_TEMPLATE = """\
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages if message['content'] is defined -%}
{%- set body = namespace(text='') -%}
{%- if message['content'] is string -%}
{%- set body.text = message['content'] -%}
{%- else -%}
{%- for block in message['content'] -%}
{%- if block['type'] == 'text' -%}
{%- set body.text = body.text + block['text'] -%}
{%- elif block['type'] == 'image' -%}
{%- set body.text = body.text + '<image>' -%}
{%- elif block['type'] == 'video' -%}
{%- set body.text = body.text + '<video>' -%}
{%- else -%}
{{- raise_exception('a message holds blocks of type text, image or video, got ' + block['type']) -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- body.text | trim + '<|im_end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- body.text | trim + '<|im_end|>' -}}
{%- endif -%}
{{- '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""
SOURCE_KEYS = {"image": ("image", "path", "url", "base64"), "video": ("video", "path", "url")}
OTHER_KEYS = {"image": ("regions", "marked"), "video": ("regions", "marked", "fps", "frames_indices")}
TIME_CUES = ("none", "mark", "prompt")


class RGPT4DBatchFeature(BatchFeature):
    """Model inputs whose `video_timestamps` stay float32 when the batch is cast.

    bfloat16 has 8 significant bits: 100.3 s would become 100.5 s, and the positions of frames would move.
    """

    def to(self, *args, **kwargs) -> "RGPT4DBatchFeature":
        timestamps = self.data.get("video_timestamps")
        super().to(*args, **kwargs)
        if isinstance(timestamps, torch.Tensor):
            self.data["video_timestamps"] = timestamps.to(self.data["video_timestamps"].device)
        return self


class RGPT4DProcessor(ProcessorMixin):
    """Image processor, video processor, tokenizer and chat template of 4D-RGPT in one.

    A message may carry pictures and videos, and both may carry regions, which are drawn on the picture or on the first
    sampled frame and named in the text:

        [{"role": "user", "content": [
            {"type": "video", "video": "street.mp4", "regions": [{"name": "obj_1", "box": [10, 20, 60, 80]}]},
            {"type": "text", "text": "How fast is <obj_1> moving?"}]}]

    - `"video"` is anything that `decode_video` reads, or a data URL with base64; arrays and folders of frames need `"fps"`
      beside it, and `"frames_indices"`, which frames of the source they are, if they were sampled before.
    - `"regions"` are as `draw_marks` takes them, in pixels of the source frame.
    - `"marked": ["obj_1"]` says that the picture shows these marks already, as the pictures of R4D-Bench do.
    - `<R1>` and `<R_1>` in a text are read as `<obj_1>`. Every name used in a conversation must be given in it.

    Each image becomes `image_token` x `frame_grid`^2 and a frame end, each video the same with `video_token` for every
    frame. The image of a conversation that has no other image and no video may be tiled instead, as NVILA does it and
    `RGPT4DImageProcessor.image_aspect_ratio` says: by `"dynamic"` each tile becomes such a sequence and a newline of the
    text, by `"dynamic_s2"` the blocks of tiles one large grid of `image_token` and one frame end. A frame ends with an ordinary token of the vocabulary (in NVILA the newline). In the text it is written
    `frame_end_placeholder`, and its id is exchanged after tokenisation: a newline in the text would merge with one that
    follows it into another token.

    The time cue (arXiv 2512.17012, Table 6) is saved with the processor, so that training, generation and evaluation
    have the same; `from_pretrained(folder, time_cue="mark")` changes it:

    - `"none"`: the processor tells the model no times, which TPE, a part of the model, adds to the features of frames.
    - `"mark"`: every frame of a video shows its seconds, see `draw_time`.
    - `"prompt"`: a sentence with the duration and the rate of each video stands before its frames, as if it were
      written there in the message, see `time_prompt`.

    Args:
        frame_grid (`int`): an image or a frame is frame_grid x frame_grid tokens; the model's `config.frame_grid`.
        frame_end_token (`str`): one token of the vocabulary.
        frame_end_placeholder (`str`): a special token of the tokenizer that the model never sees.
        time_cue (`str`): `"none"`, `"mark"` or `"prompt"`. TPE is the model's: `RGPT4DConfig.time_cue`.

    Raises: `ValueError` for an unknown `time_cue`, a wrong `frame_grid`, and what is not one token of the tokenizer.
    """

    def __init__(
        self,
        image_processor=None,
        video_processor=None,
        tokenizer=None,
        chat_template=None,
        image_token="<image>",
        video_token="<video>",
        frame_end_token="\n",
        frame_end_placeholder="<|frame_end|>",
        frame_grid=11,
        time_cue="none",
    ):
        if not isinstance(frame_grid, int) or frame_grid < 1:
            raise ValueError(f"frame_grid must be a positive whole number, got {frame_grid!r}")
        self.image_token, self.video_token = image_token, video_token
        self.frame_end_token, self.frame_end_placeholder = frame_end_token, frame_end_placeholder
        if time_cue not in TIME_CUES:
            raise ValueError(
                f"unknown time_cue {time_cue!r} of the processor: choose one of {TIME_CUES}. The timestamp encoding 'tpe' "
                "is a part of the model: set it in its config"
            )
        self.frame_grid, self.time_cue = frame_grid, time_cue
        if chat_template is None:
            chat_template = CHAT_TEMPLATE.replace("<image>", image_token).replace("<video>", video_token)
        super().__init__(image_processor, video_processor, tokenizer, chat_template=chat_template)
        self.image_token_id = self._single_id(image_token)
        self.video_token_id = self._single_id(video_token)
        self.frame_end_token_id = self._single_id(frame_end_token)
        self.frame_end_placeholder_id = self._single_id(frame_end_placeholder)

    def _single_id(self, token: str) -> int:
        ids = self.tokenizer.encode(token, add_special_tokens=False)
        if len(ids) != 1:
            raise ValueError(
                f"{token!r} must be one token of the tokenizer, and is {len(ids)}; add it with "
                f'tokenizer.add_special_tokens({{"additional_special_tokens": [{token!r}]}})'
            )
        return ids[0]

    # The two methods below exist because transformers finds video processors through torchvision's classes only: without
    # torchvision its own versions can neither construct nor load a processor that has one.
    def check_argument_for_proper_class(self, argument_name: str, argument: Any):
        if argument_name == "video_processor":
            if not isinstance(argument, VideoProcessorMixin):
                raise TypeError(f"video_processor must be an RGPT4DVideoProcessor, got {type(argument).__name__}")
            return VideoProcessorMixin
        if argument_name == "image_processor":
            if not isinstance(argument, RGPT4DImageProcessor) and not hasattr(argument, "fetch_images"):
                raise TypeError(f"image_processor must be an RGPT4DImageProcessor, got {type(argument).__name__}")
            return type(argument)
        return super().check_argument_for_proper_class(argument_name, argument)

    @classmethod
    def _get_arguments_from_pretrained(cls, pretrained_model_name_or_path, processor_dict=None, **kwargs):
        kwargs.pop("time_cue", None)  # of this class alone: the tokenizer would take it, and save it, as its own
        own = {key: value for key, value in kwargs.items() if key != "trust_remote_code"}
        return [
            RGPT4DImageProcessor.from_pretrained(pretrained_model_name_or_path, **own),
            RGPT4DVideoProcessor.from_pretrained(pretrained_model_name_or_path, **own),
            cls._load_tokenizer_from_pretrained("tokenizer", pretrained_model_name_or_path, **kwargs),
        ]

    def apply_chat_template(self, conversation, chat_template=None, processor_kwargs=None, tokenize=False, **kwargs):
        """Render conversations, and with `tokenize=True, return_dict=True` make model inputs of them.

        As `ProcessorMixin.apply_chat_template`; options of the processor, such as `num_frames`, go into `processor_kwargs`.
        Neither the messages nor `processor_kwargs` are changed. See the class for what a message may hold.

        Raises: `ValueError` if a block of a message cannot be understood, and as `__call__` does.
        """
        if kwargs.get("return_assistant_tokens_mask") and not hasattr(
            ProcessorMixin, "_adjust_assistant_masks_indices"
        ):
            # 5.17 forgets that placeholders grow: its masks are shifted or empty, and training would learn from nothing
            raise ValueError(
                "return_assistant_tokens_mask needs transformers 5.23 or newer; run `pip install -U transformers`"
            )
        conversation, media = _read_conversations(conversation)
        processor_kwargs = dict(processor_kwargs or {})
        if tokenize:
            twice = sorted(set(media) & set(processor_kwargs))
            if twice:
                raise ValueError(f"{twice} are given in the messages and in processor_kwargs; give them once")
            processor_kwargs.update(media)
        return super().apply_chat_template(
            conversation, chat_template=chat_template, processor_kwargs=processor_kwargs, tokenize=tokenize, **kwargs
        )

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        *,
        regions: list | None = None,
        image_regions: list | None = None,
        marked: list | None = None,
        **kwargs,
    ) -> RGPT4DBatchFeature:
        """Make model inputs of texts with placeholders, their images and their videos.

        Args:
            images: one or a (nested) list, in reading order over the batch; see `RGPT4DImageProcessor`.
            text (`str | list[str]`): one placeholder `<image>` or `<video>` for each.
            videos: one or a (nested) list, in reading order over the batch; see `RGPT4DVideoProcessor`.
            regions (`list`, *optional*): for each video None or its list of regions.
            image_regions (`list`, *optional*): for each image None or its list of regions.
            marked (`list`, *optional*): for each text None or the names that its pictures show already.
            kwargs: options of the tokenizer (`padding`, `return_tensors`), the video processor (`num_frames`, `fps`,
                `video_metadata`) and the image processor.

        Returns: `input_ids`, `attention_mask`, and where there are images or videos `pixel_values
            (num_images, 3, H, W)`, `pixel_values_videos (num_videos, num_frames, 3, H, W)` and
            `video_timestamps (num_videos, num_frames)` float32 seconds, -1 for frames that fill up a shorter video.
            With `return_unmarked=True` also `unmarked_pixel_values_videos`, see `RGPT4DVideoProcessor`.
        Raises: `ValueError` if placeholders and media do not match, a name is used and not given, or a medium or region
            is not as expected.
        """
        if kwargs.pop("audio", None) is not None:
            raise ValueError("4D-RGPT has no audio input; leave out audio")
        videos = None if videos is None else flatten_videos(videos)
        images = (
            None
            if images is None
            else make_flat_list_of_images(self.image_processor.fetch_images(_without_empty(images)))
        )
        if text is not None:
            text = [text] if isinstance(text, str) else list(text)
            if not all(isinstance(sample, str) for sample in text):
                raise ValueError("text must be a string or a list of strings")
            text = [rewrite_names(sample) for sample in text]
        regions = per_video(regions, videos or [], "regions")
        image_regions = per_video(image_regions, images or [], "image_regions")
        if text is not None:
            self._check_text(text, images or [], videos or [], regions, image_regions, marked)
        for modality, values in (("videos_kwargs", regions), ("images_kwargs", image_regions)):
            if any(values):
                kwargs[modality] = {**(kwargs.get(modality) or {}), "regions": values}
        if images and text is not None and self.image_processor.image_aspect_ratio != "resize":
            kwargs["images_kwargs"] = {**(kwargs.get("images_kwargs") or {}), "tiled": self._may_be_tiled(text)}
        features = super().__call__(images=images or None, text=text, videos=videos or None, **kwargs)
        if "input_ids" in features:
            features["input_ids"] = self._end_frames(features["input_ids"])
        # Engines encode these texts one by one, where the frame end merges with nothing, and know no exchange of ids
        for offset in (o for offsets in features.get("text_replacement_offsets", ()) for o in offsets):
            offset["replacement"] = offset["replacement"].replace(self.frame_end_placeholder, self.frame_end_token)
        return RGPT4DBatchFeature(features.data, skip_tensor_conversion=features.skip_tensor_conversion)

    def _check_text(self, text: list[str], images: list, videos: list, regions: list, image_regions: list, marked: Any):
        """Placeholders match the media, and every name in a text is given by its own media."""
        if marked is not None and len(marked) != len(text):
            raise ValueError(
                f"marked: got {len(marked)} entries for {len(text)} texts; give one for each, None where none is"
            )
        remaining = {}
        for token, media, what in ((self.image_token, images, "images"), (self.video_token, videos, "videos")):
            counts = self._count(token, text)
            if sum(counts) != len(media):
                raise ValueError(
                    f"the number of {token} tokens in the prompts should be the same as the number of {what} given: the "
                    f"text has {sum(counts)} placeholders {token} and {len(media)} {what} are given"
                )
            remaining[what] = counts
        regions, image_regions = iter(regions), iter(image_regions)
        for i, sample in enumerate(text):
            if re.search(UNMARKED + re.escape(self.frame_end_placeholder), sample):
                raise ValueError(
                    f"a text holds {self.frame_end_placeholder}, which the processor itself inserts; remove it"
                )
            given = {region_name(name) for name in (marked[i] or [] if marked is not None else [])}
            for iterator, count in ((regions, remaining["videos"][i]), (image_regions, remaining["images"][i])):
                for _ in range(count):
                    # a region without a good name is reported when it is drawn, together with its file
                    given.update(name for name in map(_name_or_none, next(iterator) or []) if name is not None)
            missing = [f"<{name}>" for name in names_in_text(sample) if name not in given]
            if missing:
                known = ", ".join(f"<{name}>" for name in sorted(given)) or "none"
                raise ValueError(
                    f"the text of conversation {i} uses {', '.join(missing)}, and the regions given are: {known}. Give "
                    f'"regions": [{{"name": "{missing[0][1:-1]}", "box": [x1, y1, x2, y2]}}] beside the video or image, or '
                    f'"marked": ["{missing[0][1:-1]}"] if a picture shows the mark already'
                )

    def _count(self, token: str, text: list[str]) -> list[int]:
        return [len(re.findall(UNMARKED + re.escape(token), sample)) for sample in text]

    def _may_be_tiled(self, text: list[str]) -> list[bool]:
        """For each image whether it is the only medium of its text."""
        counts = zip(self._count(self.image_token, text), self._count(self.video_token, text), strict=True)
        return [num_images == 1 and num_videos == 0 for num_images, num_videos in counts for _ in range(num_images)]

    def validate_inputs(self, images=None, text=None, videos=None, audio=None, **kwargs):
        # Placeholders were counted in `__call__`. The inherited check would refuse videos that are bytes or dicts.
        if images is None and text is None and videos is None:
            raise ValueError("give at least one of text, images and videos")

    def _process_images(self, images: list, **kwargs):
        processed = self.image_processor(images, **kwargs)
        replacements = [self.replace_image_token(processed, i, kwargs.get("tiled")) for i in range(len(images))]
        for name in ("num_tiles", "num_blocks"):  # the text now tells
            processed.pop(name, None)
        return processed, replacements

    def _process_videos(self, videos: list, **kwargs):
        if self.time_cue == "mark":
            kwargs.setdefault("time_marks", True)
        if self.time_cue == "prompt":
            kwargs["return_metadata"] = True  # `ProcessorMixin` removes it, unless the caller wants it
        processed = self.video_processor(videos, **kwargs)
        return processed, [self.replace_video_token(processed, i) for i in range(len(videos))]

    def replace_image_token(self, image_inputs: dict, image_idx: int, tiled: list | None = None, **kwargs) -> str:
        one = self.image_token * self.frame_grid**2
        if "num_blocks" in image_inputs:
            return one * image_inputs["num_blocks"][image_idx] + self.frame_end_placeholder
        one += self.frame_end_placeholder
        if "num_tiles" not in image_inputs or (tiled is not None and not tiled[image_idx]):
            return one
        # The newline is text: it merges with one that the question starts with, as in NVILA. It follows a single tile, too.
        return (one + "\n") * image_inputs["num_tiles"][image_idx]

    def replace_video_token(self, video_inputs: dict, video_idx: int, **kwargs) -> str:
        num_frames = int((np.asarray(video_inputs["video_timestamps"][video_idx]) >= 0).sum())
        frames = (self.video_token * self.frame_grid**2 + self.frame_end_placeholder) * num_frames
        if self.time_cue != "prompt":
            return frames
        video = video_inputs["video_metadata"][video_idx]
        return time_prompt(video.duration, video.fps) + frames

    def _end_frames(self, input_ids: Any) -> Any:
        """Ids with the placeholder's exchanged for the token that ends a frame; tensor, array or nested lists."""
        old, new = self.frame_end_placeholder_id, self.frame_end_token_id
        if isinstance(input_ids, torch.Tensor):
            return torch.where(input_ids == old, new, input_ids)
        if isinstance(input_ids, np.ndarray) and input_ids.dtype != object:
            return np.where(input_ids == old, new, input_ids)
        return [
            self._end_frames(ids) if not isinstance(ids, int | np.integer) else new if ids == old else ids
            for ids in input_ids
        ]

    def create_mm_token_type_ids(self, input_ids: list) -> list[list[int]]:
        """As `ProcessorMixin`'s, with the end of a frame as part of its image (1) or video (2)."""
        token_types = super().create_mm_token_type_ids(input_ids)
        for ids, types in zip(input_ids, token_types, strict=True):
            for i in range(1, len(types)):
                if ids[i] == self.frame_end_placeholder_id:
                    types[i] = types[i - 1]
        return token_types

    def _get_num_multimodal_tokens(self, image_sizes=None, video_sizes=None, **kwargs) -> MultiModalData:
        """Tokens that media of given sizes take, which vLLM asks before it has seen any.

        As in `create_mm_token_type_ids`, these are placeholders and frame ends; the sentence of `time_cue="prompt"` is
        text.

        Args:
            image_sizes (`list[tuple[int, int]]`, *optional*): height and width of each image of one conversation.
            video_sizes (`list[tuple[int, int, int]]`, *optional*): sampled frames, height and width of each video.
        """
        per_frame, data = self.frame_grid**2 + 1, {}
        if image_sizes is not None:
            mode = self.image_processor.image_aspect_ratio
            data["num_image_tokens"] = [per_frame] * len(image_sizes)
            data["num_image_patches"] = [1] * len(image_sizes)
            if mode != "resize" and len(image_sizes) == 1 and not video_sizes:
                (height, width), *_ = image_sizes
                num_tiles, grid = self.image_processor.count_tiles(width, height)
                data["num_image_patches"] = [num_tiles]
                data["num_image_tokens"] = [
                    (per_frame + 1) * num_tiles
                    if mode == "dynamic"
                    else (per_frame - 1) * self.image_processor.count_blocks(*grid) + 1
                ]
        if video_sizes is not None:
            data["num_video_tokens"] = [per_frame * num_frames for num_frames, *_ in video_sizes]
        return MultiModalData(**data)


def _without_empty(images: Any) -> Any:
    """A batch of lists with one list for each text, without those of texts that have no image."""
    if isinstance(images, list | tuple):
        return [_without_empty(image) for image in images if not (isinstance(image, list | tuple) and len(image) == 0)]
    return images


def _name_or_none(region: Any) -> str | None:
    try:
        return region_name(region["name"])
    except (ValueError, TypeError, KeyError):
        return None


def _read_conversations(conversation: Any) -> tuple[list, dict]:
    """Fresh copies of the messages that the template and `ProcessorMixin` understand, and what their media blocks carry.

    Returns: conversations in the structure they came in, with names rewritten and media blocks reduced to
        their type and source; and the arguments `regions`, `image_regions`, `marked` and `video_metadata` of
        `RGPT4DProcessor.__call__`, each only if some block gives it.
    """
    if not isinstance(conversation, list | tuple) or not conversation:
        raise ValueError("a conversation is a list of messages {'role': ..., 'content': ...}")
    conversation = messages_as_dicts(conversation)
    is_batched = isinstance(conversation[0], list | tuple)
    regions, metadata, marked, clean = {"image": [], "video": []}, [], [], []
    for messages in conversation if is_batched else [conversation]:
        names: list[str] = []
        clean.append([])
        for message in messages:
            message = {key: value for key, value in message.items() if value is not None}
            content = message.get("content")
            if isinstance(content, str):
                message["content"] = rewrite_names(content)
            elif content is not None:
                message["content"] = [_read_block(block, regions, metadata, names) for block in content]
            clean[-1].append(message)
        marked.append(names)
    media = {
        "regions": regions["video"],
        "image_regions": regions["image"],
        "marked": marked,
        "video_metadata": metadata,
    }
    return (clean if is_batched else clean[0]), {key: values for key, values in media.items() if any(values)}


def _read_block(block: Any, regions: dict, metadata: list, marked: list) -> dict:
    """One block of a message; what it carries beside its source is appended to the three collections."""
    if not isinstance(block, dict) or "type" not in block:
        raise ValueError(f"a block of a message is a dict with a 'type', got {block!r}")
    block = {key: value for key, value in block.items() if value is not None}  # as struct columns of `datasets` fill up
    kind = block["type"]
    if kind in ("image_url", "video_url"):  # the spelling of OpenAI's interface
        address = block.pop(kind, None)
        kind = kind.removesuffix("_url")
        block = {**block, "type": kind, "url": address.get("url") if isinstance(address, dict) else address}
    if kind == "text":
        return {**block, "text": rewrite_names(block.get("text", ""))}
    if kind not in SOURCE_KEYS:
        raise ValueError(f"a message holds blocks of type text, image or video, got {kind!r}")
    unknown = sorted(set(block) - {"type", *SOURCE_KEYS[kind], *OTHER_KEYS[kind]})
    if unknown:
        raise ValueError(
            f"a block of type {kind} has unknown keys {unknown}; expected {(*SOURCE_KEYS[kind], *OTHER_KEYS[kind])}"
        )
    sources = [key for key in SOURCE_KEYS[kind] if key in block]
    if len(sources) > 1:
        raise ValueError(f"a block of type {kind} has several sources {sources}; give one")
    regions[kind].append(block.get("regions"))
    marked.extend(region_name(name) for name in block.get("marked", []))
    if kind == "video":
        metadata.append({key: block[key] for key in ("fps", "frames_indices") if key in block})
    if not sources:
        return {"type": kind}
    source = block[sources[0]]
    if kind == "video" and isinstance(source, str) and source.startswith("data:"):
        return {"type": kind, kind: _read_data_url(source)}
    return {"type": kind, sources[0]: source}


def _read_data_url(url: str) -> bytes:
    """`data:video/mp4;base64,AAAA...`, as clients of a server send a file. (Pictures are read so by transformers.)"""
    header, _, content = url.partition(",")
    try:
        if header.endswith(";base64"):
            return base64.b64decode(content, validate=True)
    except ValueError:  # told below
        pass
    raise ValueError(
        f"a video's data URL must be 'data:video/mp4;base64,' and base64 text, and begins with {url[:40]!r}"
    )


RGPT4DProcessor.register_for_auto_class()

__all__ = ["RGPT4DProcessor"]
