"""A front's end of the way to one replica, as `server.engine_client.supervisor` sees an engine process.

What is sent goes in the order in which it was sent, as much together as there is while the last is under way. Times
that the engine reads are the replica's: deadlines are moved by the difference of the two clocks, which the greeting
tells to within the time that it took. A version of the shared store goes by its name: its folder is elsewhere there.
Ending it leaves the replica's engine alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec

from ..adapter_messages import ForsakeLoads, LoadAdapter, PrioritizeLoads
from ..errors import EngineDeadError, UserError
from ..messages import EngineInfo, GenerateRequest, Shutdown
from ..pooling_messages import PoolRequest
from .wire import VERSION_PATH, Channel, encode, from_replica_decoder, greeting_decoder, served_decoder

logger = logging.getLogger(__name__)


class ReplicaLink:
    """Made by `launch`."""

    def __init__(
        self,
        channel: Channel,
        front: str,
        frames: AsyncGenerator[bytes],
        info: EngineInfo,
        clock_difference_s: float,
        version_of: Callable[[Path], str | None],
    ):
        self.info = info
        self._clock_difference_s = clock_difference_s
        self._channel, self._front, self._frames = channel, front, frames
        self._version_of = version_of
        self._unsent: list[Any] = []
        self._has_unsent = asyncio.Event()
        self._sender = asyncio.create_task(self._send())

    @classmethod
    async def launch(
        cls, channel: Channel, front: str, served: str, version_of: Callable[[Path], str | None]
    ) -> ReplicaLink:
        """Attach to the replica, in the name of a front that serves what `parts.served` says. `version_of` a directory
        here that is a version's. Raises `UserError` where the replica has gone, or serves something else."""
        front = f"{front}/{uuid4().hex}"  # a new one each time: what an earlier link sends is not for this one's engine
        frames = channel.attach(front)
        try:
            frame = await anext(frames)
            now = time.monotonic()
            if (other := served_decoder.decode(frame).served) != served:
                await frames.aclose()
                raise EngineDeadError(f"it serves {other}; this front serves {served} and waits for others")
            greeting = greeting_decoder.decode(frame)
            clock_difference_s = greeting.clock_s - now
            await anext(frames)  # until it is attached
        except (UserError, msgspec.MsgspecError):
            raise
        except (Exception, StopAsyncIteration) as error:
            raise EngineDeadError(f"the replica is away ({type(error).__name__})") from error
        return cls(channel, front, frames, greeting.info, clock_difference_s, version_of)

    async def messages(self) -> AsyncGenerator[list[Any]]:
        """What the engine says at a time, until it or its replica ends."""
        async with aclosing(self._frames) as frames:
            try:
                async for frame in frames:
                    yield from_replica_decoder.decode(frame)
            except (asyncio.CancelledError, GeneratorExit, msgspec.MsgspecError):
                raise
            except Exception as error:
                logger.warning("a replica has gone: %s", type(error).__name__)

    def send(self, message: Any) -> None:
        """Queue `message` for the engine; nothing comes of it when the replica is gone."""
        if isinstance(message, Shutdown):
            return  # the engine is the replica's
        if isinstance(message, GenerateRequest | PoolRequest) and message.deadline is not None:
            message = msgspec.structs.replace(message, deadline=message.deadline + self._clock_difference_s)
        elif isinstance(message, LoadAdapter | PrioritizeLoads | ForsakeLoads):
            if (version := self._version_of(Path(message.path))) is not None:
                message = msgspec.structs.replace(message, path=VERSION_PATH + version)
        self._unsent.append(message)
        self._has_unsent.set()

    async def end(self, grace_s: float) -> str:
        """Leave the replica, which aborts what was asked of it."""
        self._sender.cancel()
        with contextlib.suppress(Exception, asyncio.CancelledError):
            await self._sender
        with contextlib.suppress(Exception):
            await self._frames.aclose()
        return "its replica was left"

    async def _send(self) -> None:
        while True:
            await self._has_unsent.wait()
            self._has_unsent.clear()
            unsent, self._unsent = self._unsent, []
            try:
                await self._channel.tell(self._front, encode(unsent))
            except Exception as error:  # the frames end as well, and say so
                logger.debug("a replica was not told", exc_info=error)
