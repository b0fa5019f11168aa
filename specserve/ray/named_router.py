"""Calls of a front reach the replica that they name; and the front hears which replicas there are.

Ray Serve's own routers choose a replica for each call. Here that has been decided (`policy`), so this one only finds
who was chosen. One that leaves is told by name until it has gone, so that whoever leaves a stream ends its sequence. A
name that is there no more goes to anybody, who says that it is not the one: a call that waited for it would wait for
ever.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

MAX_LEAVING = 64


class NamedRouter(RequestRouter):
    """`to` of a call is the name of a replica; the process that asks may have a method `replicas_changed`."""

    queue_len_response_deadline_s = 5.0  # there is no other to ask: Serve's 0.1 s only log that a core was busy

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._leaving: dict[Any, RunningReplica] = {}

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        wanted = pending_request.kwargs.get("to") if pending_request is not None else None
        known = (*candidate_replicas, *self._leaving.values())
        named = [replica for replica in known if replica.replica_id.unique_id == wanted][:1]
        return [named or candidate_replicas[:1]]

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        before = {**self._leaving, **self.curr_replicas}
        super().update_replicas(replicas)
        gone = {key: replica for key, replica in before.items() if key not in self.curr_replicas}
        self._leaving = dict(list(gone.items())[-MAX_LEAVING:])
        self.curr_replicas.update(self._leaving)  # where a chosen one is looked up
        try:
            front = serve.get_replica_context().servable_object
        except RayServeException:  # a program that only deploys
            return
        if (tell := getattr(front, "replicas_changed", None)) is not None:
            tell([replica.replica_id.unique_id for replica in replicas])

    def on_replica_actor_died(self, replica_id: Any) -> None:
        self._leaving.pop(replica_id, None)
        super().on_replica_actor_died(replica_id)
