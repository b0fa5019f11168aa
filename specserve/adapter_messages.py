"""What the server and the engine process say to each other about adapters: loads, pins, and what the engine holds.

An adapter is its content hash; names are for messages only. Placements grow, so that whatever crosses on the way is
known to be old.
"""

from typing import Literal

import msgspec

from .adapter_kinds import AdapterType, PoolingInfo


class LoadAdapter(msgspec.Struct, frozen=True, tag="load_adapter"):
    """Read, check and register the PEFT directory `path`; answered by `AdapterLoaded` or `CallFailed`."""

    call_id: int
    name: str  # for messages only; identity is the content hash
    path: str
    content_hash: str | None = None  # of what is there, if its files are those of an earlier load
    size_bytes: int = 0  # that it took in memory then
    is_pinned: bool = False
    is_prefetch: bool = False  # nobody waits for it: it takes no room of adapters in use, and waits for none
    priority: int = 0  # the best of the requests that wait for it; lower is sooner
    mount: int = 0  # the device number of the file system that it lies on


class PrioritizeLoads(msgspec.Struct, frozen=True, tag="prioritize_loads"):
    """The best priority of the requests that wait for the loads of the PEFT directory `path` is another one now."""

    path: str
    priority: int


class ForsakeLoads(msgspec.Struct, frozen=True, tag="forsake_loads"):
    """Nobody waits any more for the loads of the PEFT directory `path` that are under way: each is a prefetch now."""

    path: str


class UnloadAdapter(msgspec.Struct, frozen=True, tag="unload_adapter"):
    """Forget an adapter once no running request uses it; answered by `CallDone`.

    Where a load has placed it since `placement`, the newest that the server has heard of, it is only pinned no more as
    by `PinAdapter`.
    """

    call_id: int
    adapter_hash: str
    placement: int


class PinAdapter(msgspec.Struct, frozen=True, tag="pin_adapter"):
    """Keep a loaded adapter whatever others need, or do so no more; answered by `CallDone` or `CallFailed`.

    It stays pinned where a load has pinned it since `placement`, the newest that the server has heard of.
    """

    call_id: int
    adapter_hash: str
    is_pinned: bool
    placement: int


class GetAdapters(msgspec.Struct, frozen=True, tag="get_adapters"):
    """Answered by `AdapterStates`."""

    call_id: int


class LookaheadInfo(msgspec.Struct, frozen=True):
    """What drafts for an adapter, or for the base. `error` says why a head that is there is not used."""

    draft_len: int | None  # None without a usable head
    history_tokens: int
    error: str | None


class AdapterInfo(msgspec.Struct, frozen=True):
    """What a loaded adapter is. `size_bytes` is what it takes in memory, its head and history included."""

    content_hash: str
    max_rank: int
    num_modules: int
    target_modules: list[str]
    size_bytes: int
    text_hash: str | None  # of the chat template and tokenizer files that it brings; None when the base's serve
    lookahead: LookaheadInfo | None = None
    adapter_type: AdapterType = "generate"
    pooling: PoolingInfo | None = None  # of every other type than generate


class AdapterLoaded(msgspec.Struct, frozen=True, tag="adapter_loaded"):
    """`placement` numbers the loads that gave an adapter its place or found it there.

    It grows, from one process to the next as well, so that what crosses on the way is known to be old.
    """

    call_id: int
    adapter: AdapterInfo
    placement: int


class AdapterState(msgspec.Struct, frozen=True):
    """An adapter that the engine holds, in its best memory."""

    content_hash: str
    tier: Literal["device", "host"]  # on a CPU, host is where steps read it
    num_requests: int  # that run with it, or wait to
    draft_tokens: int  # verified since it was loaded
    accepted_draft_tokens: int


class AdapterStates(msgspec.Struct, frozen=True, tag="adapter_states"):
    call_id: int
    adapters: list[AdapterState]


class AdaptersLeft(msgspec.Struct, frozen=True, tag="adapters_left"):
    """These are no longer where steps can use them; the next request with one of them needs a load."""

    placements: dict[str, int]  # content hash -> the newest placement that has ended; a later one holds
