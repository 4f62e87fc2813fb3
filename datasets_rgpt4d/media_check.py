"""Whether images and videos can be read: found out before a training run, which would stop at the first that cannot."""

import json
import multiprocessing
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from io import BytesIO
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import Dataset
from PIL import Image as PILImage
from tqdm import tqdm

from modeling_rgpt4d.video_decoding import decode_video

from .data_statistics import media_of
from .published_dataset import Unusable

CheckMedia = Literal["exists", "full"]
FILES_AT_ONCE = 8
ROWS_AT_ONCE = 32
KINDS = {"images": "image", "videos": "video"}


def medium_problem(medium: Mapping[str, Any], kind: Literal["image", "video"], check: CheckMedia) -> str | None:
    """What is wrong with a medium, or `None`.

    Args:
        medium: `{"path", "bytes"}`.
        check: "exists": there is a file or there are bytes, and not none of them. "full": an image is decoded, of a video
            the first frame and the last, which fails if the file is cut short.
    """
    path, content = medium["path"], medium["bytes"]
    if content is None and not os.path.exists(path):
        return "is missing"
    if (os.path.getsize(path) if content is None else len(content)) == 0:
        return "is empty"
    if check == "exists":
        return None
    try:
        if kind == "video":
            decode_video(dict(medium), num_frames=2)
        else:
            with PILImage.open(path if content is None else BytesIO(content)) as image:
                image.load()
    except (ValueError, OSError, SyntaxError, PILImage.DecompressionBombError) as error:
        return f"cannot be read: {error}"
    return None


def unusable_media(
    rows: Dataset, check: CheckMedia, known: str | Path, num_proc: int = 1, progress: bool = False
) -> dict[int, Unusable]:
    """Check the media of rows of `TRAINING_FEATURES`, each file once.

    Args:
        check: as in `medium_problem`.
        known: a file to which findings are added as they come, so that an interrupted check goes on. A file that has
            changed since is checked again; content that stands in the rows is known by the row's id.
        num_proc: processes that read.
        progress: draw a progress bar on stderr.

    Returns: number of the row -> what is wrong with its first bad medium.
    """
    uses: dict[tuple[str, str], list[int]] = {}  # (column, key) -> rows
    paths: dict[tuple[str, str], str] = {}
    contents: dict[tuple[str, str], tuple[int, int]] = {}
    ids = rows["id"][:]
    for row, column, position, path, content in media_of(rows):
        if content.is_valid:
            key = (column, f"{ids[row]} {position}")
            contents.setdefault(key, (row, position))
        else:
            key = (column, _stamped(path))
            paths.setdefault(key, path)
        uses.setdefault(key, []).append(row)

    problems = _known(known)
    todo_paths = [(key, path) for key, path in paths.items() if key not in problems]
    todo_contents = [(key, *place) for key, place in contents.items() if key not in problems]
    jobs = [("paths", todo_paths[i : i + FILES_AT_ONCE]) for i in range(0, len(todo_paths), FILES_AT_ONCE)]
    # Contents come in the order of the rows: a job opens neighbours
    jobs += [("contents", list(g)) for _, g in groupby(todo_contents, lambda one: one[1] // ROWS_AT_ONCE)]
    with (
        open(known, "a", encoding="utf-8") as file,
        tqdm(
            total=len(uses), initial=len(uses) - len(todo_paths) - len(todo_contents), unit="file", disable=not progress
        ) as bar,
    ):
        for found in _run(jobs, rows, check, num_proc):
            for (column, key), problem in found:
                problems[column, key] = problem
                file.write(json.dumps([column, key, problem], ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(found))

    unusable: dict[int, Unusable] = {}
    for key, used_by in uses.items():
        problem = problems[key]
        if problem is not None:
            reason, _, detail = problem.partition(": ")
            what = paths.get(key) or f"{KINDS[key[0]]} {contents[key][1]} in the row"
            for row in used_by:
                unusable.setdefault(row, Unusable(ids[row], f"the {KINDS[key[0]]} {reason}", detail or what))
    return dict(sorted(unusable.items()))


def _stamped(path: str) -> str:
    if not os.path.exists(path):
        return f"{path} absent"
    state = os.stat(path)
    return f"{path} {state.st_size} {state.st_mtime_ns}"


def _known(file: str | Path) -> dict[tuple[str, str], str | None]:
    if not os.path.exists(file):
        return {}
    known = {}
    for line in Path(file).read_text(encoding="utf-8").splitlines():
        try:
            column, key, problem = json.loads(line)
        except ValueError:  # the line that was being written when the check was interrupted
            continue
        known[column, key] = problem
    return known


def _run(jobs: Sequence[tuple[str, list]], rows: Dataset, check: CheckMedia, num_proc: int) -> Iterator[list]:
    num_proc = min(num_proc, len(jobs))
    if num_proc <= 1 or check == "exists":
        for job in jobs:
            yield _check(job, rows, check)
        return
    context = multiprocessing.get_context("spawn")  # a forked process must not wait for its parent's thread pools
    with ProcessPoolExecutor(num_proc, mp_context=context, initializer=_start, initargs=(rows, check)) as pool:
        try:
            yield from pool.map(_check_here, jobs)
        finally:
            pool.shutdown(cancel_futures=True)


def _start(rows: Dataset, check: CheckMedia) -> None:
    global _here
    _here = rows, check
    torch.set_num_threads(1)


def _check_here(job: tuple[str, list]) -> list:
    return _check(job, *_here)


def _check(job: tuple[str, list], rows: Dataset, check: CheckMedia) -> list[tuple[tuple[str, str], str | None]]:
    kind, places = job
    if kind == "paths":
        return [(key, medium_problem({"path": path, "bytes": None}, KINDS[key[0]], check)) for key, path in places]
    return [(key, medium_problem(rows[row][key[0]][position], KINDS[key[0]], check)) for key, row, position in places]
