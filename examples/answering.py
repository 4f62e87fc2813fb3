"""Replies of a vision-language model to benchmark questions: a model in this process, or an OpenAI-compatible endpoint.

Every model sees the same pictures: those of the question, and frames sampled uniformly from its videos, with regions
drawn on the first frame. 4D-RGPT samples and draws in its own processor, by the same functions.
"""

import base64
import functools
import hashlib
import io
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from generate import add_geometry, load_teacher
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.utils import is_torchvision_available

from modeling_rgpt4d import decode_video, draw_marks

JPEG_QUALITY = 95
LONGEST_ERROR = 500  # characters kept of a message


@dataclass(frozen=True)
class Question:
    """One question of a benchmark. `messages()` reads it from the data set, and may fail where a file is damaged."""

    benchmark: str
    id: str
    messages: Callable[[], list[dict[str, Any]]]


@dataclass
class Answer:
    """What is recorded of one question.

    Attributes:
        prompt_sha256: of the roles, texts and kinds of media, in their order; `None` if they could not be read.
        reply: the whole reply; "" where there is none.
        truncated: whether the reply was cut off at the longest one.
        num_images, num_frames: pictures, and frames of all videos together, that the model was shown.
        latency_s: seconds from the inputs to the reply, reading of media apart; of a batch, divided by its size. Of an
            endpoint, with its queue and all retries.
        batch_size: how many questions were answered together.
        error: why there is no reply, or `None`.
    """

    benchmark: str
    id: str
    prompt_sha256: str | None = None
    reply: str = ""
    truncated: bool = False
    num_images: int | None = None
    num_frames: int | None = None
    latency_s: float | None = None
    batch_size: int | None = None
    error: str | None = None


def prompt_sha256(messages: list[dict[str, Any]]) -> str:
    """Equal for two models if and only if they were asked the same, about media of the same kinds in the same places."""
    told = [
        [message["role"], [[block["type"], block.get("text")] for block in _blocks(message)]] for message in messages
    ]
    return hashlib.sha256(json.dumps(told, ensure_ascii=False).encode()).hexdigest()


def model_revision(name: str, commit: str | None = None) -> str:
    """The commit of a model on the Hub; of a local folder, a hash of the names, sizes and times of its files."""
    folder = Path(name)
    if not folder.is_dir():
        return commit or "unknown"
    states = sorted(
        (file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir() if file.is_file()
    )
    return f"files:{hashlib.sha256(json.dumps(states).encode()).hexdigest()[:16]}"


def _blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _count(messages: list[dict[str, Any]], kind: str) -> int:
    return sum(block["type"] == kind for message in messages for block in _blocks(message))


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:LONGEST_ERROR]


def frames_of_videos(messages: list[dict[str, Any]], num_frames: int) -> list[dict[str, Any]]:
    """The messages with their media as RGB pictures, for models other than ours.

    A block of a video becomes `{"type": "video", "video": [PIL pictures], "metadata": {...}}`, where `metadata` is what
    transformers' `VideoMetadata` takes. Marks are drawn; names of regions stay in the text, times are not told.

    Raises: `ValueError` or `OSError` naming a medium that cannot be read, or a region that is not in the picture.
    """

    def read(block: dict[str, Any]) -> dict[str, Any]:
        regions = block.get("regions") or []
        if block["type"] == "image":
            picture = block["image"].convert("RGB")
            return {"type": "image", "image": draw_marks(picture, regions) if regions else picture}
        if block["type"] != "video":
            return {"type": "text", "text": block["text"]}
        video = decode_video(block["video"], num_frames=num_frames)
        pictures = [Image.fromarray(frame) for frame in video.frames]
        if regions:
            pictures[0] = draw_marks(pictures[0], regions, source=video.name)
        height, width = video.source_size
        metadata = {
            "total_num_frames": video.total_num_frames,
            "fps": video.total_num_frames / video.duration if video.duration else None,
            "duration": video.duration,
            "height": height,
            "width": width,
            "frames_indices": video.indices.tolist(),
        }
        return {"type": "video", "video": pictures, "metadata": metadata}

    return [{"role": message["role"], "content": [read(block) for block in _blocks(message)]} for message in messages]


def _videos_as_images(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    def spread(block: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"type": "image", "image": one} for one in block["video"]] if block["type"] == "video" else [block]

    return [
        {"role": message["role"], "content": [one for block in message["content"] for one in spread(block)]}
        for message in messages
    ]


# ----- a model in this process


class ModelAnswerer:
    """Greedy replies of any `AutoModelForImageTextToText`, in batches; the next batch is read while one is answered.

    A batch that fails, for example because memory ran out, is asked again one question at a time; a question that fails
    by itself gets an answer with its error. An error of CUDA itself, after which nothing works, is raised.

    Args:
        name: folder or Hub id.
        device: where the model goes.
        num_frames: sampled from each video.
        batch_size: questions at once.
        max_new_tokens: longest reply.
        dtype: of the weights, for example "bfloat16"; "auto" takes the checkpoint's.
        teacher: folder or Hub id of the L4P model, for a 4D-RGPT that fuses its latents.
        fast: `generate(fast=True)` of 4D-RGPT.
        trust_remote_code: run code that comes with the model. 4D-RGPT needs none here.
    """

    def __init__(
        self,
        name: str,
        device: torch.device | str,
        num_frames: int = 16,
        batch_size: int = 8,
        max_new_tokens: int = 128,
        dtype: str = "auto",
        teacher: str | None = None,
        fast: bool = False,
        trust_remote_code: bool = False,
    ):
        self.num_frames, self.batch_size, self.max_new_tokens = num_frames, batch_size, max_new_tokens
        self.fast = fast
        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        self.model = model.to(device).eval()
        try:
            self.processor = AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code)
        except (ImportError, AttributeError, TypeError, ValueError) as error:
            if is_torchvision_available():
                raise
            raise SystemExit(
                f"The processor of {name} cannot be loaded ({_told(error)}). Those of most models need torchvision: "
                "`pip install torchvision`, in the version that goes with your torch."
            ) from error
        self.is_ours = self.model.config.model_type == "rgpt4d"
        if not self.is_ours and (fast or teacher is not None):
            raise SystemExit(f"--fast and --teacher are for 4D-RGPT; {name} is a {self.model.config.model_type}.")
        self.teacher = load_teacher(self.model, teacher)
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token
        generation = self.model.generation_config.to_diff_dict()
        generation = {key: generation[key] for key in generation if key != "transformers_version" and key[0] != "_"}
        self.settings = {
            "model": name,
            "revision": model_revision(name, getattr(self.model.config, "_commit_hash", None)),
            "num_frames": num_frames,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "generation": {**generation, "do_sample": False, "max_new_tokens": max_new_tokens},
            **({} if teacher is None else {"teacher": teacher, "teacher_revision": model_revision(teacher)}),
            **({"fast": True} if fast else {}),
        }

    def answers(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """One answer for each question, in their order."""
        with ThreadPoolExecutor(1) as reader:
            ahead: tuple[list[Question], Future] | None = None
            for batch in itertools.chain(_batches(questions, self.batch_size), [None]):
                following = None if batch is None else (batch, reader.submit(self._read, batch))
                if ahead is not None:
                    yield from self._answer(ahead[0], ahead[1].result)
                ahead = following

    def _answer(self, batch: list[Question], read: Callable[[], tuple[list, Any]]) -> list[Answer]:
        try:
            return self._generate(batch, *read())
        except Exception as error:
            if "CUDA error" in str(error):
                raise
            failed = _told(error)
        # Only here, where the error no longer holds the tensors of the batch.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(batch) == 1:
            return [Answer(batch[0].benchmark, batch[0].id, error=failed)]
        return [answer for one in batch for answer in self._answer([one], functools.partial(self._read, [one]))]

    def _read(self, batch: list[Question]) -> tuple[list[list[dict[str, Any]]], Any]:
        """The messages of a batch, and the model's inputs on the CPU."""
        asked = [question.messages() for question in batch]
        options: dict[str, Any] = {"padding": True, "padding_side": "left"}
        conversations = asked
        if self.is_ours:
            options["num_frames"] = self.num_frames
            if self.teacher is not None:
                options["return_unmarked"] = True
        else:
            conversations = [frames_of_videos(messages, self.num_frames) for messages in asked]
            if getattr(self.processor, "video_processor", None) is None:
                conversations = [_videos_as_images(messages) for messages in conversations]
            metadata = [
                block.pop("metadata")
                for messages in conversations
                for message in messages
                for block in message["content"]
                if block["type"] == "video"
            ]
            if metadata:
                options |= {"video_metadata": metadata, "do_sample_frames": False}
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs=options,
        )
        return asked, inputs

    @torch.no_grad()
    def _generate(self, batch: list[Question], asked: list[list[dict[str, Any]]], inputs: Any) -> list[Answer]:
        started = time.perf_counter()
        inputs = inputs.to(self.model.device)
        if not self.is_ours:  # ours does it itself, with what is no pixel in full precision
            for key in [key for key in inputs if key.startswith("pixel_values")]:
                inputs[key] = inputs[key].to(self.model.dtype)
        if self.teacher is not None and "pixel_values_videos" in inputs:
            add_geometry(inputs, self.teacher, self.processor)
        limit, options = self.max_new_tokens, {"fast": True} if self.fast else {}
        output = self.model.generate(**inputs, max_new_tokens=limit, do_sample=False, **options)
        new = output[:, inputs["input_ids"].shape[1] :]
        replies = self.processor.batch_decode(new, skip_special_tokens=True)
        seconds = (time.perf_counter() - started) / len(batch)
        ends = self.model.generation_config.eos_token_id
        ends = set(ends if isinstance(ends, list) else [ends])
        return [
            Answer(
                question.benchmark,
                question.id,
                prompt_sha256=prompt_sha256(messages),
                reply=reply.strip(),
                truncated=len(tokens) == limit and ends.isdisjoint(tokens),
                num_images=_count(messages, "image"),
                num_frames=_count(messages, "video") * self.num_frames,
                latency_s=seconds,
                batch_size=len(batch),
            )
            for question, messages, reply, tokens in zip(batch, asked, replies, new.tolist(), strict=True)
        ]


def _batches(questions: Iterable[Question], size: int) -> Iterator[list[Question]]:
    """Questions of one benchmark together, so that a batch has media of one kind."""
    for _, group in itertools.groupby(questions, key=lambda question: question.benchmark):
        while batch := list(itertools.islice(group, size)):
            yield batch


# ----- an endpoint


class EndpointAnswerer:
    """Replies of an OpenAI-compatible endpoint, several requests at once. The key is read from `OPENAI_API_KEY`.

    Frames are sampled and marked here and sent as JPEG pictures in the place of their video. What may pass (time-outs, 408,
    409, 429, 5xx, no connection) is tried again by the client, after growing pauses; what fails for good gets an answer with
    its error. A wrong key or an unknown model or address ends the run, for it would fail every question.

    Args:
        name: the model, as the endpoint calls it.
        base_url: for example `http://localhost:8000/v1`.
        num_frames: sampled from each video.
        concurrency: requests at once.
        max_new_tokens: longest reply, reasoning included.
        retries: of one question.
        timeout: seconds of one request.
        temperature: 0 asks for greedy decoding; `None` leaves it out, for models that refuse it.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        num_frames: int = 16,
        concurrency: int = 8,
        max_new_tokens: int = 128,
        retries: int = 6,
        timeout: float = 600.0,
        temperature: float | None = 0.0,
    ):
        try:
            import openai
        except ImportError:
            raise SystemExit("--base-url needs OpenAI's client: `pip install openai`.") from None
        self.name, self.num_frames, self.concurrency = name, num_frames, concurrency
        self.generation = {"max_completion_tokens": max_new_tokens}
        if temperature is not None:
            self.generation["temperature"] = temperature
        self.fatal = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
        key = os.environ.get("OPENAI_API_KEY", "not needed")
        self.client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=retries, timeout=timeout)
        self.settings = {
            "model": name,
            "revision": "unknown: behind an endpoint",
            "base_url": base_url,
            "num_frames": num_frames,
            "pictures": f"JPEG, quality {JPEG_QUALITY}",
            "generation": self.generation,
        }

    def answers(self, questions: Iterable[Question]) -> Iterator[Answer]:
        """One answer for each question, as they come."""
        waiting, running = iter(questions), set()
        with ThreadPoolExecutor(self.concurrency) as pool:
            while True:
                running |= {
                    pool.submit(self._answer, one) for one in itertools.islice(waiting, self.concurrency - len(running))
                }
                if not running:
                    return
                done, running = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()

    def _answer(self, question: Question) -> Answer:
        answer = Answer(question.benchmark, question.id, batch_size=1)
        try:
            messages = question.messages()
            answer.prompt_sha256, answer.num_images = prompt_sha256(messages), _count(messages, "image")
            answer.num_frames = _count(messages, "video") * self.num_frames
            messages = [
                {"role": message["role"], "content": [_as_openai(block) for block in message["content"]]}
                for message in _videos_as_images(frames_of_videos(messages, self.num_frames))
            ]
            started = time.perf_counter()
            reply = self.client.chat.completions.create(model=self.name, messages=messages, **self.generation)
            answer.latency_s = time.perf_counter() - started
            (choice,) = reply.choices
            answer.truncated = choice.finish_reason == "length"
            if choice.message.content is None:
                raise ValueError(f"the endpoint sent no text (finish_reason {choice.finish_reason!r})")
            # Half a surrogate pair, which JSON can hold and UTF-8 can not, becomes "?".
            answer.reply = choice.message.content.strip().encode("utf-8", "replace").decode("utf-8")
        except self.fatal as error:
            raise SystemExit(f"{self.client.base_url} refuses {self.name}: {_told(error)}") from error
        except Exception as error:
            answer.error = _told(error)
        return answer


def _as_openai(block: dict[str, Any]) -> dict[str, Any]:
    if block["type"] == "text":
        return block
    encoded = io.BytesIO()
    block["image"].save(encoded, "JPEG", quality=JPEG_QUALITY, subsampling=0)  # colours of thin marks stay
    url = "data:image/jpeg;base64," + base64.b64encode(encoded.getvalue()).decode("ascii")
    return {"type": "image_url", "image_url": {"url": url}}
