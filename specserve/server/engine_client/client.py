"""The server's side of the engine: requests out, streams of deltas back; calls and their answers (`calls`).

Owns one queue per running request; the process is its supervisor's. A request's stream ends with its last delta, with
its own error, or with `EngineLostError` when the process goes; leaving a stream early aborts the request. After a
restart the engine holds no adapters: `generation` tells the adapter store that what it knew is void.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

import msgspec

from ...adapter_messages import (
    AdapterInfo,
    AdapterLoaded,
    AdaptersLeft,
    AdapterState,
    AdapterStates,
    ForsakeLoads,
    GetAdapters,
    LoadAdapter,
    PinAdapter,
    PrioritizeLoads,
    UnloadAdapter,
)
from ...config import EngineConfig
from ...errors import EngineDeadError, EngineLostError, UserError, from_info
from ...messages import Abort, CallDone, CallFailed, Delta, EngineInfo, GenerateRequest, GetStats, RequestFailed, joined
from ...own_modules import module_command
from ...pooling_messages import Pooled, PoolRequest
from ...stats_messages import SNAPSHOT, EngineStats, Stats
from .calls import Calls
from .link import EngineLink, Link
from .serving_engine import ReplicaState
from .supervisor import STOPPED, EngineSupervisor, State

MAX_QUEUED_DELTAS = 2048  # of one sequence whose reader takes nothing; then it is aborted
RESTART_PATIENCE_S = 60.0  # that a request waits for an engine that is started again
STATS_PATIENCE_S = 0.1  # endpoint pickers take a server whose scrape is older than 0.2 s for full


def engine_command(log_level: str = "info") -> list[str]:
    """What starts an engine process that logs from `log_level` on."""
    return [*module_command("specserve.engine.process"), "--log-level", log_level]


class EngineClient:
    """An engine for `config`, whose `model` is a local directory, in a process that is replaced when it fails."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        silence_timeout_s: float = 20.0,
        step_timeout_s: float = 10.0,
        command: list[str] | None = None,
        launch: Callable[[], Awaitable[Link]] | None = None,
    ):
        """`launch` gives the process its link where that is not one of this machine's started by `command`."""
        self.config = config
        # Of the process that serves.
        self.on_adapters_left: Callable[[dict[str, int]], object] = lambda placements: None
        self.on_serving: Callable[[], object] = lambda: None  # a process has started
        self.on_snapshot: Callable[[], object] = lambda: None  # about once a second, and when the process has gone
        command = command or engine_command()
        self._engine = EngineSupervisor(
            launch or (lambda: EngineLink.launch(command, config)),
            self._dispatch,
            self._lost,
            silence_timeout_s=silence_timeout_s,
            step_timeout_s=step_timeout_s,
            on_serving=lambda: self.on_serving(),
        )
        self._streams: dict[str, asyncio.Queue[Delta | Pooled | UserError]] = {}
        self._calls = Calls(self._link)
        self._snapshot: EngineStats | None = None  # the newest of the process that serves
        self._snapshot_at = 0.0

    @property
    def state(self) -> State:
        return self._engine.state

    @property
    def generation(self) -> int:
        """Counts started processes."""
        return self._engine.generation

    @property
    def num_restarts(self) -> int:
        """Processes that have served beside the first one."""
        return max(0, self.generation - 1)

    @property
    def info(self) -> EngineInfo:
        """Of the process that serves or served last."""
        if self._engine.info is None:
            raise EngineDeadError("the engine has not started yet; retry shortly")
        return self._engine.info

    @property
    def known_info(self) -> EngineInfo | None:
        """As `info`; None while the first process starts."""
        return self._engine.info

    async def first_info(self) -> EngineInfo:
        """As `info`; while the first process starts it is waited for, as any later one would be."""
        if self._engine.info is None:
            await self._link()
        return self.info

    @property
    def serving_s(self) -> float:
        """How long the process has served; 0 while none does."""
        since = self._engine.serving_since
        return time.monotonic() - since if self.state == "ready" and since is not None else 0.0

    @property
    def snapshot(self) -> tuple[EngineStats | None, float]:
        """The newest one of the process that serves, and when it came, since 1970; None, and now, for none."""
        return self._snapshot, time.time() if self._snapshot is None else self._snapshot_at

    @property
    def wait_estimate_s(self) -> float:
        """Seconds that a request would have waited about a second ago; 0 where nobody knows."""
        return self._snapshot.wait_estimate_seconds if self._snapshot is not None else 0.0

    async def start(self) -> None:
        """Start the process and wait for the model; raises the `UserError` that says why it cannot be served."""
        await self._engine.start()

    async def stop(self) -> None:
        """End the process; running streams end with an error."""
        self._fail_all(EngineDeadError, STOPPED)
        await self._engine.stop()

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta]:
        """Deltas of one sequence; raises `UserError` when it fails. Close the iterator to abort.

        Waits for an engine that is started again, and raises `EngineDeadError` when that takes too long.
        """
        return self._answers(request)

    def pool(self, request: PoolRequest) -> AsyncGenerator[Pooled]:
        """The one answer of a text that is pooled; as `generate` in all else."""
        return self._answers(request)

    async def _answers(self, request: GenerateRequest | PoolRequest) -> AsyncGenerator[Any]:
        engine = await self._link()
        queue: asyncio.Queue[Delta | Pooled | UserError] = asyncio.Queue()
        self._streams[request.request_id] = queue
        finished = False
        try:
            engine.send(request)
            while not finished:
                item = await queue.get()
                if isinstance(item, Delta):
                    deltas = [item]  # all that have come: where readers fall behind, each takes more at a time
                    while deltas[-1].finish_reason is None and not queue.empty():
                        if not isinstance(item := queue.get_nowait(), Delta):
                            break
                        deltas.append(item)
                    finished = deltas[-1].finish_reason is not None
                    yield joined(deltas)
                if isinstance(item, UserError):
                    finished = True
                    raise item
                if isinstance(item, Pooled):
                    finished = True
                    yield item
        finally:
            self._streams.pop(request.request_id, None)
            if not finished:
                engine.send(Abort(request.request_id))

    async def load_adapter(
        self,
        name: str,
        path: str,
        before: AdapterInfo | None = None,
        *,
        is_pinned: bool = False,
        is_prefetch: bool = False,
        priority: int = 0,
        mount: int = 0,
    ) -> AdapterLoaded:
        """Load the PEFT directory `path`; raises `UserError` when it cannot be served.

        `before` is what it was loaded as, if its files are still the same; `LoadAdapter` has the rest.
        """
        content_hash, size_bytes = (before.content_hash, before.size_bytes) if before is not None else (None, 0)
        load = LoadAdapter(
            self._calls.next_id(), name, path, content_hash, size_bytes, is_pinned, is_prefetch, priority, mount
        )
        answer: AdapterLoaded = await self._calls.ask(load)
        return answer

    def prioritize_loads(self, path: str, priority: int) -> None:
        """That is the best of the requests that wait for the loads of the directory `path`."""
        self._engine.send(PrioritizeLoads(path, priority))

    def forsake_loads(self, path: str) -> None:
        """Nobody waits any more for the loads of the directory `path`: such as wait for room fail, as prefetches do."""
        self._engine.send(ForsakeLoads(path))

    async def unload_adapter(self, adapter_hash: str, placement: int) -> None:
        """Forget it, unless a load placed it after `placement`."""
        await self._calls.ask(UnloadAdapter(self._calls.next_id(), adapter_hash, placement))

    async def pin_adapter(self, adapter_hash: str, is_pinned: bool, placement: int) -> None:
        """Raises `UserError` where it is not loaded, and shall be pinned; a load after `placement` may pin it, too."""
        await self._calls.ask(PinAdapter(self._calls.next_id(), adapter_hash, is_pinned, placement))

    def replicas(self) -> Mapping[str, ReplicaState]:
        """None: there is one engine."""
        return {}

    async def adapters(self) -> list[AdapterState]:
        """What the engine holds. Raises `EngineDeadError` while none serves."""
        return (await self._calls.ask(GetAdapters(self._calls.next_id()), patience_s=0.0)).adapters

    async def stats(self) -> EngineStats | None:
        """A snapshot of now, or of just before a step that takes long; None while no engine serves."""
        try:
            async with asyncio.timeout(STATS_PATIENCE_S):
                await self._calls.ask(GetStats(self._calls.next_id()), patience_s=0.0)
        except (EngineDeadError, TimeoutError):
            pass
        return self._snapshot

    async def _link(self, patience_s: float | None = None) -> Link:
        return await self._engine.link(RESTART_PATIENCE_S if patience_s is None else patience_s)

    # -- messages

    def _dispatch(self, message: Any) -> None:
        if isinstance(message, Delta):
            if (queue := self._streams.get(message.request_id)) is None:
                return
            if queue.qsize() < MAX_QUEUED_DELTAS:
                queue.put_nowait(message)
            elif queue.qsize() == MAX_QUEUED_DELTAS:
                queue.put_nowait(UserError("the client does not read its stream", status=408, code="slow_reader"))
                self._engine.send(Abort(message.request_id))
        elif isinstance(message, Pooled):
            if (queue := self._streams.get(message.request_id)) is not None:
                queue.put_nowait(message)
        elif isinstance(message, RequestFailed):
            if (queue := self._streams.get(message.request_id)) is not None:
                queue.put_nowait(from_info(message.error))
        elif isinstance(message, Stats):
            self._take_snapshot(message)
        elif isinstance(message, CallFailed):
            self._calls.fail(message)
        elif isinstance(message, AdaptersLeft):
            self.on_adapters_left(message.placements)
        elif isinstance(message, AdapterLoaded | AdapterStates | CallDone):
            self._calls.answer(message)

    def _take_snapshot(self, message: Stats) -> None:
        error = self._snapshot.integrity_error if self._snapshot is not None else None
        checked = message.call_id != SNAPSHOT
        self._snapshot = message.stats if checked else msgspec.structs.replace(message.stats, integrity_error=error)
        self._snapshot_at = time.time()
        self._calls.answer(message)
        if not checked:
            self.on_snapshot()

    def _lost(self) -> None:
        self._snapshot = None
        self._fail_all(EngineLostError, "the engine process ended while the request was running; retry")
        self.on_snapshot()

    def _fail_all(self, kind: type[EngineDeadError], reason: str) -> None:
        for queue in self._streams.values():
            queue.put_nowait(kind(reason))
        self._calls.fail_all(kind, reason)
