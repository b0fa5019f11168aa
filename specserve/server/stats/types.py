"""What GET /v1/stats answers, as msgspec types. Counters grow from the engine's start, so that readers make rates of
differences; where no engine serves, its numbers are those of one that has just begun.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from ...stats_messages import CostTable, RecentStep

EngineStatus = Literal["running", "starting", "restarting", "stopped"]


class StatsQuery(msgspec.Struct, forbid_unknown_fields=True):
    """The parameters of the route; `stream`: server-sent events, one a second, until the client leaves."""

    stream: Literal["true", "false"] = "false"


class EngineState(msgspec.Struct, forbid_unknown_fields=True):
    status: EngineStatus
    device: str
    dtype: str
    kernels: str
    num_restarts: int
    uptime_s: float  # of the process that serves


class FinishedSequences(msgspec.Struct, forbid_unknown_fields=True):
    """By what ended them; `pooled` generated nothing; `abort`: the client left, or its deadline passed before."""

    stop: int = 0
    length: int = 0
    pooled: int = 0
    abort: int = 0
    error: int = 0


class RequestStats(msgspec.Struct, forbid_unknown_fields=True):
    """Sequences: a request with n = 4 has four."""

    running: int
    waiting: int
    waiting_tokens: int
    wait_estimate_s: float
    finished: FinishedSequences
    max_running: int


class TokenStats(msgspec.Struct, forbid_unknown_fields=True):
    """`cached_prompt` are those of `prompt` that the prefix cache had; `accepted` those of `drafted` that were kept."""

    prompt: int
    cached_prompt: int
    generated: int
    drafted: int
    accepted: int


class KvStats(msgspec.Struct, forbid_unknown_fields=True):
    blocks: int
    free_blocks: int
    block_size: int
    used_ratio: float


class TierStats(msgspec.Struct, forbid_unknown_fields=True):
    num: int = 0
    bytes: int = 0
    max_bytes: int = 0


class AdapterStats(msgspec.Struct, forbid_unknown_fields=True):
    """On a CPU steps read main memory, and all are in `host`."""

    device: TierStats
    host: TierStats
    pinned: int
    loads: int
    evictions: int
    waiting_loads: int


class ModelSpeculation(msgspec.Struct, forbid_unknown_fields=True):
    """Of one adapter since it was loaded, or of the base model."""

    model: str
    running: int = 0
    waiting: int = 0
    verifications: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    row_price: float = 0.0
    drafted_per_pos: list[int] = []
    accepted_per_pos: list[int] = []


class SourceSpeculation(msgspec.Struct, forbid_unknown_fields=True):
    drafted: int
    accepted: int


class BaseHeadState(msgspec.Struct, forbid_unknown_fields=True):
    """What --base-head names; `error`: why it is not used."""

    draft_len: int | None
    history_tokens: int
    error: str | None


class SpeculationOverall(msgspec.Struct, forbid_unknown_fields=True):
    """`by_adapter` has those that the caller may see, the ones with most output first; `num_others` are left out.

    `_per_pos` are by position in the draft, the first one first. `base_head`: None where none was named.
    """

    by_adapter: list[ModelSpeculation]
    num_others: int
    by_source: dict[str, SourceSpeculation]
    drafted_per_pos: list[int] = []
    accepted_per_pos: list[int] = []
    base_head: BaseHeadState | None = None


class StepStats(msgspec.Struct, forbid_unknown_fields=True):
    """`undrafted` could have had drafts and had none. `no_draft_tokens` is what all steps' `seconds` would have given
    without drafts, by the cost table."""

    num: int
    undrafted: int
    seconds: float
    no_draft_tokens: float
    recent: list[RecentStep]


class ReplicaStats(msgspec.Struct, forbid_unknown_fields=True):
    """Of one of several engines that serve; `owed_tokens` are of requests that were sent there and have not ended."""

    name: str
    uptime_s: float
    running: int
    waiting: int
    owed_tokens: int
    generated: int
    adapters: int
    kv_used_ratio: float


class StatsResponse(msgspec.Struct, forbid_unknown_fields=True):
    time_s: float  # since 1970, when the counters were read
    uptime_s: float  # of the server
    version: str
    model: str
    engine: EngineState
    requests: RequestStats
    tokens: TokenStats
    kv: KvStats
    adapters: AdapterStats
    speculation: SpeculationOverall
    steps: StepStats
    cost_table: CostTable
    replicas: list[ReplicaStats] = []  # none where there is one engine and no other
