"""The files that several metrics share are one file each, and every metric's folder is complete without the project."""

import ast
from pathlib import Path

import pytest
from huggingface_hub import HfApi

ROOM = Path(__file__).parents[2] / "metrics_rgpt4d"
FOLDERS = sorted(path.parent for path in ROOM.glob("*/*.py") if path.stem == path.parent.name)  # the metrics
SHARED = sorted(path.name for path in ROOM.glob("*.py") if path.name != "__init__.py")
OURS = [folder for folder in FOLDERS if (folder / "choice_scoring.py").exists()]

ONE_ITEM = """
import sys
import evaluate
item = {"id": 1, "category": "camera_movement_direction", "task": "Counting", "options": ["2", "8"], "answer": 8}
for folder in sys.argv[1:]:
    metric = evaluate.load(folder, keep_in_memory=True)
    results = metric.compute(predictions=["The answer is **B**."], references=[item])
    print(metric.name, next(results[key] for key in ("Avg", "accuracy", "mean_of_types") if key in results))
"""


def relative_imports(path):
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    return {node.module for node in nodes if node.level}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_shared_files_of_a_folder_are_links_to_the_one_file(folder):
    for name in SHARED:
        link = folder / name
        if link.exists():
            assert link.is_symlink() and link.readlink() == Path("..") / name, (
                f"{link} is a copy; on a system without links, git needs core.symlinks=true"
            )


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_metric_names_every_file_that_its_files_import(folder):
    """`evaluate` copies what the metric's own file imports, and does not look into those files."""
    named = relative_imports(folder / f"{folder.name}.py")
    needed = named.union(*(relative_imports(folder / f"{name}.py") for name in named))
    assert needed <= named and named == {path.stem for path in folder.glob("*.py")} - {"__init__", folder.name}


@pytest.mark.slow  # starts a process
def test_folders_load_offline_without_the_project(run_as_stranger):
    printed = run_as_stranger(ONE_ITEM, *OURS).splitlines()
    assert len(OURS) == 4 and [line.split()[1] for line in printed] == ["100.0"] * 4, printed


@pytest.mark.parametrize("folder", OURS, ids=lambda folder: folder.name)
def test_space_gets_the_contents_of_the_links(folder, monkeypatch):
    monkeypatch.setattr(HfApi, "_validate_yaml", lambda *args, **kwargs: None)  # posts the card to the Hub
    added = HfApi()._prepare_upload_folder_additions(folder, "", repo_type="space")
    content = {one.path_in_repo: one.path_or_fileobj for one in added if "__pycache__" not in one.path_in_repo}
    assert {"README.md", f"{folder.name}.py", *SHARED} <= set(content)
    for one in added:
        if one.path_in_repo in SHARED:
            with one.as_file() as file:
                assert file.read() == (ROOM / one.path_in_repo).read_bytes()
