"""The parsers against replies as models write them: tests/artifacts/replies.jsonl, each with what it says, read by hand.

A row has `options` and the letters expected by the letter rules and by both, or `unit` and the number expected.
"""

import json
from pathlib import Path

import pytest

from metrics_rgpt4d.answer_parsing import (
    answer_part,
    parse_letter,
    parse_letter_or_value,
    parse_number,
    parse_value,
    quantity,
)

ROWS = [
    json.loads(line)
    for line in (Path(__file__).parents[1] / "artifacts" / "replies.jsonl").read_text(encoding="utf-8").splitlines()
]
CHOICES = [row for row in ROWS if "options" in row]
NUMBERS = [row for row in ROWS if "number" in row]
DIRECTIONS = ["left", "right", "not moving", "front left"]
LENGTHS = ["2.36m", "0.5 m", "1.0m", "4.72m"]


@pytest.mark.parametrize("row", CHOICES, ids=[repr(row["reply"]) for row in CHOICES])
def test_reply_to_a_choice_is_read_as_written_down(row):
    assert parse_letter(row["reply"], row["options"]).letter == row["letter"]
    assert parse_letter_or_value(row["reply"], row["options"]).letter == row["letter_or_value"]


@pytest.mark.parametrize("row", NUMBERS, ids=[repr(row["reply"]) for row in NUMBERS])
def test_reply_to_a_number_is_read_as_written_down(row):
    parsed = parse_number(row["reply"], row["unit"])
    assert parsed.number == (None if row["number"] is None else pytest.approx(row["number"], rel=1e-12))
    assert (parsed.number is None) == (parsed.rule == "none" or parsed.rule.startswith("ambiguous:"))


def test_table_is_large_enough_to_mean_something():
    assert len(CHOICES) + len(NUMBERS) == len(ROWS)
    assert len({row["reply"] for row in CHOICES}) >= 150 and len({row["reply"] for row in NUMBERS}) >= 100
    assert len({(tuple(row.get("options", ())), row["reply"]) for row in ROWS}) == len(ROWS)
    unreadable = sum(row["letter_or_value"] is None for row in CHOICES)
    assert 50 <= unreadable <= len(CHOICES) / 2


@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        ("The answer is (B)", "statement"),
        ("答案是A因为它向左移动", "statement"),  # no space or mark behind the letter
        ("B", "whole"),
        ("It goes right.\nB", "last_line"),
        ("B) right", "leading"),
        ("It moves to the right (B) here", "bracketed"),
        ("I think B", "lone"),
        ("right", "equal"),
        ("The answer is right", "stated_value"),
        ("left and right are both possible.\nright", "last_line_value"),
        ("It moves right", "contained"),
        ("left or right", "ambiguous:contained"),
        ("A or B", "ambiguous:whole"),
        ("no idea", "none"),
    ],
)
def test_rule_that_decided_is_named(reply, rule):
    assert parse_letter_or_value(reply, DIRECTIONS).rule == rule


def test_letter_always_goes_before_value():
    for row in CHOICES:
        if row["letter"] is not None:
            assert parse_letter_or_value(row["reply"], row["options"]) == parse_letter(row["reply"], row["options"])


def test_options_with_the_same_text_count_as_one():
    options = ["not sure", "not moving", "away from the camera", "away from the camera"]
    assert parse_value("Away from the camera.", options).letter == "C"
    assert parse_value("It moves away from the camera", options).letter == "C"
    assert parse_letter("D", options).letter == "D"


def test_value_is_not_a_letter():
    assert parse_letter("2.36m", LENGTHS).letter is None
    assert parse_value("2.36m", LENGTHS).letter == "A"


def test_quantity_reads_number_and_unit():
    assert quantity("-0.70 m/s²") == (-0.7, "m/s2")
    assert quantity("1,200 m") == (1200.0, "m")
    assert quantity(".5") == (0.5, "")
    assert quantity("15°") == (15.0, "deg")
    assert quantity("3 cars") is None
    assert quantity("left") is None


def test_answer_part_takes_the_last_container():
    assert answer_part("<think>x</think><answer>A</answer> no <answer>B</answer>") == "B"
    assert answer_part("\\boxed{A}, or rather \\boxed{C}") == "C"


@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        ("The answer is 3", "statement"),
        ("about 1.6 m", "whole"),
        ("First 0.5 m, then 0.7 m.\n1.2", "last_line"),
        ("After 2 steps it is 1.6 m away", "with_unit"),
        ("It is 1.6 away", "single"),
        ("1 or 2", "ambiguous:single"),
        ("1-2 m", "ambiguous:with_unit"),
        ("The answer is 1 to 2", "ambiguous:statement"),
        ("less than 2 m", "none"),
        ("no idea", "none"),
    ],
)
def test_rule_that_decided_on_a_number_is_named(reply, rule):
    assert parse_number(reply, "m").rule == rule


def test_number_without_a_unit_asked_for_is_not_converted():
    assert parse_number("160 cm").number == 160.0
    assert parse_number("2.0 s").number == 2.0
    assert parse_number("160 cm", "m").number == 1.6 and parse_number("1.6 m", "cm").number == 160.0
    with pytest.raises(ValueError, match="unit must be one of m, cm, .* not 'parsec'"):
        parse_number("1.6", "parsec")
