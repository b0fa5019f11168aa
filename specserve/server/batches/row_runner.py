"""One row at a time: its body to the route that answers it, and what came of that as a line of output.

Owns what is tried again, and when: a server that is full, a key without tokens and an engine that is away are no
answers. A row that was in an engine when that ended has `MAX_LOSSES` tries.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from ...errors import EngineDeadError, ErrorInfo, UserError
from ...strict_json import decode_json
from ..access.caller import Caller
from ..engine_client.serving_engine import ServingEngine
from ..route import Answer
from .places import Places
from .rows import Row, answered_line, failed_line
from .types import BatchUsage, InputDetails, OutputDetails

logger = logging.getLogger(__name__)

MAX_LOSSES = 3
MAX_WAIT_S = 60.0
_FAULT = ErrorInfo("internal error; the server's log says more", 500, "server_error", None, "internal_error")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A line of output, for the file of errors if it `is_failure`."""

    line: bytes
    is_failure: bool
    usage: BatchUsage


class RowRunner:
    """`answers` by URL; `caller_named` gives whoever has a key's name now."""

    def __init__(
        self,
        engine: ServingEngine,
        answers: Mapping[str, Answer],
        caller_named: Callable[[str], Caller | None],
        places: Places,
    ):
        self.answers = answers
        self._engine, self._caller_named, self._places = engine, caller_named, places

    async def outcome(self, owner: str, row: Row) -> Outcome:
        """However long that takes. Holds a place while the row runs."""
        num_tries = num_losses = 0
        while True:
            num_restarts = self._engine.num_restarts
            try:
                async with self._places.one(owner):
                    num_restarts = self._engine.num_restarts
                    answer = await self._answer(owner, row)
                return Outcome(answered_line(row.custom_id, 200, answer), False, usage_of(answer))
            except UserError as error:
                num_losses += isinstance(error, EngineDeadError) and self._engine.num_restarts != num_restarts
                if error.status not in (429, 503) or num_losses >= MAX_LOSSES:
                    return Outcome(failed_line(row.custom_id, error.info()), True, BatchUsage())
                wait_s = max(error.retry_after_s or 0.0, float(2**num_tries))
            except Exception:
                logger.exception("the row %r of %r failed", row.custom_id[:100], owner)
                return Outcome(failed_line(row.custom_id, _FAULT), True, BatchUsage())
            num_tries = min(num_tries + 1, 10)
            await asyncio.sleep(min(wait_s, MAX_WAIT_S))

    async def _answer(self, owner: str, row: Row) -> Any:
        caller = self._caller_named(owner)
        if caller is None or "generate" not in caller.scopes:
            raise UserError(
                f"the key {owner!r} may not generate any more; make a batch with another",
                status=401,
                code="invalid_api_key",
            )
        value = await asyncio.to_thread(decode_json, row.body, "the row's body")
        if value.get("stream"):
            raise UserError("stream is true; a row of a batch is answered whole, leave it out", param="stream")
        return await self.answers[row.url](value, replace(caller, is_background=True))


def usage_of(answer: Any) -> BatchUsage:
    """What an answer says that it took; nothing where it does not say."""
    found = answer.get("usage") if isinstance(answer, dict) else getattr(answer, "usage", None)
    usage = msgspec.to_builtins(found) or {}

    def first(*names: str) -> Any:
        return next((usage[name] for name in names if usage.get(name)), None)

    num_input, num_output = (
        first("prompt_tokens", "input_tokens") or 0,
        first("completion_tokens", "output_tokens") or 0,
    )
    of_input = first("prompt_tokens_details", "input_tokens_details") or {}
    of_output = first("completion_tokens_details", "output_tokens_details") or {}
    return BatchUsage(
        num_input,
        InputDetails(of_input.get("cached_tokens", 0)),
        num_output,
        OutputDetails(of_output.get("reasoning_tokens", 0)),
        num_input + num_output,
    )
