"""The server's side of the engine process: starts it, talks to it, and replaces it when it dies or hangs.

Owns the process, the socket and one queue per running request. A request's stream ends with its last delta, with its
own error, or with `EngineDeadError` when the process goes; leaving a stream early aborts the request. After a restart
the engine holds no adapters: `generation` tells the adapter store that what it knew is void.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import socket
import sys
import time
from collections.abc import AsyncGenerator
from typing import Any, Literal

from .config import EngineConfig
from .errors import EngineDeadError, UserError, from_info
from .frames import encode_frame, from_engine_decoder, read_frame_async
from .messages import (
    MAX_FRAME_BYTES,
    Abort,
    AdapterInfo,
    AdapterLoaded,
    CallDone,
    CallFailed,
    Delta,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    GetStats,
    Heartbeat,
    LoadAdapter,
    RequestFailed,
    Shutdown,
    Stats,
    UnloadAdapter,
)

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "dead", "stopped"]
START_TIMEOUT_S = 900.0  # reading and converting a large model from a slow disk
MAX_BACKOFF_S = 30.0
MAX_QUEUED_DELTAS = 2048  # of one sequence whose reader takes nothing; then it is aborted


class EngineClient:
    """One engine process for `config`, whose `model` is a local directory."""

    def __init__(self, config: EngineConfig, *, silence_timeout_s: float = 120.0, command: list[str] | None = None):
        self.config = config
        self.state: State = "stopped"
        self.generation = 0  # counts started processes
        self.num_running = 0  # as of the last heartbeat
        self.num_waiting = 0
        self._info: EngineInfo | None = None
        self._silence_timeout_s = silence_timeout_s
        self._command = command or [sys.executable, "-m", "specserve.engine_process"]
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._streams: dict[str, asyncio.Queue[Delta | UserError]] = {}
        self._calls: dict[int, asyncio.Future[Any]] = {}
        self._call_ids = itertools.count()
        self._supervisor: asyncio.Task[None] | None = None
        self._last_frame = 0.0

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineDeadError("the engine has not started yet; retry shortly")
        return self._info

    async def start(self) -> None:
        """Start the process and wait for the model; raises the `UserError` that says why it cannot be served."""
        reader = await self._launch()
        self._supervisor = asyncio.create_task(self._supervise(reader))

    async def stop(self) -> None:
        """End the process; running streams end with an error."""
        self.state = "stopped"
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._fail_all("the server is shutting down")
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.write(encode_frame(Shutdown()))
            self._writer.close()
        await self._reap(grace_s=5.0)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta]:
        """Deltas of one sequence; raises `UserError` when it fails. Close the iterator to abort."""
        queue: asyncio.Queue[Delta | UserError] = asyncio.Queue()
        self._streams[request.request_id] = queue
        finished = False
        try:
            self._send(request)
            while not finished:
                item = await queue.get()
                if isinstance(item, UserError):
                    finished = True
                    raise item
                finished = item.finish_reason is not None
                yield item
        finally:
            self._streams.pop(request.request_id, None)
            if not finished:
                with contextlib.suppress(EngineDeadError):
                    self._send(Abort(request.request_id))

    async def load_adapter(self, name: str, path: str) -> AdapterInfo:
        """Load the PEFT directory `path`; raises `UserError` when it cannot be served."""
        return (await self._call(LoadAdapter(next(self._call_ids), name, path))).adapter

    async def unload_adapter(self, adapter_hash: str) -> None:
        await self._call(UnloadAdapter(next(self._call_ids), adapter_hash))

    async def stats(self) -> EngineStats:
        return (await self._call(GetStats(next(self._call_ids)))).stats

    # -- process

    async def _launch(self) -> asyncio.StreamReader:
        self.state = "starting"
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, "--fd", str(theirs.fileno()), pass_fds=[theirs.fileno()]
            )
        finally:
            theirs.close()
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=MAX_FRAME_BYTES)
        self._writer.write(encode_frame(self.config))
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                payload = await read_frame_async(reader)
        except TimeoutError:
            payload = None
        message = from_engine_decoder.decode(payload) if payload is not None else None
        if not isinstance(message, EngineInfo):
            self.state = "dead"
            await self._reap(grace_s=5.0)
            if isinstance(message, CallFailed):
                raise from_info(message.error)
            raise EngineDeadError("the engine process ended while it was starting; its log says why")
        self._info = message
        self.generation += 1
        self.state = "ready"
        self._last_frame = time.monotonic()
        return reader

    async def _supervise(self, reader: asyncio.StreamReader | None) -> None:
        backoff_s = 0.5
        while True:
            if reader is not None:
                started = time.monotonic()
                await self._read_until_end(reader)
                self.state = "dead"
                code = await self._reap(grace_s=0.0)
                logger.error("the engine process ended (status %s); restarting it", code)
                self._fail_all("the engine process ended while the request was running; retry")
                backoff_s = 0.5 if time.monotonic() - started > 60 else min(2 * backoff_s, MAX_BACKOFF_S)
            await asyncio.sleep(backoff_s)
            try:
                reader = await self._launch()
            except UserError as error:
                logger.error("the engine could not be restarted: %s", error)
                self.state, reader = "dead", None
                backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    async def _read_until_end(self, reader: asyncio.StreamReader) -> None:
        """Dispatch frames until the stream ends, breaks, or is silent for longer than a living engine would be."""
        try:
            while True:
                async with asyncio.timeout(self._silence_timeout_s):
                    payload = await read_frame_async(reader)
                if payload is None:
                    return
                self._last_frame = time.monotonic()
                self._dispatch(from_engine_decoder.decode(payload))
                await asyncio.sleep(0)  # a burst of buffered frames must not keep their readers from running
        except TimeoutError:
            logger.error("the engine has been silent for %.0f s and is killed", self._silence_timeout_s)
        except Exception:
            logger.exception("the connection to the engine broke")

    async def _reap(self, grace_s: float) -> int | None:
        process = self._process
        if process is None:
            return None
        try:
            async with asyncio.timeout(grace_s):
                return await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            return await process.wait()

    # -- messages

    def _dispatch(self, message: Any) -> None:
        if isinstance(message, Delta):
            if (queue := self._streams.get(message.request_id)) is None:
                return
            if queue.qsize() < MAX_QUEUED_DELTAS:
                queue.put_nowait(message)
            elif queue.qsize() == MAX_QUEUED_DELTAS:
                queue.put_nowait(UserError("the client does not read its stream", status=408, code="slow_reader"))
                with contextlib.suppress(EngineDeadError):
                    self._send(Abort(message.request_id))
        elif isinstance(message, RequestFailed):
            if (queue := self._streams.get(message.request_id)) is not None:
                queue.put_nowait(from_info(message.error))
        elif isinstance(message, Heartbeat):
            self.num_running, self.num_waiting = message.num_running, message.num_waiting
        elif isinstance(message, CallFailed):
            if (future := self._calls.pop(message.call_id, None)) is not None and not future.done():
                future.set_exception(from_info(message.error))
        elif isinstance(message, AdapterLoaded | CallDone | Stats):
            if (future := self._calls.pop(message.call_id, None)) is not None and not future.done():
                future.set_result(message)

    async def _call(self, message: LoadAdapter | UnloadAdapter | GetStats) -> Any:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._calls[message.call_id] = future
        try:
            self._send(message)
            return await future
        finally:
            self._calls.pop(message.call_id, None)

    def _send(self, message: Any) -> None:
        if self.state != "ready" or self._writer is None:
            raise EngineDeadError("the engine is not running; retry shortly")
        self._writer.write(encode_frame(message))

    def _fail_all(self, reason: str) -> None:
        for queue in self._streams.values():
            queue.put_nowait(EngineDeadError(reason))
        for future in self._calls.values():
            if not future.done():
                future.set_exception(EngineDeadError(reason))
        self._calls.clear()
