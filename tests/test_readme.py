"""What README.md points at is there: files, names in them, scripts and their options, and the code of its examples."""

import ast
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
LINKS = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", README) + re.findall(r"<img ()src=\"([^\"]+)\"", README)
COMMANDS = [
    line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines() if line
]
SCRIPTS = sorted(
    {word for line in COMMANDS for word in shlex.split(line, comments=True) if word.startswith("examples/")}
)


@pytest.mark.parametrize("text, target", [link for link in LINKS if not link[1].startswith("http")])
def test_link_leads_to_the_name_it_shows(text, target):
    file = ROOT / target
    assert file.exists(), target
    name = re.fullmatch(r"`(\w+)`", text)
    if name and file.suffix == ".py":
        defined = {
            node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        assert name[1] in defined, f"{target} does not define {name[1]}"


def test_every_equation_of_the_method_has_its_place():
    table = README.split("## From the paper to the code")[1].split("##")[0]
    for equation in ("Eq. 1, 2", "Eq. 3", "Eq. 4", "Eq. 5", "Eq. 6", "Eq. 7", "Eq. A8"):
        assert f"| {equation}:" in table, equation


@pytest.mark.parametrize("script", [script for script in SCRIPTS if script.endswith(".py")])
def test_commands_use_options_that_exist(script, help_of):
    help_text = help_of(ROOT / script)
    for line in COMMANDS:
        words = shlex.split(line, comments=True)
        if script in words:
            for option in (word for word in words[words.index(script) :] if word.startswith("--")):
                assert re.search(rf"{re.escape(option)}\b", help_text) or option == "--config", f"{script} {option}"


def test_python_examples_are_python():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        ast.parse(block)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", "\n".join(COMMANDS), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_nothing_is_left_to_fill_in():
    assert "@" not in README


def test_results_of_the_study_are_those_of_its_document():
    section = README.split("## Check the claims")[1].split("\n## ")[0]
    results = re.findall(r"\d+\.\d \[\d+\.\d, \d+\.\d\]|\[\+\d\.\d, \+\d\.\d\]", section)
    results.append(re.search(r"\d+ of \d+ runs are in", section)[0])
    assert len(results) >= 10
    document = (ROOT / "STUDY.md").read_text(encoding="utf-8")
    assert [result for result in results if result not in document] == []
