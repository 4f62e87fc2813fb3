import pytest

from datasets_rgpt4d import answer_letter, multiple_choice_prompt, to_messages

ROW = {
    "video": {"path": "clip.mp4", "bytes": None},
    "regions": [{"name": "obj_1", "box": [1.0, 2.0, 30.0, 40.0]}],
    "question": "Which way does <obj_1> move?",
    "options": ["left", "right", "it does not move"],
    "answer": "right",
}


def test_prompt_is_laid_out_as_r4d_bench_does():
    assert multiple_choice_prompt(ROW["question"], ROW["options"]) == (
        "Which way does <obj_1> move?\n\nOptions:\n(A) left\n(B) right\n(C) it does not move\n\n"
        "Answer with only the letter of the correct option."
    )
    assert multiple_choice_prompt("Q?", ["1", "2"], "text").endswith(
        "\n\nAnswer with only the text of the correct option."
    )


@pytest.mark.parametrize(("answer_with", "expected"), [("text", "right"), ("letter", "B")])
def test_messages_have_the_video_first_and_the_answer_last(answer_with, expected):
    user, assistant = to_messages(ROW, answer_with)
    video, text = user["content"]
    assert video == {"type": "video", "video": ROW["video"], "regions": ROW["regions"]}
    assert text == {"type": "text", "text": multiple_choice_prompt(ROW["question"], ROW["options"], answer_with)}
    assert assistant == {"role": "assistant", "content": [{"type": "text", "text": expected}]}
    assert to_messages(ROW, answer_with, with_answer=False) == [user]


def test_only_long_options_are_answered_by_letter():
    assert to_messages(ROW) == to_messages(ROW, "text")
    boxes = {**ROW, "options": ['{"dimensions": [0.6, 0.6, 0.8], "central_point": [-1.2, 1.3, 3.6]}', "short"]}
    boxes["answer"] = boxes["options"][0]
    assert to_messages(boxes) == to_messages(boxes, "letter")


def test_rows_that_cannot_be_asked_are_refused():
    with pytest.raises(ValueError, match="exactly one of the options"):
        answer_letter(["1", "1"], "1")
    with pytest.raises(ValueError, match="exactly one of the options"):
        to_messages({**ROW, "answer": "up"})
    with pytest.raises(ValueError, match="needs 2 to 26 options"):
        multiple_choice_prompt("Q?", ["only"])
    with pytest.raises(ValueError, match="answer_with must be one of"):
        multiple_choice_prompt("Q?", ["1", "2"], "number")
