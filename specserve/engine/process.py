"""The process that the engine lives in: `python -m specserve.engine.process --fd N`.

Runs steps on the main thread; frames are read on another (`server_link`), adapters are read and grammars compiled on
more, so that neither a client nor a slow disk nor a large schema holds up decoding. First frame in: the `EngineConfig`,
whose `model` is a local directory. First frame out: `EngineInfo`, or `CallFailed(-1)` when the model cannot be served.
When the server goes away (end of stream), so does this process, at once: nothing is orphaned.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import queue
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from ..adapter_messages import (
    AdaptersLeft,
    AdapterStates,
    ForsakeLoads,
    GetAdapters,
    LoadAdapter,
    PinAdapter,
    PrioritizeLoads,
    UnloadAdapter,
)
from ..compute.device_choice import full_device
from ..config import EngineConfig
from ..drafting.cost_model import MEASURED_SEQS, StepShape
from ..errors import ErrorInfo, UserError
from ..frames import read_frame
from ..grammar.grammar import CompiledGrammar
from ..log_lines import configure_logging
from ..messages import (
    BACKGROUND_PRIORITY,
    Abort,
    CallDone,
    CallFailed,
    GenerateRequest,
    GetStats,
    RequestFailed,
    Shutdown,
)
from ..pooling_messages import AnyRequest, PoolRequest
from ..stats_messages import SNAPSHOT, Stats
from .adapter_loads import AdapterLoads
from .compiling import Compiled, CompilingRequests
from .engine import Engine
from .server_link import NewestStep, ServerLink
from .stats import adapter_states

logger = logging.getLogger(__name__)

SNAPSHOT_S = 1.0
IDLE_S = 0.5  # the longest wait for a message
PLACE_S = 0.05  # between looks for a place that an adapter waits for


@dataclass(frozen=True, slots=True)
class _AdapterRead:
    pass


class EngineProcess:
    """Feeds messages from the socket to the engine between steps, and its events back."""

    def __init__(self, engine: Engine, link: ServerLink):
        self._engine = engine
        self._link = link
        self._inbox = link.inbox  # messages, and what other threads have done
        self._loads = AdapterLoads(
            engine.adapters, lambda: self._inbox.put(_AdapterRead()), lambda loaded: link.send_beside([loaded])
        )
        link.at_once, link.has_come = self._begin_load, self._end_step_for
        self._next_snapshot = 0.0
        self._is_over = False  # a `Shutdown` came
        self._held: list[Any] | None = None  # events of the latest step, to be sent beside the next
        self._compiling = CompilingRequests(engine.grammars, self._add, self._fail, self._put_compiled)

    def serve(self) -> None:
        """Serve until `Shutdown`; end of stream leaves the process from the reading thread."""
        self._link.start_heartbeat(self._newest_step)
        while not self._is_over:
            self._link.begin_turn()
            self._compiling.give_up()
            if time.monotonic() >= self._next_snapshot:
                self._engine.measure_load()
                self._send([Stats(SNAPSHOT, self._engine.stats(check_integrity=False))])
                self._next_snapshot = time.monotonic() + SNAPSHOT_S
            busy = self._engine.has_work()
            if not busy:
                self._send_held()  # no forward will follow to send them beside
            self._drain_inbox(wait_s=0.0 if busy else PLACE_S if self._loads.is_waiting else IDLE_S)
            self._place_adapters()
            self._send([*self._engine.requests.drop_late()])
            if self._engine.has_work() and not self._is_over:
                events = self._engine.step(self._while_running)
                self._send_held()  # unless that was done while it ran
                self._held = events
                if not (self._engine.is_asynchronous and self._engine.has_work()):
                    self._send_held()  # else while the next forward runs
            elif not self._is_over:
                self._engine.take_idle_turn()

    def _while_running(self) -> None:
        """While a device runs a step: tell of the one before, and hear what has come since."""
        self._send_held()
        self._drain_inbox(wait_s=0.0)

    def _newest_step(self) -> NewestStep:
        """Asked while a step runs: reads, and no more than what may be read then."""
        engine, scheduler = self._engine, self._engine.scheduler
        running, num_rows = scheduler.running[:], engine.steps.num_rows
        shape = StepShape(num_seqs=max(1, len(running)), num_keys=sum([seq.num_computed for seq in running]))
        most_rows = max(num_rows, min(scheduler.max_batched_tokens, num_rows * (1 + engine.config.max_draft_tokens)))
        expected_s = engine.proposer.cost_model.seconds(most_rows, shape)
        return NewestStep(num_rows, expected_s)

    def _begin_load(self, message: Any) -> bool:
        """On the thread that reads frames: a load waits for no step."""
        if isinstance(message, LoadAdapter):
            self._link.send_beside(self._loads.submit(message))
        elif isinstance(message, PrioritizeLoads):
            self._loads.prioritize(message.path, message.priority)
        elif isinstance(message, ForsakeLoads):
            self._loads.forsake(message.path)
        else:
            return False
        return True

    def _end_step_for(self, message: Any) -> None:
        """On the thread that puts it into the inbox: a request waits for no step of rows of batches alone."""
        if isinstance(message, GenerateRequest | PoolRequest) and message.priority < BACKGROUND_PRIORITY:
            self._engine.path.interrupt.ask()

    def _drain_inbox(self, wait_s: float) -> None:
        """Handle what has arrived, waiting at most `wait_s` for a first message; nothing after `Shutdown`."""
        self._engine.path.interrupt.clear()
        try:
            message = self._inbox.get(timeout=wait_s) if wait_s else self._inbox.get_nowait()
            while not self._is_over:
                if isinstance(message, Shutdown):
                    self._is_over = True
                else:
                    self._handle(message)
                    message = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _handle(self, message: Any) -> None:
        engine = self._engine
        if self._begin_load(message):  # it came before this loop did
            return
        if isinstance(message, GenerateRequest):
            if message.grammar is None:
                self._add(message)
            else:
                self._compiling.begin(message, message.grammar)
        elif isinstance(message, PoolRequest):
            self._add(message)
        elif isinstance(message, Abort):
            self._compiling.forget(message.request_id)
            engine.abort(message.request_id)
        elif isinstance(message, UnloadAdapter):
            engine.adapters.unload(message.adapter_hash, message.placement)
            self._send([CallDone(message.call_id)])
        elif isinstance(message, PinAdapter):
            self._pin(message)
        elif isinstance(message, GetAdapters):
            self._send([AdapterStates(message.call_id, adapter_states(engine))])
        elif isinstance(message, GetStats):
            self._send([Stats(message.call_id, engine.stats())])
        elif isinstance(message, Compiled):
            self._compiling.end(message)
        else:
            assert isinstance(message, _AdapterRead)  # it only ends the wait for a message

    def _pin(self, message: PinAdapter) -> None:
        try:
            self._engine.registry.pin(message.adapter_hash, message.is_pinned, message.placement)
        except UserError as error:
            self._send([CallFailed(message.call_id, error.info())])
        else:
            self._send([CallDone(message.call_id)])

    def _place_adapters(self) -> None:
        """Answer loads that have ended, and tell of the adapters that left for them, or with their last request."""
        answers: list[Any] = [*self._loads.place(), *self._engine.requests.drop_displaced()]
        self._engine.adapters.forget_left()
        if left := self._engine.adapters.left:
            answers.append(AdaptersLeft(dict(left)))
            left.clear()
        self._send(answers)

    def _add(self, request: AnyRequest, grammar: CompiledGrammar | None = None) -> None:
        try:
            self._engine.add_request(request, grammar)
        except UserError as error:
            self._fail(request.request_id, error.info())

    def _fail(self, request_id: str, error: ErrorInfo) -> None:
        self._send([RequestFailed(request_id, error)])

    def _put_compiled(self, compiled: Compiled) -> None:
        """On the thread that has compiled it."""
        self._inbox.put(compiled)
        self._end_step_for(compiled.request)

    def _send_held(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            self._engine.write_events()
            self._send(held)

    def _send(self, messages: list[Any]) -> None:
        self._link.send(messages)


def main() -> int:
    parser = argparse.ArgumentParser(description="engine process of specserve; started by the server")
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the server")
    parser.add_argument("--log-level", default="info", choices=["debug", "info", "warning", "error"])
    arguments = parser.parse_args()
    sock = socket.socket(fileno=arguments.fd)
    # A terminal's Ctrl-C reaches the whole group; the server decides when this process ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    configure_logging(getattr(logging, arguments.log_level.upper()), "engine")
    payload = read_frame(sock)
    if payload is None:
        return 0
    config = msgspec.msgpack.decode(payload, type=EngineConfig)
    link = ServerLink(sock)
    link.start_reading()
    try:
        engine = Engine(config, Path(config.model), keeps_costs=True)
    except UserError as error:
        link.send([CallFailed(-1, error.info())])
        return 1
    except Exception as error:
        if (full := full_device(error, config)) is not None:
            link.send([CallFailed(-1, full.info())])
            return 1
        logger.exception("the model could not be loaded")
        text = f"the model could not be loaded: {type(error).__name__}: {error}"
        link.send([CallFailed(-1, ErrorInfo(text, 500, "server_error", None, "model_load_failed"))])
        return 1
    gc.collect()
    gc.freeze()  # what is there now stays: to look through its 200,000 objects would hold a step up for 0.1 s
    link.send([msgspec.structs.replace(engine.info, pid=os.getpid(), undrafted_rates=_undrafted_rates(engine))])
    try:
        EngineProcess(engine, link).serve()
    except BaseException:
        logger.exception("the engine failed; its process ends")
        _leave(1)  # no thread that still reads an adapter from a slow disk is waited for
    engine.close()
    _leave(0)


def _undrafted_rates(engine: Engine) -> list[tuple[int, float]]:
    """Of short contexts and the bare base."""
    table = engine.proposer.cost_model
    return [(num, num / table.seconds(num, StepShape(num_seqs=num))) for num in (1, MEASURED_SEQS)]


def _leave(status: int) -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


if __name__ == "__main__":
    raise SystemExit(main())
