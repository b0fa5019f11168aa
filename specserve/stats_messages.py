"""What the engine's process tells of itself: counters, what is held, recent steps and what steps cost.

Plain values, as all of `messages.py`; a snapshot is whole, of one moment between two steps.
"""

import msgspec


class AdapterDrafts(msgspec.Struct, frozen=True):
    """What speculation did for one adapter since it was loaded, or for the bare base."""

    name: str | None  # None is the base
    num_verifications: int  # forwards that gave the adapter's sequences tokens, those without drafts included
    generated_tokens: int
    draft_tokens: int
    accepted_draft_tokens: int
    row_price: float  # running mean of the tokens that one more row had to be expected to bring
    drafted_per_pos: list[int] = []  # drafts with a token at each position, the first one first
    accepted_per_pos: list[int] = []  # those whose token there was kept; as many positions


class AdapterRequests(msgspec.Struct, frozen=True):
    """The sequences of one adapter, or of the bare base."""

    name: str | None  # None is the base
    num_running: int
    num_waiting: int


class RecentStep(msgspec.Struct, frozen=True):
    """One of the latest steps."""

    ago_s: float  # from its end to the snapshot
    num_sequences: int
    num_rows: int  # drafts included
    num_drafts: int
    seconds: float  # drafting included
    no_draft_tokens_per_s: float  # of the same sequences and prompts, by the cost table
    tokens: int  # of output


class CostTable(msgspec.Struct, frozen=True):
    """Seconds that a step of so many rows is expected to take, with the sequences and adapters of the latest one."""

    rows: list[int] = []
    seconds: list[float] = []
    num_sequences: int = 1
    num_adapters: int = 0


class EngineStats(msgspec.Struct, frozen=True):
    """A snapshot of the engine; counters grow from the start of the process."""

    num_running: int
    num_waiting: int
    num_kv_blocks: int
    num_free_kv_blocks: int  # unreferenced, whether or not they still hold a reusable prefix
    num_adapters: int
    adapter_bytes: int
    num_adapter_refs: int
    num_steps: int
    num_preemptions: int
    prompt_tokens: int
    generated_tokens: int
    cached_prompt_tokens: int
    draft_tokens: int
    accepted_draft_tokens: int
    num_waiting_tokens: int = 0  # prompts, and outputs as long as they are expected to be
    wait_estimate_seconds: float = 0.0  # of a request for an adapter of which none waits
    num_kernel_builds: int = 0  # native kernels compiled by this process: at start or never
    num_cuda_graphs: int = 0
    cuda_graph_bytes: int = 0
    cuda_graph_capture_seconds: float = 0.0
    num_eager_parts: int = 0  # parts of steps that no graph was captured for
    num_undrafted_steps: int = 0  # steps that could have verified drafts and chose none
    drafts_by_adapter: list[AdapterDrafts] = []
    drafted_by_source: dict[str, int] = {}
    accepted_by_source: dict[str, int] = {}
    num_grammars_compiled: int = 0
    num_grammar_cache_hits: int = 0
    num_cached_grammars: int = 0
    grammar_compile_seconds: float = 0.0
    grammar_mask_seconds: float = 0.0  # masks and checks of sampled tokens
    integrity_error: str | None = None
    max_adapter_bytes: int = 0  # the budget of `adapter_bytes`, which counts what is held and what loads have reserved
    num_pinned_adapters: int = 0
    num_host_adapters: int = 0  # copies in main memory beside a device
    host_adapter_bytes: int = 0
    max_host_adapter_bytes: int = 0
    num_adapter_loads: int = 0  # into the memory that steps read
    num_adapter_reads: int = 0  # from disk
    num_adapter_evictions: int = 0  # to make room for others
    num_adapters_asked: int = 0  # in use, to make room when their requests have ended
    num_adapter_waits: int = 0  # loads that found no room at once
    adapter_wait_seconds: float = 0.0  # of these
    num_adapter_loads_waiting: int = 0
    num_adapter_reads_stuck: int = 0  # threads that wait for a disk which may be away
    drafted_per_pos: list[int] = []  # drafts with a token at each position, the first one first
    accepted_per_pos: list[int] = []  # those whose token there was kept; as many positions
    finished: dict[str, int] = {}  # sequences by what ended them: stop, length, pooled, abort, error
    requests_by_adapter: list[AdapterRequests] = []
    step_seconds: float = 0.0  # of all steps, one after the other
    no_draft_tokens: float = 0.0  # that they would have given without drafts, by the cost table
    recent_steps: list[RecentStep] = []  # oldest first
    cost_table: CostTable = CostTable()


SNAPSHOT = -1  # the call id of `Stats` that nobody asked for; blocks were not checked for them


class Stats(msgspec.Struct, frozen=True, tag="stats"):
    """The answer to `GetStats`, and about once a second between steps without being asked for."""

    call_id: int
    stats: EngineStats
