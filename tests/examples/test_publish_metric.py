import shutil
import sys
from pathlib import Path

import pytest

from examples import publish

FOLDER = Path(__file__).parents[2] / "metrics_rgpt4d" / "depth_flow"


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Runs the command line in this process; what would be uploaded is returned."""
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    uploads = []
    monkeypatch.setattr(publish, "publish", lambda *args, **options: uploads.append((args, options)))

    def command(*arguments):
        monkeypatch.setattr(sys, "argv", ["publish.py", *map(str, arguments)])
        publish.main()
        return uploads

    yield command
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


def test_metric_becomes_a_space_that_loads_without_the_project(run, tmp_path, run_as_stranger):
    output = tmp_path / "space" / "depth_flow"
    output.parent.mkdir()
    uploads = run("--metric", FOLDER, "--output", output, "--repo-id", "user/depth_flow")
    assert uploads == [((output, "user/depth_flow"), {"private": True, "repo_type": "space"})]
    assert 'evaluate.load("user/depth_flow")' in (output / "README.md").read_text(encoding="utf-8")
    files = {path.name for path in output.iterdir()}
    assert files == {"README.md", "__init__.py", "depth_flow.py", "signal_errors.py"}
    assert not any(path.is_symlink() for path in output.iterdir())
    script = """
import evaluate
import numpy as np
truth = np.full((1, 2, 4, 4), 2.0)
metric = evaluate.load(sys.argv[1])
results = metric.compute(predictions=[{"depth": 3 * truth}], references=[{"id": "a", "depth": truth}])
print(results["depth_abs_rel"], results["depth_abs_rel_aligned"])
"""
    assert run_as_stranger(script, output).split() == ["2.0", "0.0"]


def test_metric_alone_brings_the_card_of_its_folder_up_to_date(run, tmp_path):
    folder = tmp_path / "metrics_rgpt4d" / "depth_flow"
    shutil.copytree(FOLDER, folder)
    expected = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(expected.replace("2,000 resamples", "no resamples"), encoding="utf-8")
    assert run("--metric", folder) == []
    assert (folder / "README.md").read_text(encoding="utf-8") == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--metric", FOLDER, "--name", "small"], "--metric goes without --run"),
        (["--metric", FOLDER, "--repo-id", "user/x"], "--repo-id needs --output"),
        (["--run", "runs/p4d", "--output", "out"], "a model needs --evaluation, --name, --from-scratch or --origin"),
    ],
)
def test_arguments_that_do_not_fit_are_named(run, arguments, message, capsys):
    with pytest.raises(SystemExit):
        run(*arguments)
    assert message in capsys.readouterr().err


def test_folder_without_a_metric_is_named(run, tmp_path):
    with pytest.raises(SystemExit, match="holds no .*.py"):
        run("--metric", tmp_path)
    with pytest.raises(SystemExit, match="exists; remove it"):
        run("--metric", FOLDER, "--output", tmp_path)
