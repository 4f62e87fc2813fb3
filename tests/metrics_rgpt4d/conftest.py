import sys

import pytest


@pytest.fixture(autouse=True)
def own_dynamic_modules(monkeypatch):
    """What a test loads by `evaluate.load`, from a cache of its own, is not there for the next one."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "evaluate_modules"]:
        del sys.modules[name]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Keeps what `evaluate` writes inside the test's folder."""
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_CACHE", tmp_path / "evaluate")
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", str(tmp_path / "metrics"))
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return tmp_path
