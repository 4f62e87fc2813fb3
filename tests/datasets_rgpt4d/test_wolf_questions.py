import copy
import json

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from datasets_rgpt4d import WolfQA
from datasets_rgpt4d.wolf_questions import (
    LocalModel,
    make_wolf_questions,
    parse_reply,
    rule_pairs,
    unsupported,
)

CAPTION = "The car slows down, then turns left at the junction. Two pedestrians wait beside a grey truck."
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
GOOD = json.dumps({"question": "Who waits?", "answer": "2 pedestrians wait beside a gray truck."})


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def captions(tmp_path):
    path = tmp_path / "captions.jsonl"
    clips = [{"clip_id": f"c{i}", "video": f"{i}.mp4", "caption": CAPTION} for i in range(4)]
    path.write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    return path


class Scripted:
    """Gives the replies of a clip in turn; `asked` has the conversations."""

    settings = {"model": "scripted"}

    def __init__(self, script, batch=3):
        self.script, self.batch, self.asked = script, batch, []

    def __call__(self, conversations):
        self.asked += conversations
        return [self.script[(len(one) - 1) // 2] for one in conversations]


@pytest.mark.parametrize(
    "answer, word",
    [
        ("Two pedestrians wait.", None),
        ("2 pedestrians and one truck", None),
        ("The ego vehicle and the ego-centric car wait.", None),
        ("The ego vehicle waits for a vehicle.", "vehicle"),
        ("A pedestrian waits at the left.", None),
        ("It goes leftwards.", None),
        ("It turns right.", "right"),
        ("The gray TRUCK waits.", None),
        ("A white truck waits.", "white"),
        ("Buses wait.", "bus"),
        ("Two people wait.", "person"),
        ("3 pedestrians wait.", "3"),
    ],
)
def test_unsupported_names_the_word_that_the_caption_lacks(answer, word):
    reason = unsupported(answer, CAPTION)
    assert reason is None if word is None else reason.endswith(f": {word}")


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Here you are:\n" + GOOD,
        "```json\n" + GOOD + "\n```",
        f"[{GOOD}]",
        '{"question": "Q?"}',
        '{"question": "Q?", "answer": 2}',
        '{"question": "Q?", "answer": " "}',
        '{"question": "Q?", "answer": "\\ud800"}',
        "\n".join([GOOD] * 6),
    ],
)
def test_reply_that_is_not_json_lines_cannot_be_read(reply):
    with pytest.raises(ValueError):
        parse_reply(reply)


def test_rules_answer_with_spans_of_the_caption():
    pairs = {pair["question_type"]: pair["answer"] for pair in rule_pairs(CAPTION)}
    assert pairs == {
        "participants": "Two pedestrians, a grey truck",
        "speed": "The car slows down",
        "turn": "turns left at the junction",
    }
    assert all(part in CAPTION for answer in pairs.values() for part in answer.split(", "))


@pytest.mark.parametrize(
    "caption",
    [
        "The car does not stop.",
        "The car ahead stops.",
        "The car waits and a driver turns left.",
        "There are no pedestrians.",
        "Rain falls.",
    ],
)
def test_rules_make_no_pair_of_what_is_denied_or_of_others(caption):
    assert rule_pairs(caption) == []


def test_pairs_are_read_by_wolf_qa(captions, tmp_path):
    report = make_wolf_questions(captions, tmp_path / "out", None)
    assert report["clips"] == 4 and report["pairs"] == 12 and report["rejected"] == {}
    for i in range(4):
        (tmp_path / "out" / f"{i}.mp4").write_bytes(b"video")
    builder = WolfQA(location=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    builder.download_and_prepare()
    rows = builder.as_dataset("train")
    assert len(rows) == 12 and rows[0]["subset"] == "participants" and rows[0]["id"] == "c0-0"


def test_clips_without_pair_are_counted(captions, tmp_path):
    captions.write_text(json.dumps({"clip_id": "c", "video": "v", "caption": "Rain falls."}))
    assert make_wolf_questions(captions, tmp_path / "out", None)["clips_without_pair"] == 1


def test_reply_that_cannot_be_read_is_asked_again_once(captions, tmp_path):
    model = Scripted(["what?", GOOD])
    assert make_wolf_questions(captions, tmp_path / "good", model)["pairs"] == 4
    assert len(model.asked) == 8 and model.asked[-1][1]["content"] == "what?"
    bad = Scripted(["what?", "what?", GOOD])
    report = make_wolf_questions(captions, tmp_path / "bad", bad)
    assert report["pairs"] == 0 and report["rejected"] == {"the reply cannot be read": 4} and len(bad.asked) == 8
    assert [one["reply"] for one in lines(tmp_path / "bad" / "rejected.jsonl")] == ["what?"] * 4


def test_pair_that_the_caption_does_not_support_is_rejected_alone(captions, tmp_path):
    wrong = json.dumps({"question": "What is there?", "answer": "A red bus."})
    report = make_wolf_questions(captions, tmp_path / "out", Scripted([f"{wrong}\n{GOOD}\n{GOOD}"]))
    assert report["pairs"] == 4
    assert report["rejected"] == {
        "a colour of the answer is not in the caption": 4,
        "the question is there twice": 4,
    }


def test_failed_clips_are_asked_by_the_next_run(captions, tmp_path):
    report = make_wolf_questions(captions, tmp_path / "out", Scripted([OSError("gone")]))
    assert sorted(report["failed"]) == ["c0", "c1", "c2", "c3"] and report["pairs"] == 0
    model = Scripted([GOOD])
    report = make_wolf_questions(captions, tmp_path / "out", model)
    assert report["failed"] == {} and report["pairs"] == 4
    make_wolf_questions(captions, tmp_path / "out", model)
    assert len(model.asked) == 4


def test_cut_line_is_mended_and_its_clip_asked_again(captions, tmp_path):
    make_wolf_questions(captions, tmp_path / "out", Scripted([GOOD]))
    names = ("clips.jsonl", "wolf_qa.jsonl", "rejected.jsonl", "report.json")
    before = {name: (tmp_path / "out" / name).read_bytes() for name in names}
    record = tmp_path / "out" / "clips.jsonl"
    record.write_bytes(before["clips.jsonl"][:-20])
    model = Scripted([GOOD])
    make_wolf_questions(captions, tmp_path / "out", model)
    assert len(model.asked) == 1
    assert {name: (tmp_path / "out" / name).read_bytes() for name in names} == before


def test_other_settings_are_refused(captions, tmp_path):
    make_wolf_questions(captions, tmp_path / "out", Scripted([GOOD]))
    with pytest.raises(ValueError, match="made_by"):
        make_wolf_questions(captions, tmp_path / "out", None)
    captions.write_text(captions.read_text().replace("Two", "Three"))
    with pytest.raises(ValueError, match="captions_sha256"):
        make_wolf_questions(captions, tmp_path / "out", Scripted([GOOD]))


@pytest.mark.parametrize("line", ["{", "[]", '{"clip_id": "a"}', '{"clip_id": "c0", "video": "v", "caption": "c"}'])
def test_captions_that_cannot_be_used_are_named(captions, tmp_path, line):
    captions.write_text(captions.read_text() + line)
    with pytest.raises(ValueError, match="line 5"):
        make_wolf_questions(captions, tmp_path / "out", None)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tiny_tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        eos_token_id=tiny_tokenizer.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = CHAT_TEMPLATE  # the tokenizer has none: that of 4D-RGPT is its processor's
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_garbage_of_a_local_model_is_rejected(captions, tmp_path, tiny_model):
    report = make_wolf_questions(captions, tmp_path / "out", LocalModel(tiny_model, 3, 16))
    assert report["pairs"] == 0 and report["rejected"] == {"the reply cannot be read": 4}


def test_local_model_returns_the_generated_text_alone(captions, tmp_path, tiny_model, monkeypatch):
    model = LocalModel(tiny_model, 3, 16)
    prompts = []

    def generate(input_ids, **kwargs):
        prompts.extend(model.tokenizer.batch_decode(input_ids))
        reply = model.tokenizer(GOOD, add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([input_ids, reply.expand(len(input_ids), -1)], dim=1)

    monkeypatch.setattr(model.model, "generate", generate)
    assert make_wolf_questions(captions, tmp_path / "out", model)["pairs"] == 4
    assert len(prompts) == 4 and all(CAPTION in prompt for prompt in prompts)
