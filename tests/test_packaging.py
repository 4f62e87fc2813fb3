"""What is installed, what it may import, and what `make` sets up."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from setuptools import find_packages

ROOT = Path(__file__).parents[1]
ROOMS = ["modeling_rgpt4d", "trainer", "datasets_rgpt4d", "metrics_rgpt4d", "hub_cards"]
IMPORT_OF_DISTRIBUTION = {"pillow": "PIL", "huggingface-hub": "huggingface_hub"}
# Each comes with a declared distribution that cannot work without it.
BUNDLED = {
    "filelock": "huggingface_hub",
    "pyarrow": "datasets",
    "tokenizers": "transformers",
    "tqdm": "transformers",
    "yaml": "huggingface_hub",
}


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_modules(path):
    """Top-level names that a file imports absolutely, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names - sys.stdlib_module_names


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built offline from a copy of the files that it is made of."""
    source, output = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "LICENSE", ROOT / "README.md"]
    files += [path for room in ROOMS for path in (ROOT / room).rglob("*") if "__pycache__" not in path.parts]
    for path in files:
        if path.is_file():
            target = source / path.relative_to(ROOT)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target, follow_symlinks=False)  # links stay links, as in a checkout
    command = [sys.executable, "-m", "pip", "wheel", str(source), "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*command, "--wheel-dir", str(output)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = output.glob("rgpt4d-*.whl")
    with zipfile.ZipFile(path) as archive:
        names = {entry.filename: entry.file_size for entry in archive.infolist()}
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
    return names, metadata


def requirements(metadata):
    """extra ("" for what is always installed) -> import names of the required distributions."""
    by_extra = {}
    for line in re.findall(r"^Requires-Dist: (.+)$", metadata, flags=re.MULTILINE):
        name = re.match(r"[\w.-]+", line)[0].lower().replace("_", "-")
        extra = re.search(r"extra == [\"'](\w+)[\"']", line)
        by_extra.setdefault(extra[1] if extra else "", set()).add(IMPORT_OF_DISTRIBUTION.get(name, name))
    return by_extra


def test_wheel_holds_the_five_rooms_and_their_data(wheel):
    names, metadata = wheel
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == set(ROOMS)
    assert {name for name in names if name.startswith("hub_cards/templates/")} == {
        f"hub_cards/templates/{kind}_card.md" for kind in ("model", "dataset", "training_data", "metric", "teacher")
    }
    assert "metrics_rgpt4d/r4d_bench/README.md" in names and "metrics_rgpt4d/r4d_bench/answer_parsing.py" in names
    assert "License-Expression: Apache-2.0" in metadata and any(name.endswith("licenses/LICENSE") for name in names)


def test_every_file_of_the_rooms_is_in_the_wheel(wheel):
    files = [path for room in ROOMS for path in (ROOT / room).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert {str(path.relative_to(ROOT)) for path in files} <= set(wheel[0])


def test_links_are_whole_files_in_the_wheel(wheel):
    links = [path for path in (ROOT / "metrics_rgpt4d").rglob("*.py") if path.is_symlink()]
    assert links and all(wheel[0][str(path.relative_to(ROOT))] == path.stat().st_size for path in links)


def test_found_packages_are_the_rooms():
    found = find_packages(str(ROOT), exclude=["tests*", "examples*", "benchmarks*"])
    assert {name.split(".")[0] for name in found} == set(ROOMS)


def test_every_import_is_declared(wheel):
    declared = requirements(wheel[1])
    always = declared[""] | set(ROOMS)
    always |= {"lmms_eval"}  # the host of a plug-in, which alone imports it
    installed = always | declared["train"] | declared["eval"] | declared["demo"] | declared["serve"]
    for path in python_files(*ROOMS, "examples"):
        siblings = {other.stem for other in path.parent.glob("*.py")} if path.parent.name == "examples" else set()
        for name in imported_modules(path) - siblings:
            assert BUNDLED.get(name, name) in installed, (
                f"{path.relative_to(ROOT)} imports {name}: declare it in setup.py"
            )


def test_dev_extra_holds_all_others(wheel):
    declared = requirements(wheel[1])
    assert set.union(*(names for extra, names in declared.items() if extra)) <= declared["dev"]


def test_modeling_room_imports_no_other_room_and_only_what_the_hub_folder_may_need():
    for path in python_files("modeling_rgpt4d"):
        allowed = {"torch", "transformers", "numpy", "PIL", "av", "safetensors", "huggingface_hub"}
        assert imported_modules(path) <= allowed, path.name


def test_no_room_below_imports_a_room_above():
    for path in python_files("datasets_rgpt4d", "metrics_rgpt4d", "hub_cards"):
        assert not imported_modules(path) & {"trainer", "examples"}, path.name
    for path in python_files("trainer"):
        assert "examples" not in imported_modules(path), path.name


def test_no_file_is_named_utils():
    assert not [path for path in python_files(*ROOMS, "examples", "tests") if path.stem in ("utils", "util", "helpers")]


def test_no_file_names_a_folder_of_one_machine():
    pattern = re.compile(r"(?<![\w.])/(?:home|root|tmp|work|Users|mnt|opt)/")
    kept = [
        ROOT / name for name in ("setup.py", "Makefile", "README.md", "CONTRIBUTING.md", ".ci/run", "pyproject.toml")
    ]
    texts = [path for room in (*ROOMS, "examples") for path in (ROOT / room).rglob("*") if path.is_file()]
    for path in [*kept, *texts]:
        if path.is_file() and path.suffix not in (".pyc", ".png"):
            assert not pattern.search(path.read_text(encoding="utf-8")), path


def test_nothing_reads_pickles_or_runs_shell_strings():
    for path in python_files(*ROOMS, "examples"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not imported_modules(path) & {"pickle", "dill", "cloudpickle"}
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert name not in ("eval", "exec", "os.system", "os.popen"), f"{path}:{call.lineno}"
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert keywords.get("shell") != "True", f"{path}:{call.lineno}"
            assert keywords.get("weights_only") != "False", f"{path}:{call.lineno}"


def make(*arguments):
    """Runs make as a user would, also if these tests themselves were started by make with variables of its own."""
    ours = ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "TORCH", "PYTHON", "STEPS", "VIDEO", "ARGS", "PYTEST_ARGS")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_installs_torch_first_and_holds_it_fixed(target):
    plan = make("--dry-run", "--always-make", target, "TORCH=torch==2.13.0 --index-url mirror").stdout.splitlines()
    installs = [line for line in plan if " pip install " in line]
    assert installs[0].endswith("-m pip install torch==2.13.0 --index-url mirror")
    assert f"--constraint .venv-{target}/torch.txt --editable '.[" in installs[1]
    assert not any("torchvision" in line for line in plan)
    # The stamp is written after the last install: an interrupted one starts again.
    touched = plan.index(f"touch .venv-{target}/ready")
    assert max(plan.index(line) for line in installs) < touched


def test_make_demo_passes_its_arguments_on():
    plan = make("--dry-run", "demo", "STEPS=3", "VIDEO=my clip.mp4", "ARGS=--seed 1", "--always-make").stdout
    assert '--steps 3 --video "my clip.mp4" --seed 1' in plan
    assert "--steps" not in make("--dry-run", "--always-make", "demo").stdout


def test_make_without_a_target_prints_help():
    done = make()
    assert done.returncode == 0
    assert {line.split()[1] for line in done.stdout.splitlines()} == {
        "help",
        "demo",
        "test",
        "contract",
        "lint",
        "clean",
    }


def test_make_refuses_another_python_with_a_clear_message(tmp_path):
    other = tmp_path / "python3.10"
    other.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")
    other.chmod(0o755)
    done = make("--always-make", "test", f"PYTHON={other}")
    assert done.returncode != 0 and "needs Python 3.11 or 3.12" in done.stderr
