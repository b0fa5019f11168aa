"""One engine process and the server's end of the socket to it: launch, send, receive, end.

Owns exactly these two. Whatever way a launch fails, neither a handle nor a process stays behind. Who watches the
process, and what becomes of requests when it goes, is decided elsewhere.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import subprocess
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

import msgspec

from ...config import EngineConfig
from ...errors import EngineDeadError, from_info
from ...frames import MAX_FRAME_BYTES, FrameError, encode_frame, from_engine_decoder, read_frame_async
from ...messages import CallFailed, EngineInfo

START_TIMEOUT_S = 900.0  # reading and converting a large model from a slow disk
_REAP_S = 10.0  # a killed process that is not gone by then hangs in the kernel; nothing waits for it
_POLL_S = 0.01

logger = logging.getLogger(__name__)


class Link(Protocol):
    """A process that has loaded its model, as its supervisor sees it; `EngineLink` documents each method."""

    @property
    def info(self) -> EngineInfo: ...

    def messages(self) -> AsyncGenerator[list[Any]]: ...

    def send(self, message: Any) -> None: ...

    async def end(self, grace_s: float) -> str: ...


class EngineLink:
    """A process that has loaded its model. Made by `launch`; `end` gives everything back."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        info: EngineInfo,
    ):
        self.info = info
        self._process = process
        self._reader = reader
        self._writer = writer

    @classmethod
    async def launch(cls, command: Sequence[str], config: EngineConfig) -> EngineLink:
        """Start `command` and wait for the model. Raises `UserError` that says why it does not serve."""
        try:
            ours, process = _start(command)
        except OSError as error:
            raise EngineDeadError(f"the engine process cannot be started: {error.strerror or error}") from error
        writer: asyncio.StreamWriter | None = None
        try:
            reader, writer = await asyncio.open_connection(sock=ours, limit=MAX_FRAME_BYTES)
            writer.write(encode_frame(config))
            message = await _first_message(reader)
            if isinstance(message, EngineInfo):
                return cls(process, reader, writer, message)
            if isinstance(message, CallFailed):
                raise from_info(message.error)
            status = describe(await wait(process, grace_s=1.0))
            raise EngineDeadError(f"the engine process ended ({status}) while it was starting; its log says why")
        except BaseException:
            if writer is not None:
                writer.transport.abort()
            ours.close()
            await wait(process, grace_s=0.0)
            raise

    async def messages(self) -> AsyncGenerator[list[Any]]:
        """What the engine says at a time, until it closes the socket. Raises `FrameError` or msgspec's on nonsense."""
        while True:
            try:
                payload = await read_frame_async(self._reader)
            except ConnectionError:
                return
            if payload is None:
                return
            yield from_engine_decoder.decode(payload)

    def send(self, message: Any) -> None:
        """Queue `message` for the engine; nothing comes of it when the process is gone."""
        if not self._writer.is_closing():
            self._writer.write(encode_frame(message))

    async def end(self, grace_s: float) -> str:
        """Wait for the process, kill it after `grace_s`, and close the socket. Says how it ended.

        In this order: a process whose socket closes leaves at once, whatever it was about to save.
        """
        try:
            return describe(await wait(self._process, grace_s))
        finally:
            self._writer.transport.abort()


def _start(command: Sequence[str]) -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            return ours, subprocess.Popen([*command, "--fd", str(theirs.fileno())], pass_fds=[theirs.fileno()])
        except BaseException:
            ours.close()
            raise


async def _first_message(reader: asyncio.StreamReader) -> Any:
    """The engine's first message, sent alone; None when there is none in time, or none that makes sense."""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            payload = await read_frame_async(reader)
        return next(iter(from_engine_decoder.decode(payload)), None) if payload is not None else None
    except TimeoutError:
        logger.error("the engine process has not loaded its model within %.0f s", START_TIMEOUT_S)
    except (FrameError, msgspec.MsgspecError) as error:
        logger.error("the engine process said nonsense: %s", error)
    except ConnectionError:
        pass
    return None


async def wait(process: subprocess.Popen[bytes], grace_s: float) -> int | None:
    """The status of `process`, which is killed after `grace_s`; None when even that does not end it.

    Polls: to be told of the end takes a handle or a thread, and both may be out.
    """
    deadline = time.monotonic() + grace_s
    while process.poll() is None and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S)
    process.kill()  # nothing, once it was waited for
    deadline = time.monotonic() + _REAP_S
    while process.poll() is None and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_S)
    return process.returncode


def describe(status: int | None) -> str:
    """A process's return code in words."""
    if status is None:
        return "it does not die"
    if status >= 0:
        return f"status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
