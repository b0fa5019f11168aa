"""What a front and a replica say to each other: the engine's own messages, in msgpack, and a greeting before them.

A replica's frames are a greeting, by which a front may see that it wants another one, an empty list when the front is
attached, and then lists of what its engine says; a front's are lists of what the engine is
told. The framing, and who is at the other end, is the transport's.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Protocol

import msgspec

from ..frames import FromEngine, ToEngine
from ..messages import EngineInfo

VERSION_PATH = "version:"  # before a version of the shared store, in the place of its folder, which differs by machine


class Served(msgspec.Struct, frozen=True):
    """What every version's greeting says, whatever else it has become: `served` as in `parts`."""

    served: str


class Greeting(Served, frozen=True):
    """A replica's first frame. `clock_s` is its time.monotonic(), which deadlines are in."""

    info: EngineInfo
    clock_s: float


class Channel(Protocol):
    """The way to one replica."""

    def attach(self, front: str) -> AsyncGenerator[bytes]:
        """Its frames, until its engine ends or another front attaches; closing it ends what it was asked for.

        `front` is a front's name, a slash, and a name for this way. Waits for an engine that is started, and for what
        another front has begun. Raises anything where the replica has gone.
        """
        ...

    async def tell(self, front: str, frame: bytes) -> None:
        """Tell the engine; nothing comes of it where `front` is not attached."""
        ...


encode = msgspec.msgpack.Encoder().encode
served_decoder = msgspec.msgpack.Decoder(Served)
greeting_decoder = msgspec.msgpack.Decoder(Greeting)
from_replica_decoder: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list[FromEngine])
to_replica_decoder: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list[ToEngine])
