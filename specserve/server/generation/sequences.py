"""One sequence on its way through the engine, however often it has to begin again.

Owns what may happen to it there: its adapter had to make room and is loaded again, its engine process ended
(`engine_client.resending`). All sequences of a server pass through one `Sequences`, or their turns after an engine's
end would not be turns.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from ...errors import OverloadedError, UserError
from ...messages import AdapterInfo, Delta, GenerateRequest
from ..adapter_store import AdapterStore
from ..engine_client.client import EngineClient
from ..engine_client.resending import EngineLosses, Resender, other_output
from .prompts import check_same_texts

MAX_RELOADS = 16  # of one sequence's adapter, where many wait for few places


class Sequences:
    """Runs the sequences of one server on its engine."""

    def __init__(self, engine: EngineClient, store: AdapterStore):
        self._resender = Resender(engine)
        self._store = store

    async def run(
        self, request: GenerateRequest, adapter: str | None, prompted: AdapterInfo | None, losses: EngineLosses
    ) -> AsyncGenerator[Delta]:
        """What the engine says of it; its adapter is loaded again when it had to make room, or went with its engine.

        `prompted` is the adapter whose chat template and tokenizer made the prompt, if it did: they must be the same.
        """
        for attempt in range(MAX_RELOADS + 1):
            try:
                async with aclosing(self._resender.generate(request, losses)) as deltas:
                    async for delta in deltas:
                        yield delta
                return
            except UserError as error:
                if error.code != "adapter_not_resident" or adapter is None:
                    raise
                if attempt == MAX_RELOADS:
                    raise OverloadedError(
                        f"adapter {adapter!r} had to make room for others {attempt + 1} times before this request ran; "
                        "retry later or raise --max-adapters",
                        status=503,
                    ) from None
            self._store.engine_lost(adapter, request.adapter_hash)
            now = await self._store.resolve(adapter, request.priority)
            check_same_texts(adapter, prompted, now)
            if losses.token_ids and now.content_hash != request.adapter_hash:
                raise other_output()
            request = msgspec.structs.replace(request, adapter_hash=now.content_hash)
