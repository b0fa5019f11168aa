"""Sequences outlive the engine process that they were in, as long as nothing of them was given to a client.

One whose engine ended runs again on the next one, as if it had just come: its seed is its own, so its tokens are the
same. What was made of those already stays; where the next engine says other ones, which a device without the same bits
may, the sequence ends with the loss. A sequence may be what ended the engine. So those that saw an end are sent again
one at a time, the next one when the last has given its first token, and one that has seen `MAX_ENGINE_LOSSES` ends is
refused: a request that no engine survives takes nobody with it who only waited beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field

import msgspec

from ...errors import EngineDeadError, EngineLostError, UserError
from ...messages import Delta, GenerateRequest
from .client import EngineClient

MAX_ENGINE_LOSSES = 2


@dataclass(slots=True)
class EngineLosses:
    """How many engine processes ended with one sequence in them, and what had been made of its output by then."""

    is_streamed: bool = True  # a client reads the output as it comes
    num: int = 0
    token_ids: list[int] = field(default_factory=list)
    text_len: int = 0
    _num_again: int = 0
    _text_again: int = 0

    def begin_again(self) -> None:
        self._num_again = self._text_again = 0

    def rest_of(self, delta: Delta) -> Delta | None:
        """What is new in `delta`, if anything. Raises `EngineDeadError` where it is not what was said before."""
        num_old = min(len(delta.token_ids), len(self.token_ids) - self._num_again)
        len_old = min(len(delta.text), self.text_len - self._text_again)
        if delta.token_ids[:num_old] != self.token_ids[self._num_again : self._num_again + num_old]:
            raise other_output()
        self._num_again += len(delta.token_ids)
        self._text_again += len(delta.text)
        self.token_ids += delta.token_ids[num_old:]
        self.text_len += len(delta.text) - len_old
        if not num_old and not len_old:
            return delta
        if num_old == len(delta.token_ids) and len_old == len(delta.text) and delta.finish_reason is None:
            return None
        return msgspec.structs.replace(
            delta,
            token_ids=delta.token_ids[num_old:],
            text=delta.text[len_old:],
            num_silent=min(delta.num_silent, len(delta.token_ids) - num_old),
            logprobs=delta.logprobs[num_old:] if delta.logprobs is not None else None,
            prompt_logprobs=None,
        )


class Resender:
    """Runs sequences on an engine that may end under them."""

    def __init__(self, engine: EngineClient):
        self._engine = engine
        self._alone = asyncio.Lock()  # of the sequence among those with losses that has no token yet

    async def generate(self, request: GenerateRequest, losses: EngineLosses) -> AsyncGenerator[Delta]:
        """As `EngineClient.generate`; `losses` is the sequence's own, over several calls where it needs them."""
        while True:
            has_output = False
            losses.begin_again()
            async with AsyncExitStack() as turn:
                if losses.num:
                    await turn.enter_async_context(self._alone)
                try:
                    async with aclosing(self._engine.generate(request)) as deltas:
                        async for delta in deltas:
                            if not has_output:
                                has_output = True
                                await turn.aclose()
                            fresh = delta if losses.is_streamed else losses.rest_of(delta)
                            if fresh is not None:
                                yield fresh
                    return
                except EngineLostError:
                    losses.num += 1
                    if has_output and losses.is_streamed:
                        raise
            if losses.num >= MAX_ENGINE_LOSSES:
                raise _refused(losses.num)


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
