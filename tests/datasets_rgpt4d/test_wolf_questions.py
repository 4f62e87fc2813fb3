"""Pairs from captions: what is checked, what is rejected, and that an interrupted run goes on."""

import json

import pytest

from datasets_rgpt4d import WolfQA
from datasets_rgpt4d.wolf_questions import (
    TOPICS,
    Clip,
    Rejected,
    claims,
    make_wolf_questions,
    parse_pair,
    read_clips,
    rule_pair,
    unsupported,
)

CAPTION = (
    "The ego vehicle drives along an urban street and slows down. Two white cars and 3 cones block the lane on the left. "
    "It yields to a pedestrian, then passes the cones on the right. The sky is cloudy."
)
CLIP = Clip("c1", "clips/c1.mp4", CAPTION)


def reply(question="What is on the left?", answer="Two white cars."):
    return json.dumps({"question": question, "answer": answer})


def test_claims_are_numbers_colours_directions_and_participants():
    assert claims("Two gray bikes, 3 buses and 1 child; the ego vehicle turns left.") == {
        "2", "grey", "bicycle", "3", "bus", "child", "left",
    }  # fmt: skip
    assert claims("It slows down and passes them.") == set()


@pytest.mark.parametrize(
    "answer, more",
    [
        ("Two white cars and three cones.", set()),
        ("A car and a person.", set()),
        ("Two vehicles.", set()),
        ("Four cars.", {"4"}),
        ("A red car to the left.", {"red"}),
        ("It turns straight ahead.", {"straight", "ahead"}),
        ("Two trucks.", {"truck"}),
    ],
)
def test_answer_may_say_no_more_than_the_caption(answer, more):
    assert unsupported(answer, CAPTION) == more


def test_vehicle_needs_some_vehicle():
    assert unsupported("A vehicle.", "The ego vehicle waits for a pedestrian.") == {"vehicle"}


@pytest.mark.parametrize(
    "text, reason",
    [
        ("Sure! Which cars?", "no JSON object"),
        ('{"question": "Which cars?"', "no JSON object"),
        ('["Which cars?", "Two."]', "no JSON object"),
        ('{"question": null, "answer": null}', "says nothing"),
        ('{"question": "Which?", "answer": 2}', "no text"),
        ('{"question": "Which?", "answer": " "}', "no text"),
        (reply(answer="A bus."), "says more"),
        (reply(question="Where is the bus?"), "says more"),
    ],
)
def test_bad_reply_is_rejected_with_its_reason(text, reason):
    with pytest.raises(Rejected, match=reason):
        parse_pair(text, CAPTION)


def test_reply_may_stand_in_a_code_block():
    assert parse_pair(f"Here it is:\n```json\n{reply()}\n```", CAPTION) == ("What is on the left?", "Two white cars.")


def test_rules_answer_by_sentences_of_the_caption():
    sentences = CAPTION.replace(". ", ".|").split("|")
    answers = {topic: rule_pair(CLIP, topic)[1] for topic in TOPICS}
    assert answers["participants"] == " ".join(sentences[1:3])
    assert answers["ego_motion"] == sentences[0]
    assert answers["interaction"] == " ".join(sentences[1:3])
    assert all(not unsupported(" ".join(rule_pair(CLIP, topic)), CAPTION) for topic in TOPICS)
    with pytest.raises(Rejected, match="says nothing"):
        rule_pair(Clip("c2", "v", "The sky is cloudy."), "participants")


def test_pairs_are_read_by_the_builder_and_counts_add_up(tmp_path):
    def ask(prompts):
        assert all(CAPTION in prompt for prompt in prompts)
        return [
            reply() if "which, how many" in prompt else reply(answer="A bus.") if "order" in prompt else "no"
            for prompt in prompts
        ]

    report = make_wolf_questions([CLIP], tmp_path / "wolf", ask, {"made_by": "model"})
    assert report["pairs"] == 1 and report["clips"] == 1 and report["clips_without_pair"] == 0
    assert report["rejected"] == {
        "the pair says more than the caption": 1,
        "the reply is no JSON object with question and answer": 1,
    }
    rejected = [json.loads(line) for line in (tmp_path / "wolf" / "rejected.jsonl").read_text().splitlines()]
    assert {one["id"] for one in rejected} == {"c1-ego_motion", "c1-interaction"}
    (tmp_path / "wolf" / "clips").mkdir()
    (tmp_path / "wolf" / "clips" / "c1.mp4").write_bytes(b"video")
    (row,) = WolfQA.read(WolfQA.source(str(tmp_path / "wolf")))
    assert row["id"] == "c1-participants" and row["subset"] == "participants"
    assert row["messages"][1]["content"][0]["text"] == "Two white cars."


def test_unreadable_reply_is_asked_for_once_more(tmp_path):
    asked = []

    def ask(prompts):
        asked.append(len(prompts))
        return ["no"] * len(prompts) if len(asked) == 1 else [reply()] * len(prompts)

    assert make_wolf_questions([CLIP], tmp_path, ask, {})["pairs"] == 3
    assert asked == [3, 3]


def test_interrupted_run_goes_on_without_asking_again(tmp_path):
    clips = [Clip(f"c{number}", f"{number}.mp4", CAPTION) for number in range(4)]
    seen = []

    def ask(prompts):
        if len(seen) == 2:
            raise ConnectionError("the endpoint is gone")
        seen.append(prompts)
        return [reply()] * len(prompts)

    with pytest.raises(ConnectionError):
        make_wolf_questions(clips, tmp_path / "cut", ask, {}, clips_at_once=1)
    journal = tmp_path / "cut" / "clips.jsonl"
    journal.write_text(journal.read_text() + '{"clip_id": "c2", "pa')  # as a kill leaves it
    asked_again = []
    make_wolf_questions(
        clips, tmp_path / "cut", lambda prompts: asked_again.extend(prompts) or [reply()] * len(prompts), {}
    )
    assert len(asked_again) == 2 * len(TOPICS)
    make_wolf_questions(clips, tmp_path / "whole", lambda prompts: [reply()] * len(prompts), {})
    for name in ("wolf_qa.jsonl", "rejected.jsonl", "report.json"):
        assert (tmp_path / "cut" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_folder_of_other_settings_is_refused(tmp_path):
    make_wolf_questions([CLIP], tmp_path, None, {"made_by": "rules"})
    with pytest.raises(ValueError, match="other settings or captions"):
        make_wolf_questions([CLIP], tmp_path, None, {"made_by": "a model"})
    with pytest.raises(ValueError, match="other settings or captions"):
        make_wolf_questions([Clip("c1", "clips/c1.mp4", "Another.")], tmp_path, None, {"made_by": "rules"})


@pytest.mark.parametrize(
    "lines, message",
    [
        (['{"clip_id": "a", "video": "a.mp4"}'], "line 1.*caption"),
        (['{"clip_id": "a", "video": "a.mp4", "caption": " "}'], "must not be empty"),
        (['{"clip_id": "a", "video": "a.mp4", "caption": "x"}'] * 2, "line 2.*comes twice"),
        (["nothing"], "line 1"),
        ([""], "no clips"),
    ],
)
def test_bad_captions_are_named(tmp_path, lines, message):
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        read_clips(file)
