"""The answer of GET /v1/stats, made of the engine's newest snapshot: once for all, and what of it a caller may see."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from itertools import zip_longest

import msgspec

from ... import __version__
from ...messages import EngineInfo
from ...stats_messages import EngineStats
from ..engine_client.serving_engine import ReplicaState, ServingEngine
from .types import (
    AdapterStats,
    BaseHeadState,
    EngineState,
    FinishedSequences,
    KvStats,
    ModelSpeculation,
    ReplicaStats,
    RequestStats,
    SourceSpeculation,
    SpeculationOverall,
    StatsResponse,
    StepStats,
    TierStats,
    TokenStats,
)

NamesAlike = Callable[[str], Collection[str]]  # names of adapters -> all names of the same content
MAX_MODELS = 100  # whose speculation is told of
_NOTHING = EngineStats(*(0,) * 14)
_UNKNOWN = EngineInfo("", "", 0, 0, 0, 0, "", "", 0, [])  # of an engine that has not started yet


class StatsSource:
    """Of one server, whose base model has this name."""

    def __init__(self, engine: ServingEngine, base_name: str):
        self._engine, self._base_name = engine, base_name
        self._since = time.monotonic()

    async def fresh(self) -> StatsResponse:
        """Of now, or of just before a step that takes long."""
        await self._engine.stats()
        return self.newest()

    def newest(self) -> StatsResponse:
        """Of the engine's last word."""
        engine = self._engine
        stats, taken_at = engine.snapshot
        stats, info = stats or _NOTHING, engine.known_info or _UNKNOWN
        head = info.base_head
        return StatsResponse(
            time_s=taken_at,
            uptime_s=time.monotonic() - self._since,
            version=__version__,
            model=self._base_name,
            engine=EngineState(
                status="running" if engine.state == "ready" else engine.state,
                device=info.device,
                dtype=info.dtype,
                kernels=info.kernels,
                num_restarts=engine.num_restarts,
                uptime_s=engine.serving_s,
            ),
            requests=RequestStats(
                running=stats.num_running,
                waiting=stats.num_waiting,
                waiting_tokens=stats.num_waiting_tokens,
                wait_estimate_s=stats.wait_estimate_seconds,
                finished=FinishedSequences(**stats.finished),
                max_running=info.max_num_seqs,
            ),
            tokens=TokenStats(
                prompt=stats.prompt_tokens + stats.cached_prompt_tokens,
                cached_prompt=stats.cached_prompt_tokens,
                generated=stats.generated_tokens,
                drafted=stats.draft_tokens,
                accepted=stats.accepted_draft_tokens,
            ),
            kv=_kv(stats, info),
            adapters=_adapters(stats, info),
            speculation=SpeculationOverall(
                by_adapter=_by_adapter(stats, self._base_name),
                num_others=0,
                by_source={
                    source: SourceSpeculation(num, stats.accepted_by_source.get(source, 0))
                    for source, num in stats.drafted_by_source.items()
                },
                drafted_per_pos=stats.drafted_per_pos,
                accepted_per_pos=stats.accepted_per_pos,
                base_head=BaseHeadState(head.draft_len, head.history_tokens, head.error) if head is not None else None,
            ),
            steps=StepStats(
                num=stats.num_steps,
                undrafted=stats.num_undrafted_steps,
                seconds=stats.step_seconds,
                no_draft_tokens=stats.no_draft_tokens,
                recent=stats.recent_steps,
            ),
            cost_table=stats.cost_table,
            replicas=[_replica(name, state) for name, state in sorted(engine.replicas().items())],
        )


def visible(
    whole: StatsResponse, may_see: Callable[[str], bool], names_alike: NamesAlike = lambda name: ()
) -> StatsResponse:
    """What somebody may see who may see these adapters; the base model is everybody's.

    The engine knows a content by the name that brought it; who may not see that one is shown another name of it.
    """
    found: dict[str, ModelSpeculation] = {}
    for entry in whole.speculation.by_adapter:
        name: str | None = entry.model
        if entry.model != whole.model and not may_see(entry.model):
            name = next(filter(may_see, sorted(names_alike(entry.model))), None)
        if name is not None:
            entry = msgspec.structs.replace(entry, model=name)
            found[name] = _together(found[name], entry) if name in found else entry
    models = _most_output_first(found)
    cut = msgspec.structs.replace(
        whole.speculation, by_adapter=models[:MAX_MODELS], num_others=max(0, len(models) - MAX_MODELS)
    )
    return msgspec.structs.replace(whole, speculation=cut)


def _replica(name: str, state: ReplicaState) -> ReplicaStats:
    stats = state.stats or _NOTHING
    num_blocks = stats.num_kv_blocks
    return ReplicaStats(
        name=name,
        uptime_s=state.serving_s,
        running=stats.num_running,
        waiting=stats.num_waiting,
        owed_tokens=state.owed_tokens,
        generated=stats.generated_tokens,
        adapters=state.num_adapters,
        kv_used_ratio=1 - stats.num_free_kv_blocks / num_blocks if num_blocks else 0.0,
    )


def _kv(stats: EngineStats, info: EngineInfo) -> KvStats:
    num, free = info.num_kv_blocks, stats.num_free_kv_blocks if stats is not _NOTHING else info.num_kv_blocks
    return KvStats(blocks=num, free_blocks=free, block_size=info.block_size, used_ratio=1 - free / num if num else 0.0)


def _adapters(stats: EngineStats, info: EngineInfo) -> AdapterStats:
    in_steps = TierStats(stats.num_adapters, stats.adapter_bytes, stats.max_adapter_bytes)
    copies = TierStats(stats.num_host_adapters, stats.host_adapter_bytes, stats.max_host_adapter_bytes)
    device, host = (TierStats(), in_steps) if info.device == "cpu" else (in_steps, copies)
    return AdapterStats(
        device=device,
        host=host,
        pinned=stats.num_pinned_adapters,
        loads=stats.num_adapter_loads,
        evictions=stats.num_adapter_evictions,
        waiting_loads=stats.num_adapter_loads_waiting,
    )


def _by_adapter(stats: EngineStats, base_name: str) -> list[ModelSpeculation]:
    """Versions of one name together, most output first."""
    found: dict[str, ModelSpeculation] = {}
    for drafts in stats.drafts_by_adapter:
        name = drafts.name or base_name
        entry = ModelSpeculation(
            model=name,
            verifications=drafts.num_verifications,
            generated=drafts.generated_tokens,
            drafted=drafts.draft_tokens,
            accepted=drafts.accepted_draft_tokens,
            row_price=drafts.row_price,
            drafted_per_pos=drafts.drafted_per_pos,
            accepted_per_pos=drafts.accepted_per_pos,
        )
        found[name] = _together(found[name], entry) if name in found else entry
    for requests in stats.requests_by_adapter:
        name = requests.name or base_name
        entry = found.setdefault(name, ModelSpeculation(name))
        entry.running += requests.num_running
        entry.waiting += requests.num_waiting
    return _most_output_first(found)


def _most_output_first(found: dict[str, ModelSpeculation]) -> list[ModelSpeculation]:
    return sorted(found.values(), key=lambda entry: -entry.generated)


def _together(one: ModelSpeculation, other: ModelSpeculation) -> ModelSpeculation:
    """Both, under the name of `one`."""
    num = one.verifications + other.verifications
    priced = one.row_price * one.verifications + other.row_price * other.verifications
    return ModelSpeculation(
        model=one.model,
        running=one.running + other.running,
        waiting=one.waiting + other.waiting,
        verifications=num,
        generated=one.generated + other.generated,
        drafted=one.drafted + other.drafted,
        accepted=one.accepted + other.accepted,
        row_price=priced / num if num else 0.0,
        drafted_per_pos=_sums(one.drafted_per_pos, other.drafted_per_pos),
        accepted_per_pos=_sums(one.accepted_per_pos, other.accepted_per_pos),
    )


def _sums(one: list[int], other: list[int]) -> list[int]:
    return [sum(pair) for pair in zip_longest(one, other, fillvalue=0)]
