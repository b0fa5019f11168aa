"""Stats for everybody who listens: one event for all, made when the engine tells of itself, about once a second.

Owns the listeners. None of them asks the engine anything, keeps others waiting or has a queue: who is slow misses
events and gets the newest. Where the engine says nothing for `QUIET_S`, in a long step or while it is started again,
what is known is told all the same. Stats that cannot be made are logged and harm nobody: `publish` is called in the
midst of the engine's messages.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Callable

import msgspec

from ...errors import OverloadedError, ShuttingDownError
from ..access.caller import ANONYMOUS, Caller
from .snapshot import NamesAlike, visible
from .types import StatsResponse

logger = logging.getLogger(__name__)

MAX_LISTENERS = 64
MAX_LISTENERS_OF_ONE = 32  # key, or all without one
QUIET_S = 2.0


class _Event:
    """The stats of a moment, written once for all callers who may see the same."""

    def __init__(self, whole: StatsResponse, names_alike: NamesAlike):
        self._whole = whole
        self._names_alike = names_alike
        self._written: dict[tuple[str, ...] | None, msgspec.Raw] = {}

    def for_caller(self, caller: Caller | None) -> msgspec.Raw:
        """JSON. Whoever needs no key to ask, and sends none, sees what /metrics shows."""
        adapters = caller.adapters if caller is not None else None
        if adapters not in self._written:
            may_see = caller.may_use if caller is not None else lambda name: True
            self._written[adapters] = msgspec.Raw(msgspec.json.encode(visible(self._whole, may_see, self._names_alike)))
        return self._written[adapters]


class StatsFeed:
    """`newest` makes the stats of a moment; call `publish` when there is a new one. Of one event loop."""

    def __init__(self, newest: Callable[[], StatsResponse], names_alike: NamesAlike = lambda name: ()):
        self._newest = newest
        self._names_alike = names_alike
        self._event: _Event | None = None  # the newest, while there are listeners
        self._changed = asyncio.Event()  # set, and replaced, with each event
        self._listeners: Counter[str] = Counter()  # by name of the key
        self._is_broken = False  # the latest stats could not be made
        self._quiet: asyncio.TimerHandle | None = None
        self._is_closed = False

    @property
    def num_listeners(self) -> int:
        return self._listeners.total()

    def publish(self) -> None:
        """Tell all listeners of the stats of now; nothing is done for none. Raises nothing."""
        self._cancel_timer()
        if not self.num_listeners or self._is_closed:
            return
        self._quiet = asyncio.get_running_loop().call_later(QUIET_S, self.publish)
        try:
            self._event = _Event(self._newest(), self._names_alike)
        except Exception:
            if not self._is_broken:  # once for all that follow
                logger.exception("the stats cannot be made; who listens keeps the last ones")
            self._is_broken = True
        else:
            self._is_broken = False
            self._wake()

    def close(self) -> None:
        """End all streams, and begin none."""
        self._is_closed = True
        self._cancel_timer()
        self._wake()

    async def listen(self, caller: Caller | None) -> AsyncGenerator[msgspec.Raw]:
        """Events as JSON, the first at once, until `close`. Raises `UserError` where there is no place."""
        if self._is_closed:
            raise ShuttingDownError("the server is shutting down")
        name = caller.name if caller is not None else ANONYMOUS
        self._check_room(name)
        self._listeners[name] += 1
        try:
            if self._event is None:
                self.publish()
            while not self._is_closed:
                changed, event = self._changed, self._event
                if event is not None:
                    yield event.for_caller(caller)
                await changed.wait()
        finally:
            self._listeners[name] -= 1
            if not self._listeners[name]:
                del self._listeners[name]
            if not self._listeners:
                self._event = None
                self._cancel_timer()

    def _check_room(self, name: str) -> None:
        """Raises `OverloadedError` where all places are taken, or all that one may have."""
        if self.num_listeners >= MAX_LISTENERS:
            raise OverloadedError(
                f"{self.num_listeners} clients listen to the stats, which is the limit; ask without stream, or later"
            )
        if self._listeners[name] >= MAX_LISTENERS_OF_ONE:
            who = "without a key" if name == ANONYMOUS else f"with key {name!r}"
            raise OverloadedError(
                f"{self._listeners[name]} clients {who} listen to the stats, which is the limit for one; "
                "ask without stream, or later"
            )

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _cancel_timer(self) -> None:
        if self._quiet is not None:
            self._quiet.cancel()
            self._quiet = None
