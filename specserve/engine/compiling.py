"""Requests whose grammars are compiled on other threads, so that a large schema holds up no step.

Each is added once its grammar is there, or fails, or is forgotten: one of these, once. All of it is called by the
engine's loop but `when_done`, which other threads call.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from ..errors import ErrorInfo, GrammarError, OverloadedError, UserError
from ..grammar.compiler import COMPILE_TIMEOUT_S, GrammarCompiler
from ..grammar.grammar import CompiledGrammar
from ..messages import GenerateRequest, GrammarSpec

logger = logging.getLogger(__name__)

MAX_COMPILING = 1024  # requests


@dataclass(frozen=True, slots=True)
class Compiled:
    """A grammar's end, for whoever asked for it."""

    request: GenerateRequest
    future: Future[CompiledGrammar]


class CompilingRequests:
    """`when_done` hears of grammars that were not known already; the loop answers with `end`."""

    def __init__(
        self,
        grammars: GrammarCompiler,
        add: Callable[[GenerateRequest, CompiledGrammar], object],
        fail: Callable[[str, ErrorInfo], object],
        when_done: Callable[[Compiled], object],
    ):
        self._grammars, self._add, self._fail, self._when_done = grammars, add, fail, when_done
        self._waiting: dict[str, tuple[GenerateRequest, float]] = {}  # request id -> (request, deadline)

    def begin(self, request: GenerateRequest, spec: GrammarSpec) -> None:
        if len(self._waiting) >= MAX_COMPILING:
            error = OverloadedError(f"{len(self._waiting)} requests wait for their grammars; retry shortly")
            self._fail(request.request_id, error.info())
            return
        self._waiting[request.request_id] = request, time.monotonic() + COMPILE_TIMEOUT_S
        future = self._grammars.submit(spec)
        if future.done():
            self.end(Compiled(request, future))
        else:
            future.add_done_callback(functools.partial(self._done, request))

    def _done(self, request: GenerateRequest, future: Future[CompiledGrammar]) -> None:
        self._when_done(Compiled(request, future))

    def end(self, compiled: Compiled) -> None:
        """Add the request, or fail it, unless it was aborted or given up."""
        request = compiled.request
        waiting, _ = self._waiting.get(request.request_id, (None, 0.0))
        if waiting is not request:
            return
        del self._waiting[request.request_id]
        try:
            grammar = compiled.future.result()
        except UserError as error:
            self._fail(request.request_id, error.info())
        except Exception as error:
            logger.exception("compiling a grammar failed")
            info = ErrorInfo(f"the grammar could not be compiled: {type(error).__name__}: {error}", 500, "server_error")
            self._fail(request.request_id, info)
        else:
            self._add(request, grammar)

    def forget(self, request_id: str) -> None:
        """It was aborted."""
        self._waiting.pop(request_id, None)

    def give_up(self) -> None:
        """Fail those that have waited too long for a grammar's own time."""
        now, began = time.monotonic(), self._grammars.began
        if began is None or now - began < COMPILE_TIMEOUT_S:  # indexing a large vocabulary is not the grammar's time
            return
        for request_id in [key for key, (_, deadline) in self._waiting.items() if deadline < now]:
            del self._waiting[request_id]
            error = GrammarError(f"the grammar took longer than {COMPILE_TIMEOUT_S:g} s to compile; that is the limit")
            self._fail(request_id, error.info())
