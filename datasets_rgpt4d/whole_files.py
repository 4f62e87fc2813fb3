"""Files that stay whole when a run is killed: replaced at once, or appended to line by line."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write a file under a temporary name beside it, then rename it: it is there whole, or as it was."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def append_record(file: int, record: Mapping[str, Any]) -> None:
    """Append a line of JSON to a file descriptor opened with `O_APPEND`, in one write that is on the disk at the return: a kill
    leaves whole lines and part of one at most.

    Raises: `OSError` if the line does not fit on the disk.
    """
    line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
    if os.write(file, line) != len(line):
        raise OSError(f"The disk is full: this was not written: {line[:200].decode(errors='replace')}")
    os.fsync(file)


def drop_partial_line(path: Path) -> None:
    """Take a last line away that a kill cut off."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
