"""Loads of versions of the shared store, which this machine may have to fetch before its engine can read them.

A load goes to the engine with the folder that its version has here, and holds it until the engine has answered.
Whatever else is said meanwhile goes on; who waits for the load, and how much, is the front's newest word when it is
sent. Nothing outlives the front that asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from ..adapter_messages import AdapterLoaded, ForsakeLoads, LoadAdapter, PrioritizeLoads
from ..errors import ErrorInfo, UserError
from ..messages import CallFailed
from ..server.shared_store.versions import Versions
from .wire import VERSION_PATH

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Bringing:
    """A load that waits for its files, or for the engine's answer."""

    version: str
    load: LoadAdapter
    is_answered: asyncio.Event = field(default_factory=asyncio.Event)
    task: asyncio.Task[None] | None = None


class BroughtVersions:
    """`send` tells the engine, `answer` the front."""

    def __init__(self, versions: Versions, send: Callable[[Any], object], answer: Callable[[Any], object]):
        self._versions, self._send, self._answer = versions, send, answer
        self._bringing: dict[int, _Bringing] = {}  # by the load's number

    def take(self, message: Any) -> bool:
        """Whether `message` is of a version, which is taken care of."""
        if not isinstance(message, LoadAdapter | PrioritizeLoads | ForsakeLoads):
            return False
        if not message.path.startswith(VERSION_PATH):
            return False
        version = message.path.removeprefix(VERSION_PATH)
        if isinstance(message, LoadAdapter):
            bringing = self._bringing[message.call_id] = _Bringing(version, message)
            bringing.task = asyncio.create_task(self._bring(bringing))
            return True
        for bringing in self._bringing.values():
            if bringing.version == version:
                priority = message.priority if isinstance(message, PrioritizeLoads) else bringing.load.priority
                bringing.load = msgspec.structs.replace(
                    bringing.load, priority=priority, is_prefetch=isinstance(message, ForsakeLoads)
                )
        self._send(msgspec.structs.replace(message, path=str(self._versions.folders.path(version))))
        return True

    def heard(self, message: Any) -> None:
        """The engine says so."""
        if isinstance(message, AdapterLoaded | CallFailed) and message.call_id in self._bringing:
            self._bringing[message.call_id].is_answered.set()

    def drop(self) -> None:
        """The front or the engine has gone: nobody waits for any of them."""
        for bringing in self._bringing.values():
            if bringing.task is not None:
                bringing.task.cancel()
        self._bringing.clear()

    async def _bring(self, bringing: _Bringing) -> None:
        call_id = bringing.load.call_id
        try:
            async with self._versions.local(bringing.version) as folder:
                self._send(msgspec.structs.replace(bringing.load, path=str(folder)))
                await bringing.is_answered.wait()
        except UserError as error:
            self._answer(CallFailed(call_id, error.info()))
        except Exception:  # a bug: whoever waits hears of it
            logger.exception("version %s was not brought", bringing.version[:12])
            text = "bringing the adapter failed; the replica's log says where"
            self._answer(CallFailed(call_id, ErrorInfo(text, 500, "server_error", None, "internal_error")))
        finally:
            if self._bringing.get(call_id) is bringing:
                del self._bringing[call_id]
