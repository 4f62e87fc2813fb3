import json
import sys

import pytest

from examples.demo import Steps


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
