"""What the server's tests share: a tiny model, an adapter of it, and a plain server for tests that change nothing.

A module whose server has flags, is broken on purpose or gets other adapters has a `server` of its own. Each process of
a run makes these once.
"""

import shutil

import pytest
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def alpha_dir(model_dir, tmp_path_factory):
    """In a folder of adapters of which it is the only one."""
    return make_peft_adapter(model_dir, tmp_path_factory.mktemp("adapters") / "alpha", r=4, std=0.3)


@pytest.fixture(scope="module")
def adapters_dir(alpha_dir, tmp_path_factory):
    """A folder with the adapter `good`; the module's own, as adapters come and go there."""
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(alpha_dir, root / "good")
    return root


@pytest.fixture(scope="session")
def server(model_dir, alpha_dir):
    """With the adapter `alpha`."""
    server = ServerProcess(model_dir, "--adapters-dir", str(alpha_dir.parent)).wait_ready()
    yield server
    server.wait_baseline()
    assert server.stop() == 0
