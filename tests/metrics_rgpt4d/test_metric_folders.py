from pathlib import Path

METRICS = Path(__file__).parents[2] / "metrics_rgpt4d"
FOLDERS = sorted(path.parent for path in METRICS.glob("*/*.py") if path.stem == path.parent.name)


def test_stranger_loads_every_folder_in_a_fresh_process(run_as_stranger):
    script = """
import evaluate
for folder in sys.argv[1:]:
    print(type(evaluate.load(folder)).__module__.split(".")[-1])
"""
    assert run_as_stranger(script, *FOLDERS).split() == [folder.name for folder in FOLDERS]
