"""Our parsers beside the official scorers, over tests/artifacts/replies.jsonl.

The scorers are written here anew from a description of what they do; where it leaves something open, a comment says what
was taken. They stay out of the package: they guess (OmniSpatial's A), or take a word for a letter ("A car").
Every difference is in tests/artifacts/official_differences.json, and its count and an example in the metrics' cards.
"""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from metrics_rgpt4d.answer_parsing import parse_letter, parse_letter_or_value, parse_number
from metrics_rgpt4d.choice_accuracy.choice_accuracy import score as choice_score
from metrics_rgpt4d.mean_relative_accuracy.mean_relative_accuracy import relative_accuracy
from metrics_rgpt4d.mean_relative_accuracy.mean_relative_accuracy import score as vsti_score

ARTIFACTS = Path(__file__).parents[1] / "artifacts"
METRICS = Path(__file__).parents[2] / "metrics_rgpt4d"
ROWS = [json.loads(line) for line in (ARTIFACTS / "replies.jsonl").read_text(encoding="utf-8").splitlines()]
CHOICES = [row for row in ROWS if "options" in row]
NUMBERS = [row for row in ROWS if "number" in row]


def sti_bench(reply, options):
    """Patterns in their order, without case and line by line; else the last character."""
    for pattern in (
        r"\(([A-E])\)",
        r"Ans\s*=\s*([A-E])\b",
        r"Answer\s*[:=]\s*([A-E])\b",
        r"Option\s+([A-E])\b",
        r"\b([A-E])\s+(?:is|was)\s+correct",
        r"\b([A-E])[.)]\s*$",
    ):
        match = re.search(pattern, reply, flags=re.IGNORECASE | re.MULTILINE)
        if match:
            return match[1].upper()
    return reply.strip()[-1] if reply.strip() and reply.strip()[-1] in "ABCDE" else None


def vlm4d(reply, options):
    """The letter that a reply begins with. (The official judge is a model; on its published file this rule agrees.)"""
    match = re.match(r"\s*\(?([A-D])(?![A-Za-z0-9'])", reply)
    return match[1] if match else None


def omnispatial(reply, options):
    """The last "Answer: X", or else A."""
    return (re.findall(r"Answer\s*:\s*([A-D])\b", reply) or ["A"])[-1]


def mmsi_bench(reply, options):
    """``x``, `x`, {x}, else a capital that no word follows. What is enclosed counts if it is a letter."""
    for pattern in (r"``([^`]*)``", r"`([^`]*)`", r"\{([^{}]*)\}"):
        match = re.search(pattern, reply)
        if match:
            return match[1].strip() if match[1].strip() in tuple("ABCD") else None
    match = re.search(r"\b([A-D])\b(?!\s[a-zA-Z])", reply)
    return match[1] if match else None


def r4d_bench(reply, options):
    """The first (X), else the first X that stands alone; then a random letter, which is None here."""
    reply = re.sub(r"^\s*(?:the\s+)?(?:correct\s+|final\s+)?answer\s*(?:is|:)\s*:?\s*", "", reply, flags=re.IGNORECASE)
    match = re.search(r"\(([A-E])\)", reply) or re.search(r"\b([A-E])\b", reply)
    return match[1] if match else None


def sat(reply, options):
    """The option that the reply contains, if it does not contain the other one."""
    contained = [letter for letter, option in zip("AB", options, strict=True) if option.lower() in reply.lower()]
    return contained[0] if len(contained) == 1 else None


def vsti_choice(reply, options):
    token = reply.split(" ")[0].rstrip(".").strip().upper()
    return token if token in tuple("ABCDEFGH"[: len(options)]) else None


def vsti_number(reply):
    try:
        return float(reply.split(" ")[0].rstrip(".").strip())
    except ValueError:
        return None


def choice_rows(*num_options):
    return [row for row in CHOICES if len(row["options"]) in num_options]


# name in the card's table -> (card, scorer, our parser, rows that the benchmark could have)
SCORERS = {
    "STI-Bench": ("choice_accuracy", sti_bench, parse_letter, choice_rows(2, 3, 4, 5)),
    "VLM4D": ("choice_accuracy", vlm4d, parse_letter, choice_rows(4)),
    "OmniSpatial": ("choice_accuracy", omnispatial, parse_letter, choice_rows(4)),
    "MMSI-Bench": ("choice_accuracy", mmsi_bench, parse_letter, choice_rows(4)),
    "SAT": ("choice_accuracy", sat, parse_letter_or_value, choice_rows(2)),
    "R4D-Bench": ("r4d_bench", r4d_bench, parse_letter, choice_rows(4, 5)),
    "VSTI-Bench, choices": ("mean_relative_accuracy", vsti_choice, parse_letter_or_value, choice_rows(2, 3, 4)),
    "VSTI-Bench, numbers": (
        "mean_relative_accuracy",
        lambda reply, options: vsti_number(reply),
        lambda reply, options: parse_number(reply, "m"),
        [row | {"options": []} for row in NUMBERS],
    ),
}


def compare(name):
    """All differences: [reply, options, official, ours]."""
    _, scorer, parse, rows = SCORERS[name]
    found = []
    for row in rows:
        parsed = parse(row["reply"], row["options"])
        official, ours = (
            scorer(row["reply"], row["options"]),
            getattr(parsed, "letter", getattr(parsed, "number", None)),
        )
        if official != ours and not (official != official and ours is None):  # nan is no answer either
            found.append([row["reply"], row["options"], official, ours])
    return found


def table_line(name):
    """The line of the card: counts, and for each kind of difference the shortest example."""
    differences, total = compare(name), len(SCORERS[name][3])
    kinds = [
        [d for d in differences if d[3] is None],
        [d for d in differences if d[2] is None],
        [d for d in differences if d[2] is not None and d[3] is not None],
    ]
    examples = []
    for kind in kinds:
        readable = [d for d in kind if re.fullmatch(r"[^|`\n\\<>*$_{}]{3,}", d[0])]
        if readable:
            reply, _, official, ours = min(readable, key=lambda d: len(d[0]))
            examples.append(
                f'"{reply}": {"none" if official is None else official} / {"none" if ours is None else ours}'
            )
    counts = [total - len(differences), *map(len, kinds)]
    return f"| {name} | {total} | {' | '.join(map(str, counts))} | {'; '.join(examples)} |"


@pytest.mark.parametrize("name", SCORERS)
def test_differences_from_the_official_scorer_are_exactly_the_listed_ones(name):
    listed = json.loads((ARTIFACTS / "official_differences.json").read_text(encoding="utf-8"))
    assert compare(name) == listed[name]
    assert set(listed) == set(SCORERS)


@pytest.mark.parametrize("name", SCORERS)
def test_card_lists_the_differences_from_the_official_scorer(name):
    card = (METRICS / SCORERS[name][0] / "README.md").read_text(encoding="utf-8")
    assert table_line(name) in card.splitlines() and f"over {len(ROWS)} hand-made replies" in card


def test_plain_replies_are_read_alike_by_all():
    options = ["left", "right", "up", "down"]
    for letter in "ABCD":
        for name in ("STI-Bench", "VLM4D", "MMSI-Bench", "R4D-Bench", "VSTI-Bench, choices"):
            assert SCORERS[name][1](letter, options) == SCORERS[name][2](letter, options).letter == letter
        assert (
            omnispatial(f"...\n\nAnswer: {letter}", options) == parse_letter(f"...\n\nAnswer: {letter}", options).letter
        )


def test_first_token_scoring_equals_the_official_one_on_every_reply():
    references, replies, expected = [], [], []
    for index, row in enumerate(choice_rows(2, 3, 4)):
        right = "ABCDEFGH".index(row["letter_or_value"] or "A")
        references.append(
            {"id": f"c{index}", "category": "choice", "options": row["options"], "answer": row["options"][right]}
        )
        replies.append(row["reply"])
        expected.append(float(vsti_choice(row["reply"], row["options"]) == "ABCDEFGH"[right]))
    thresholds = np.linspace(0.5, 0.95, 10)
    for index, row in enumerate(NUMBERS):
        number = vsti_number(row["reply"])
        references.append({"id": f"n{index}", "category": "number", "options": None, "answer": "1.6"})
        replies.append(row["reply"])
        expected.append(0.0 if number is None else float(np.mean(abs(number - 1.6) / 1.6 <= 1 - thresholds)))
    result = vsti_score(replies, references, scoring="first_token", return_items=True)
    assert [item["score"] for item in result["items"]] == expected
    assert 0 < sum(expected) < len(expected)


def test_relative_accuracy_equals_the_official_arithmetic_on_a_grid():
    thresholds = np.linspace(0.5, 0.95, 10)
    for hundredths in range(20, 1000, 13):
        for other in range(0, 1500, 7):
            true, predicted = hundredths / 100, other / 100
            official = sum(abs(predicted - true) / true <= 1 - threshold for threshold in thresholds) / 10
            assert relative_accuracy(predicted, true) == official


def test_pair_of_sat_is_scored_as_the_official_one_where_the_options_text_is_repeated():
    options = ["rotated left and moved forward", "rotated right and moved forward"]
    replies = [
        "rotated left and moved forward",
        "The camera rotated right and moved forward.",
        "Rotated Left And Moved Forward.",
        "rotated left and moved forward or rotated right and moved forward",
        "I cannot tell.",
    ]
    references, given, official = [], [], 0
    for pair, (first, second) in enumerate(itertools.product(replies, replies)):
        right = []
        for order, reply in ((options, first), (options[::-1], second)):
            references.append(
                {"id": f"{pair}{order[0]}", "category": "x", "options": order, "answer": options[0], "pair": pair}
            )
            given.append(reply)
            right.append(sat(reply, order) == "AB"[order.index(options[0])])
        official += all(right)
    pairs = choice_score(given, references)["pairs"]
    assert (pairs["n"], pairs["correct"]) == (25, official) and official == 4
