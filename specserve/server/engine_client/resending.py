"""Sequences outlive the engine process that they were in, as long as nothing of them was given to a client.

One whose engine ended runs again on the next one, as if it had just come, though nobody refuses it for want of room:
its seed is its own, so its tokens are the same. What was made of those already stays; where the next engine says other
ones, which a device without the same bits may, the sequence ends with the loss.

A sequence may be what ended the engine. So those that saw an end are sent again one at a time, the next one when the
last has come further than ever before. What saw no end runs beside them; so one that ends an engine in its turn is
refused where nothing of that kind was there, and else has another turn, in which nothing new begins. A request that no
engine survives takes nobody with it who only ran beside it. As all this is slow, long outputs are not made again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec

from ...errors import EngineDeadError, EngineLostError, UserError
from ...messages import BACKGROUND_PRIORITY, Delta, GenerateRequest, TokenTrace, renumbered
from ...pooling_messages import Pooled, PoolRequest
from .serving_engine import ServingEngine

R = TypeVar("R", GenerateRequest, PoolRequest)
A = TypeVar("A", Delta, Pooled)

MAX_TOKENS_AGAIN = 256
MAX_ENGINE_LOSSES = 4  # of a sequence that had come further than before each time


@dataclass(slots=True)
class EngineLosses:
    """How many engine processes ended with one sequence in them, and what had been made of its output by then."""

    is_once: bool  # somebody acts on the output as it comes: what was given cannot be made again
    num: int = 0
    was_alone: bool = False  # an engine ended in its turn, with a new one beside it: either may be why
    token_ids: list[int] = field(default_factory=list)
    text_len: int = 0
    num_forwards: int = 0  # that its trace tells of
    _num_before: int = 0  # tokens when the newest engine was asked
    _num_again: int = 0  # of them, what it has said so far, and more
    _text_again: int = 0
    _forwards_before: int | None = None  # of the newest engine's, that tell of nothing new

    @property
    def is_further(self) -> bool:
        """Whether it has come further on this engine than on those that ended."""
        return self._num_again > self._num_before

    @property
    def is_final(self) -> bool:
        """Whether it cannot be made again."""
        num = len(self.token_ids)
        return self.num >= MAX_ENGINE_LOSSES or num > (0 if self.is_once else MAX_TOKENS_AGAIN)

    def begin_again(self) -> None:
        self._num_before, self._num_again, self._text_again = len(self.token_ids), 0, 0
        self._forwards_before = None

    def rest_of(self, delta: Delta) -> Delta | None:
        """What is new in `delta`, if anything. Raises `EngineDeadError` where it is not what was said before."""
        if not self.num:
            self.token_ids += delta.token_ids
            self.text_len += len(delta.text)
            self._count(delta.trace)
            return delta
        num_old = min(len(delta.token_ids), len(self.token_ids) - self._num_again)
        len_old = min(len(delta.text), self.text_len - self._text_again)
        if delta.token_ids[:num_old] != self.token_ids[self._num_again : self._num_again + num_old]:
            raise other_output()
        self._num_again += len(delta.token_ids)
        self._text_again += len(delta.text)
        self.token_ids += delta.token_ids[num_old:]
        self.text_len += len(delta.text) - len_old
        trace = self._numbered_on(delta.trace[num_old:]) if delta.trace is not None else None
        if not num_old and not len_old and trace == delta.trace:
            return delta
        if num_old == len(delta.token_ids) and len_old == len(delta.text) and delta.finish_reason is None:
            return None
        return msgspec.structs.replace(
            delta,
            token_ids=delta.token_ids[num_old:],
            text=delta.text[len_old:],
            num_silent=min(delta.num_silent, len(delta.token_ids) - num_old),
            logprobs=delta.logprobs[num_old:] if delta.logprobs is not None else None,
            trace=trace,
            prompt_logprobs=None,
        )

    def _numbered_on(self, trace: list[TokenTrace]) -> list[TokenTrace]:
        """The trace of new tokens, its forwards behind those that were told of on engines that ended."""
        if trace and self._forwards_before is None:
            self._forwards_before = trace[0].forward - self.num_forwards
        trace = renumbered(trace, -(self._forwards_before or 0))
        self._count(trace)
        return trace

    def _count(self, trace: list[TokenTrace] | None) -> None:
        if trace:
            self.num_forwards = trace[-1].forward + 1


class Resender:
    """Runs sequences on an engine that may end under them."""

    def __init__(self, engine: ServingEngine):
        self._engine = engine
        self._alone = asyncio.Lock()  # of the sequence among those with losses whose turn it is
        self._background = asyncio.Lock()  # of a background one, so that no more than one is ever before others
        self._num_new: Counter[int] = Counter()  # sequences without losses that run, by number of the engine
        self._has_company = False  # one of them ran in this turn
        self._takes_new = asyncio.Event()
        self._takes_new.set()

    def generate(self, request: GenerateRequest, losses: EngineLosses) -> AsyncGenerator[Delta]:
        """As `EngineClient.generate`; `losses` is the sequence's own, over several calls where it needs them."""
        return self._run(request, losses, self._engine.generate, losses.rest_of)

    def pool(self, request: PoolRequest, losses: EngineLosses) -> AsyncGenerator[Pooled]:
        """As `EngineClient.pool`."""
        return self._run(request, losses, self._engine.pool, lambda pooled: pooled)

    async def _run(
        self,
        request: R,
        losses: EngineLosses,
        ask: Callable[[R], AsyncGenerator[A]],
        rest_of: Callable[[A], A | None],
    ) -> AsyncGenerator[A]:
        """What is new of the answers, by `rest_of`, of those that one engine after the other gives."""
        is_alone = False
        async with AsyncExitStack() as turn:
            while True:
                losses.begin_again()
                if not losses.num:
                    await self._takes_new.wait()
                    self._begin_new(turn)
                else:
                    if not is_alone:
                        if request.priority >= BACKGROUND_PRIORITY:
                            await turn.enter_async_context(self._background)
                        await turn.enter_async_context(self._alone)
                        is_alone = True
                    if losses.was_alone:
                        self._takes_new.clear()
                        turn.callback(self._takes_new.set)
                    self._has_company = self._num_new[self._engine_number] > 0
                try:
                    async with aclosing(ask(request)) as answers:
                        async for answer in answers:
                            fresh = rest_of(answer)
                            if is_alone and losses.is_further:
                                is_alone = False
                                await turn.aclose()
                            if fresh is not None:
                                yield fresh
                    return
                except EngineLostError:
                    losses.num += 1
                    # It was admitted once, and comes in its turn.
                    request = msgspec.structs.replace(request, together=None, is_first=False)
                    if is_alone and not self._has_company:
                        raise _refused(losses.num) from None
                    if losses.is_final:
                        raise
                    if is_alone:
                        losses.was_alone = True
                    else:
                        await turn.aclose()

    @property
    def _engine_number(self) -> int:
        """Of the engine that a sequence goes to now."""
        return self._engine.generation + (self._engine.state != "ready")

    def _begin_new(self, turn: AsyncExitStack) -> None:
        number = self._engine_number
        self._num_new[number] += 1
        self._has_company = True
        turn.callback(self._num_new.subtract, (number,))


def other_output() -> EngineDeadError:
    """For a sequence whose output cannot be that of before again."""
    return EngineDeadError("the engine process ended while the request was running; retry")


def _refused(num: int) -> UserError:
    error = UserError(
        f"the engine process ended {num} times while this request was in it; it is not tried again",
        status=500,
        code="engine_crashed",
    )
    error.type = "server_error"
    return error
