"""Questions and answers from captions of driving clips, in the format that [`WolfQA`] reads.

The paper asked Llama-3.1-70B-Instruct, with captions of Wolf and text templates, for about three pairs a clip. Its
templates and pairs were never published: the prompt and the rules here are our own, and the result is **not** the
paper's data.
"""

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from .whole_files import append_record, drop_partial_line, write_text

MAX_PAIRS = 5  # of one clip: the prompt asks for three

PROMPT = """\
Below is the caption of a short driving video, filmed from the front of the ego vehicle. Write three pairs of a question \
about the video and its answer:
1. Which traffic participants and obstacles are there, and where?
2. How does the ego vehicle move: does it stop, turn, change lanes, speed up or slow down, and in what order?
3. How do the ego vehicle and the others interact: who passes, yields or waits, and on which side?

Put each question in your own words; it must be answerable from the video alone and must not mention a caption. Answer in \
one full sentence, with nothing that the caption does not say and with the caption's own words for participants, \
numbers, colours and directions. Leave a question out if the caption does not answer it.
Reply with one JSON object a line and nothing else: {"question": "...", "answer": "..."}

Caption: """

ASK_AGAIN = "That could not be read: %s. Reply again, with one JSON object a line and nothing else."

NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
        "eighteen nineteen twenty".split()
    )
} | {"thirty": "30", "forty": "40", "fifty": "50", "dozen": "12", "hundred": "100"}
COLOURS = set(
    "red orange yellow green blue purple pink brown black white grey silver gold golden beige maroon turquoise".split()
)
DIRECTIONS = set(
    "left right ahead behind forward backward straight north south east west northeast northwest southeast southwest "
    "clockwise counterclockwise".split()
)
PARTICIPANTS = set(
    "car vehicle truck bus van suv sedan taxi pickup trailer ambulance motorcycle motorcyclist motorbike scooter bicycle "
    "bike cyclist bicyclist rider driver pedestrian person man woman child worker crowd tram train cone barrier animal "
    "dog cat stroller wheelchair lorry jeep minivan excavator crane tractor".split()
)
IRREGULAR = {
    "people": "person",
    "persons": "person",
    "men": "man",
    "women": "woman",
    "children": "child",
    "gray": "grey",
    "counter-clockwise": "counterclockwise",
}
EGO_NAME = re.compile(r"\bego[ -](?:centric )?(?:vehicle|car)\b", re.IGNORECASE)
WORD = re.compile(r"\d+(?:[.,]\d+)*|counter-clockwise|[^\W\d_]+")


def _singular(word: str) -> Iterator[str]:
    yield IRREGULAR.get(word, word)
    if word.endswith("s"):
        yield word[:-1]
        if word.endswith("es"):
            yield word[:-2]
    if word.endswith(("ward", "wards")):  # leftward, westwards
        yield word.removesuffix("s").removesuffix("ward")


def checked_words(text: str) -> dict[str, str]:
    """The numbers, colours, directions and traffic participants of a text, each with its kind.

    Words are compared in lower case; plurals are singular, number words are digits, gray is grey, leftward is left.
    """
    found = {}
    for word in WORD.findall(text.lower()):
        if word[0].isdigit():
            found[word.replace(",", "")] = "number"
        elif word in NUMBERS:
            found[NUMBERS[word]] = "number"
        else:
            for form in _singular(word):
                kinds = (("colour", COLOURS), ("direction", DIRECTIONS), ("traffic participant", PARTICIPANTS))
                kind = next((kind for kind, words in kinds if form in words), None)
                if kind is not None:
                    found[form] = kind
                    break
    return found


def unsupported(answer: str, caption: str) -> str | None:
    """Why an answer is not supported by the caption: the kind of the first of its [`checked_words`] that the caption
    lacks, or `None`.

    The rule knows words, not sentences: a colour may have moved to another car, and other words are not checked. "Ego
    vehicle" is the prompt's own name for the car that films, and captions write the number one as "a".
    """
    there = {*checked_words(caption), "1"}
    answer = EGO_NAME.sub(" ", answer)
    return next(
        (
            f"a {kind} of the answer is not in the caption: {word}"
            for word, kind in checked_words(answer).items()
            if word not in there
        ),
        None,
    )


def parse_reply(reply: str) -> list[dict[str, str]]:
    """The pairs of a reply, one JSON object with a `question` and an `answer` a line.

    Raises: `ValueError` if any line is something else, or there are none or more than `MAX_PAIRS`.
    """
    pairs = []
    for line in filter(str.strip, reply.split("\n")):
        try:
            pair = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError("a line is no JSON") from None
        if not isinstance(pair, dict) or set(pair) != {"question", "answer"}:
            raise ValueError("a line is no object of question and answer alone")
        if not all(isinstance(text, str) and text.strip() for text in pair.values()):
            raise ValueError("a question or an answer is no text or empty")
        if any("\ud800" <= letter <= "\udfff" for text in pair.values() for letter in text):
            raise ValueError("a line has half a character")  # which no file can hold
        pairs.append({name: text.strip() for name, text in pair.items()})
    if not 1 <= len(pairs) <= MAX_PAIRS:
        raise ValueError(f"there are {'no' if not pairs else f'more than {MAX_PAIRS}'} pairs")
    return pairs


# ----- rules

# Sorted: the order of a set differs between processes, and settings.json holds a hash of the patterns.
NOUNS = "|".join(sorted(PARTICIPANTS - {"driver"}))
BEFORE = "|".join(
    [
        *NUMBERS,
        *sorted(COLOURS),
        *"gray a an the other another several many some multiple parked oncoming traffic large small".split(),
    ]
)
PHRASE = re.compile(
    rf"\b(?P<before>(?:(?:{BEFORE}|\d+)\s+)*)(?P<noun>{NOUNS}|people|men|women|children)(?:es|s)?\b(?!['’-])",
    re.IGNORECASE,
)
NEGATION = re.compile(r"\b(?:no|not|never|without|neither|nor|none)\b|n['’]t\b", re.IGNORECASE)
SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?](?!\s|$)[^.!?\n]*)*")
# The car that films: other cars are "the car ahead", "the car that ...".
EGO = re.compile(r"\s*The\s+(?:ego(?:-centric)?\s+)?(?:car|vehicle)\s+", re.IGNORECASE)
NEXT_CLAUSE = re.compile(r"(?:\s*[,;]\s*|\s+)(?:(?:and|then)\s+)+|\s*[,;]\s*", re.IGNORECASE)
SIDE = r"\b(?:left|right)\b"
EGO_RULES = {
    "speed": (
        "How does the speed of the ego vehicle change?",
        r"(?:(?:maintains|keeps|increases|reduces|decreases)\b.*\bspeed|accelerates|decelerates|slows|brakes|speeds up)\b",
    ),
    "stop": ("What does the ego vehicle do when it stops?", r"(?:stops|halts|comes to a (?:\w+ )?(?:stop|halt))\b"),
    "turn": ("Which way does the ego vehicle turn?", rf"(?:turns|steers|veers|bends)\b.*{SIDE}"),
    "lane": ("How does the ego vehicle change lanes?", r"(?:(?:changes|switches)\s+lanes?|merges)\b"),
    "passing": (
        "What does the ego vehicle pass, and on which side?",
        rf"(?:\w+\s+(?:\w+\s+)?to\s+)?(?:pass(?:es)?|overtakes?|bypass(?:es)?)\b.*{SIDE}",
    ),
    "yielding": ("To whom or for what does the ego vehicle yield or wait?", r"(?:yields\s+to|waits\s+for)\b"),
}


def rule_pairs(caption: str) -> list[dict[str, str]]:
    """At most one pair of each `question_type`: participants, and speed, stop, turn, lane, passing and yielding of the car
    that films. Answers are spans of the caption; that of participants is a list of spans.

    Only sentences that start with "The (ego) car" or "vehicle" tell how it moves, and those with a negation tell nothing.
    """
    participants: dict[tuple[str, ...], str] = {}  # told once: "the cones" are the "two cones" of before
    pairs: dict[str, dict[str, str]] = {}
    for sentence in SENTENCE.findall(caption):
        if NEGATION.search(sentence):
            continue
        for phrase in PHRASE.finditer(sentence):
            before = set(phrase["before"].lower().split()) - {"a", "an", "the"}
            if before or phrase["noun"].lower() not in ("car", "vehicle"):  # "the car" is the one that films
                key = (*checked_words(phrase["noun"]), *sorted(before & COLOURS))
                participants.setdefault(key, phrase[0])
        subject = EGO.match(sentence)
        if subject is None:
            continue
        start, is_first = subject.end(), True
        for end, following in _clauses(sentence, start):
            clause = re.sub(r"^(?:\w+ly\s+)*", "", sentence[start:end])
            kinds = [kind for kind, (_, pattern) in EGO_RULES.items() if re.match(pattern, clause, re.IGNORECASE)]
            for kind in kinds:
                answer = sentence[subject.start() if is_first else start : end].strip()
                pairs.setdefault(kind, {"question": EGO_RULES[kind][0], "answer": answer, "question_type": kind})
            if not kinds:
                break  # perhaps of somebody else, and so may be what follows
            start, is_first = following, False
    found = [pairs[kind] for kind in EGO_RULES if kind in pairs]
    if participants:
        question = "Which traffic participants and obstacles are in the video?"
        found.insert(
            0, {"question": question, "answer": ", ".join(participants.values()), "question_type": "participants"}
        )
    return found


def _clauses(sentence: str, start: int) -> Iterator[tuple[int, int]]:
    """Where each clause from `start` on ends, and where the next one starts."""
    for between in NEXT_CLAUSE.finditer(sentence, start):
        yield between.span()
    yield len(sentence), len(sentence)


# ----- models


class Replies(Protocol):
    """`settings` go into settings.json. `batch` conversations are asked at once."""

    settings: dict[str, Any]
    batch: int

    def __call__(self, conversations: Sequence[list[dict[str, str]]]) -> list[str | Exception]: ...


class LocalModel:
    """An instruction model of transformers, greedy. `name`: folder or Hub id."""

    def __init__(self, name: str, batch_size: int = 8, max_new_tokens: int = 512):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
        if self.tokenizer.chat_template is None:
            raise ValueError(f"{name} has no chat template: name an instruction model.")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        placed = {"device_map": "auto"} if torch.cuda.is_available() else {}
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", **placed).eval()
        self.batch, self.max_new_tokens = batch_size, max_new_tokens
        self.settings = {
            "model": name,
            "revision": getattr(self.model.config, "_commit_hash", None) or "local",
            "dtype": str(self.model.dtype),
            "batch_size": batch_size,  # padding may change a greedy reply
            "max_new_tokens": max_new_tokens,
        }

    def __call__(self, conversations: Sequence[list[dict[str, str]]]) -> list[str | Exception]:
        import torch

        inputs = self.tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        ).to(self.model.device)
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return self.tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


class Endpoint:
    """An OpenAI-compatible endpoint, at temperature 0; its key is in `OPENAI_API_KEY`. The client repeats failed requests."""

    def __init__(
        self,
        base_url: str,
        model: str,
        concurrency: int = 8,
        retries: int = 6,
        max_new_tokens: int = 512,
        timeout: float = 600.0,
    ):
        try:
            import openai
        except ImportError:
            raise ValueError("An endpoint needs OpenAI's client: `pip install openai`.") from None
        self.fatal = (openai.AuthenticationError, openai.PermissionDeniedError, openai.NotFoundError)
        key = os.environ.get("OPENAI_API_KEY", "not needed")
        self.client = openai.OpenAI(base_url=base_url, api_key=key, max_retries=retries, timeout=timeout)
        self.model, self.batch, self.max_new_tokens = model, concurrency, max_new_tokens
        self.settings = {"model": model, "base_url": base_url, "temperature": 0, "max_new_tokens": max_new_tokens}

    def __call__(self, conversations: Sequence[list[dict[str, str]]]) -> list[str | Exception]:
        with ThreadPoolExecutor(self.batch) as pool:
            return list(pool.map(self._reply, conversations))

    def _reply(self, messages: list[dict[str, str]]) -> str | Exception:
        try:
            reply = self.client.chat.completions.create(
                model=self.model, messages=messages, temperature=0, max_completion_tokens=self.max_new_tokens
            )
            return reply.choices[0].message.content or ""
        except self.fatal as error:
            raise ValueError(f"{self.client.base_url} refuses {self.model}: {error}") from error
        except Exception as error:  # of one clip, which is asked again by the next run
            return error


# ----- the run


def read_captions(path: Path) -> list[dict[str, str]]:
    """Clips `{clip_id, video, caption}`, one a line. Raises: `ValueError` naming the line that is something else."""
    clips: dict[str, dict[str, str]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            clip = json.loads(line)
            clip = {name: clip[name] for name in ("clip_id", "video", "caption")}
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number}: write an object of clip_id, video and caption.") from None
        if not all(isinstance(text, str) and text.strip() for text in clip.values()):
            raise ValueError(f"{path}, line {number}: clip_id, video and caption must be texts that are not empty.")
        if clip["clip_id"] in clips:
            raise ValueError(f"{path}, line {number}: clip_id {clip['clip_id']!r} is there twice; make them unique.")
        clips[clip["clip_id"]] = clip
    if not clips:
        raise ValueError(f"{path} holds no clips.")
    return list(clips.values())


def make_wolf_questions(
    captions: Path, output: Path, replies: Replies | None, progress: bool = False
) -> dict[str, Any]:
    """Write wolf_qa.jsonl, rejected.jsonl and report.json of the clips of `captions` into the folder `output`.

    Each finished clip is a line of clips.jsonl there; a run that was interrupted goes on after them.

    Args:
        replies: a [`LocalModel`] or an [`Endpoint`]; `None` for [`rule_pairs`], which need no model.

    Returns:
        The report: numbers of clips and pairs, rejected by reason, clips without a pair, clips that failed (an endpoint
        gave no reply; they are asked again by the next run).

    Raises:
        `ValueError` for captions that cannot be read, other settings than those of what is there, damaged records.
    """
    clips = read_captions(captions)
    output.mkdir(parents=True, exist_ok=True)
    words = [sorted(NUMBERS), sorted(COLOURS), sorted(DIRECTIONS), sorted(PARTICIPANTS)]
    ours = [PROMPT, ASK_AGAIN, MAX_PAIRS, words, EGO_NAME.pattern, EGO_RULES, PHRASE.pattern, NEGATION.pattern]
    settings = {
        "captions_sha256": hashlib.sha256(json.dumps(clips).encode()).hexdigest(),
        "prompt_and_rules_sha256": hashlib.sha256(json.dumps(ours).encode()).hexdigest(),
        "made_by": "rules" if replies is None else type(replies).__name__,
        **({} if replies is None else replies.settings),
    }
    _check_settings(output, settings)
    done = _finished_clips(output / "clips.jsonl")
    waiting = [clip for clip in clips if clip["clip_id"] not in done]
    size = 1 if replies is None else replies.batch
    failed: dict[str, str] = {}
    file = os.open(output / "clips.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        with tqdm(total=len(clips), initial=len(done), desc="Clips", unit="clip", disable=not progress) as bar:
            for start in range(0, len(waiting), size):
                batch = waiting[start : start + size]
                found = [_by_rules(clip) for clip in batch] if replies is None else _by_model(batch, replies)
                for clip, record in zip(batch, found, strict=True):
                    if isinstance(record, Exception):
                        failed[clip["clip_id"]] = f"{type(record).__name__}: {record}"
                        tqdm.write(f"{clip['clip_id']} failed: {failed[clip['clip_id']]}")
                    else:
                        done[clip["clip_id"]] = record
                        append_record(file, record)
                    bar.update()
    finally:
        os.close(file)
    records = [done[clip["clip_id"]] for clip in clips if clip["clip_id"] in done]
    pairs = [pair for record in records for pair in record["pairs"]]
    rejected = [one for record in records for one in record["rejected"]]
    report = {
        "made_by": settings["made_by"],
        "clips": len(clips),
        "pairs": len(pairs),
        "pairs_with_nothing_to_check": sum(not checked_words(pair["answer"]) for pair in pairs),
        "clips_without_pair": sum(not record["pairs"] for record in records),
        "rejected": dict(sorted(Counter(one["reason"].split(":")[0] for one in rejected).items())),
        "failed": failed,
        "note": "Made from captions by rgpt4d's own prompt and rules; not the paper's data.",
    }
    for name, rows in (("wolf_qa.jsonl", pairs), ("rejected.jsonl", rejected)):
        write_text(output / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(output / "report.json", json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    return report


def _by_rules(clip: Mapping[str, str]) -> dict[str, Any]:
    return _checked(clip, rule_pairs(clip["caption"]))


def _by_model(clips: Sequence[Mapping[str, str]], replies: Replies) -> list[dict[str, Any] | Exception]:
    """Asks, and asks once more those whose reply cannot be read, with the reply and what is wrong with it."""
    conversations = [[{"role": "user", "content": PROMPT + clip["caption"]}] for clip in clips]
    found: list[dict[str, Any] | Exception] = [ValueError("not asked")] * len(clips)
    asked = list(range(len(clips)))
    for is_last in (False, True):
        again = []
        for index, reply in zip(asked, replies([conversations[index] for index in asked]), strict=True):
            if isinstance(reply, Exception):
                found[index] = reply
                continue
            try:
                found[index] = _checked(clips[index], parse_reply(reply))
            except ValueError as error:
                if is_last:
                    reason = f"the reply cannot be read: {error}"
                    rejected = [{"clip_id": clips[index]["clip_id"], "reason": reason, "reply": reply}]
                    found[index] = {"clip_id": clips[index]["clip_id"], "pairs": [], "rejected": rejected}
                else:
                    again.append(index)
                    conversations[index] += [
                        {"role": "assistant", "content": reply},
                        {"role": "user", "content": ASK_AGAIN % error},
                    ]
        asked = again
        if not asked:
            break
    return found


def _checked(clip: Mapping[str, str], pairs: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    record: dict[str, Any] = {"clip_id": clip["clip_id"], "pairs": [], "rejected": []}
    questions = set()
    for number, pair in enumerate(pairs):
        reason = unsupported(pair["answer"], clip["caption"])
        if reason is None and pair["question"] in questions:
            reason = "the question is there twice"
        if reason is None:
            questions.add(pair["question"])
            record["pairs"].append({"id": f"{clip['clip_id']}-{number}", "video": clip["video"], **pair})
        else:
            record["rejected"].append({"clip_id": clip["clip_id"], "reason": reason, **pair})
    return record


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    path = folder / "settings.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        differ = sorted(key for key in {*before, *settings} if before.get(key) != settings.get(key))
        if differ:
            raise ValueError(f"{folder} holds pairs of other settings ({', '.join(differ)}); choose another folder.")
    elif (folder / "clips.jsonl").exists() or (folder / "wolf_qa.jsonl").exists():
        raise ValueError(f"{folder} holds pairs, but no settings.json; choose another folder.")
    else:
        write_text(path, json.dumps(settings, indent=1) + "\n")


def _finished_clips(path: Path) -> dict[str, dict[str, Any]]:
    """The records of an earlier run; a last line that a kill cut off is taken away."""
    if not path.exists():
        return {}
    drop_partial_line(path)
    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return {record["clip_id"]: record for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove its folder and start again.") from error
