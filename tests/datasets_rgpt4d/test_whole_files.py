"""Files that a kill cannot leave half written."""

import json
import os

import pytest

from datasets_rgpt4d.whole_files import append_record, drop_partial_line, write_text


def test_file_stays_as_it_was_where_writing_fails(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_text(file, "old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_text(file, "new")
    assert file.read_text() == "old"


def test_whole_lines_survive_a_line_that_was_cut_off(tmp_path):
    file = tmp_path / "a.jsonl"
    records = [{"reply": "left\u2028ü"}, {"reply": ""}]
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for record in records:
        append_record(descriptor, record)
    os.write(descriptor, b'{"reply": "cut')
    os.close(descriptor)
    drop_partial_line(file)
    assert [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]] == records
    before = file.read_bytes()
    drop_partial_line(file)
    assert file.read_bytes() == before


def test_full_disk_is_an_error(monkeypatch):
    monkeypatch.setattr(os, "write", lambda file, line: len(line) - 1)
    with pytest.raises(OSError, match="disk is full"):
        append_record(0, {"id": 1})
