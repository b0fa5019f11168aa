"""Which replicas there are and which of them serve, and what everybody hears when that changes.

`policy` and `holders` know of a replica's end before anybody is asked to choose again. One that goes takes its own
sequences with it and nothing else; one that leaves in order finishes what it has.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from uuid import uuid4

from ..config import ServeConfig
from ..errors import EngineDeadError
from ..messages import EngineInfo
from ..server.engine_client.client import RESTART_PATIENCE_S
from ..server.engine_client.supervisor import STOPPED, State
from .holders import Holders
from .member import Member
from .merged import merged_info
from .policy import AffinityPolicy
from .wire import Channel

logger = logging.getLogger(__name__)


class Members:
    """Of one front and event loop; `channel_to` gives the way to a replica. Callbacks are the server's."""

    def __init__(
        self,
        config: ServeConfig,
        channel_to: Callable[[str], Channel],
        policy: AffinityPolicy,
        holders: Holders,
        *,
        on_adapters_left: Callable[[dict[str, int]], object],
        on_serving: Callable[[], object],
        on_snapshot: Callable[[], object],
    ):
        self._config, self._channel_to, self._front = config, channel_to, uuid4().hex
        self._policy, self._holders = policy, holders
        self._on_adapters_left, self._on_serving, self._on_snapshot = on_adapters_left, on_serving, on_snapshot
        self._members: dict[str, Member] = {}
        self._has_ready = asyncio.Event()
        self._leaving: set[asyncio.Task[None]] = set()
        self._num_losses = 0
        self._has_served = self._is_stopped = False
        self.info: EngineInfo | None = None  # of all that serve or served last

    def set_replicas(self, names: Iterable[str]) -> None:
        """These run now; what another one has begun it finishes."""
        if self._is_stopped:
            return
        wanted = set(names)
        for name in sorted(wanted - self._members.keys()):
            member = self._members[name] = Member(name, self._config, self._channel_to(name), self._front)
            member.client.on_adapters_left = partial(self.left, member)
            member.client.on_serving = self._changed
            member.client.on_snapshot = partial(self._heard, member)
            member.start()
        for name in self._members.keys() - wanted:
            self._num_losses += self._members[name].num_losses
            self._leaving.add(task := asyncio.create_task(self._members.pop(name).leave(self._config.drain_timeout_s)))
            task.add_done_callback(self._leaving.discard)
        self._changed()

    def all(self) -> Iterable[Member]:
        return self._members.values()

    def ready(self) -> dict[str, Member]:
        """Those that serve, by name."""
        return {name: member for name, member in self._members.items() if member.client.state == "ready"}

    async def any_ready(self) -> dict[str, Member]:
        """Those that serve; a first one is waited for. Raises `EngineDeadError`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(RESTART_PATIENCE_S):
                await self._has_ready.wait()
        if self._is_stopped:
            raise EngineDeadError(STOPPED)
        if not (ready := self.ready()):
            raise EngineDeadError("no replica serves now; retry shortly")
        return ready

    async def first_ready(self) -> None:
        """Wait for the first one, however long that takes."""
        await self._has_ready.wait()

    @property
    def state(self) -> State:
        if self._is_stopped:
            return "stopped"
        return "ready" if self._has_ready.is_set() else "restarting" if self._has_served else "starting"

    @property
    def has_served(self) -> bool:
        return self._has_served

    @property
    def num_losses(self) -> int:
        """Engine processes and replicas that have gone."""
        return self._num_losses + sum(member.num_losses for member in self._members.values())

    def left(self, member: Member, numbers: Mapping[str, int]) -> None:
        """A replica holds these contents no more, by its own numbers."""
        gone = {}
        for content_hash, number in numbers.items():
            self._policy.left(member.name, content_hash)
            if (placement := self._holders.left(content_hash, member.name, number)) is not None:
                gone[content_hash] = placement
        if gone:
            self._on_adapters_left(gone)

    async def stop(self) -> None:
        """Leave all of them; what runs ends with an error."""
        self._is_stopped = True
        members, self._members = list(self._members.values()), {}
        self._policy.set_replicas(())
        self._has_ready.set()  # whoever waits hears that it is stopped
        await asyncio.gather(*(member.leave(0.0) for member in members), *self._leaving, return_exceptions=True)

    def _changed(self) -> None:
        """Some replica serves now, or no more."""
        ready, served_before = self.ready(), self._has_ready.is_set()
        for lost in self._policy.loads.keys() - ready.keys():
            logger.warning("replica %s serves no more; %d do", lost, len(ready))
            if gone := self._holders.replica_lost(lost):
                self._on_adapters_left(gone)
        self._policy.set_replicas(ready)
        if not ready:
            self._has_ready.clear()
            return
        self.info = merged_info([member.client.info for member in ready.values()])
        self._has_ready.set()
        self._has_served = True
        if not served_before:
            self._on_serving()

    def _heard(self, member: Member) -> None:
        if (member.client.state == "ready") != (member.name in self._policy.loads):
            self._changed()
        self._on_snapshot()
