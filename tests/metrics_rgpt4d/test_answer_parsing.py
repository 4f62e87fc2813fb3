"""The parser against replies as models write them. Each row: reply, letter by the letter rules, letter by both."""

import pytest

from metrics_rgpt4d.r4d_bench.answer_parsing import (
    answer_part,
    parse_letter,
    parse_letter_or_value,
    parse_value,
    quantity,
)

DIRECTIONS = ["left", "right", "not moving", "front left"]
SPEEDS = ["0.5m/s", "1.20m/s", "-0.40m/s", "2.36m/s", "10m/s"]
ACCELERATIONS = ["-0.10m/s²", "-0.40m/s²", "-0.70m/s²", "-1.30m/s²", "-0.60m/s²"]
LENGTHS = ["2.36m", "0.5 m", "1.0m", "4.72m"]
COUNTS = ["1", "2", "3", "0"]
ROTATION = ["clockwise", "counter-clockwise", "not rotating", "None"]
ANGLES = ["15°", "0°", "40°", "60°"]
TIMES = ["4.92", "9.85", "19.7", "39.4", "78.8"]
BOXES = [
    "{'dimensions': [0.1, 0.2, 0.3], 'central_point': [1.0, 0.5, 2.0]}",
    "{'dimensions': [0.2, 0.2, 0.3], 'central_point': [1.0, 0.5, 2.0]}",
]
YES_NO = ["yes", "no"]
SENTENCES = ["Camera C moves", "A car moves left", "the red car", "there are no buses in the video"]
LETTER_TEXTS = ["B", "A", "C", "D"]

REPLIES = [
    # the letter alone, in every dress
    (DIRECTIONS, "B", "B", "B"),
    (DIRECTIONS, "b", "B", "B"),
    (DIRECTIONS, " B \n", "B", "B"),
    (DIRECTIONS, "B.", "B", "B"),
    (DIRECTIONS, "(B)", "B", "B"),
    (DIRECTIONS, "(b)", "B", "B"),
    (DIRECTIONS, "B)", "B", "B"),
    (DIRECTIONS, "[B]", "B", "B"),
    (DIRECTIONS, "**B**", "B", "B"),
    (DIRECTIONS, "**(B)**.", "B", "B"),
    (DIRECTIONS, "`B`", "B", "B"),
    (DIRECTIONS, '"B"', "B", "B"),
    (DIRECTIONS, "Ｂ", "B", "B"),
    (DIRECTIONS, "A", "A", "A"),
    (DIRECTIONS, "a", "A", "A"),
    (DIRECTIONS, "Option B", "B", "B"),
    (DIRECTIONS, "option (b)", "B", "B"),
    (DIRECTIONS, "Choice D.", "D", "D"),
    (DIRECTIONS, "$B$", "B", "B"),
    (DIRECTIONS, "\\boxed{B}", "B", "B"),
    (DIRECTIONS, "$\\boxed{\\text{B}}$", "B", "B"),
    (DIRECTIONS, "The final answer is \\boxed{(C)}.", "C", "C"),
    (DIRECTIONS, "<answer>B</answer>", "B", "B"),
    (DIRECTIONS, "<think>It could be A, or (C).</think> B", "B", "B"),
    (DIRECTIONS, "<think>Left. No, right.</think>\n<answer> (D) </answer>", "D", "D"),
    (DIRECTIONS, "<answer>B", "B", "B"),
    # the letter, then text
    (DIRECTIONS, "B) right", "B", "B"),
    (DIRECTIONS, "(B) right", "B", "B"),
    (DIRECTIONS, "(B)right", "B", "B"),
    (DIRECTIONS, "B. right", "B", "B"),
    (DIRECTIONS, "B: right", "B", "B"),
    (DIRECTIONS, "B - right", "B", "B"),
    (DIRECTIONS, "B, because the car goes right.", "B", "B"),
    (DIRECTIONS, "B right", "B", "B"),
    (DIRECTIONS, "A left", "A", "A"),
    (DIRECTIONS, "**B.** right", "B", "B"),
    (DIRECTIONS, "B\n\nThe car moves to the right of the frame.", "B", "B"),
    (DIRECTIONS, "B) left", "B", "B"),  # letter and text disagree: the letter was asked for
    (DIRECTIONS, "A. The ball goes left, then it stops.", "A", "A"),
    (DIRECTIONS, "- (C) not moving", "C", "C"),
    # statements
    (DIRECTIONS, "The answer is B", "B", "B"),
    (DIRECTIONS, "The answer is (B).", "B", "B"),
    (DIRECTIONS, "The answer is: B", "B", "B"),
    (DIRECTIONS, "The answer is **B**.", "B", "B"),
    (DIRECTIONS, "The answer is A.", "A", "A"),
    (DIRECTIONS, "The answer is A because it moves.", "A", "A"),
    (DIRECTIONS, "The answer is B because it moves left at first.", "B", "B"),
    (DIRECTIONS, "The answer is option C.", "C", "C"),
    (DIRECTIONS, "The correct answer is D) front left.", "D", "D"),
    (DIRECTIONS, "The correct answer to this question is C.", "C", "C"),
    (DIRECTIONS, "The correct option is B", "B", "B"),
    (DIRECTIONS, "The best choice would be (C).", "C", "C"),
    (DIRECTIONS, "Answer: B", "B", "B"),
    (DIRECTIONS, "answer: b", "B", "B"),
    (DIRECTIONS, "**Answer:** B", "B", "B"),
    (DIRECTIONS, "**Answer: (B) right**", "B", "B"),
    (DIRECTIONS, "ANSWER = C", "C", "C"),
    (DIRECTIONS, "Ans: D", "D", "D"),
    (DIRECTIONS, "Answer - B", "B", "B"),
    (DIRECTIONS, '{"answer": "B"}', "B", "B"),
    (DIRECTIONS, "### Answer\n\nB", "B", "B"),
    (DIRECTIONS, "Therefore, the final answer is: $B$", "B", "B"),
    (DIRECTIONS, "I choose option B.", "B", "B"),
    (DIRECTIONS, "I would go with C.", "C", "C"),
    (DIRECTIONS, "Option D is correct.", "D", "D"),
    (DIRECTIONS, "Option D is the correct answer.", "D", "D"),
    (DIRECTIONS, "B is the correct answer.", "B", "B"),
    (DIRECTIONS, "(C) is correct, since nothing moves.", "C", "C"),
    (DIRECTIONS, "My choice is B", "B", "B"),
    (DIRECTIONS, "I think B", "B", "B"),
    (DIRECTIONS, "Definitely C!", "C", "C"),
    (DIRECTIONS, "Based on the frames, it moves to the right (B).", "B", "B"),
    # reasoning first
    (DIRECTIONS, "The car starts at the left and ends at the right.\n\nB", "B", "B"),
    (DIRECTIONS, "Frame 1 shows it left. Frame 9 shows it right.\n(B)", "B", "B"),
    (DIRECTIONS, "A) left: no, it goes the other way.\nB) right: yes.\nB", "B", "B"),
    (DIRECTIONS, "It goes right.\nAnswer: B) right", "B", "B"),
    (DIRECTIONS, "The answer is A. Wait, looking again, the answer is B.", "B", "B"),
    (DIRECTIONS, "Option A is incorrect. Option B is correct.", "B", "B"),
    (DIRECTIONS, "The answer is not A but the answer is B", "B", "B"),
    (DIRECTIONS, "Options:\n(A) left\n(B) right\nAnswer: C", "C", "C"),
    # the article "A" and the pronoun "I" are no letters
    (DIRECTIONS, "A car moves left", None, "A"),
    (DIRECTIONS, "A car is there.", None, None),
    (DIRECTIONS, "The answer is A car moving right", None, "B"),
    (DIRECTIONS, "I see a car that is moving right.", None, "B"),
    (DIRECTIONS, "A person walks to the right of A table", None, "B"),
    (SENTENCES, "A car moves left", None, "B"),
    (SENTENCES, "Camera C moves", None, "A"),
    (SENTENCES, "The red car.", None, "C"),
    # values: text
    (DIRECTIONS, "right", None, "B"),
    (DIRECTIONS, "Right.", None, "B"),
    (DIRECTIONS, " NOT  MOVING ", None, "C"),
    (DIRECTIONS, "It is moving right.", None, "B"),
    (DIRECTIONS, "The answer is left", None, "A"),
    (DIRECTIONS, "The right answer is: left", None, "A"),
    (DIRECTIONS, "front left", None, "D"),
    (DIRECTIONS, "Front-left", None, "D"),
    (DIRECTIONS, "It moves to the front left.", None, "D"),
    (DIRECTIONS, "It moves front-left of the camera", None, "D"),
    (DIRECTIONS, "The car is not moving", None, "C"),
    (DIRECTIONS, "It is not moving left.", None, "C"),  # "not moving" is an option's text, and "left" is denied
    (DIRECTIONS, "It does not go left but right", None, "B"),
    (DIRECTIONS, "The car turns from left to right.", None, None),
    (DIRECTIONS, "Some reasoning on left and right.\nright", None, "B"),
    (ROTATION, "clockwise", None, "A"),
    (ROTATION, "counterclockwise", None, "B"),
    (ROTATION, "Counter clockwise", None, "B"),
    (ROTATION, "<obj_1> rotates counter-clockwise.", None, "B"),
    (ROTATION, "none", None, "D"),
    (["clockwise", "not rotating"], "counter-clockwise", None, None),
    (YES_NO, "Yes, it does.", None, "A"),
    (YES_NO, "No.", None, "B"),
    (YES_NO, "It is not known.", None, None),
    (SENTENCES, "There are no buses in the video.", None, "D"),
    (BOXES, '{"dimensions":[0.2,0.2,0.3],"central_point":[1.0,0.5,2.0]}', None, "B"),
    # values: numbers and units
    (LENGTHS, "2.36m", None, "A"),
    (LENGTHS, "2.36 m", None, "A"),
    (LENGTHS, "2.36 meters", None, "A"),
    (LENGTHS, "2.360 metres.", None, "A"),
    (LENGTHS, "2.36", None, "A"),
    (LENGTHS, "The distance is about 2.36 m.", None, "A"),
    (LENGTHS, "$2.36\\ \\text{m}$", None, "A"),
    (LENGTHS, "\\boxed{0.50\\,\\mathrm{m}}", None, "B"),
    (LENGTHS, "1m", None, "C"),
    (LENGTHS, "1.0 cm", None, None),
    (LENGTHS, "2.36 m/s", None, None),
    (LENGTHS, "2.4 m", None, None),
    (LENGTHS, "12.36m", None, None),
    (LENGTHS, "Between 0.5 m and 1.0 m", None, None),
    (LENGTHS, "0.5-1.0m", None, None),
    (SPEEDS, "0.5 m/s", None, "A"),
    (SPEEDS, "1.2 meters per second", None, "B"),
    (SPEEDS, "0.40m/s", None, None),  # the option is negative
    (SPEEDS, "−0.4 m/s", None, "C"),
    (SPEEDS, "Answer: -0.40m/s", None, "C"),
    (SPEEDS, "E) 10m/s", "E", "E"),
    (ACCELERATIONS, "-0.70m/s²", None, "C"),
    (ACCELERATIONS, "-0.7 m/s^2", None, "C"),
    (ACCELERATIONS, "−0.70 m/s2", None, "C"),
    (ACCELERATIONS, "$-0.70\\ m/s^{2}$", None, "C"),
    (ACCELERATIONS, "The acceleration is -1.30 m/s².", None, "D"),
    (ACCELERATIONS, "-0.7 meters per second squared", None, "C"),
    (ACCELERATIONS, "0.70m/s²", None, None),
    (ACCELERATIONS, "-0.70m/s", None, None),
    (ANGLES, "15 degrees", None, "A"),
    (ANGLES, "40 deg.", None, "C"),
    (ANGLES, "0", None, "B"),
    (COUNTS, "0", None, "D"),
    (COUNTS, "3 times", None, "C"),
    (COUNTS, "two", None, "B"),
    (COUNTS, "Two times.", None, "B"),
    (COUNTS, "<obj_1> hits the ball 2 times.", None, "B"),
    (COUNTS, "At 2.00 sec it has hit the ball 3 times", None, "C"),
    (COUNTS, "2 or 3", None, None),
    (COUNTS, "4", None, None),
    (TIMES, "19.70", None, "C"),
    (TIMES, "19.7 seconds", None, "C"),  # the options have no unit: the question says "how many seconds"
    (TIMES, "19.7 km", None, None),
    (TIMES, "The answer is 9.85 s.", None, "B"),
    (TIMES, "B. 9.85", "B", "B"),
    # letters beyond the options, and texts that are letters
    (DIRECTIONS, "E", None, None),
    (DIRECTIONS, "The answer is F.", None, None),
    (SPEEDS, "E", "E", "E"),
    (LETTER_TEXTS, "B", "B", "B"),  # the letter was asked for, so B is the second option
    (["a", "the"], "the", None, "B"),
    # nothing, or several things
    (DIRECTIONS, "", None, None),
    (DIRECTIONS, "   ", None, None),
    (DIRECTIONS, "I cannot tell from the video.", None, None),
    (DIRECTIONS, "<think>The car goes right, so B", None, None),
    (DIRECTIONS, "A or B", None, None),
    (DIRECTIONS, "A, B", None, None),
    (DIRECTIONS, "B and C", None, None),
    (DIRECTIONS, "The answer is B or C.", None, None),
    (DIRECTIONS, "The answer is A or B", None, None),
    (DIRECTIONS, "(A) or (B)", None, None),
    (DIRECTIONS, "Both A and B", None, None),
    (DIRECTIONS, "Neither A nor B", None, None),
    (DIRECTIONS, "(A) left (B) right (C) not moving (D) front left", None, None),
    (DIRECTIONS, "(A) left\n(B) right\n(C) not moving\n(D) front left", None, None),
    (DIRECTIONS, "Option A or option C", None, None),
    (DIRECTIONS, "It might be (A), it might be (C).", None, None),
    (DIRECTIONS, "The object in 3D space", None, None),
]


@pytest.mark.parametrize(("options", "reply", "letter", "letter_or_value"), REPLIES, ids=[repr(r[1]) for r in REPLIES])
def test_reply_is_read_as_written_down(options, reply, letter, letter_or_value):
    assert parse_letter(reply, options).letter == letter
    assert parse_letter_or_value(reply, options).letter == letter_or_value


def test_table_is_large_enough_to_mean_something():
    assert len(REPLIES) >= 100
    assert len({(tuple(options), reply) for options, reply, *_ in REPLIES}) == len(REPLIES)


@pytest.mark.parametrize(
    ("reply", "rule"),
    [
        ("The answer is (B)", "statement"),
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
    for options, reply, letter, _ in REPLIES:
        if letter is not None:
            assert parse_letter_or_value(reply, options) == parse_letter(reply, options)


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
