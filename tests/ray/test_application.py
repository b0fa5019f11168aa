"""What the application asks of a cluster's machines, with clusters that are only told of; where Ray is installed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from specserve.config import RayConfig
from specserve.errors import UserError

pytest.importorskip("ray.serve")
from specserve.ray import application as module  # noqa: E402
from specserve.ray import preflight  # noqa: E402


@pytest.fixture
def cluster(monkeypatch):
    """Let there be these machines: by address, what is free on each."""

    def cluster(**free):
        nodes = [{"NodeManagerAddress": name.replace("_", "."), "Alive": True} for name in free]
        monkeypatch.setattr(module.ray, "is_initialized", lambda: True)
        monkeypatch.setattr(module.ray, "nodes", lambda: nodes)
        monkeypatch.setattr(module, "available_resources_per_node", lambda: dict(free))

    return cluster


def test_room_for_one_more_is_on_one_machine_and_not_in_the_sum(cluster):
    config = RayConfig(replica_cpus=4, replica_gpus=1)
    cluster(east={"CPU": 3.0, "GPU": 1.0}, west={"CPU": 3.0, "GPU": 1.0}, south={"CPU": 8.0})
    assert not module.has_room(config)
    cluster(east={"CPU": 3.0}, west={"CPU": 4.0, "GPU": 1.0})
    assert module.has_room(config)


def test_a_front_for_a_machine_that_is_not_there_is_refused_by_those_that_are(cluster):
    cluster(**{"10_0_0_2": {}, "10_0_0_3": {}})
    with pytest.raises(UserError, match=r"front_node is 10.0.0.9; the cluster has 10.0.0.2, 10.0.0.3"):
        module.application(RayConfig(front_node="10.0.0.9"))
    assert module.application(RayConfig(front_node="10.0.0.3")) is not None


def test_machines_of_one_host_name_are_all_asked(monkeypatch):
    nodes = [
        {"NodeManagerAddress": address, "NodeManagerHostname": "host", "NodeID": "0" * 56, "Alive": True,
         "Resources": {"CPU": 4.0}}
        for address in ("10.0.0.2", "10.0.0.3")
    ]  # fmt: skip
    answers = iter(["it lacks the model", None])
    task = SimpleNamespace(options=lambda **_: SimpleNamespace(remote=lambda sent: next(answers)))
    monkeypatch.setattr(preflight, "_problem", task)
    monkeypatch.setattr(preflight.ray, "nodes", lambda: nodes)
    monkeypatch.setattr(preflight.ray, "get", lambda answer: answer)
    with pytest.raises(UserError, match="machine host cannot serve this, nothing was changed: it lacks the model"):
        preflight.check_machines(RayConfig())
