"""Five checks of a folder on the machine where it will run: are the weights those of the files, and does the model see?

Each catches a way in which a port of NVILA to another version of transformers has lost accuracy without a message: weights
initialised again after loading, buffers left uninitialised, a greedy call that samples, rounded or wrong rotary
frequencies, a vision tower that is not heard.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

from .checkpoint_files import StoredTensor, quoted, read_folder

QUESTION = "What shapes are in this picture, and which colour has each of them?"
NEW_TOKENS = 32


@dataclass(frozen=True)
class Check:
    """What one check found; `ok` is False if the model cannot be trusted."""

    name: str
    ok: bool
    found: str


def verify_checkpoint(
    folder: Path,
    source_tensors: dict[str, StoredTensor] | None = None,
    source_theta: float | None = None,
    image: str | Path | None = None,
    question: str = QUESTION,
    device: str = "cpu",
    dtype: str = "auto",
) -> list[Check]:
    """Load a folder with `AutoModelForImageTextToText`, check it, and print a line for each check.

    Args:
        folder: as `convert_nvila` or `save_pretrained` writes it.
        source_tensors: those that the folder was converted from, by the names of this model, to compare with.
        source_theta: `rope_theta` of the source.
        image: a picture to ask about; one with a red disc and a blue square is drawn if omitted.
        question: about the picture.
        device: to run on.
        dtype: to load in: "auto" for the checkpoint's, or "float32", "bfloat16", "float16".

    Raises: `ValueError` if the folder cannot be read.
    """
    dtypes = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if dtype not in dtypes:
        raise ValueError(f"dtype {dtype!r} is unknown: choose one of {sorted(dtypes)}")
    stored = read_folder(Path(folder))
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtypes[dtype]).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    print(f"{folder}: transformers {transformers.__version__}, torch {torch.__version__}, {model.dtype}, {device}")

    picture = Image.open(image).convert("RGB") if image is not None else _draw_picture()
    inputs, black_inputs = (
        _ask(processor, question, shown).to(model.device) for shown in (picture, Image.new("RGB", picture.size))
    )
    checks = []
    for check in (
        lambda: _check_weights(model, stored, source_tensors),
        lambda: _check_position_ids(model),
        lambda: _check_greedy(model, inputs),
        lambda: _check_rotary(model, source_theta),
        lambda: _check_sight(model, processor, inputs, black_inputs),
    ):
        checks.append(check())
        print(f"{'ok    ' if checks[-1].ok else 'FAILED'} {checks[-1].name}: {checks[-1].found}", flush=True)
    return checks


def _draw_picture() -> Image.Image:
    picture = Image.new("RGB", (448, 448), "white")
    draw = ImageDraw.Draw(picture)
    draw.ellipse((40, 40, 200, 200), fill="red")
    draw.rectangle((240, 240, 400, 400), fill="blue")
    return picture


def _ask(processor, question: str, picture: Image.Image):
    content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def _check_weights(model, stored: dict[str, StoredTensor], source: dict[str, StoredTensor] | None) -> Check:
    state = model.state_dict()
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    wrong = [f"{name} is in no file" for name in state.keys() - stored.keys() - tied]
    wrong += [f"{name} is not in the model" for name in stored.keys() - state.keys()]
    for name in stored.keys() & state.keys():
        loaded = state[name].cpu()
        if not torch.equal(loaded, stored[name].load().to(loaded.dtype)):
            wrong.append(f"{name} differs from the file")
    found = f"{len(stored)} tensors equal {'the file' if len({t.file for t in stored.values()}) == 1 else 'the files'}"
    if source is None:
        found += " (the source is not here, or not named: not compared)"
    else:
        wrong += [f"{name} is not in the source" for name in stored.keys() - source.keys()]
        for name in stored.keys() & source.keys():
            same_kind = (stored[name].dtype, stored[name].shape) == (source[name].dtype, source[name].shape)
            if not same_kind or not torch.equal(stored[name].load(), source[name].load()):
                wrong.append(f"{name} differs from the source")
        found += " and the source"
    return Check("weights", not wrong, f"{len(wrong)} wrong: {quoted(wrong)}" if wrong else found)


def _check_position_ids(model) -> Check:
    ids = {name: buffer for name, buffer in model.model.vision_tower.named_buffers() if name.endswith("position_ids")}
    wrong = [
        name for name, buffer in ids.items() if not torch.equal(buffer.flatten().cpu(), torch.arange(buffer.numel()))
    ]
    sizes = ", ".join(f"{name} is arange({buffer.numel()})" for name, buffer in ids.items())
    return Check(
        "position ids", not wrong, f"not counted up: {quoted(wrong)}" if wrong else sizes or "the tower has none"
    )


def _check_greedy(model, inputs) -> Check:
    config, answers = model.generation_config, []
    for seed in (0, 1):
        torch.manual_seed(seed)
        answers.append(model.generate(**inputs, max_new_tokens=NEW_TOKENS).tolist())
    names = ("do_sample", "num_beams", "temperature", "top_p", "top_k", "repetition_penalty")
    settings = ", ".join(f"{name} {getattr(config, name)}" for name in names if getattr(config, name) is not None)
    ok = not config.do_sample and config.repetition_penalty in (None, 1.0) and answers[0] == answers[1]
    found = f"{settings or 'nothing set'}; two seeds give {'equal' if answers[0] == answers[1] else 'DIFFERENT'} tokens"
    return Check("greedy generation", ok, found)


def _check_rotary(model, source_theta: float | None) -> Check:
    rope = model.config.text_config.rope_parameters
    theta = rope["rope_theta"]
    if source_theta is not None and source_theta != theta:
        return Check("rotary frequencies", False, f"rope_theta is {theta}, and {source_theta} in the source")
    buffers = {n: b for n, b in model.model.language_model.named_buffers() if n.endswith("rotary_emb.inv_freq")}
    kind = rope.get("rope_type", "default")
    for name, buffer in buffers.items():
        exponents = torch.arange(len(buffer), dtype=torch.float64) / len(buffer)
        expected = theta**-exponents / (rope["factor"] if kind == "linear" else 1.0)
        if buffer.dtype != torch.float32:
            return Check(
                "rotary frequencies", False, f"{name} is {buffer.dtype}; expected torch.float32: load with dtype="
            )
        if kind in ("default", "linear"):
            error = (buffer.cpu().double() / expected - 1).abs().max().item()
            if error > 1e-6:
                return Check("rotary frequencies", False, f"{name} is off theta ** (-2i / d) by up to {error:.1e}")
    values = "theta ** (-2i / d)" if kind in ("default", "linear") else f"not compared (rope_type {kind})"
    return Check("rotary frequencies", True, f"rope_theta {theta:g}, rope_type {kind}, float32, values {values}")


@torch.no_grad()
def _check_sight(model, processor, inputs, black_inputs) -> Check:
    length = inputs["input_ids"].shape[1]
    logits = [model(**given, logits_to_keep=1).logits.float() for given in (inputs, black_inputs)]
    answers = [
        processor.decode(
            model.generate(**given, max_new_tokens=NEW_TOKENS)[0, length:], skip_special_tokens=True
        ).strip()
        for given in (inputs, black_inputs)
    ]
    difference = (logits[0] - logits[1]).abs().max().item()
    found = f"to the picture {answers[0]!r}, to a black one {answers[1]!r}, logits differ by {difference:.3g}"
    if difference == 0:
        found = f"the model is blind: {found}"
    elif answers[0] == answers[1]:
        found += " (warning: equal answers)"
    return Check("sight", difference > 0, found)


__all__ = ["QUESTION", "Check", "verify_checkpoint"]
