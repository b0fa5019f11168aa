"""Calls reach the replica that they name while it leaves, and none of another's. Needs Ray, and no cluster."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("ray.serve", reason="Ray is not installed")

from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID

from specserve.ray.named_router import NamedRouter

DEPLOYMENT = DeploymentID("EngineReplica", "specserve")


class Replica:
    def __init__(self, name):
        self.replica_id = ReplicaID(name, DEPLOYMENT)
        self.max_ongoing_requests = 10

    async def get_queue_len(self, *, deadline_s):
        return 0


async def chosen(router, name):
    """By the router's own steps from choosing to sending."""
    request = SimpleNamespace(kwargs={"to": name})
    (ranked,) = await router.choose_replicas(router._replicas_list, request)
    found = await router._select_from_candidate_replicas(ranked, 0)
    return found and found.replica_id.unique_id


async def test_one_that_leaves_is_told_until_it_has_died_and_is_nobodys_second_choice():
    router = NamedRouter(DEPLOYMENT, DeploymentHandleSource.REPLICA)
    east, west = Replica("east"), Replica("west")
    router.update_replicas([east, west])
    assert [await chosen(router, name) for name in ("east", "west", "nobody")] == ["east", "west", "east"]
    router.update_replicas([west])
    for _ in range(2):
        assert [await chosen(router, name) for name in ("east", "west", "nobody")] == ["east", "west", "west"]
        router.update_replicas([west])
    router.on_replica_actor_died(east.replica_id)
    assert await chosen(router, "east") == "west"
    router.update_replicas([west, east])
    assert await chosen(router, "east") == "east" and not router._leaving
    await asyncio.sleep(0)
