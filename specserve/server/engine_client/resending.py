"""Sequences outlive the engine process that they were in, as long as nothing of them was given out.

One that had no output yet when its engine ended runs again on the next one, as if it had just come: its seed is its
own, so the text is the same. A sequence may be what ended the engine. So those that saw an end are sent again one at a
time, the next one when the last has given its first token, and one that has seen `MAX_ENGINE_LOSSES` ends is refused: a
request that no engine survives takes nobody with it who only waited beside it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass

from ...errors import EngineLostError, UserError
from ...messages import Delta, GenerateRequest
from .client import EngineClient

MAX_ENGINE_LOSSES = 2


@dataclass(slots=True)
class EngineLosses:
    """How many engine processes ended with one sequence in them."""

    num: int = 0


class Resender:
    """Runs sequences on an engine that may end under them."""

    def __init__(self, engine: EngineClient):
        self._engine = engine
        self._alone = asyncio.Lock()  # of the sequence among those with losses that has no token yet

    async def generate(self, request: GenerateRequest, losses: EngineLosses) -> AsyncGenerator[Delta]:
        """As `EngineClient.generate`; `losses` is the sequence's own, over several calls where it needs them."""
        while True:
            has_output = False
            async with AsyncExitStack() as turn:
                if losses.num:
                    await turn.enter_async_context(self._alone)
                try:
                    async with aclosing(self._engine.generate(request)) as deltas:
                        async for delta in deltas:
                            if not has_output:
                                has_output = True
                                await turn.aclose()
                            yield delta
                    return
                except EngineLostError:
                    losses.num += 1
                    if has_output:
                        raise
            if losses.num >= MAX_ENGINE_LOSSES:
                raise _refused(losses.num)


def _refused(num: int) -> UserError:
    error = UserError(
        f"the engine process ended {num} times while this request was in it; it is not tried again",
        status=500,
        code="engine_crashed",
    )
    error.type = "server_error"
    return error
