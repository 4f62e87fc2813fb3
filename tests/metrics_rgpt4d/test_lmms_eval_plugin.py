"""The lmms-eval plug-in asks and scores as examples/run_eval.py; where lmms-eval is installed, it also runs a tiny model."""

import ast
import contextlib
import io
import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset, load_dataset
from PIL import Image

from datasets_rgpt4d.world4d_video import write_video
from examples.make_small_model import build_model
from metrics_rgpt4d.lmms_eval_plugin import task_functions
from metrics_rgpt4d.lmms_eval_plugin.write_tasks import BUILDERS, TASKS, write_task

ROOT = Path(__file__).parents[2]
FOLDERS = {"r4d_bench": "r4d", "vstibench": "vsti", "sti_bench": "sti", "vlm4d": "vlm4d"}
REPLIES = {
    "r4d_bench": ["A", "(B)", "nothing of it", "C. up", "B", "left"],
    "vstibench": ["1.6", "3", "B", "what"],
    "sti_bench": ["A", "0.5m/s", "what"],
    "vlm4d": ["C", "not moving", "what"],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """`r4d/`: six questions, half of them with a set-of-mark picture, `vsti/`: four, two of them numbers, and three of the other two."""
    data = tmp_path_factory.mktemp("data")
    rows = []
    for number in range(6):
        name, som = f"clipped/vlm4d/{number}.mp4", f"images/vlm4d/{number}.png" if number % 2 else ""
        for file in filter(None, (name, som)):
            (data / "r4d" / file).parent.mkdir(parents=True, exist_ok=True)
        frames = [np.full((64, 64, 3), 40 * number + 5 * i, np.uint8) for i in range(6)]
        write_video(data / "r4d" / name, frames, 6, 64)
        if som:
            Image.new("RGB", (64, 64), (40 * number, 0, 99)).save(data / "r4d" / som)
        row = {"id": number, "benchmark": "vlm4d", "task": ["Counting", "Translational"][number % 2], "video": name}
        row |= {"source": name, "som_image": som, "question_raw": "", "time_start": None}
        row |= {"question": f"Which way does {'<obj_1>' if som else 'it'} go?", "options": ["left", "right", "up"]}
        rows.append(row | {"answer": row["options"][number % 3]})
    (data / "r4d" / "test.json").write_text(json.dumps(rows))
    (data / "vsti" / "scannet" / "videos").mkdir(parents=True)
    write_video(
        data / "vsti" / "scannet/videos/a.mp4", [np.full((64, 64, 3), 9 * i, np.uint8) for i in range(6)], 6, 64
    )
    rows = [
        {"id": number, "dataset": "scannet", "scene_name": "a", "video_path": "scannet/videos/a.mp4"}
        | {"question_type": kind, "options": options, "ground_truth": truth, "mc_answer": letter, "question": "Where?"}
        for number, (kind, options, truth, letter) in enumerate(
            [
                ("camera_displacement", None, "1.6", None),
                ("camera_obj_abs_dist", None, "2.0", None),
                ("obj_obj_relative_pos_lr", ["A. Left", "B. Right"], "Left", "A"),
                ("camera_movement_direction", ["A. forward", "B. backward"], "backward", "B"),
            ]
        )
    ]
    (data / "vsti" / "test.json").write_text(json.dumps(rows))
    shared = data / "vsti" / "scannet/videos/a.mp4"
    for place in ("sti/videos", "vlm4d/videos_real/davis", "vlm4d/QA"):
        (data / place).mkdir(parents=True)
    shutil.copyfile(shared, data / "sti" / "videos" / "scene1.mp4")
    candidates = {
        letter: text for letter, text in zip("ABCDE", ("0.1m/s", "0.5m/s", "2m/s", "3m/s", "5m/s"), strict=True)
    }
    rows = [
        {"Video": "scene1.mp4", "ID": number, "time_start": 0.0, "time_end": 1.0, "Question": f"How fast is {name}?"}
        | {"Candidates": candidates, "Answer": "AB"[number % 2], "Task": "Speed & Acceleration", "Source": "scannet"}
        for number, name in enumerate(["the car", "the bus", "the dog"])
    ]
    Dataset.from_list(rows).to_parquet(data / "sti" / "qa.parquet")
    shutil.copyfile(shared, data / "vlm4d" / "videos_real" / "davis" / "a.mp4")
    choices = {"A": "left", "B": "right", "C": "up", "D": "not moving"}
    rows = [
        {"id": f"validation_{number}", "video": "https://x/resolve/main/videos_real/davis/a.mp4", "choices": choices}
        | {"question_type": "multiple-choice", "question": f"Where does {name} go?", "answer": answer}
        for number, (name, answer) in enumerate([("it", "up"), ("he", "not moving"), ("she", "left")], 1)
    ]
    (data / "vlm4d" / "QA" / "real_mc.json").write_text(json.dumps(rows))
    return data


@pytest.fixture(scope="module")
def tasks(data, tmp_path_factory):
    """The folder for `--include_path`."""
    import datasets.config

    output = tmp_path_factory.mktemp("tasks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        for benchmark, folder in FOLDERS.items():
            write_task(benchmark, str(data / folder), output)
    return output


def docs(tasks: Path, benchmark: str, cache: Path) -> list[dict]:
    """The rows as lmms-eval loads them."""
    file = str(tasks / f"{benchmark}.parquet")
    return list(load_dataset("parquet", data_files={"test": file}, split="test", cache_dir=str(cache)))


def run_eval(data: Path, model: Path, output: Path, cache: Path) -> dict[str, dict[str, dict]]:
    """Answers of examples/run_eval.py: benchmark -> id -> line."""
    options = ["--model", model, "--benchmarks", ",".join(FOLDERS), "--output", output]
    options += ["--num-frames", 4, "--max-new-tokens", 6]
    for benchmark, folder in FOLDERS.items():
        options += [f"--{benchmark}", data / folder]
    import datasets.config

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache))
        patch.syspath_prepend(ROOT / "examples")
        patch.setattr(sys, "argv", ["run_eval.py", *map(str, options)])
        runpy.run_path(str(ROOT / "examples" / "run_eval.py"), run_name="__main__")
    answers: dict[str, dict[str, dict]] = {}
    for line in (output / "answers.jsonl").read_text(encoding="utf-8").split("\n")[:-1]:
        answer = json.loads(line)
        answers.setdefault(answer["benchmark"], {})[answer["id"]] = answer
    return answers


@pytest.fixture(scope="module")
def model(tiny_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model, processor = build_model(tiny_tokenizer, image_size=32, patch_size=8, width=64, layers=1)
    with torch.no_grad():  # wide weights, so that what is seen decides what is said
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def answers(data, model, tmp_path_factory):
    return run_eval(data, model, tmp_path_factory.mktemp("eval"), tmp_path_factory.mktemp("cache"))


# ----- without lmms-eval


def test_task_files_name_functions_that_exist_and_files_that_write_tasks_writes():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    common = yaml.load((TASKS / "_rgpt4d_common").read_text(encoding="utf-8"), Loader)
    named = [common[key] for key in ("doc_to_messages", "doc_to_visual", "doc_to_text", "process_results")]
    named += [metric["aggregation"] for metric in common["metric_list"]]
    for path in named:
        module, name = path.rsplit(".", 1)
        assert module == task_functions.__name__ and callable(getattr(task_functions, name))
    assert common["generation_kwargs"] == {"max_new_tokens": 128, "do_sample": False, "until": []}
    for benchmark in BUILDERS:
        task = yaml.load((TASKS / f"{benchmark}_rgpt4d.yaml").read_text(encoding="utf-8"), Loader)
        assert task["task"] == f"{benchmark}_rgpt4d" and task["include"] == "_rgpt4d_common"
        assert task["dataset_kwargs"]["data_files"] == {"test": f"{benchmark}.parquet"}
    assert {path.name for path in TASKS.glob("*.yaml")} == {f"{benchmark}_rgpt4d.yaml" for benchmark in BUILDERS}
    assert set(task_functions.HEADLINES) == set(BUILDERS)


def test_tasks_ask_the_same_as_run_eval(tasks, answers, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        from answering import prompt_sha256
    for benchmark in FOLDERS:
        rows = docs(tasks, benchmark, tmp_path)
        assert [row["id"] for row in rows] == list(answers[benchmark])
        for row in rows:
            messages = task_functions.doc_to_messages(row)
            assert prompt_sha256(messages) == answers[benchmark][row["id"]]["prompt_sha256"]
            assert messages[0]["content"][-1]["text"] == task_functions.doc_to_text(row)
            visuals = task_functions.doc_to_visual(row)
            assert len(visuals) == len(row["images"]) + len(row["videos"]) and Path(visuals[-1]).is_absolute()


@pytest.mark.parametrize("benchmark, replies", REPLIES.items())
def test_tasks_score_the_same_as_run_eval(benchmark, replies, tasks, tmp_path):
    rows = docs(tasks, benchmark, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        from evaluation_report import headline, score_benchmark
    told = [row | {"reply": reply, "error": None, "truncated": False} for row, reply in zip(rows, replies, strict=True)]
    expected = headline(benchmark, score_benchmark(benchmark, told))
    results = [task_functions.process_results(row, [reply]) for row, reply in zip(rows, replies, strict=True)]
    found = {name: getattr(task_functions, name)([one[name] for one in results]) for name in results[0]}
    assert 0 < found["score"] < 100 and found["unparsable"] > 0
    assert found["score"] == expected["value"] and found["unparsable"] == expected["unparsable"]
    assert [found["interval_low"], found["interval_high"]] == list(expected["interval"])


# ----- with lmms-eval


@pytest.fixture
def plugin_model():
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    from metrics_rgpt4d.lmms_eval_plugin import lmms_eval_model

    return lmms_eval_model


def test_manifest_names_the_model_class(plugin_model):
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    from metrics_rgpt4d.lmms_eval_plugin import manifest

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("rgpt4d") is plugin_model.RGPT4DForLmmsEval


def test_generation_is_greedy_unless_a_task_samples(plugin_model):
    options = plugin_model.generation_options
    assert options({"temperature": 0, "top_p": 1.0, "until": ["\n"]}) == {"max_new_tokens": 128, "do_sample": False}
    assert options({"max_new_tokens": 9, "temperature": 0.5}) == {
        "max_new_tokens": 9,
        "temperature": 0.5,
        "do_sample": True,
    }
    with pytest.warns(UserWarning, match="image_aspect_ratio"):
        options({"image_aspect_ratio": "original"})
    assert plugin_model.cut_at("a\n\nb", ["\n\n"]) == "a" and plugin_model.cut_at("a\n\nb", []) == "a\n\nb"


def test_media_of_other_tasks_are_read_and_parts_of_videos_refused(plugin_model):
    content = [{"type": "video", "url": "a.mp4"}, {"type": "text", "text": "?"}]
    found = plugin_model.hf_messages([{"role": "user", "content": content}])
    assert found[0]["content"][0] == {"type": "video", "video": "a.mp4"}
    with pytest.raises(ValueError, match="cut the clip"):
        plugin_model.hf_messages([{"role": "user", "content": [content[0] | {"start_time": 1.0}]}])


def test_lmms_eval_gives_the_replies_and_scores_of_run_eval(plugin_model, tasks, model, answers, tmp_path):
    # The entry point of setup.py, which an editable installation made before it does not have.
    setup = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (call,) = (node for node in ast.walk(setup) if isinstance(node, ast.Call) and ast.unparse(node.func) == "setup")
    points = next(ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "entry_points")
    installed = tmp_path / "site" / "entry_of_test-0.dist-info"
    installed.mkdir(parents=True)
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: entry-of-test\nVersion: 0\n")
    lines = [line for group, names in points.items() for line in (f"[{group}]", *names)]
    (installed / "entry_points.txt").write_text("\n".join(lines))
    common = tasks / "_rgpt4d_common"
    common.write_text(common.read_text(encoding="utf-8").replace("max_new_tokens: 128", "max_new_tokens: 6"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(tmp_path / "site")])
    command = [sys.executable, "-m", "lmms_eval", "--model", "rgpt4d", "--batch_size", "8", "--log_samples"]
    command += ["--model_args", f"pretrained={model},num_frames=4", "--include_path", str(tasks)]
    names = ",".join(f"{benchmark}_rgpt4d" for benchmark in FOLDERS)
    command += ["--tasks", names, "--output_path", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("*_results.json")
    results = json.loads(results.read_text(encoding="utf-8"))["results"]
    for benchmark, expected in answers.items():
        (samples,) = (tmp_path / "out").rglob(f"*_samples_{benchmark}_rgpt4d.jsonl")
        samples = [json.loads(line) for line in samples.read_text(encoding="utf-8").split("\n")[:-1]]
        replies = {sample["score"]["reference"]["id"]: sample["score"]["reply"] for sample in samples}
        assert replies == {id: answer["reply"] for id, answer in expected.items()}
        assert len(set(replies.values())) > 1
        unparsable = sum(answer["parsed"] is None for answer in expected.values())
        assert results[f"{benchmark}_rgpt4d"]["unparsable,none"] == unparsable
        mean = 100 * np.mean([answer["score"] for answer in expected.values()])
        # Of VSTI-Bench here every type has one question, and of the others the average is over questions.
        assert results[f"{benchmark}_rgpt4d"]["score,none"] == pytest.approx(mean)
