"""The question of an evaluation row as the benchmark's own evaluation asks it, as text and as chat messages.

Scores depend on these wordings, so they are the published ones to the letter; what surrounds them there, such as special
tokens, is the chat template's; options come without outer spaces. Where a benchmark has several, this is the one:

    r4d_bench     its lmms-eval task: letter
    sti_bench     the authors' script for open models: letter
    vlm4d         the authors' direct output: letter. They also publish a chain-of-thought prompt
    omnispatial   the authors' `direct` note: letter. Their default, and lmms-eval's, is a page of guidelines for a chain of
                  thought in front of the question, whose text is theirs and not here: scores differ by several points
    mmsi_bench    the authors' only one: letter in backticks
    sat_real      the authors' only one: the option's text. lmms-eval asks for a letter
    vstibench     the authors' lmms-eval task: a number or phrase, or a letter
    timebench     never published; laid out as R4D-Bench
"""

import json
from collections.abc import Mapping
from typing import Any

from modeling_rgpt4d.region_marks import names_in_text

from .mmsi_bench import split_inline_options
from .multiple_choice import lettered_options, multiple_choice_prompt
from .schema import media_blocks

R4D_BENCH_MARKED = (
    "The first image is a set-of-mark annotation of a key frame from the video, with bounding boxes labeled <obj_1>, "
    "<obj_2>, etc. References to <obj_N> in the question correspond to those labeled regions."
)
SAT_EGO_MOVEMENT = "The first image is from the beginning of the video and the second image is from the end. "


def _r4d_bench(row: Mapping[str, Any]) -> str:
    prompt = multiple_choice_prompt(row["question"], row["options"])
    return f"{R4D_BENCH_MARKED}\n\n{prompt}" if row["images"] else prompt


def _sti_bench(row: Mapping[str, Any]) -> str:
    start, end = row["time_start"], row["time_end"]
    # The authors would print "From None s" for an item without an interval.
    interval = "" if start is None or end is None else f"From {start} s to {end} s. "
    return f"{interval}{row['question']}\n{lettered_options(row['options'])}\nPlease output only the option letter!"


def _vlm4d(row: Mapping[str, Any]) -> str:
    return (
        f"\nQuestion: {row['question']}\n{lettered_options(row['options'], '{}: {}')}\n\n"
        "Do not generate any intermediate reasoning process. "
        "Answer directly with the option letter from the given choices.\n"
    )


def _omnispatial(row: Mapping[str, Any]) -> str:
    note = "Note: You only need to respond with A, B, C, or D without providing any additional information."
    return f"{note}\n\n{row['question']}\n{lettered_options(row['options'], '{}. {}')}"


def _mmsi_bench(row: Mapping[str, Any]) -> str:
    question = json.loads(row["details"]).get("published_question", "")  # lists the options itself
    if not question or split_inline_options(question)[1] != row["options"]:  # their order was changed since
        options = ", ".join(lettered_options(row["options"], "{}: {}").split("\n"))
        question = f"{row['question']}\nOptions: {options}"
    return (
        f"{question}\nAnswer with the option's letter from the given choices directly. "
        "Enclose the option's letter within ``."
    )


def _sat_real(row: Mapping[str, Any]) -> str:
    question = row["question"]
    if row["category"] == "ego_movement" and not question.startswith(SAT_EGO_MOVEMENT.strip()):
        question = SAT_EGO_MOVEMENT + question
    options = " or ".join(f'"{option}"' for option in row["options"])
    return (
        f"Answer in natural language. {question} Answer the question using a single word or phrase. "
        f"Choose between the following options: {options}."
    )


def _vstibench(row: Mapping[str, Any]) -> str:
    question = f"These are frames of a video.\n{row['question']}\n"
    if row["answer_kind"] == "number":
        return f"{question}Please answer the question using a single word or phrase."
    return (
        f"{question}Options:\n{lettered_options(row['options'], '{}. {}')}\n"
        "Answer with the option's letter from the given choices directly."
    )


PROMPTS = {
    "r4d_bench": _r4d_bench,
    "sti_bench": _sti_bench,
    "vlm4d": _vlm4d,
    "omnispatial": _omnispatial,
    "mmsi_bench": _mmsi_bench,
    "sat_real": _sat_real,
    "vstibench": _vstibench,
    "timebench": lambda row: multiple_choice_prompt(row["question"], row["options"]),
}


def evaluation_prompt(row: Mapping[str, Any]) -> str:
    """The text that the benchmark's own evaluation puts after the media. Raises: `ValueError` for an unknown benchmark."""
    if row["benchmark"] not in PROMPTS:
        raise ValueError(f"No prompt is known for the benchmark {row['benchmark']!r}; known are {', '.join(PROMPTS)}.")
    return PROMPTS[row["benchmark"]](row)


def evaluation_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The user's turn for a row of `EVALUATION_FEATURES`: images, then videos with their regions, then the prompt.

    Pictures are opened, not yet decoded; videos stay `{"path", "bytes"}`. There is no assistant's turn. Names of regions in
    the prompt that have no box in the row, as in R4D-Bench, are told to be `marked` in the first medium: its set-of-mark
    picture, or nothing where it has none, and the question is asked all the same.
    """
    prompt, found = evaluation_prompt(row), media_blocks(row)
    media = [*found["image"], *found["video"]]
    boxed = {region["name"] for region in row["regions"]}
    marked = [name for name in names_in_text(prompt) if name not in boxed]
    if marked and media:
        media[0]["marked"] = marked
    return [{"role": "user", "content": [*media, {"type": "text", "text": prompt}]}]
