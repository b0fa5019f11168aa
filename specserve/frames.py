"""Length-prefixed msgpack frames between the server and the engine process, blocking and asyncio.

A frame is 4 bytes little-endian length, then one msgpack value: a message to the engine, a list of messages from it.
This file owns the framing, and which messages go which way; what they are is in `messages.py` and
`pooling_messages.py`. A peer that goes away between frames is an end (None); inside a frame it is a `FrameError`.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import Any

import msgspec

from .adapter_messages import (
    AdapterLoaded,
    AdaptersLeft,
    AdapterStates,
    ForsakeLoads,
    GetAdapters,
    LoadAdapter,
    PinAdapter,
    PrioritizeLoads,
    UnloadAdapter,
)
from .messages import (
    Abort,
    CallDone,
    CallFailed,
    Delta,
    EngineInfo,
    GenerateRequest,
    GetStats,
    Heartbeat,
    RequestFailed,
    Shutdown,
)
from .pooling_messages import Pooled, PoolRequest
from .stats_messages import Stats

ToEngine = (
    GenerateRequest
    | PoolRequest
    | Abort
    | LoadAdapter
    | PrioritizeLoads
    | ForsakeLoads
    | UnloadAdapter
    | PinAdapter
    | GetAdapters
    | GetStats
    | Shutdown
)
FromEngine = (
    EngineInfo
    | Delta
    | Pooled
    | RequestFailed
    | AdapterLoaded
    | AdaptersLeft
    | AdapterStates
    | CallDone
    | CallFailed
    | Stats
    | Heartbeat
)
MAX_FRAME_BYTES = 256 * 1024 * 1024

_LENGTH = struct.Struct("<I")

encoder = msgspec.msgpack.Encoder()
to_engine_decoder: msgspec.msgpack.Decoder[Any] = msgspec.msgpack.Decoder(ToEngine)
from_engine_decoder: msgspec.msgpack.Decoder[list[Any]] = msgspec.msgpack.Decoder(list[FromEngine])


class FrameError(Exception):
    """The peer broke the framing: a frame over the limit, or an end in the middle of one."""


def encode_frame(value: Any) -> bytearray:
    """One value as a whole frame, ready to be sent."""
    buffer = bytearray(_LENGTH.size)
    encoder.encode_into(value, buffer, _LENGTH.size)
    _LENGTH.pack_into(buffer, 0, _checked(len(buffer) - _LENGTH.size))
    return buffer


def encode_frames(messages: Sequence[Any]) -> bytearray:
    """All of `messages` from the engine, in one frame if they fit."""
    try:
        return encode_frame(messages)
    except FrameError:
        if len(messages) < 2:
            raise
    half = len(messages) // 2
    return encode_frames(messages[:half]) + encode_frames(messages[half:])


def read_frame(sock: socket.socket) -> bytes | None:
    """The next frame's payload from a blocking socket; None when the peer has closed."""
    head = _receive(sock, _LENGTH.size)
    if head is None:
        return None
    payload = _receive(sock, _checked(_LENGTH.unpack(head)[0]))
    if payload is None:
        raise FrameError("the peer closed the socket after a frame's length")
    return bytes(payload)


async def read_frame_async(reader: asyncio.StreamReader) -> bytes | None:
    """The next frame's payload from a stream; None when the peer has closed."""
    try:
        head = await reader.readexactly(_LENGTH.size)
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise FrameError("the peer closed the socket inside a frame's length") from error
        return None
    try:
        return await reader.readexactly(_checked(_LENGTH.unpack(head)[0]))
    except asyncio.IncompleteReadError as error:
        raise FrameError("the peer closed the socket inside a frame") from error


def _checked(length: int) -> int:
    if length > MAX_FRAME_BYTES:
        raise FrameError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
    return length


def _receive(sock: socket.socket, length: int) -> bytearray | None:
    """Exactly `length` bytes; None when the peer closed before the first of them."""
    buffer = bytearray(length)
    view = memoryview(buffer)
    received = 0
    while received < length:
        n = sock.recv_into(view[received:])
        if n == 0:
            if received == 0:
                return None
            raise FrameError(f"the peer closed the socket after {received} of {length} bytes")
        received += n
    return buffer
