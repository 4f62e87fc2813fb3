"""What the tasks' YAML files name: prompts and media of a row of `EVALUATION_FEATURES`, and its score by our metrics."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from datasets_rgpt4d import evaluation_messages, evaluation_prompt
from metrics_rgpt4d import ChoiceAccuracy, MeanRelativeAccuracy, R4DBench

CHOICE = (ChoiceAccuracy, "accuracy")
# benchmark -> metric and its headline, the same as in the report of examples/run_eval.py
HEADLINES = {
    "r4d_bench": (R4DBench, "Avg"),
    "sti_bench": CHOICE,
    "vlm4d": CHOICE,
    "vstibench": (MeanRelativeAccuracy, "mean_of_types"),
}


def doc_to_messages(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    """[`evaluation_messages`], whose media are under `url`, too, where other models of lmms-eval look for them: pictures in
    RGB, videos as paths. Those models do not see boxes that 4D-RGPT draws on a video; these benchmarks have none."""
    messages = evaluation_messages(doc)
    for block in messages[0]["content"]:
        if block["type"] == "image":
            block["url"] = block["image"].convert("RGB")
        elif block["type"] == "video":
            block["url"] = block["video"]["path"]
    return messages


def doc_to_visual(doc: Mapping[str, Any]) -> list[Any]:
    return [block["url"] for block in doc_to_messages(doc)[0]["content"] if block["type"] != "text"]


def doc_to_text(doc: Mapping[str, Any]) -> str:
    return evaluation_prompt(doc)


def process_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The reply with what the metric has to know; it is scored with all others, when they are aggregated."""
    reference = {key: doc[key] for key in ("id", "category", "options", "answer")}
    if doc["benchmark"] == "r4d_bench":
        reference |= {"task": doc["category"], "benchmark": json.loads(doc["details"]).get("benchmark")}
    record = {"test": doc["benchmark"], "reply": results[0], "reference": reference}
    return dict.fromkeys(("score", "interval_low", "interval_high", "unparsable"), record)


def _scores(records: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    metric, headline = HEADLINES[records[0]["test"]]
    replies, references = ([record[key] for record in records] for key in ("reply", "reference"))
    return metric(keep_in_memory=True).compute(predictions=replies, references=references), headline


def _interval(records: Sequence[Mapping[str, Any]]) -> Sequence[float]:
    scores, headline = _scores(records)
    return scores["interval"][headline] if isinstance(scores["interval"], Mapping) else scores["interval"]


def score(records: Sequence[Mapping[str, Any]]) -> float:
    """In percent; a reply that chooses nothing counts as wrong."""
    scores, headline = _scores(records)
    return scores[headline]


def interval_low(records: Sequence[Mapping[str, Any]]) -> float:
    """The lower end of the score's 95 % interval."""
    return _interval(records)[0]


def interval_high(records: Sequence[Mapping[str, Any]]) -> float:
    return _interval(records)[1]


def unparsable(records: Sequence[Mapping[str, Any]]) -> int:
    """How many replies chose nothing."""
    return _scores(records)[0]["unparsable"]
