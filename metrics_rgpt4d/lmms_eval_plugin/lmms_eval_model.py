"""4D-RGPT as a model of lmms-eval: `--model rgpt4d --model_args pretrained=FOLDER_OR_ID,num_frames=16`."""

import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor

import modeling_rgpt4d  # noqa: F401  registers the model with transformers

MAX_NEW_TOKENS = 128  # where a task does not say
SAMPLING = ("temperature", "top_p", "top_k")
GENERATION = ("do_sample", "num_beams", "repetition_penalty", *SAMPLING)


def hf_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages of lmms-eval, whose media are under `url`, as `RGPT4DProcessor` takes them. Media that our own tasks give
    under their kind, too, with regions, are taken from there.

    Raises: `ValueError` for audio, and for a part of a video, which the processor cannot cut out.
    """

    def block_of(block: Mapping[str, Any]) -> dict[str, Any]:
        kind = block["type"]
        if kind not in ("text", "image", "video"):
            raise ValueError(f"4D-RGPT reads text, images and videos, but this task has a block of the type {kind!r}.")
        if block.get("start_time") is not None or block.get("end_time") is not None:
            raise ValueError("4D-RGPT reads whole videos; cut the clip out before, instead of start_time and end_time.")
        kept = {key: value for key, value in block.items() if key not in ("url", "start_time", "end_time")}
        return kept if kind == "text" else {kind: block.get("url"), **kept}

    return [
        {"role": message["role"], "content": [block_of(block) for block in message["content"]]} for message in messages
    ]


def generation_options(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` from a task's `generation_kwargs`; greedy unless it asks to sample. What `generate` does not
    take, such as another model's `image_aspect_ratio`, is left out with a warning; `until` is applied to the reply."""
    told = {key: value for key, value in asked.items() if value is not None}
    limit = told.pop("max_new_tokens", told.pop("max_gen_toks", MAX_NEW_TOKENS))
    told.pop("until", None)
    unknown = sorted(told.keys() - {*GENERATION, "max_gen_toks"})
    if unknown:
        warnings.warn(f"4D-RGPT takes no {', '.join(unknown)} of generation_kwargs; they are left out.", stacklevel=2)
    options = {key: told[key] for key in GENERATION if key in told}
    options["do_sample"] = bool(options.get("do_sample", options.get("temperature", 0) > 0))
    if not options["do_sample"] or options.get("temperature") == 0:
        options = {key: value for key, value in options.items() if key not in SAMPLING} | {"do_sample": False}
    return {"max_new_tokens": limit, **options}


def cut_at(reply: str, until: str | Sequence[str] | None) -> str:
    """The reply before the first of the strings `until`."""
    for stop in [until] if isinstance(until, str) else until or ():
        reply = reply.split(stop)[0] if stop else reply
    return reply


class RGPT4DForLmmsEval(lmms):
    """Replies of 4D-RGPT, from video frames alone: a teacher's latents (`--teacher` of run_eval.py) are not fused.

    Args:
        pretrained: folder or Hub id.
        device: by default, CUDA where there is one; with several processes, each its own.
        dtype: of the weights; "auto" takes the checkpoint's.
        num_frames: sampled from each video.
        batch_size: questions at once.
        fast: `generate(fast=True)`, on CUDA.
        trust_remote_code: run code that comes with the checkpoint; none is needed.

    Raises: `ValueError` if the checkpoint is another model's.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str | None = None,
        dtype: str = "auto",
        num_frames: int = 16,
        batch_size: int | str = 1,
        fast: bool = False,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size must be a number of questions, at least 1, got {batch_size!r}.")
        accelerator = Accelerator(cpu=not torch.accelerator.is_available())
        self.accelerator = accelerator
        self._rank, self._world_size = accelerator.process_index, accelerator.num_processes
        if device is None or accelerator.num_processes > 1:
            device = accelerator.device
        self.num_frames, self.batch_size, self.fast = num_frames, int(batch_size), fast
        model = AutoModelForImageTextToText.from_pretrained(
            pretrained, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if model.config.model_type != "rgpt4d":
            raise ValueError(
                f"{pretrained} is a {model.config.model_type}; lmms-eval has models of its own for others."
            )
        self.model = model.to(device).eval()
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=trust_remote_code)
        if self.processor.tokenizer.pad_token is None:
            self.processor.tokenizer.pad_token = self.processor.tokenizer.eos_token

    @property
    def device(self) -> torch.device:
        return self.model.device

    def generate_until(self, requests: list[Instance]) -> list[str]:
        replies: list[str] = []
        with tqdm(total=len(requests), desc="Answers", unit="question", disable=self.rank != 0) as progress:
            # Those that go into one batch: of one task, with the same generation_kwargs.
            for _, group in itertools.groupby(requests, key=lambda request: (request.args[4], repr(request.args[2]))):
                while batch := list(itertools.islice(group, self.batch_size)):
                    replies += self._replies(batch)
                    progress.update(len(batch))
        return replies

    @torch.no_grad()
    def _replies(self, batch: list[Instance]) -> list[str]:
        conversations = [
            hf_messages(doc_to_messages(self.task_dict[task][split][doc_id]))
            for _, doc_to_messages, _, doc_id, task, split in (request.args for request in batch)
        ]
        inputs = self.processor.apply_chat_template(
            conversations,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True, "padding_side": "left", "num_frames": self.num_frames},
        ).to(self.device)
        asked = batch[0].args[2]
        output = self.model.generate(**inputs, **generation_options(asked), **({"fast": True} if self.fast else {}))
        texts = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        replies = [cut_at(text, asked.get("until")).strip() for text in texts]
        for request, reply in zip(batch, replies, strict=True):
            self.cache_hook.add_partial("generate_until", (request.args[0], asked), reply)
        return replies

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise NotImplementedError(
            "4D-RGPT gives no log-likelihoods here: choose a task whose output is generate_until."
        )

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        raise NotImplementedError("4D-RGPT answers one round here: choose a task whose output is generate_until.")
