"""A request to pool, checked and tokenised, as texts for the engine; and what came of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ...adapter_kinds import AdapterType, PoolingInfo
from ...adapter_messages import AdapterInfo
from ...pooled_values import floats
from ...pooling_messages import Pooled, PoolRequest
from ..access.caller import Caller
from .response_types import PoolingUsage

SHORT_ANSWER = 4  # texts
T = TypeVar("T")


@dataclass(slots=True)
class PoolingJob:
    """The texts of one request, all of them for one adapter, or for the base model."""

    id: str
    model: str  # as the client named it
    operation: str  # its name in traces
    kind: AdapterType  # of the adapter; the base model embeds
    adapter: str | None
    adapter_info: AdapterInfo | None  # of the adapter as it was when the texts were read
    caller: Caller
    requests: list[PoolRequest]
    cut: list[int]  # which texts were cut
    deadline: float | None = None  # of time.monotonic()
    names: list[str] = field(default_factory=list)  # of the texts, as errors call them
    span_settings: Mapping[str, Any] = field(default_factory=dict)
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def generates(self) -> bool:
        return False

    @property
    def num_may_generate(self) -> int:
        return 0

    @property
    def prompt_lens(self) -> list[int]:
        """Of each text."""
        return [len(request.prompt_token_ids) for request in self.requests]

    @property
    def num_prompt_tokens(self) -> int:
        return sum(self.prompt_lens)


@dataclass(frozen=True, slots=True)
class PooledTexts:
    """The answers to a job, one for each of its texts in their order."""

    job: PoolingJob
    pooled: list[Pooled]

    @property
    def info(self) -> PoolingInfo | None:
        """What the adapter says of its outputs; None for the base model."""
        return None if self.job.adapter_info is None else self.job.adapter_info.pooling

    def values(self) -> list[list[float]]:
        return [floats(each.values).tolist() for each in self.pooled]

    async def shaped(self, shape: Callable[..., T], *args: object) -> T:
        """`shape(*args)` on a thread, or here where the answer is short and that is sooner done."""
        return shape(*args) if len(self.pooled) <= SHORT_ANSWER else await asyncio.to_thread(shape, *args)

    def usage(self) -> PoolingUsage:
        num = self.job.num_prompt_tokens
        return PoolingUsage(num, num)
