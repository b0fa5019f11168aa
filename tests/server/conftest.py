"""What the server's tests share: a tiny model, an adapter of it, and servers.

These are a plain one for tests that change nothing, one whose adapters come and go, one that asks for a key, and one
that breaks where it is told to. A start takes longer than most modules: one has a `server` of its own only where none
of these can be it. Each process of a run makes these once.
"""

import shutil

import pytest
from broken.broken_tokens import AWAY, broken_env
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def patient_model_dir(tmp_path_factory):
    """The same weights with a context of 4,096: answers that last while a test does something to them."""
    return make_tiny_model(tmp_path_factory.mktemp("patient") / "tiny", max_position_embeddings=4096)


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


@pytest.fixture(scope="session")
def open_dir(alpha_dir, tmp_path_factory):
    """A folder with the adapter `good`, to which tests add others that they take away again."""
    root = tmp_path_factory.mktemp("adapters")
    shutil.copytree(alpha_dir, root / "good")
    return root


@pytest.fixture(scope="session")
def open_server(model_dir, open_dir, tmp_path_factory):
    """With the adapters of `open_dir`, bodies of up to 4 MiB, and batches."""
    flags = (
        "--adapters-dir",
        str(open_dir),
        "--max-body-mib",
        "4",
        "--batch-dir",
        str(tmp_path_factory.mktemp("batches")),
    )
    server = ServerProcess(model_dir, *flags).wait_ready()
    yield server
    server.wait_baseline()
    assert server.stop() == 0


@pytest.fixture(scope="session")
def api_key():
    return "sk-test-key"


@pytest.fixture(scope="session")
def locked_server(model_dir, alpha_dir, api_key):
    """With the adapter `alpha`, for those who have the key."""
    flags = ("--adapters-dir", str(alpha_dir.parent), "--max-num-seqs", "8")
    server = ServerProcess(model_dir, *flags, env={"SPECSERVE_API_KEY": api_key}).wait_ready()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="session")
def faults(tmp_path_factory):
    """A folder of switches, for fixtures/broken: while `once` is there, a prompt with ONCE kills the engine, and while
    `hangs` is, the disk of the adapter `AWAY` hangs."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def broken_dir(alpha_dir, tmp_path_factory):
    """A folder with the adapters `good` and `AWAY`."""
    root = tmp_path_factory.mktemp("adapters")
    for name in ("good", AWAY):
        shutil.copytree(alpha_dir, root / name)
    return root


@pytest.fixture(scope="session")
def broken_server(patient_model_dir, broken_dir, faults):
    """Breaks where it is told to; impatient with steps and silence."""
    env = broken_env(BROKEN_ONCE=faults / "once", BROKEN_DISK=faults / "hangs")
    flags = ("--adapters-dir", str(broken_dir), "--engine-step-timeout-s", "2", "--engine-timeout-s", "5")
    server = ServerProcess(patient_model_dir, *flags, env=env).wait_ready()
    yield server
    assert server.stop() == 0
