"""The engine's end of the socket: what the server says, what the loop sends, and a heartbeat that no step holds up.

One thread reads frames into `inbox`, but for those that `at_once` takes, from before the model is loaded, and leaves
the process when the server goes. The loop sends, and says when its next turn begins; other threads send beside it,
whole frames one after the other. The heartbeat tells once a second that the process lives and how long the present turn
has taken of its own time; it never waits for the socket, which they may have filled.
"""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..awake_clock import AwakeClock, CoreWaits
from ..frames import encode_frames, read_frame, to_engine_decoder
from ..messages import Heartbeat

logger = logging.getLogger(__name__)

HEARTBEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class NewestStep:
    """What a heartbeat says beside the time: the newest step's rows, and the seconds that it should take at most."""

    num_rows: int
    expected_s: float


class ServerLink:
    """Owns the socket from when the first frame, the configuration, has been read."""

    def __init__(self, sock: socket.socket, leave: Callable[[int], Any] = os._exit):
        self.inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()  # messages, and what else is to be handled by the loop
        # On the thread that reads: whether a message was handled there, and is none of the loop's.
        self.at_once: Callable[[Any], bool] = lambda message: False
        self.has_come: Callable[[Any], object] = lambda message: None  # the same thread, of one that lies in the inbox
        self._sock = sock
        self._leave = leave  # the process, at once, with this status
        self._sending = threading.Lock()
        self._turn = 0

    def start_reading(self) -> None:
        """From here on the process leaves when the server does."""
        threading.Thread(target=self._read, name="frames", daemon=True).start()

    def start_heartbeat(self, newest_step: Callable[[], NewestStep]) -> None:
        """`newest_step` is asked once a second, by another thread than the loop's."""
        threading.Thread(target=self._beat, args=(newest_step,), name="heartbeat", daemon=True).start()

    def begin_turn(self) -> None:
        """What the loop does from here to the next call is what a heartbeat calls a turn."""
        self._turn += 1

    def send(self, messages: Sequence[Any]) -> None:
        """Send them, as the loop; waits while the server takes nothing."""
        self.send_beside(messages)
        self._turn += 1  # waiting for the server is no part of a turn

    def send_beside(self, messages: Sequence[Any]) -> None:
        """The same from another thread, which says nothing of the loop."""
        if not messages:
            return
        data = encode_frames(messages)
        with self._sending:
            try:
                self._sock.sendall(data)
            except OSError:  # the server has gone, and the reading thread is about to see it
                self._leave(0)

    def _read(self) -> None:
        try:
            while (payload := read_frame(self._sock)) is not None:
                message = to_engine_decoder.decode(payload)
                if not self.at_once(message):
                    self.inbox.put(message)
                    self.has_come(message)
        except ConnectionError:
            pass
        except Exception:
            logger.exception("the connection to the server broke")
        self._leave(0)

    def _beat(self, newest_step: Callable[[], NewestStep]) -> None:
        clock, waits, turn, since = AwakeClock(HEARTBEAT_S), CoreWaits(), -1, 0.0
        while True:
            time.sleep(HEARTBEAT_S)
            now = clock.tick(waits.take())
            if not self._sending.acquire(blocking=False):
                continue  # the loop is sending: that is a sign of life, or the server takes nothing
            try:
                if turn != self._turn:
                    turn, since = self._turn, now
                step = newest_step()
                self._send_now(encode_frames([Heartbeat(now - since, step.num_rows, step.expected_s)]))
            finally:
                self._sending.release()

    def _send_now(self, data: bytearray) -> None:
        """Send a small frame if the socket has room for it."""
        try:
            num_sent = self._sock.send(data, socket.MSG_DONTWAIT)
            if num_sent < len(data):  # the start of a frame commits to all of it
                self._sock.sendall(data[num_sent:])
        except BlockingIOError:
            pass
        except OSError:
            self._leave(0)
