"""examples/run_eval.py and evaluation_report.py, with tiny random models on synthetic benchmarks laid out as published."""

import base64
import contextlib
import copy
import io
import json
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from datasets_rgpt4d.world4d_video import write_video
from examples.make_small_model import build_model
from modeling_rgpt4d import decode_video
from modeling_rgpt4d.region_marks import colour_of

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZE = 64
BOX = [8.0, 8.0, 40.0, 40.0]


def png(shade: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (SIZE, SIZE), (shade, 0, 255 - shade)).save(content, "PNG")
    return content.getvalue()


def choice(number: int, **more) -> dict:
    return {"options": ["left", "right", "up", "down"], "answer": ["left", "right", "up", "down"][number % 4], **more}


def clip(path: Path, shade: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = [np.full((SIZE, SIZE, 3), (shade + 5 * i) % 256, np.uint8) for i in range(6)]
    write_video(path, frames, 6, SIZE)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`r4d/` (12 questions, half with a set-of-mark picture), `vsti/` (4 questions, two of them numbers), `sat/` (2)."""
    data = tmp_path_factory.mktemp("data")
    tasks = ["Counting", "Translational", "Spatial Relation"]
    rows = []
    for number in range(12):
        clip(data / "r4d" / f"clipped/vlm4d/{number}.mp4", 20 * number)
        som = ""
        if number % 2:
            som = f"images/vlm4d/{number}.png"
            (data / "r4d" / som).parent.mkdir(parents=True, exist_ok=True)
            (data / "r4d" / som).write_bytes(png(20 * number))
        named = "<obj_1>" if som else "the ball"
        video = {"video": f"clipped/vlm4d/{number}.mp4", "source": f"videos/vlm4d/{number}.mp4", "som_image": som}
        row = {"id": number, "benchmark": "vlm4d", "task": tasks[number % 3], **video}
        rows.append(choice(number, **row, question=f"Which way does {named} go?", question_raw="", time_start=None))
    (data / "r4d" / "test.json").write_text(json.dumps(rows))
    clip(data / "vsti" / "scannet/videos/a.mp4", 90)
    vsti = [
        ("camera_displacement", None, "1.6", None),
        ("camera_obj_abs_dist", None, "2.0", None),
        ("obj_obj_relative_pos_lr", ["A. Left", "B. Right"], "Left", "A"),
        ("camera_movement_direction", ["A. forward", "B. backward"], "backward", "B"),
    ]
    keys = ("question_type", "options", "ground_truth", "mc_answer")
    rows = [
        {"id": number, "dataset": "scannet", "scene_name": "a", "video_path": "scannet/videos/a.mp4"}
        | dict(zip(keys, one, strict=True), question=f"Question {number}?")
        for number, one in enumerate(vsti)
    ]
    (data / "vsti" / "test.json").write_text(json.dumps(rows))
    (data / "sat").mkdir()
    rows = [
        {"image_bytes": [png(10), png(200)], "question": "Did I move?", "answers": ["yes", "no"]}
        | {"question_type": kind, "correct_answer": "yes"}
        for kind in ("ego_movement", "perspective")
    ]
    pq.write_table(pa.Table.from_pylist(rows), data / "sat" / "SAT_test.parquet")
    return data


def widen(model) -> None:
    """Wide random weights, so that what is seen decides what is said."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)


@pytest.fixture(scope="module")
def models(tmp_path_factory, tiny_tokenizer):
    """`ours/` and `other/`: two 4D-RGPTs of random weights."""
    models = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("ours", "other")):
        torch.manual_seed(seed)
        model, processor = build_model(tiny_tokenizer, image_size=32, patch_size=8, width=64, layers=1)
        widen(model)
        model.save_pretrained(models / name)
        processor.save_pretrained(models / name)
    return models


@pytest.fixture(scope="module", autouse=True)
def caches(tmp_path_factory):
    """Builds of data sets go to a folder of the tests, in this process and in others."""
    import datasets.config

    patch = pytest.MonkeyPatch()
    folder = tmp_path_factory.mktemp("caches")
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    patch.setenv("HF_DATASETS_CACHE", str(folder))
    yield
    patch.undo()


def evaluate(*options, script: str = "run_eval.py") -> str:
    """Runs run_eval.py in this process, as if it were the main one; returns what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.syspath_prepend(EXAMPLES)
        patch.setattr(sys, "argv", [script, *map(str, options)])
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    return printed.getvalue()


def options_of(data: Path, model: Path | str, output: Path, *more, benchmarks: str = "r4d_bench") -> list:
    places = ["--r4d_bench", data / "r4d", "--vstibench", data / "vsti", "--sat_real", data / "sat"]
    places += ["--sat_real_both_orders", data / "sat"]
    options = ["--model", model, "--benchmarks", benchmarks, "--output", output, *places]
    return [*options, "--num-frames", 4, "--max-new-tokens", 6, *more]


def lines_of(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def answers_of(output: Path) -> dict[tuple[str, str], dict]:
    """answers.jsonl by benchmark and id, without what differs between runs."""
    rows = lines_of(output / "answers.jsonl")
    differing = ("latency_s", "batch_size")
    return {
        (row["benchmark"], row["id"]): {key: value for key, value in row.items() if key not in differing}
        for row in rows
    }


def process(*options, launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{EXAMPLES.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
    }
    command = [sys.executable, *launcher, str(EXAMPLES / "run_eval.py"), *map(str, options)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def finished(data, models, tmp_path_factory):
    """The output of a run of `ours` on three benchmarks, which other runs are compared with."""
    output = tmp_path_factory.mktemp("finished") / "ours"
    evaluate(*options_of(data, models / "ours", output, benchmarks="r4d_bench,vstibench,sat_real"))
    return output


# ----- what a run leaves


def test_run_records_every_question_with_its_prompt_reply_and_score(finished, data):
    answers = answers_of(finished)
    assert len(answers) == 12 + 4 + 2
    marked, plain = answers["r4d_bench", "1"], answers["r4d_bench", "2"]
    assert (marked["num_images"], marked["num_frames"]) == (1, 4) and (plain["num_images"], plain["num_frames"]) == (
        0,
        4,
    )
    assert answers["sat_real", "0"]["num_images"] == 2 and answers["sat_real", "0"]["num_frames"] == 0
    assert all(row["error"] is None and len(row["prompt_sha256"]) == 64 for row in answers.values())
    assert len({row["reply"] for row in answers.values()}) > 6
    scores = json.loads((finished / "scores.json").read_text())
    r4d = [row for (benchmark, _), row in answers.items() if benchmark == "r4d_bench"]
    assert scores["r4d_bench"]["Avg"] == pytest.approx(100 * np.mean([row["score"] for row in r4d]))
    assert scores["r4d_bench"]["n"]["Avg"] == 12 and scores["vstibench"]["n"] == 4 and scores["sat_real"]["n"] == 2
    settings = json.loads((finished / "settings.json").read_text())
    revision = settings["benchmarks"]["r4d_bench"]["revisions"]
    assert len(revision) == 1 and revision[0].startswith("sha256:")
    assert settings["num_frames"] == 4 and settings["dtype"] == "float32"


def test_report_has_the_papers_tables_beside_this_run(finished):
    report = (finished / "report.md").read_text()
    tables = report.split("\n## ")
    second = next(part for part in tables if part.startswith("The paper's Tables 2"))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in second.splitlines() if line.startswith("|")
    ]
    assert rows[0] == ["%", "SAT", "VSTI"]
    assert ["4D-RGPT-8B (Table 2)", "64.7", "59.1"] in rows and ["n", "2", "4"] in rows
    third = next(part for part in tables if part.startswith("The paper's Tables 3"))
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in third.splitlines() if line.startswith("|")
    ]
    paper = next(row for row in rows if row[0] == "4D-RGPT-8B (Table 3)")
    assert paper[1:] == "42.2 32.9 45.7 35.1 26.3 52.2 43.1 40.1 48.7 40.2 50.9 38.9".split()
    assert json.loads((finished / "settings.json").read_text())["benchmarks"]["vstibench"]["revisions"][0] in report


def test_report_alone_scores_what_the_answers_say(finished, tmp_path):
    answers = lines_of(finished / "answers.jsonl")
    replies = {
        "0": "(A)",
        "1": "right",
        "2": "The answer is D",
        "3": "left or right",
        "camera_displacement": "about 1.6 m",
    }
    for row in answers:
        row["reply"] = replies.get(row["id"] if row["benchmark"] == "r4d_bench" else row["category"], "")
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    (tmp_path / "settings.json").write_bytes((finished / "settings.json").read_bytes())
    evaluate(tmp_path, script="evaluation_report.py")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["r4d_bench"]["Avg"] == pytest.approx(100 * 2 / 12) and scores["r4d_bench"]["unparsable"] == 9
    assert scores["vstibench"]["mean_of_types"] == pytest.approx(25) and scores["vstibench"]["mean_of_groups"] == 25
    found = answers_of(tmp_path)
    assert [found["r4d_bench", id]["score"] for id in "0123"] == [1, 1, 0, 0]
    assert [found["r4d_bench", id]["parsed"] for id in "0123"] == ["A", "B", "D", None]
    assert found["vstibench", "0"]["parsed"] == 1.6 and found["vstibench", "0"]["score"] == 1


def test_papers_static_and_dynamic_scores_follow_from_its_own_categories():
    """A typing mistake in the numbers would break the weighted means that the paper's rows obey."""
    tables = json.loads((EXAMPLES / "paper_scores.json").read_text())
    released = {"VG": 103, "DM": 183, "SR": 41, "R": 106, "C": 157, "T": 633, "FP": 135, "SA": 37, "DP": 24}
    for name in ("Table 3", "Table A2"):
        for model, values in tables[name]["rows"].items():
            row = dict(zip(tables[name]["columns"], values, strict=True))
            for total, parts in (("Sta", ("VG", "DM", "SR")), ("Dyn", ("R", "C", "T", "FP", "SA", "DP"))):
                weights = [released[part] for part in parts]
                mean = np.average([row[part] for part in parts], weights=weights)
                assert row[total] == pytest.approx(mean, abs=5), (model, total)  # weights are the later set's
    assert all(
        len(values) == len(table["columns"]) for table in list(tables.values())[1:] for values in table["rows"].values()
    )


def test_answers_are_those_of_generate_alone(finished, data, models):
    model = AutoModelForImageTextToText.from_pretrained(models / "ours").eval()
    processor = AutoProcessor.from_pretrained(models / "ours")
    prompt = (
        "Which way does the ball go?\n\nOptions:\n(A) left\n(B) right\n(C) up\n(D) down\n\n"
        "Answer with only the letter of the correct option."
    )
    content = [{"type": "video", "video": str(data / "r4d/clipped/vlm4d/4.mp4")}, {"type": "text", "text": prompt}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 4},
    )
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    reply = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert answers_of(finished)["r4d_bench", "4"]["reply"] == reply


# ----- interruptions, processes, failures


def test_killed_run_goes_on_and_loses_and_repeats_nothing(finished, data, models, tmp_path):
    output = tmp_path / "killed"
    options = options_of(data, models / "ours", output, "--batch-size", 1, benchmarks="r4d_bench,vstibench,sat_real")
    running = process(*options)
    answers = output / "answers-0.jsonl"
    for _ in range(6000):
        if answers.exists() and answers.read_bytes().count(b"\n") >= 2 or running.poll() is not None:
            break
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=60)
    whole = answers.read_bytes().splitlines(keepends=True)[:2]
    answers.write_bytes(b"".join(whole) + whole[1][:40])  # whatever the kill left, a cut line is the worst
    evaluate(*options)
    assert answers.read_bytes().startswith(b"".join(whole))  # not asked again
    assert len(lines_of(answers)) == 18
    assert answers_of(output) == answers_of(finished)


def test_two_processes_answer_as_one_and_share_the_work(finished, data, models, tmp_path):
    launcher = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0")
    output = tmp_path / "two"
    options = options_of(data, models / "ours", output, benchmarks="r4d_bench,vstibench,sat_real")
    running = process(*options, launcher=launcher)
    printed, _ = running.communicate(timeout=240)
    assert running.returncode == 0, printed
    assert [len(lines_of(output / f"answers-{rank}.jsonl")) for rank in (0, 1)] == [9, 9]
    assert answers_of(output) == answers_of(finished)
    assert json.loads((output / "settings.json").read_text()) == json.loads((finished / "settings.json").read_text())
    # One process reads what two have written, and asks what is missing.
    lines = (output / "answers-1.jsonl").read_bytes().splitlines(keepends=True)
    (output / "answers-1.jsonl").write_bytes(b"".join(lines[:3]))
    evaluate(*options)
    assert [len(lines_of(output / f"answers-{rank}.jsonl")) for rank in (0, 1)] == [15, 3]
    assert answers_of(output) == answers_of(finished)


def test_failing_question_is_recorded_counted_wrong_and_asked_again_on_request(finished, data, models, tmp_path):
    damaged = tmp_path / "data" / "r4d"
    (damaged / "images").parent.mkdir(parents=True)
    for path in (data / "r4d").rglob("*"):
        if path.is_file():
            (damaged / path.relative_to(data / "r4d")).parent.mkdir(parents=True, exist_ok=True)
            (damaged / path.relative_to(data / "r4d")).write_bytes(path.read_bytes())
    video = damaged / "clipped/vlm4d/4.mp4"
    content = video.read_bytes()
    video.write_bytes(content[: len(content) // 2])
    options = options_of(tmp_path / "data", models / "ours", tmp_path / "output")
    printed = evaluate(*options)
    answers, expected = answers_of(tmp_path / "output"), answers_of(finished)
    failed = answers.pop(("r4d_bench", "4"))
    assert "4.mp4" in failed["error"] and failed["reply"] == "" and failed["score"] == 0
    assert "1 of 12 questions failed" in printed
    for key, answer in answers.items():  # the others of its batch are answered
        assert answer["reply"] == expected[key]["reply"] and answer["error"] is None
    scores = json.loads((tmp_path / "output" / "scores.json").read_text())["r4d_bench"]
    assert scores["n"]["Avg"] == 12 and scores["errors"] == 1
    evaluate(*options)
    assert len(lines_of(tmp_path / "output" / "answers-0.jsonl")) == 12  # what is recorded stands
    video.write_bytes(content)
    assert "failed" not in evaluate(*options, "--retry-errors")
    assert answers_of(tmp_path / "output")["r4d_bench", "4"]["reply"] == expected["r4d_bench", "4"]["reply"]
    assert len(lines_of(tmp_path / "output" / "answers-0.jsonl")) == 13


def test_question_with_several_answers_counts_once_and_an_answer_goes_before_an_error(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        read_answers = runpy.run_path(str(EXAMPLES / "run_eval.py"))["read_answers"]
    files = {
        "answers-0.jsonl": [("1", "first", None), ("2", "", "an error"), ("3", "", "an error")],
        "answers-1.jsonl": [
            ("1", "second", None),
            ("1", "", "an error"),
            ("2", "answered", None),
            ("3", "", "another"),
        ],
    }
    for name, lines in files.items():
        rows = [{"benchmark": "b", "id": id, "reply": reply, "error": error} for id, reply, error in lines]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {id: (row["reply"], row["error"]) for (_, id), row in read_answers(tmp_path).items()}
    assert found == {"1": ("first", None), "2": ("answered", None), "3": ("", "an error")}


def test_batch_without_memory_is_asked_one_by_one(data, models, tmp_path, finished, monkeypatch):
    from modeling_rgpt4d import RGPT4DForConditionalGeneration

    generate = RGPT4DForConditionalGeneration.generate

    def scarce(self, *args, **kwargs):
        if len(kwargs["input_ids"]) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(RGPT4DForConditionalGeneration, "generate", scarce)
    evaluate(*options_of(data, models / "ours", tmp_path / "scarce"))
    answers = answers_of(tmp_path / "scarce")
    assert answers == {key: value for key, value in answers_of(finished).items() if key[0] == "r4d_bench"}
    assert all(row["batch_size"] == 1 for row in lines_of(tmp_path / "scarce" / "answers.jsonl"))


def test_broken_device_ends_the_run(data, models, tmp_path, monkeypatch):
    from modeling_rgpt4d import RGPT4DForConditionalGeneration

    def broken(self, *args, **kwargs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(RGPT4DForConditionalGeneration, "generate", broken)
    with pytest.raises(RuntimeError, match="device-side assert"):
        evaluate(*options_of(data, models / "ours", tmp_path / "broken"))
    assert lines_of(tmp_path / "broken" / "answers-0.jsonl") == []


def test_folder_of_other_settings_is_refused(finished, data, models):
    options = options_of(data, models / "ours", finished, benchmarks="r4d_bench,vstibench,sat_real")
    for other, named in ((["--num-frames", 3], "num_frames"), (["--model", models / "other"], "model")):
        with pytest.raises(SystemExit, match=named):
            evaluate(*options, *other)


def test_missing_data_and_wrong_names_end_with_what_to_do(data, models, tmp_path, capsys):
    with pytest.raises(SystemExit, match="give location="):
        evaluate(*options_of(data, models / "ours", tmp_path / "x", "--r4d_bench", tmp_path))
    with pytest.raises(SystemExit):
        evaluate(*options_of(data, models / "ours", tmp_path / "x", benchmarks="r4d"))
    assert "known are r4d_bench" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="give the teacher|leave out --teacher"):
        evaluate(*options_of(data, models / "ours", tmp_path / "x", "--teacher", "somewhere"))
    assert not (tmp_path / "x" / "settings.json").exists()


# ----- two runs


def test_two_runs_are_compared_in_pairs(finished, data, models, tmp_path):
    options = options_of(data, models / "other", tmp_path / "other", benchmarks="vstibench,r4d_bench")
    printed = evaluate(*options, "--compare", finished)
    line = next(line for line in printed.split("## Compared")[1].splitlines() if line.startswith("| r4d_bench"))
    name, n, videos, this, other, difference, _, only_this, only_other, p = (
        cell.strip() for cell in line.strip("|").split("|")
    )
    scores = [
        {key: row["score"] for key, row in answers_of(run).items() if key[0] == "r4d_bench"}
        for run in (tmp_path / "other", finished)
    ]
    assert (n, videos) == ("12", "12")
    assert float(this) == pytest.approx(100 * np.mean(list(scores[0].values())), abs=0.05)
    assert float(other) == pytest.approx(100 * np.mean(list(scores[1].values())), abs=0.05)
    assert float(difference) == pytest.approx(float(this) - float(other), abs=0.11)
    assert int(only_this) == sum(scores[0][key] > scores[1][key] for key in scores[0])
    assert int(only_other) == sum(scores[0][key] < scores[1][key] for key in scores[0])
    # The report alone gives the same again, without model and data.
    assert evaluate(tmp_path / "other", "--compare", finished, script="evaluation_report.py") == printed
    settings = json.loads((tmp_path / "other" / "settings.json").read_text())
    settings["benchmarks"]["vstibench"]["revisions"] = ["sha256:another"]
    (tmp_path / "other" / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(SystemExit, match="other revisions of the data"):
        evaluate(tmp_path / "other", "--compare", finished, script="evaluation_report.py")


def test_sat_in_both_orders_counts_pairs(data, models, tmp_path):
    printed = evaluate(*options_of(data, models / "ours", tmp_path / "sat", benchmarks="sat_real_both_orders"))
    scores = json.loads((tmp_path / "sat" / "scores.json").read_text())["sat_real_both_orders"]
    assert scores["n"] == 4 and scores["pairs"]["n"] == 2 and "both orders" in printed


# ----- an endpoint


class Endpoint(BaseHTTPRequestHandler):
    """Answers with the letter A; fails once for each question that says "Question 1?", and always for "Question 2?"."""

    requests: list[dict] = []
    status_of_all = None

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][-1]["content"][-1]["text"]
        earlier = sum(one["messages"][-1]["content"][-1]["text"] == text for one in self.requests)
        self.requests.append(body)
        status = self.status_of_all or (
            400 if "Question 2?" in text else 503 if "Question 1?" in text and not earlier else 200
        )
        message = {"role": "assistant", "content": "A \u2028\ud800" if "Question 0?" in text else "A"}
        reply = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
        reply |= {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
        content = json.dumps(reply if status == 200 else {"error": {"message": f"status {status}"}}).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def endpoint(monkeypatch):
    """The address of a server whose requests are in `Endpoint.requests`."""
    pytest.importorskip("openai", reason='the extra "serve" is not installed')
    monkeypatch.setattr(Endpoint, "requests", [])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


def test_endpoint_is_sent_marked_frames_and_asked_again_where_that_helps(data, tmp_path, endpoint, finished):
    output = tmp_path / "endpoint"
    options = options_of(data, "some-model", output, "--base-url", endpoint, benchmarks="vstibench,r4d_bench")
    evaluate(*options)
    answers, of_ours = answers_of(output), answers_of(finished)
    assert answers["vstibench", "1"]["reply"] == "A" and answers["vstibench", "0"]["reply"] == "A \u2028?"
    assert len((output / "answers.jsonl").read_text(encoding="utf-8").splitlines()) == 16
    assert "status 400" in answers["vstibench", "2"]["error"] and answers["vstibench", "2"]["score"] == 0
    assert all(answer["prompt_sha256"] == of_ours[key]["prompt_sha256"] for key, answer in answers.items())
    by_text = {one["messages"][-1]["content"][-1]["text"]: one for one in Endpoint.requests}
    asked = by_text[
        "These are frames of a video.\nQuestion 3?\nOptions:\nA. forward\nB. backward\nAnswer with the option's letter from the given choices directly."
    ]
    assert asked["model"] == "some-model" and asked["temperature"] == 0 and asked["max_completion_tokens"] == 6
    kinds = [block["type"] for block in asked["messages"][0]["content"]]
    assert kinds == ["image_url"] * 4 + ["text"]
    frames = [
        np.asarray(Image.open(io.BytesIO(base64.b64decode(block["image_url"]["url"].split(",")[1]))))
        for block in asked["messages"][0]["content"][:4]
    ]
    # Frames 0, 2, 3, 5 of the clip, each 5 levels brighter than the one before.
    assert [round(frame.mean()) for frame in frames] == pytest.approx([90, 100, 105, 115], abs=3)
    before = len(Endpoint.requests)
    evaluate(*options)
    assert len(Endpoint.requests) == before  # finished: nothing is asked again


def test_wrong_key_ends_the_run_instead_of_failing_every_question(data, tmp_path, endpoint, monkeypatch):
    monkeypatch.setattr(Endpoint, "status_of_all", 401)
    with pytest.raises(SystemExit, match="refuses some-model"):
        evaluate(*options_of(data, "some-model", tmp_path / "endpoint", "--base-url", endpoint))
    assert (tmp_path / "endpoint" / "answers-0.jsonl").read_text() == ""


# ----- models other than ours

PEER_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{% for block in message['content'] %}"
    "{% if block['type'] == 'text' %}{{ block['text'] }}{% else %}{{ media[block['type']] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def peer_template(image: str, video: str) -> str:
    return "{% set media = {'image': '" + image + "', 'video': '" + video + "'} %}" + PEER_TEMPLATE


def peer_tokenizer(tiny_tokenizer, *tokens: str):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(list(tokens), special_tokens=True)
    return tokenizer


def small_text_config(tokenizer) -> dict:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    size |= {"num_key_value_heads": 2, "vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return size | ends


def save_qwen(folder: Path, tiny_tokenizer) -> None:
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2_5_VLProcessor,
        Qwen2VLImageProcessor,
        Qwen2VLVideoProcessor,
    )

    names = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]
    tokenizer = peer_tokenizer(tiny_tokenizer, *names)
    image, video, start, end = tokenizer.convert_tokens_to_ids(names)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = Qwen2_5_VLConfig(
        text_config=small_text_config(tokenizer) | {"rope_parameters": rope},
        vision_config={"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 32}
        | {"patch_size": 14, "fullatt_block_indexes": [0], "window_size": 56},
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    size = {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}
    media = {name: f"<|vision_start|><|{name}_pad|><|vision_end|>" for name in ("image", "video")}
    processor = Qwen2_5_VLProcessor(
        Qwen2VLImageProcessor(size=size),
        tokenizer,
        Qwen2VLVideoProcessor(size=size),
        chat_template=peer_template(**media),
    )
    save_peer(folder, model, processor)


def save_llava_onevision(folder: Path, tiny_tokenizer) -> None:
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        LlavaOnevisionImageProcessor,
        LlavaOnevisionProcessor,
        LlavaOnevisionVideoProcessor,
    )

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaOnevisionConfig(
        text_config={"model_type": "qwen2"} | small_text_config(tiny_tokenizer),
        vision_config={"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 7, "vision_use_head": False}
        | vision,
        image_token_id=tiny_tokenizer.convert_tokens_to_ids("<image>"),
        video_token_id=tiny_tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=[[28, 28], [28, 56]],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    size = {"height": 28, "width": 28}
    processor = LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=config.image_grid_pinpoints),
        tiny_tokenizer,
        LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=peer_template("<image>", "<video>"),
    )
    save_peer(folder, LlavaOnevisionForConditionalGeneration(config), processor)


def save_llava(folder: Path, tiny_tokenizer) -> None:
    """A model of pictures alone, whose processor does without torchvision."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        text_config={"model_type": "qwen2"} | small_text_config(tiny_tokenizer),
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 7} | vision,
        image_token_id=tiny_tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
    )
    size = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size),
        tiny_tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=peer_template("<image>", "<video>"),
    )
    save_peer(folder, LlavaForConditionalGeneration(config), processor)


def save_peer(folder: Path, model, processor) -> None:
    widen(model)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def answer_of_peer(folder: Path, video: dict | None, images: list, text: str) -> str:
    """What the model says when its own processor is given the media directly."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image"} for _ in images] + [{"type": "video"}] * (video is not None)
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    prompt = processor.apply_chat_template([message], add_generation_prompt=True)
    given = {"images": images} if images else {}
    if video is not None:
        given |= {"videos": [video["frames"]], "video_metadata": [video["metadata"]], "do_sample_frames": False}
    inputs = processor(text=[prompt], return_tensors="pt", **given)
    output = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0].strip()


R4D_PROMPT = (
    "Which way does {} go?\n\nOptions:\n(A) left\n(B) right\n(C) up\n(D) down\n\n"
    "Answer with only the letter of the correct option."
)
R4D_MARKED = (
    "The first image is a set-of-mark annotation of a key frame from the video, with bounding boxes labeled <obj_1>, "
    "<obj_2>, etc. References to <obj_N> in the question correspond to those labeled regions.\n\n"
)


@pytest.mark.parametrize("save", [save_qwen, save_llava_onevision])
def test_video_models_see_our_frames_through_their_own_processor(save, tiny_tokenizer, data, tmp_path, finished):
    pytest.importorskip("torchvision", reason="the video processors of these models need torchvision")
    torch.manual_seed(0)
    save(tmp_path / "peer", tiny_tokenizer)
    evaluate(*options_of(data, tmp_path / "peer", tmp_path / "output", benchmarks="r4d_bench,sat_real"))
    answers, of_ours = answers_of(tmp_path / "output"), answers_of(finished)
    assert all(answer["error"] is None for answer in answers.values())
    assert all(answer["prompt_sha256"] == of_ours[key]["prompt_sha256"] for key, answer in answers.items())
    assert len({answer["reply"] for answer in answers.values()}) > 3  # what is seen decides what is said
    for number in (4, 5):
        decoded = decode_video(str(data / "r4d" / f"clipped/vlm4d/{number}.mp4"), num_frames=4)
        metadata = {"total_num_frames": 6, "fps": 6.0, "duration": 1.0, "frames_indices": [0, 2, 3, 5]}
        images = [Image.open(data / "r4d/images/vlm4d/5.png")] if number == 5 else []
        text = R4D_MARKED + R4D_PROMPT.format("<obj_1>") if images else R4D_PROMPT.format("the ball")
        reply = answer_of_peer(tmp_path / "peer", {"frames": decoded.frames, "metadata": metadata}, images, text)
        assert answers["r4d_bench", str(number)]["reply"] == reply


def test_video_model_is_told_the_rate_at_which_frames_were_sampled(tiny_tokenizer, data, tmp_path, monkeypatch):
    pytest.importorskip("torchvision", reason="the video processors of these models need torchvision")
    from transformers import Qwen2_5_VLForConditionalGeneration

    generate, seen = Qwen2_5_VLForConditionalGeneration.generate, []

    def spy(self, *args, **kwargs):
        seen.extend(torch.as_tensor(kwargs["second_per_grid_ts"]).tolist())
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(Qwen2_5_VLForConditionalGeneration, "generate", spy)
    save_qwen(tmp_path / "peer", tiny_tokenizer)
    evaluate(*options_of(data, tmp_path / "peer", tmp_path / "output"))
    assert seen == [0.5] * 12  # two frames a patch in time, four frames of one second


def test_model_of_pictures_alone_sees_frames_as_pictures(tiny_tokenizer, data, tmp_path):
    torch.manual_seed(0)
    save_llava(tmp_path / "peer", tiny_tokenizer)
    evaluate(*options_of(data, tmp_path / "peer", tmp_path / "output"))
    answers = answers_of(tmp_path / "output")
    assert all(answer["error"] is None for answer in answers.values())
    frames = decode_video(str(data / "r4d/clipped/vlm4d/5.mp4"), num_frames=4).frames
    images = [Image.open(data / "r4d/images/vlm4d/5.png"), *map(Image.fromarray, frames)]
    reply = answer_of_peer(tmp_path / "peer", None, images, R4D_MARKED + R4D_PROMPT.format("<obj_1>"))
    assert answers["r4d_bench", "5"]["reply"] == reply
    assert answers["r4d_bench", "5"]["num_images"] == 1 and answers["r4d_bench", "5"]["num_frames"] == 4


def test_regions_are_drawn_on_the_first_frame_for_models_other_than_ours(data, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    from answering import frames_of_videos

    content = [
        {"type": "image", "image": Image.open(io.BytesIO(png(5))), "marked": ["obj_1"]},
        {"type": "video", "video": str(data / "r4d/clipped/vlm4d/4.mp4"), "regions": [{"name": "obj_1", "box": BOX}]},
        {"type": "text", "text": "Which way does <obj_1> go?"},
    ]
    ((message,),) = (frames_of_videos([{"role": "user", "content": content}], 4),)
    image, video, text = message["content"]
    assert set(image) == {"type", "image"} and text == content[2]
    first, *others = (np.asarray(frame) for frame in video["video"])
    assert tuple(first[8, 30]) == colour_of("obj_1")
    assert all(np.ptp(frame, axis=(0, 1)).max() < 8 for frame in others) and len(others) == 3
    metadata = video["metadata"]
    assert metadata["frames_indices"] == [0, 2, 3, 5] and metadata["total_num_frames"] == 6
    assert metadata["fps"] == pytest.approx(6) and metadata["duration"] == pytest.approx(1)
