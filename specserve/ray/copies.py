"""Copies of adapters on further replicas, which the server's own loads know nothing of.

A copy takes only room that is idle, and is read once however many ask for it. One that cannot be made is not tried
again for `PAUSE_S`. Nothing that the server has let go of comes back: a copy that ends too late, or is of other files
by then, is let go of.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping

from ..errors import EngineDeadError, UserError
from .holders import Holders
from .member import Member

PAUSE_S = 5.0
MAX_PAUSES = 4096

logger = logging.getLogger(__name__)


class Copies:
    """Of one table of `holders`; `ready` gives the replicas that serve."""

    def __init__(
        self, holders: Holders, ready: Callable[[], Mapping[str, Member]], observe_load_s: Callable[[float], object]
    ):
        self._holders, self._ready, self._observe_load_s = holders, ready, observe_load_s
        self._tasks: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._not_before: dict[tuple[str, str], float] = {}

    def refusing(self, content_hash: str) -> list[str]:
        """Replicas that could not take one lately."""
        now = time.monotonic()
        return [name for name in self._ready() if self._not_before.get((content_hash, name), 0.0) > now]

    async def bring(self, content_hash: str, replica: str) -> bool:
        """Have a copy there; whether it is."""
        key = content_hash, replica
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(self._copy(content_hash, replica))
            task.add_done_callback(lambda done: self._ended(key, done))
        await asyncio.wait((task,))
        return not task.cancelled() and task.exception() is None and replica in self._holders.of(content_hash)

    def _ended(self, key: tuple[str, str], task: asyncio.Task[None]) -> None:
        del self._tasks[key]
        if task.cancelled() or task.exception() is None:
            return
        logger.debug("no copy of %s on %s: %s", key[0][:12], key[1], task.exception())
        if len(self._not_before) >= MAX_PAUSES:
            self._not_before.clear()
        self._not_before[key] = time.monotonic() + PAUSE_S

    async def _copy(self, content_hash: str, replica: str) -> None:
        held, member = self._holders.get(content_hash), self._ready().get(replica)
        if held is None or member is None:
            return
        start = time.monotonic()
        answer = await member.client.load_adapter(
            held.name, held.path, held.info, is_pinned=held.is_pinned, is_prefetch=True, mount=held.mount
        )
        self._observe_load_s(time.monotonic() - start)
        found = answer.adapter.content_hash
        if found == content_hash and self._holders.copied(content_hash, replica, answer.placement):
            logger.info("adapter %r: another copy on replica %s", held.name, replica)
            return
        if replica not in self._holders.of(found):
            await member.client.unload_adapter(found, answer.placement)
        if found != content_hash:
            raise UserError(f"adapter {held.name!r} has other files now")

    async def forget(self, content_hash: str, by_replica: Mapping[str, int]) -> None:
        """Let the replicas forget what they have by these numbers."""
        ready = self._ready()

        async def unload(replica: str, number: int) -> None:
            with contextlib.suppress(EngineDeadError):
                await ready[replica].client.unload_adapter(content_hash, number)

        await asyncio.gather(*(unload(name, number) for name, number in by_replica.items() if name in ready))

    async def stop(self) -> None:
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
