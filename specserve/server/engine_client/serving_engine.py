"""What the server needs of what generates for it: one engine process (`client.EngineClient`), or several as if they
were one (`specserve.ray`). Says what each must keep; owns nothing.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, TypedDict, Unpack

from ...adapter_messages import AdapterInfo, AdapterLoaded, AdapterState
from ...messages import Delta, EngineInfo, GenerateRequest
from ...pooling_messages import Pooled, PoolRequest
from ...stats_messages import EngineStats
from .supervisor import State


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """One of several engines that serve; `owed_tokens` are those of requests that were sent there and have not ended.

    `stats` is its last word of itself, None before the first.
    """

    stats: EngineStats | None
    owed_tokens: int
    num_adapters: int  # that requests find there
    serving_s: float


class LoadOptions(TypedDict, total=False):
    """How an adapter is loaded; as fields of `LoadAdapter`."""

    is_pinned: bool
    is_prefetch: bool
    priority: int
    mount: int


class ServingEngine(Protocol):
    """`EngineClient` documents each method; numbers of placements grow, whatever process gives them."""

    on_adapters_left: Callable[[dict[str, int]], object]
    on_serving: Callable[[], object]
    on_snapshot: Callable[[], object]

    @property
    def state(self) -> State: ...

    @property
    def generation(self) -> int: ...

    @property
    def num_restarts(self) -> int: ...

    @property
    def info(self) -> EngineInfo: ...

    @property
    def known_info(self) -> EngineInfo | None: ...

    async def first_info(self) -> EngineInfo: ...

    @property
    def serving_s(self) -> float: ...

    @property
    def snapshot(self) -> tuple[EngineStats | None, float]: ...

    @property
    def wait_estimate_s(self) -> float: ...

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta]: ...

    def pool(self, request: PoolRequest) -> AsyncGenerator[Pooled]: ...

    async def load_adapter(
        self, name: str, path: str, before: AdapterInfo | None = None, **options: Unpack[LoadOptions]
    ) -> AdapterLoaded: ...

    def prioritize_loads(self, path: str, priority: int) -> None: ...

    def forsake_loads(self, path: str) -> None: ...

    async def unload_adapter(self, adapter_hash: str, placement: int) -> None: ...

    async def pin_adapter(self, adapter_hash: str, is_pinned: bool, placement: int) -> None: ...

    def replicas(self) -> Mapping[str, ReplicaState]:
        """Those that serve, by name; none where there is one engine and no other."""
        ...

    async def adapters(self) -> list[AdapterState]: ...

    async def stats(self) -> EngineStats | None: ...
