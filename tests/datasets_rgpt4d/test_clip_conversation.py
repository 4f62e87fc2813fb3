import pytest

from datasets_rgpt4d import clip_conversation


def row(index, question, boxes, scene="s", options=("near", "far"), answer="far"):
    regions = [{"name": f"obj_{number + 1}", "box": box} for number, box in enumerate(boxes)]
    return {
        "id": f"clip-{index}",
        "scene": scene,
        "video": "clip.mp4",
        "question": question,
        "options": list(options),
        "answer": answer,
        "regions": regions,
    }


RED, BLUE = [0.0, 0.0, 4.0, 4.0], [8.0, 8.0, 12.0, 12.0]


def test_an_object_keeps_its_name_in_all_turns():
    rows = [
        row(0, "Is <obj_1> red?", [RED]),
        row(1, "Is <obj_1> blue?", [BLUE]),
        row(2, "Is <obj_1> blue and <obj_2> red?", [BLUE, RED], options=("<obj_2>", "<obj_1>"), answer="<obj_1>"),
    ]
    messages = clip_conversation(rows)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 3
    videos = [block for message in messages for block in message["content"] if block["type"] == "video"]
    assert videos == [messages[0]["content"][0]]
    name = {tuple(region["box"]): region["name"] for region in videos[0]["regions"]}
    assert sorted(name.values()) == ["obj_1", "obj_2"]
    red, blue = name[tuple(RED)], name[tuple(BLUE)]
    questions = [message["content"][-1]["text"].split("\n")[0] for message in messages[::2]]
    assert sorted(questions) == sorted([f"Is <{red}> red?", f"Is <{blue}> blue?", f"Is <{blue}> blue and <{red}> red?"])
    turn = 2 * questions.index(f"Is <{blue}> blue and <{red}> red?")
    assert f"(A) <{red}>\n(B) <{blue}>" in messages[turn]["content"][-1]["text"]
    assert messages[turn + 1]["content"][0]["text"] == f"<{blue}>"


def test_order_of_turns_is_repeatable_and_not_always_the_rows():
    orders = set()
    for clip in range(8):
        rows = [row(f"{clip}-{index}", f"Question {index}?", [RED]) for index in range(4)]
        texts = [message["content"][-1]["text"] for message in clip_conversation(rows)]
        assert texts == [message["content"][-1]["text"] for message in clip_conversation(rows)]
        orders.add(tuple(texts))
    assert len(orders) > 4


def test_rows_of_different_clips_are_refused():
    with pytest.raises(ValueError, match="different clips"):
        clip_conversation([row(0, "?", [RED]), row(1, "?", [RED], scene="other")])
    with pytest.raises(ValueError, match="at least one"):
        clip_conversation([])
