"""One keyed server with a tiny model for all clients, and the environments that `make conformance` makes for them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from served_poolers import make_poolers
from server_fixture import ServerProcess
from tiny_models import make_tiny_model

ENVIRONMENTS = Path(os.environ.get("CONFORMANCE_VENVS", Path(__file__).parents[2] / ".venv-conformance"))


class KeyedServer(ServerProcess):
    """Sends the key with every request of the fixture itself."""

    key = "sk-conformance"

    def get(self, path, **kwargs):
        return super().get(path, headers={"Authorization": f"Bearer {self.key}"}, **kwargs)

    def post(self, path, body, **kwargs):
        return super().post(path, body, headers={"Authorization": f"Bearer {self.key}"}, **kwargs)


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    model_dir = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=8192)
    root = tmp_path_factory.mktemp("adapters")
    make_poolers(model_dir, root)
    flags = ("--adapters-dir", str(root), "--batch-dir", str(tmp_path_factory.mktemp("batches")))
    server = KeyedServer(model_dir, *flags, env={"SPECSERVE_API_KEY": KeyedServer.key}).wait_ready()
    yield server
    server.wait_baseline()
    assert server.stop() == 0


@pytest.fixture(scope="session")
def executable():
    """The path of a program in a client's environment; skips where the environment was not made."""

    def find(client: str, program: str) -> Path:
        path = ENVIRONMENTS / client / "bin" / program
        if not path.exists():
            pytest.skip(f"no environment of {client}; make conformance makes it")
        return path

    return find
