"""An engine process without an engine: what it does is the next word of the file that FAKE_ENGINE_PLAN names.

It starts in a tenth of a second, which is what makes a supervisor's failures cheap to try.
"""

import os
import socket
import sys
import time
from pathlib import Path

import msgspec

from specserve.config import EngineConfig
from specserve.errors import ErrorInfo
from specserve.frames import read_frame, to_engine_decoder, write_frame
from specserve.messages import (
    SNAPSHOT,
    CallDone,
    CallFailed,
    Delta,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    Heartbeat,
    Shutdown,
    Stats,
    UnloadAdapter,
)

POISON = 13  # a prompt with it ends the process


def next_word() -> str:
    """Taken from the plan; its last word stays."""
    path = Path(os.environ["FAKE_ENGINE_PLAN"])
    first, _, rest = path.read_text().partition(" ")
    if rest:
        path.write_text(rest)
    return first


def main() -> None:
    sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
    word = next_word()
    if word == "exit":
        sys.exit(3)
    if word == "garbage":
        sock.sendall(b"\x03\0\0\0abc")
    if word == "half":
        sock.sendall(b"\x30\0\0")
    if word == "huge":
        sock.sendall(b"\xff" * 64)
    if word == "refuse":
        write_frame(sock, CallFailed(-1, ErrorInfo("no such model")))
    if word not in ("serve", "silent", "nonsense", "stuck"):
        return
    config = msgspec.msgpack.decode(read_frame(sock), type=EngineConfig)
    write_frame(sock, EngineInfo(config.model, "fake", 320, 128, 8, 16, "cpu", "fp32", os.getpid(), [2]))
    if word == "nonsense":
        sock.sendall(b"\x01\0\0\0\xc1")
    write_frame(sock, Stats(SNAPSHOT, EngineStats(*range(14))))
    if word == "stuck":
        write_frame(sock, Heartbeat(1, 0, 20.0, 2048))  # may be: it is large
        time.sleep(0.5)
        write_frame(sock, Heartbeat(1, 0, 20.0, 512))
    waiting: list[str] = []
    while word == "serve":
        sock.settimeout(0.1)
        try:
            payload = read_frame(sock)
        except TimeoutError:
            for request_id in waiting:
                write_frame(sock, Delta(request_id, [7], "seven", finish_reason="stop"))
            waiting.clear()
            write_frame(sock, Heartbeat(1, 0, 0.0, 1))
            continue
        message = to_engine_decoder.decode(payload) if payload else Shutdown()
        if isinstance(message, Shutdown):
            return
        if isinstance(message, GenerateRequest):
            waiting.append(message.request_id)
            if POISON in message.prompt_token_ids:
                sys.exit(9)
        if isinstance(message, UnloadAdapter):
            write_frame(sock, CallDone(message.call_id))
    time.sleep(100)


main()
