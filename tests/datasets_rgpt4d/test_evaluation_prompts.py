import json
from io import BytesIO

import pytest
from PIL import Image

from datasets_rgpt4d import evaluation_messages, evaluation_prompt
from datasets_rgpt4d.evaluation_prompts import PROMPTS
from datasets_rgpt4d.schema import evaluation_row

VIDEO = {"path": "clip.mp4", "bytes": None}


def picture():
    stream = BytesIO()
    Image.new("RGB", (4, 4), "red").save(stream, "png")
    return {"path": None, "bytes": stream.getvalue()}


def row(benchmark, question="Which way?", options=("left", "right"), answer="right", kind="choice", **fields):
    media = {} if "images" in fields else {"videos": [VIDEO]}
    fields = {"category": "", "revision": "r", **media, **fields}
    return evaluation_row(
        id="1", benchmark=benchmark, question=question, options=options, answer=answer, answer_kind=kind, **fields
    )


R4D = "Which way?\n\nOptions:\n(A) left\n(B) right\n\nAnswer with only the letter of the correct option."
MARKED = (
    "The first image is a set-of-mark annotation of a key frame from the video, with bounding boxes labeled <obj_1>, "
    "<obj_2>, etc. References to <obj_N> in the question correspond to those labeled regions."
)
EGO = "The first image is from the beginning of the video and the second image is from the end. "
SAT = (
    "Answer in natural language. {}Which way? Answer the question using a single word or phrase. "
    'Choose between the following options: "left" or "right".'
)
MMSI = "\nAnswer with the option's letter from the given choices directly. Enclose the option's letter within ``."


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (row("r4d_bench"), R4D),
        (row("r4d_bench", images=[picture()], videos=[VIDEO]), f"{MARKED}\n\n{R4D}"),
        (
            row("sti_bench", time_start=7.3, time_end=18.0),
            "From 7.3 s to 18.0 s. Which way?\n(A) left\n(B) right\nPlease output only the option letter!",
        ),
        (row("sti_bench"), "Which way?\n(A) left\n(B) right\nPlease output only the option letter!"),
        (
            row("vlm4d"),
            "\nQuestion: Which way?\nA: left\nB: right\n\nDo not generate any intermediate reasoning process. Answer "
            "directly with the option letter from the given choices.\n",
        ),
        (
            row("omnispatial"),
            "Note: You only need to respond with A, B, C, or D without providing any additional information.\n\n"
            "Which way?\nA. left\nB. right",
        ),
        (row("mmsi_bench"), "Which way?\nOptions: A: left, B: right" + MMSI),
        (
            row("mmsi_bench", details={"published_question": "Which way? \nOptions:\nA: left,  B: right"}),
            "Which way? \nOptions:\nA: left,  B: right" + MMSI,
        ),
        (
            row("mmsi_bench", details={"published_question": "Which way?\nOptions: A: right, B: left"}),
            "Which way?\nOptions: A: left, B: right" + MMSI,
        ),
        (row("sat_real", category="obj_movement"), SAT.format("")),
        (row("sat_real", category="ego_movement"), SAT.format(EGO)),
        (row("sat_real", category="ego_movement", question=f"{EGO}Which way?"), SAT.format(EGO)),
        (
            row("vstibench"),
            "These are frames of a video.\nWhich way?\nOptions:\nA. left\nB. right\n"
            "Answer with the option's letter from the given choices directly.",
        ),
        (
            row("vstibench", options=(), answer="0", kind="number"),
            "These are frames of a video.\nWhich way?\nPlease answer the question using a single word or phrase.",
        ),
        (row("timebench"), R4D),
    ],
)
def test_prompts_are_worded_as_published(asked, expected):
    assert evaluation_prompt(asked) == expected


def test_messages_have_images_then_videos_then_the_prompt():
    region = {"video": 0, "name": "obj_1", "box": [0.0, 1.0, 2.0, 3.0]}
    asked = row("r4d_bench", images=[picture()], videos=[VIDEO], regions=[region])
    (message,) = evaluation_messages(asked)
    image, video, text = message["content"]
    assert message["role"] == "user" and image["type"] == "image" and image["image"].size == (4, 4)
    assert video == {"type": "video", "video": VIDEO, "regions": [{"name": "obj_1", "box": [0.0, 1.0, 2.0, 3.0]}]}
    assert text == {"type": "text", "text": evaluation_prompt(asked)}


def test_regions_without_a_marked_picture_are_left_to_the_processor():
    region = {"video": 0, "name": "obj_1", "box": [0.0, 1.0, 2.0, 3.0]}
    (message,) = evaluation_messages(row("r4d_bench", regions=[region]))
    video, text = message["content"]
    assert video["regions"][0]["name"] == "obj_1" and text["text"] == R4D


def test_braces_in_options_are_shown_as_they_are():
    box = json.dumps({"C_lwh": [4.95, 2.36]})
    assert f"(A) {box}\n(B) {{}}" in evaluation_prompt(row("sti_bench", options=(box, "{}"), answer="{}"))


def test_unknown_benchmarks_are_refused():
    with pytest.raises(ValueError, match="'other'; known are r4d_bench, sti_bench"):
        evaluation_prompt({"benchmark": "other"})


def test_every_builder_has_a_prompt():
    import datasets_rgpt4d
    from datasets_rgpt4d.published_questions import PublishedQuestions

    builders = [one for one in vars(datasets_rgpt4d).values() if isinstance(one, type)]
    names = {one.BENCHMARK for one in builders if issubclass(one, PublishedQuestions)}
    assert names == set(PROMPTS)
