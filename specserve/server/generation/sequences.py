"""One sequence on its way through the engine, however often it has to begin again.

Owns what may happen to it there: its adapter had to make room and is loaded again, its engine process ended
(`engine_client.resending`). All sequences of a server pass through one `Sequences`, or their turns after an engine's
end would not be turns.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

import msgspec

from ...adapter_messages import AdapterInfo
from ...errors import OverloadedError, UserError
from ...messages import Delta, GenerateRequest
from ...pooling_messages import Pooled, PoolRequest
from ..adapter_store import AdapterStore
from ..engine_client.resending import A, EngineLosses, R, Resender, other_output
from ..engine_client.serving_engine import ServingEngine
from .prompts import check_generates, check_same_texts

MAX_RELOADS = 16  # of one sequence's adapter, where many wait for few places


class Sequences:
    """Runs the sequences of one server on its engine."""

    def __init__(self, engine: ServingEngine, store: AdapterStore):
        self._resender = Resender(engine)
        self._store = store

    def generate(
        self, request: GenerateRequest, adapter: str | None, prompted: AdapterInfo | None, losses: EngineLosses
    ) -> AsyncGenerator[Delta]:
        """The deltas of one that generates.

        `prompted` is the adapter whose chat template and tokenizer made the prompt, if it did: they must be the same.
        """

        def check(now: AdapterInfo, adapter_hash: str | None) -> None:
            check_same_texts(adapter, prompted, now)
            check_generates(adapter, now)
            if losses.token_ids and now.content_hash != adapter_hash:
                raise other_output()

        return self._run(request, adapter, lambda again: self._resender.generate(again, losses), check)

    def pool(self, request: PoolRequest, adapter: str | None) -> AsyncGenerator[Pooled]:
        """The one answer of a text that is pooled.

        The adapter must stay what it was: the texts of a request are answered by one, and checked for its kind.
        """

        def check(now: AdapterInfo, adapter_hash: str | None) -> None:
            if now.content_hash != adapter_hash:
                raise UserError(
                    f"adapter {adapter!r} got other files while the request waited for it; send the request again",
                    status=409,
                    code="adapter_changed",
                )

        losses = EngineLosses(is_once=False)
        return self._run(request, adapter, lambda again: self._resender.pool(again, losses), check)

    async def _run(
        self,
        request: R,
        adapter: str | None,
        ask: Callable[[R], AsyncGenerator[A]],
        check: Callable[[AdapterInfo, str | None], None],
    ) -> AsyncGenerator[A]:
        """What the engine says of it; its adapter is loaded again when it had to make room, or went with its engine.

        `check` raises where the request must not go on with what the adapter is now; it had the content hash before.
        """
        for attempt in range(MAX_RELOADS + 1):
            placement = self._store.placement(request.adapter_hash or "")
            try:
                async with aclosing(ask(request)) as answers:
                    async for answer in answers:
                        yield answer
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
            self._store.engine_lost(request.adapter_hash or "", placement)
            now = await self._store.resolve(adapter, request.priority)
            check(now, request.adapter_hash)
            request = msgspec.structs.replace(request, adapter_hash=now.content_hash)
