"""An engine behind `LLM` and one behind a server, of the same tiny model and adapter, for tests that change nothing."""

import shutil
import time

import pytest
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess
from tiny_models import make_tiny_model

from specserve import LLM


@pytest.fixture(scope="session")
def options():
    """Of both engines."""
    return {"dtype": "fp32", "kv_cache_gib": 0.02, "num_threads": 1, "max_model_len": 1024}


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=1024)


@pytest.fixture(scope="session")
def adapters_dir(model_dir, tmp_path_factory):
    """With the adapter `alpha`."""
    root = tmp_path_factory.mktemp("adapters")
    make_peft_adapter(model_dir, root / "alpha", r=4, std=0.3)
    return root


@pytest.fixture(scope="session")
def beta_dir(model_dir, tmp_path_factory):
    """Another adapter, in a folder that nobody serves."""
    return make_peft_adapter(model_dir, tmp_path_factory.mktemp("elsewhere") / "beta", r=2, std=0.3, seed=1)


@pytest.fixture
def copy_of_beta(beta_dir, tmp_path):
    return shutil.copytree(beta_dir, tmp_path / "copy")


@pytest.fixture(scope="session")
def llm(model_dir, adapters_dir, options):
    with LLM(model_dir, adapters_dir=adapters_dir, **options) as llm:
        yield llm


@pytest.fixture(scope="session")
def server(model_dir, adapters_dir):
    server = ServerProcess(model_dir, "--adapters-dir", str(adapters_dir)).wait_ready()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def wait_idle():
    """Waits until an engine runs nothing and holds no block for anybody."""

    def wait(llm):
        deadline = time.monotonic() + 60
        while True:
            stats = llm.stats()
            if not stats.requests.running + stats.requests.waiting and stats.kv.free_blocks == stats.kv.blocks:
                return
            assert time.monotonic() < deadline, stats
            time.sleep(0.02)

    return wait
