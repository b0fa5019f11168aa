"""A run file of a tiny model and a sweep's runs in this process, for the tests of sweeps and curves alike."""

from types import SimpleNamespace

import pytest
from tiny_models import make_tiny_model
from training_fixture import SETTINGS, write_rows

from specserve.training.sweep import rung as rung_module
from specserve.training.sweep.runner import Sweep


@pytest.fixture(scope="session")
def sweep_model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("sweeps") / "model")


@pytest.fixture(scope="module")
def folder(sweep_model, tmp_path_factory):
    root = tmp_path_factory.mktemp("sweep")
    write_rows(root / "train.jsonl", 25)
    write_rows(root / "dev.jsonl", 6, seed=1)
    (root / "run.yaml").write_text(SETTINGS.format(model=sweep_model))
    return root


@pytest.fixture(scope="session")
def in_this_process():
    """A process of its own takes seconds for its imports; what it does is done here, behind `before`."""

    def patched(monkeypatch, before=lambda name, rung: None):
        def start(sweep, name, rung, lock):
            directory = sweep._directory
            before(name, rung)
            directory.run_folder(name).mkdir(parents=True, exist_ok=True)
            rung_module.run_rung(directory, name, rung)
            return SimpleNamespace(poll=lambda: 0, returncode=0, stdin=SimpleNamespace(close=lambda: None))

        monkeypatch.setattr(Sweep, "_start", start)

    return patched
