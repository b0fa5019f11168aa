"""A replica: one engine process, run as the HTTP server runs its own, and the front that it serves.

One front at a time: the last that attached, once what another had begun has ended. What it says goes to the engine in
order, what the engine says goes back, all that has come together as one frame. A front that leaves, or is replaced,
leaves nothing behind: its sequences are aborted, so that their KV blocks return. An engine that ends ends the frames;
it is started again by its supervisor, and the front attaches anew.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..config import ServeConfig
from ..errors import EngineDeadError
from ..messages import (
    Abort,
    Delta,
    GenerateRequest,
    RequestFailed,
)
from ..pooling_messages import Pooled, PoolRequest
from ..server.engine_client.client import RESTART_PATIENCE_S, engine_command
from ..server.engine_client.link import EngineLink
from ..server.engine_client.supervisor import EngineSupervisor
from ..server.served_engine import process_settings
from ..server.shared_store.versions import Versions
from ..stats_messages import EngineStats, Stats
from .brought_versions import BroughtVersions
from .own_folder import OwnFolder
from .parts import served
from .wire import Greeting, encode, to_replica_decoder

MAX_AWAY_S = 120.0  # that an engine may need to be started again before the replica counts as broken
MAX_REPLACED = 64  # fronts that are remembered
LOOK_S = 0.05  # between looks at what another front has begun

logger = logging.getLogger(__name__)


class EngineHost:
    """Not started yet; its engine reads adapters below `roots`, anywhere where there are none. Raises `UserError` for
    settings of what is not there.

    What an engine has learned (`history_dir`) goes to a folder of its own below that.
    """

    def __init__(self, config: ServeConfig, model_dir: Path, roots: Sequence[Path] = ()):
        self._front: _Attached | None = None
        self._replaced: list[str] = []  # fronts; newest last
        self._served, self._drain_timeout_s = served(config), config.drain_timeout_s
        command = engine_command(config.log_level)
        settings = process_settings(config, model_dir, roots)
        self._histories = OwnFolder(config.history_dir, "history_dir") if config.history_dir is not None else None
        if self._histories is not None:
            settings = msgspec.structs.replace(settings, history_dir=str(self._histories.path))
        self._engine = EngineSupervisor(
            lambda: EngineLink.launch(command, settings),
            self._relay,
            self._lost,
            silence_timeout_s=config.engine_timeout_s,
            step_timeout_s=config.engine_step_timeout_s,
        )
        self._away_since: float | None = None
        self._stats: EngineStats | None = None
        self._versions = Versions.of(config)
        self._brought = (
            BroughtVersions(self._versions, self._engine.send, self._answer) if self._versions is not None else None
        )

    def load(self) -> dict[str, float]:
        """Tokens of requests that wait, and the share of seats whose sequences run; no load while no engine serves."""
        stats, info = self._stats, self._engine.info
        if stats is None or info is None:
            return {"waiting_tokens": 0.0, "used_seats": 0.0}
        return {
            "waiting_tokens": float(stats.num_waiting_tokens),
            "used_seats": stats.num_running / max(1, info.max_num_seqs),
        }

    @property
    def pid(self) -> int:
        """Of the engine process that serves or served last; 0 before the first."""
        return self._engine.info.pid if self._engine.info is not None else 0

    async def start(self) -> None:
        """Start the engine and wait for its model; raises the `UserError` that says why it cannot be served."""
        await self._engine.start()

    async def stop(self) -> None:
        self._lost()
        if self._versions is not None:
            await self._versions.stop()
        await self._engine.stop()
        if self._histories is not None:
            self._histories.close()

    def check(self) -> None:
        """Raises `EngineDeadError` where the engine has been away for too long."""
        if self._engine.state == "ready":
            self._away_since = None
            return
        now = time.monotonic()
        self._away_since = self._away_since or now
        if now - self._away_since > MAX_AWAY_S:
            raise EngineDeadError(f"the engine has not been back for {MAX_AWAY_S:.0f} s ({self._engine.state})")

    async def attach(self, front: str) -> AsyncGenerator[bytes]:
        """As `wire.Channel.attach`. Raises `EngineDeadError` for a front that another one has replaced."""
        engine = await self._engine.link(RESTART_PATIENCE_S)
        yield encode(Greeting(self._served, engine.info, time.monotonic()))
        await self._replace(front.partition("/")[0])
        if await self._engine.link(RESTART_PATIENCE_S) is not engine:
            return  # what was greeted for has ended meanwhile
        self._lost()
        attached = self._front = _Attached(front)
        logger.info("a front attached")
        try:
            yield encode([])
            async for messages in attached.messages():
                yield encode(messages)
        finally:
            if self._front is attached:
                self._front = None
            for request_id in attached.running:
                self._engine.send(Abort(request_id))

    async def _replace(self, name: str) -> None:
        """Let whoever is attached finish, unless it is this front itself; it is not to come back."""
        if name in self._replaced:
            raise EngineDeadError("another front serves")
        until = time.monotonic() + self._drain_timeout_s
        while (other := self._front) is not None and other.name != name:
            if not other.running or time.monotonic() > until:
                self._replaced = [*self._replaced[1 - MAX_REPLACED :], other.name]
                return
            await asyncio.sleep(LOOK_S)

    async def tell(self, front: str, frame: bytes) -> None:
        """As `wire.Channel.tell`."""
        attached = self._front
        if attached is None or attached.front != front:
            return
        for message in to_replica_decoder.decode(frame):
            if isinstance(message, GenerateRequest | PoolRequest):
                attached.running.add(message.request_id)
            elif isinstance(message, Abort):
                attached.running.discard(message.request_id)  # of which the engine says nothing more
            if self._brought is None or not self._brought.take(message):
                self._engine.send(message)

    def _answer(self, message: Any) -> None:
        """In the engine's stead."""
        if self._front is not None:
            self._front.put(message)

    def _relay(self, message: Any) -> None:
        if isinstance(message, Stats):
            self._stats = message.stats
        if self._brought is not None:
            self._brought.heard(message)
        if (attached := self._front) is None:
            return
        if (isinstance(message, Delta) and message.finish_reason is not None) or isinstance(
            message, Pooled | RequestFailed
        ):
            attached.running.discard(message.request_id)
        attached.put(message)

    def _lost(self) -> None:
        """The engine has gone, or the front: whoever is attached hears nothing more."""
        self._stats = None
        if self._brought is not None:
            self._brought.drop()
        if self._front is not None:
            self._front.end()
            self._front = None


class _Attached:
    """A front, what it is to hear, and which of its sequences run."""

    def __init__(self, front: str):
        self.front, self.name = front, front.partition("/")[0]
        self.running: set[str] = set()
        self._messages: list[Any] = []
        self._changed = asyncio.Event()
        self._is_ended = False

    def put(self, message: Any) -> None:
        self._messages.append(message)
        self._changed.set()

    def end(self) -> None:
        self._is_ended = True
        self._changed.set()

    async def messages(self) -> AsyncGenerator[list[Any]]:
        """All that has come, each time there is something."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            messages, self._messages = self._messages, []
            if messages:
                yield messages
            if self._is_ended:
                return
