"""Numerical parity: ours against tensors of the original NVILA, and transformers 4.46 against 5 on the same files.

    python benchmarks/parity.py --references FOLDER --python OLD/bin/python --python NEW/bin/python \\
        --output modeling_rgpt4d/PARITY.md

FOLDER holds checkpoints in NVILA's layout (`model_*`) and what the original code computed with them (`refs`). Every
checkpoint is converted, loaded by the Auto classes, and asked the questions of the references, from the files of pictures
and videos on. Each `--python` is an interpreter with another version of transformers; all of them load the same random
models, and what they give is compared with the first one's.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2Config, Qwen2ForCausalLM
from transformers.utils import logging

from modeling_rgpt4d.convert_nvila import convert_nvila, convert_to_nvila

PROBE = Path(__file__).with_name("parity_probe.py")
NEW_TOKENS = 16  # of the references' greedy answers
TOLERANCE = 1e-5  # largest difference over the largest value, float32
TINY = {
    "vocab_size": 405,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
TINY |= {"num_key_value_heads": 2}
MID = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
}
MID |= {"num_key_value_heads": 2}
LENGTHS = {"tiny": (2, 256), "mid": (2, 1024), "long": (1, 7808)}  # 7808: 64 frames of NVILA-Lite

CAUSES = """\
| | what a port to transformers 5 can do wrong without a message | what guards it here |
|---|---|---|
| A | code that initialises weights in place is run on weights that were just loaded | the model is made of transformers' \
own classes and has no such code: `test_every_tensor_equals_the_file`; `--verify`, check 1 |
| B | a buffer that is not saved keeps uninitialised memory | none is made by this model, and the tower's is checked: \
`test_position_ids_count_up`; `--verify`, check 2 |
| C | a greedy call samples, because what it leaves open comes from the checkpoint's generation_config.json | the converter \
writes a greedy file and names what it dropped: `test_generation_is_greedy_whatever_the_source_says`; `--verify`, check 3 |
| D | casting the whole model rounds the rotary frequencies | casts of this model leave them in float32: \
`test_a_cast_model_keeps_its_rotary_frequencies`; `--verify`, check 4 |
| E | `rope_theta` is lost between versions, and 10000 taken | read from either spelling, and both are written on the way \
back: `test_rope_theta_survives_both_ways`; `--verify`, check 4 |
| F | a left-padded batch of unequal prompts puts features in the wrong places | places come from the ids: \
`test_left_padded_batch_equals_singles` |
| G | pictures are resized by another library if torchvision is there | always by PIL: \
`test_pictures_are_resized_by_pil` |"""


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[float, float]:
    """Largest difference, and the same over the largest value."""
    largest = (ours.float() - theirs.float()).abs().max().item()
    return largest, largest / theirs.float().abs().max().item()


def conversation(parts: list, inputs: Path) -> list[dict]:
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif part[0] == "image":
            content.append({"type": "image", "path": str(inputs / part[1])})
        else:
            content.append({"type": "video", "path": str(inputs / part[1]), "fps": 10})
    return [{"role": "user", "content": content}]


@torch.no_grad()
def compare_batch(model, processor, cases: dict, tensors: dict, references: Path, name: str) -> str:
    """All cases of one way of tiling at once, padded on the left, against the original's single ones."""
    mode = processor.image_processor.image_aspect_ratio
    chosen = [
        case for case, about in cases.items()
        if "prompt_parts" in about and f"{case}/logits" in tensors and about.get("image_aspect_ratio") in (None, mode)
    ]  # fmt: skip
    conversations = [conversation(cases[case]["prompt_parts"], references / "inputs") for case in chosen]
    inputs = processor.apply_chat_template(
        conversations, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        processor_kwargs={"padding": True},
    )  # fmt: skip
    logits, length = model(**inputs).logits, inputs["input_ids"].shape[1]
    answers = model.generate(**inputs, max_new_tokens=NEW_TOKENS)[:, length:].tolist()
    largest, relative, same = 0.0, 0.0, True
    for i, case in enumerate(chosen):
        expected = tensors[f"{case}/logits"][0, :, : logits.shape[-1]]
        found = difference(logits[i, -len(expected) :], expected)
        largest, relative = max(largest, found[0]), max(relative, found[1])
        wanted = tensors[f"{case}/generated_ids"][0].tolist()
        same &= answers[i][: len(wanted)] == wanted
    lengths = sorted(inputs["attention_mask"].sum(1).tolist())
    verdict = "equal" if same and relative <= TOLERANCE else "DIFFERENT"
    title = f"batch of {len(chosen)}, {lengths[0]} to {lengths[-1]} tokens"
    return f"{name} | {title} | - | - | - | - | {largest:.1e} ({relative:.1e}) | {verdict}"


def forward_and_watch(model, inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Logits, and what the parts gave on the way: "features" as the projector gets them, its "tokens", "embeddings".

    The tower itself is not watched: it would then run in whole, and not as it does for everybody else.
    """
    seen = {}

    def tokens(module, args, output):
        seen["features"], seen["tokens"] = args[0], output

    def embeddings(module, args, kwargs):
        seen["embeddings"] = kwargs["inputs_embeds"]

    parts = model.model
    hooks = [
        parts.multi_modal_projector.register_forward_hook(tokens),
        parts.language_model.register_forward_pre_hook(embeddings, with_kwargs=True),
    ]
    logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits, seen


@torch.no_grad()
def compare_model(checkpoint: Path, references: Path, scratch: Path) -> tuple[list[str], list[str], bool]:
    """Table rows of the float32 comparison and of the drift in half precision, and whether all is within the tolerance."""
    name = checkpoint.name
    described = json.loads((references / f"{name}.json").read_text())
    tensors = load_file(references / f"{name}.safetensors")
    tensors |= load_file(references / described.get("vision_file", f"{name}.safetensors"))
    converted = scratch / name
    convert_nvila(checkpoint, converted)
    processor = AutoProcessor.from_pretrained(converted)
    models = {
        dtype: AutoModelForImageTextToText.from_pretrained(converted, dtype=dtype).eval()
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    exact = models[torch.float32]
    rows, drift, is_equal = [], [], True
    for case, about in described["cases"].items():
        if "prompt_parts" not in about or f"{case}/logits" not in tensors:
            continue
        mode = about.get("image_aspect_ratio")
        processor.image_processor.image_aspect_ratio = mode or processor.image_processor.image_aspect_ratio
        inputs = processor.apply_chat_template(
            conversation(about["prompt_parts"], references / "inputs"),
            add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
        )  # fmt: skip
        pixels = inputs.get("pixel_values", inputs.get("pixel_values_videos"))
        logits, seen = forward_and_watch(exact, inputs)
        # the original adds random rows to the vocabulary when it loads
        expected = tensors[f"{case}/logits"][..., : logits.shape[-1]]
        cells = [name, case]
        if pixels is None:
            cells += ["-", "-", "-"]
        else:
            pixels, reference = pixels.flatten(0, -4), tensors[f"{case}/pixel_values"]
            cells.append("equal" if torch.equal(pixels, reference) else f"{difference(pixels, reference)[0]:.1e}")
            for key, value in (("vision_features", seen["features"]), ("projector_output", seen["tokens"])):
                reference = tensors.get(f"{case}/{key}")
                if reference is None or reference.shape != value.shape:
                    cells.append("-")
                    continue
                largest, relative = difference(value, reference)
                is_equal &= relative <= TOLERANCE
                cells.append(f"{largest:.1e}")
        for value, reference in ((seen["embeddings"], tensors[f"{case}/inputs_embeds"]), (logits, expected)):
            largest, relative = difference(value, reference)
            is_equal &= relative <= TOLERANCE
            cells.append(f"{largest:.1e} ({relative:.1e})")
        length = inputs["input_ids"].shape[1]
        answer = exact.generate(**inputs, max_new_tokens=NEW_TOKENS)[0, length:].tolist()
        same = answer == tensors[f"{case}/generated_ids"][0].tolist()
        is_equal &= same
        rows.append(" | ".join([*cells, "equal" if same else "DIFFERENT"]))
        for dtype in (torch.bfloat16, torch.float16):
            half = models[dtype](**inputs).logits.float()
            agreement = (half.argmax(-1) == expected.argmax(-1)).float().mean().item()
            gaps = (half - expected).abs()
            other = models[dtype].generate(**inputs, max_new_tokens=NEW_TOKENS)[0, length:].tolist()
            first = next((i for i, (a, b) in enumerate(zip(other, answer, strict=False)) if a != b), None)
            drift.append(
                f"{name} | {case} | {str(dtype)[6:]} | {gaps.mean():.1e} | {gaps.max():.1e} | {agreement:.3f} | "
                + ("none" if first is None else str(first + 1))
            )
    rows.append(compare_batch(exact, processor, described["cases"], tensors, references, name))
    is_equal &= "DIFFERENT" not in rows[-1]
    return [f"| {row} |" for row in rows], [f"| {row} |" for row in drift], is_equal


def make_probe_folder(folder: Path, checkpoint: Path) -> None:
    """Files that every version of transformers reads: two random language models, ids, a model with code of its own."""
    generator = torch.Generator().manual_seed(0)
    for size, geometry in (("tiny", TINY), ("mid", MID)):
        torch.manual_seed(0)
        rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
        model = Qwen2ForCausalLM(
            Qwen2Config(**geometry, **rope, max_position_embeddings=32_768, tie_word_embeddings=False)
        )
        for name, parameter in model.named_parameters():
            if "k_proj.bias" in name:  # as trained ones: large, so that positions matter
                torch.nn.init.normal_(parameter, std=4.0)
            elif parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.06 if size == "mid" else 0.15)
        if size == "mid":
            model.save_pretrained(folder / "saved by 5")
        model.save_pretrained(folder / size)
        config = json.loads((folder / size / "config.json").read_text())
        # as transformers 4 wrote it; 5 reads this form, too
        config |= {"rope_theta": config.pop("rope_parameters")["rope_theta"], "torch_dtype": config.pop("dtype")}
        (folder / size / "config.json").write_text(json.dumps(config))
        sampled = {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "repetition_penalty": 1.05}
        (folder / size / "generation_config.json").write_text(json.dumps(sampled if size == "tiny" else {}))
    ids = {
        key: torch.randint(0, (MID if key != "tiny" else TINY)["vocab_size"], shape, generator=generator)
        for key, shape in LENGTHS.items()
    }
    save_file(ids, folder / "ids.safetensors")
    old = folder / "old_style"
    old.mkdir()
    shapes = {"norm.weight": (16,), "norm.bias": (16,), "linear.weight": (16, 16), "linear.bias": (16,)}
    shapes["embedding.weight"] = (1024, 16)
    values = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    save_file(values, old / "model.safetensors", {"format": "pt"})
    (old / "config.json").write_text(json.dumps({"model_type": "old_style", "architectures": ["OldStyleModel"]}))
    convert_nvila(checkpoint, folder / "converted")
    for kept in ("nvila", "conversion.json"):  # so that the way back writes the configs anew, as for a trained model
        path = folder / "converted" / kept
        os.rename(path, folder / f"{kept} of the source")
    convert_to_nvila(folder / "converted", folder / "back")
    os.rename(folder / "back" / "llm", folder / "to_nvila")


def probe(interpreters: list[str], folder: Path) -> list[tuple[dict, dict[str, torch.Tensor]]]:
    results = []
    for i, interpreter in enumerate(interpreters):
        print(f"{interpreter} ...", file=sys.stderr, flush=True)
        output = folder / f"probe-{i}.safetensors"
        environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            [interpreter, str(PROBE), str(folder), str(output)],
            capture_output=True, text=True, env=environment, cwd=folder,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"error: {interpreter} could not run {PROBE.name}:\n{done.stderr[-3000:]}")
        results.append((json.loads(done.stdout.splitlines()[-1]), load_file(output)))
    return results


def version_tables(results: list[tuple[dict, dict[str, torch.Tensor]]]) -> str:
    (first, reference), *others = results
    lines = [
        f"Logits of the same files, compared with transformers {first['transformers']}: largest difference, and which",
        "",
    ]
    lines[0] += (
        " share of positions has the same most likely token;\nthe worst of four masks (none, ones, padded right, padded left)."
    )
    header = ["model, dtype, attention", *(found["transformers"] for found, _ in others)]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    kinds = list(dict.fromkeys(name.rsplit("/", 1)[0] for name in reference if name.count("/") == 3))
    for kind in kinds:
        names = [name for name in reference if name.startswith(f"{kind}/")]
        cells = []
        for _, values in others:
            largest = max((values[n] - reference[n]).abs().max().item() for n in names)
            same = min((values[n].argmax(-1) == reference[n].argmax(-1)).float().mean().item() for n in names)
            cells.append("0" if largest == 0 else f"{largest:.1e}, {same:.4f}")
        lines.append(f"| {kind.replace('/', ', ')} | {' | '.join(cells)} |")

    lines += ["", "What differs without a message:", ""]
    header = ["", *(found["transformers"] for found, _ in results)]
    lines += ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]

    def row(title: str, cell) -> str:
        return f"| {title} | " + " | ".join(cell(found, values) for found, values in results) + " |"

    lines.append(
        row(
            "A: tensors that differ from the file after loading (model with its own in-place initialisation)",
            lambda f, _: f"{len(f['reinitialised']['differ from the file'])} of {f['reinitialised']['tensors']}",
        )
    )
    lines.append(
        row("B: buffer that is not saved has its values", lambda f, _: "yes" if f["position_ids"] else "**no**")
    )
    lines.append(
        row(
            "C: different answers of 6 seeds, for a bare GenerationConfig beside a file that samples",
            lambda f, _: str(f["sampling"]["different_answers"]),
        )
    )
    for dtype in ("bfloat16", "float16"):
        for how in ("at load", "cast", "cast, restored"):

            def cell(_, values, dtype=dtype, how=how):
                exact, other = values["long/float32"], values[f"long/{dtype}/{how}"]
                same = (exact.argmax(-1) == other.argmax(-1)).float().mean()
                return f"{(exact - other).abs().mean():.4f}, {same:.3f}"

            what = {"at load": "loaded in", "cast": "cast to", "cast, restored": "cast, frequencies put back,"}[how]
            lines.append(row(f"D: {what} {dtype}, 7,808 positions: mean difference from float32, same token", cell))
    for name, title in (("saved by 5", "by transformers 5"), ("to_nvila", "by `--to-nvila`")):
        lines.append(
            row(
                f"E: rope_theta read from a config written {title}",
                lambda f, _, name=name: f"{f['theta'].get(name, 0):.4g}",
            )
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", type=Path, required=True, help="folder with model_* and refs")
    parser.add_argument(
        "--python",
        action="append",
        default=[],
        help="interpreter with another transformers (repeat; the first is the reference)",
    )
    parser.add_argument("--output", type=Path, help="write the report (default: print it)")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    checkpoints = sorted(path for path in args.references.glob("model_*") if path.is_dir())
    interpreters = []
    for name in args.python:
        if shutil.which(name) is None:
            parser.error(f"--python {name} is no interpreter")
        interpreters.append(os.path.abspath(shutil.which(name)))  # not resolved: a link tells Python its environment
    if not checkpoints:
        parser.error(f"{args.references} holds no model_* folder")

    rows, drift, is_equal = [], [], True
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        for checkpoint in checkpoints:
            for collected, new in zip(
                (rows, drift), (result := compare_model(checkpoint, args.references / "refs", scratch)), strict=False
            ):
                collected += new
            is_equal &= result[2]
        tables = ""
        if args.python:
            folder = scratch / "probe"
            folder.mkdir()
            make_probe_folder(folder, checkpoints[0])
            tables = version_tables(probe(interpreters, folder))

    report = f"""\
# Parity with the original NVILA, and between versions of transformers

Written by `python benchmarks/parity.py`, with Python {platform.python_version()}, torch {torch.__version__}, transformers
{transformers.__version__}, on a CPU. Models are small and random (the released weights were not at hand); their files were written, and the reference
values computed, by the original code on transformers 4.46.

## Against the original, float32

From the files of pictures and videos on: pixels, then the tower's features, the projector's output, the embeddings that the
language model gets, its logits at every position, and {NEW_TOKENS} greedy tokens. Numbers are the largest absolute difference; in parentheses
over the largest value. {"All are" if is_equal else "**NOT all are**"} within {TOLERANCE:g} of the largest value.

| model | case | pixels | features | projector | embeddings | logits | greedy tokens |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

## Half precision

Against the original's float32 logits: mean and largest difference, share of positions with the same most likely token, and
the first of {NEW_TOKENS} greedy tokens that differs from float32. Loaded with `dtype=`.

| model | case | dtype | mean | largest | same token | first different |
|---|---|---|---|---|---|---|
{chr(10).join(drift)}

## transformers 4.46 against 5

It is said that transformers 5 costs NVILA-Lite-8B 8 points of R4D-Bench. On the same files, the language model gives the
same numbers in both, to the bit with SDPA and up to rounding with eager attention. What differs, and can cost such points, is
listed below, measured with each version on small random models.

{tables or "Not measured in this run (no --python was given)."}

## What guards each cause here

{CAUSES}

`python -m modeling_rgpt4d.convert_nvila --verify FOLDER` runs the five checks on a checkpoint of yours.
"""
    if args.output is None:
        print(report)
    else:
        temporary = args.output.with_suffix(".tmp")
        temporary.write_text(report, encoding="utf-8")
        os.replace(temporary, args.output)
        print(f"{args.output} written; within the tolerance: {is_equal}")
    sys.exit(not is_equal)


if __name__ == "__main__":
    main()
