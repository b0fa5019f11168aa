"""The routes of adapters: what there is and where it lies, and loading, unloading, pinning and prefetching by name."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from ..adapter_messages import AdapterState
from ..errors import EngineDeadError
from .access.caller import caller_of
from .adapter_extras import AdapterExtras, Extras
from .adapter_store import AdapterStore
from .engine_client.serving_engine import ServingEngine
from .http_body import convert, json_response, read_json
from .openai.request_types import AdapterNameRequest, LoadAdapterRequest, UnloadAdapterRequest
from .openai.response_types import AdapterEntry
from .route import Handler
from .sources.fetcher import AdapterFetcher

MAX_BODY_BYTES = 2**20


class AdapterRoutes:
    """Handlers over one store and its engine."""

    def __init__(self, store: AdapterStore, fetcher: AdapterFetcher, engine: ServingEngine, read_timeout_s: float):
        self._store = store
        self._extras = AdapterExtras(store)
        self._fetcher = fetcher
        self._engine = engine
        self._read_timeout_s = read_timeout_s

    def handlers(self) -> dict[str, Handler]:
        """Handlers by the names that the route table gives them."""
        return {
            "adapters": self.adapters,
            "load_adapter": self.load,
            "unload_adapter": self.unload,
            "pin_adapter": self.pin,
            "unpin_adapter": self.unpin,
            "prefetch_adapter": self.prefetch,
            **self._extras.handlers(),
        }

    async def adapters(self, request: web.Request) -> web.Response:
        caller = caller_of(request)
        names = [name for name in await self._store.look(self._store.names) if caller.may_use(name)]
        try:
            states = {state.content_hash: state for state in await self._engine.adapters()}
        except EngineDeadError:  # nothing is held anywhere then
            states = {}
        extras, loading = await self._extras.of(names), self._store.loading()
        entries = [self._entry(name, states, name in loading, extras.get(name, (False, False))) for name in names]
        return json_response({"object": "list", "data": entries})

    def _entry(self, name: str, states: dict[str, AdapterState], is_loading: bool, extras: Extras) -> AdapterEntry:
        known, uses = self._store.known(name), self._store.uses.of(name)
        state = states.get(known.content_hash) if known is not None else None
        drafted = state.draft_tokens if state is not None else 0
        return AdapterEntry(
            id=name,
            object="adapter",
            tier=state.tier if state is not None else "disk",
            is_loading=is_loading,
            pinned=self._store.is_pinned(name),
            size_bytes=known.size_bytes if known is not None else None,
            content_hash=known.content_hash if known is not None else None,
            max_rank=known.max_rank if known is not None else None,
            adapter_type=known.adapter_type if known is not None else None,
            running=state.num_requests if state is not None else 0,
            uses=uses.num_uses,
            last_used=int(uses.last_used) if uses.num_uses else None,
            acceptance=round(state.accepted_draft_tokens / drafted, 4) if state is not None and drafted else None,
            has_report=extras[0],
            has_examples=extras[1],
        )

    async def load(self, request: web.Request) -> web.Response:
        body = await self._body(request, LoadAdapterRequest)
        self._store.check_name(body.lora_name)  # before anything is fetched for it
        async with self._fetcher.local(body.lora_path, self._store.given_directories) as path:
            info = await self._store.register(body.lora_name, path, replace=body.load_inplace)
        return json_response({"message": f"adapter {body.lora_name!r} is loaded", "adapter": info})

    async def unload(self, request: web.Request) -> web.Response:
        name = (await self._body(request, UnloadAdapterRequest)).lora_name
        await self._store.unregister(name)
        return json_response({"message": f"adapter {name!r} is unloaded"})

    async def pin(self, request: web.Request) -> web.Response:
        name = (await self._body(request, AdapterNameRequest)).lora_name
        info = await self._store.pin(name)
        return json_response({"message": f"adapter {name!r} is pinned", "adapter": info})

    async def unpin(self, request: web.Request) -> web.Response:
        name = (await self._body(request, AdapterNameRequest)).lora_name
        await self._store.unpin(name)
        return json_response({"message": f"adapter {name!r} is not pinned"})

    async def prefetch(self, request: web.Request) -> web.Response:
        name = (await self._body(request, AdapterNameRequest)).lora_name
        is_loaded = await self._store.prefetch(name)
        return json_response({"message": f"adapter {name!r} is {'loaded' if is_loaded else 'being loaded'}"})

    async def _body(self, request: web.Request, kind: Any) -> Any:
        return convert(await read_json(request, MAX_BODY_BYTES, self._read_timeout_s), kind)
