"""What an engine counts over its life, and a snapshot of that and of its state."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from ..adapter_messages import AdapterState
from ..adapters.held import Held
from ..drafting.counts import DraftLengths
from ..stats_messages import AdapterRequests, EngineStats

if TYPE_CHECKING:
    from .engine import Engine


@dataclass(slots=True)
class Counters:
    """Of all requests since the engine started."""

    num_steps: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    cached_prompt_tokens: int = 0
    drafted_by_source: Counter[str] = field(default_factory=Counter)
    accepted_by_source: Counter[str] = field(default_factory=Counter)
    lengths: DraftLengths = field(default_factory=DraftLengths)
    finished: Counter[str] = field(default_factory=Counter)


def engine_stats(engine: Engine, counters: Counters, check_integrity: bool) -> EngineStats:
    """A snapshot; with `check_integrity` the block manager is checked against every live sequence."""
    registry, host = engine.registry, engine.adapters.memory.host
    graphs, error = engine.path.graphs, None
    if check_integrity:
        error = engine.blocks.check_integrity(seq.block_table for seq in engine.scheduler.sequences())
    return EngineStats(
        num_running=len(engine.scheduler.running),
        num_waiting=len(engine.scheduler.waiting),
        num_kv_blocks=engine.blocks.num_blocks,
        num_free_kv_blocks=engine.blocks.num_free,
        num_adapters=len(registry.adapters),
        adapter_bytes=registry.size_bytes,
        num_adapter_refs=registry.num_refs,
        num_steps=counters.num_steps,
        num_preemptions=engine.scheduler.num_preemptions,
        prompt_tokens=counters.prompt_tokens,
        generated_tokens=counters.generated_tokens,
        cached_prompt_tokens=counters.cached_prompt_tokens,
        draft_tokens=counters.drafted_by_source.total(),
        accepted_draft_tokens=counters.accepted_by_source.total(),
        num_waiting_tokens=engine.scheduler.waiting.num_tokens,
        wait_estimate_seconds=engine.waits.typical_wait_s,
        num_kernel_builds=engine.decoder.num_builds,
        num_cuda_graphs=graphs.num_graphs if graphs else 0,
        cuda_graph_bytes=graphs.capture_bytes if graphs else 0,
        cuda_graph_capture_seconds=graphs.capture_s if graphs else 0.0,
        num_eager_parts=graphs.num_eager.total() if graphs else 0,
        num_undrafted_steps=engine.proposer.num_undrafted_steps,
        drafts_by_adapter=engine.proposer.counts.told(),
        drafted_by_source=dict(counters.drafted_by_source),
        accepted_by_source=dict(counters.accepted_by_source),
        num_grammars_compiled=engine.grammars.num_compiled,
        num_grammar_cache_hits=engine.grammars.num_cache_hits,
        num_cached_grammars=engine.grammars.num_cached,
        grammar_compile_seconds=engine.grammars.compile_s,
        grammar_mask_seconds=engine.masks.seconds,
        integrity_error=error,
        max_adapter_bytes=registry.max_bytes,
        num_pinned_adapters=registry.num_pinned,
        num_host_adapters=len(host.adapters) if host else 0,
        host_adapter_bytes=host.size_bytes if host else 0,
        max_host_adapter_bytes=host.max_bytes if host else 0,
        num_adapter_loads=registry.counts.num_loads,
        num_adapter_reads=engine.adapters.memory.num_reads,
        num_adapter_evictions=registry.counts.num_evictions,
        num_adapters_asked=registry.counts.num_asked,
        num_adapter_waits=registry.counts.num_waits,
        adapter_wait_seconds=registry.counts.wait_s,
        num_adapter_loads_waiting=registry.num_waiting,
        num_adapter_reads_stuck=engine.adapters.memory.num_stuck_reads,
        drafted_per_pos=counters.lengths.drafted_per_pos(),
        accepted_per_pos=counters.lengths.accepted_per_pos(),
        finished=dict(counters.finished),
        requests_by_adapter=_requests_by_adapter(engine),
        step_seconds=engine.recent_steps.seconds,
        no_draft_tokens=engine.recent_steps.no_draft_tokens,
        recent_steps=engine.recent_steps.taken(),
        cost_table=engine.recent_steps.cost_table(),
    )


def _requests_by_adapter(engine: Engine) -> list[AdapterRequests]:
    running = Counter(seq.adapter_hash for seq in engine.scheduler.running)
    waiting = engine.scheduler.waiting.num_by_adapter  # not counted here: thousands may wait, and steps do meanwhile
    adapters = engine.registry.adapters  # none of a sequence leaves before it
    return [
        AdapterRequests(None if key is None else adapters[key].name, running[key], waiting.get(key, 0))
        for key in running.keys() | waiting.keys()
    ]


def adapter_states(engine: Engine) -> list[AdapterState]:
    """Every adapter that is held anywhere, in its best memory."""
    memory, totals_of = engine.adapters.memory, engine.proposer.counts.totals
    tiers: list[tuple[Literal["host", "device"], dict[str, Held]]] = [("host", memory.registry.held())]
    if memory.host is not None:
        tiers = [("host", memory.host.held()), ("device", memory.registry.held())]
    states = {
        key: AdapterState(key, tier, held.num_refs, *totals_of(key))
        for tier, of_tier in tiers
        for key, held in of_tier.items()
    }
    return list(states.values())
