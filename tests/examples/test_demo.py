import importlib
import json
import sys
from pathlib import Path

import pytest

from examples.demo import Steps

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_a_finished_step_is_not_done_again(tmp_path):
    made = tmp_path / "made"
    command = [sys.executable, "-c", f"open({str(made)!r}, 'a').write('x'); print('said')"]
    steps = Steps(tmp_path / "demo")
    assert steps.run("one", "One", command, makes=made).strip() == "said"
    assert steps.run("one", "One", command, makes=made).strip() == "said"
    assert made.read_text() == "x"
    assert [record["reused"] for record in steps.records] == [False, True]
    steps.run("one", "One", [*command, "other"], makes=made)
    assert made.read_text() == "xx"
    made.unlink()
    steps.run("one", "One", [*command, "other"], makes=made)
    assert made.read_text() == "x"


def test_a_failed_step_is_named_and_not_remembered(tmp_path):
    steps = Steps(tmp_path)
    with pytest.raises(SystemExit, match="'One' ended with status 3"):
        steps.run("one", "One", [sys.executable, "-c", "import sys; sys.exit(3)"])
    assert not (tmp_path / "steps" / "one.json").exists()


def test_a_step_records_time_and_memory(tmp_path):
    Steps(tmp_path).run("one", "One", [sys.executable, "-c", "x = bytearray(64 << 20)"])
    record = json.loads((tmp_path / "steps" / "one.json").read_text())
    assert record["seconds"] > 0 and record["peak_mib"] > 64


@pytest.fixture
def run_demo(monkeypatch, tmp_path, capsys):
    """Call it: the demo without its commands. Returns the names of the steps with "report" for each report, in their
    order, what each report shows of the stored and the trained models, and what was printed.
    """
    monkeypatch.syspath_prepend(str(EXAMPLES))
    demo, demo_report = importlib.import_module("demo"), importlib.import_module("demo_report")

    def run():
        done, shown = [], []

        def step(self, name, title, command, makes=None, cwd=None):
            done.append(name)
            return json.dumps({"asked": command[command.index("--model") + 1]}) if name.startswith("ask") else ""

        def write_report(path, *, asked, stored, trained, **others):
            done.append("report")
            shown.append((Path(asked["asked"]).name, stored is not None, trained is not None))

        monkeypatch.setattr(demo.Steps, "run", step)
        monkeypatch.setattr(demo_report, "write_report", write_report)
        sample = {"question": "Which?", "answer": "this one", "replies": ["that one"]}
        score = {"accuracy": 71.04, "interval": [66.0, 75.0], "n": 468}
        scores = {"samples": [sample], "tables": {"stored": {"Avg": score, "TimeBench": score}}, "chance": 22.0}
        monkeypatch.setattr(demo_report, "scores_of", lambda evaluations: scores)
        monkeypatch.setattr(demo, "STUDENT", tmp_path / "student")
        monkeypatch.setattr(demo, "sample_clip", lambda: tmp_path / "clip.mp4")
        monkeypatch.setattr(sys, "argv", ["demo.py", "--output", str(tmp_path / "out"), "--steps", "5"])
        (tmp_path / "out" / "world4d-tiny" / "videos" / "test").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "world4d-tiny" / "videos" / "test" / "a.mp4").touch()
        capsys.readouterr()
        demo.main()
        return done, shown, capsys.readouterr().out

    return run


def test_the_stored_model_comes_first_with_a_report_of_its_own(run_demo, tmp_path):
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_bytes(b"weights")
    done, shown, printed = run_demo()
    kinds = [name.split("-")[0] for name in done]
    assert kinds[:6] == ["render", "eval", "perceive", "ask", "report", "teacher"]
    assert kinds.count("report") == 2 and kinds[-1] == "report" and kinds.count("ask") == 1
    assert shown == [("student", True, False), ("student", True, True)]
    assert "Which?" in printed and "right: this one; it says: that one" in printed
    assert "Avg: 71.0 % right [66.0, 75.0], n = 468" in printed and "A guess gets 22.0 %." in printed

    (tmp_path / "student" / "model.safetensors").write_bytes(b"others")
    again, *_ = run_demo()
    assert not {*done[1:4]} & {*again}  # nothing that another model said is taken over
    assert done[5:] == again[5:]
