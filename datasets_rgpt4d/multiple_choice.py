"""A multiple-choice row (R4D-Bench's schema) as a prompt, and as chat messages that `RGPT4DProcessor` takes."""

import re
from collections.abc import Mapping, Sequence
from hashlib import sha256
from string import ascii_uppercase
from typing import Any, Literal

AnswerWith = Literal["letter", "text"]

INSTRUCTIONS = {
    "letter": "Answer with only the letter of the correct option.",  # wording of R4D-Bench's official prompt
    "text": "Answer with only the text of the correct option.",
}
LONGEST_SPOKEN_OPTION = 40  # characters; World4D's options have up to 30, its 3D boxes in JSON about 110


def lettered_options(options: Sequence[str], layout: str = "({}) {}") -> str:
    """One line an option; `layout` takes the letter and the text. Raises `ValueError` unless there are 2 to 26 options."""
    if not 2 <= len(options) <= len(ascii_uppercase):
        raise ValueError(f"A multiple-choice question needs 2 to {len(ascii_uppercase)} options, got {len(options)}.")
    return "\n".join(layout.format(letter, text) for letter, text in zip(ascii_uppercase, options, strict=False))


def multiple_choice_prompt(question: str, options: Sequence[str], answer_with: AnswerWith = "letter") -> str:
    """Lay out a question as R4D-Bench does: question, lettered options, instruction, with blank lines between.

    Raises: `ValueError` for an unknown `answer_with`, or fewer than 2 or more than 26 options.
    """
    if answer_with not in INSTRUCTIONS:
        raise ValueError(f"answer_with must be one of {tuple(INSTRUCTIONS)}, got {answer_with!r}.")
    return f"{question}\n\nOptions:\n{lettered_options(options)}\n\n{INSTRUCTIONS[answer_with]}"


def answer_letter(options: Sequence[str], answer: str) -> str:
    """The letter of the option whose text is `answer`. Raises `ValueError` unless exactly one option is."""
    options = list(options)
    if options.count(answer) != 1:
        raise ValueError(f"The answer {answer!r} must be exactly one of the options {options}.")
    return ascii_uppercase[options.index(answer)]


def shuffled_options(options: Sequence[str], id: str) -> list[str]:
    """The options in an order that depends on the question's id and their texts alone: the same on every machine."""
    return sorted(options, key=lambda option: sha256(f"{id}\0{option}".encode()).digest())


def to_messages(
    row: Mapping[str, Any], answer_with: AnswerWith | None = None, with_answer: bool = True
) -> list[dict[str, Any]]:
    """Turn a row into chat messages: the video with its regions, the prompt, and the answer as the assistant's turn.

    Args:
        row: needs `video` (path, or a dict with `path` and `bytes`), `regions`, `question`, `options` and, if
            `with_answer`, `answer` (the text of the right option). An empty list of options makes an open question:
            its text is the prompt, and the answer is said as it is.
        answer_with: what the prompt asks for, and what the assistant says: the option's letter or its text. By default
            the text, but the letter where an option is longer than `LONGEST_SPOKEN_OPTION`, as a 3D box in JSON is: most
            of the loss would then be on reciting brackets.
        with_answer: False leaves the assistant's turn out, as evaluation wants it.
    """
    if answer_with is None:
        answer_with = "letter" if max(map(len, row["options"]), default=0) > LONGEST_SPOKEN_OPTION else "text"
    is_open = not row["options"]
    prompt = row["question"] if is_open else multiple_choice_prompt(row["question"], row["options"], answer_with)
    content = [
        {"type": "video", "video": row["video"], "regions": list(row["regions"])},
        {"type": "text", "text": prompt},
    ]
    messages = [{"role": "user", "content": content}]
    if with_answer:
        letter = None if is_open else answer_letter(row["options"], row["answer"])
        text = letter if letter and answer_with == "letter" else row["answer"]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": text}]})
    return messages


def to_conversation(
    rows: Sequence[Mapping[str, Any]], answer_with: AnswerWith | None = None, with_answer: bool = True
) -> list[dict[str, Any]]:
    """Turn several questions about one video into one conversation: the video once, with the regions of all.

    Training then encodes the video once for many answers. Regions with the same box are one object; the objects are named
    anew, in the order in which the questions name them.

    Args:
        rows: as [`to_messages`] takes them, all with the same video; each region has a `box`.
        answer_with: as there.
        with_answer: False leaves the last answer out, as evaluation wants it.
    Raises: `ValueError` without rows, or if they have several videos.
    """
    if not rows:
        raise ValueError("A conversation needs at least one question.")
    if any(row["video"] != rows[0]["video"] for row in rows):
        raise ValueError("The questions of a conversation must be about one video, and these have several.")
    names: dict[tuple[float, ...], str] = {}
    regions, messages = [], []
    for row in rows:
        new = {}
        for region in row["regions"]:
            box = tuple(region["box"])
            if box not in names:
                names[box] = f"obj_{len(names) + 1}"
                regions.append({**region, "name": names[box]})
            new[f"<{region['name']}>"] = f"<{names[box]}>"
        renamed = {
            **row,
            "question": _renamed(row["question"], new),
            "options": [_renamed(option, new) for option in row["options"]],
            "answer": _renamed(row["answer"], new),
        }
        messages += to_messages(renamed, answer_with, with_answer=with_answer or row is not rows[-1])
    video, *_ = messages[0]["content"]
    for message in messages[2::2]:
        message["content"] = message["content"][1:]
    video["regions"] = regions
    return messages


def _renamed(text: str, new: Mapping[str, str]) -> str:
    """All at once, so that two names can change places."""
    return re.sub("|".join(map(re.escape, new)), lambda match: new[match[0]], text) if new else text
