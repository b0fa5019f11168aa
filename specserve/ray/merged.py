"""Several engines as one: what they are, and what they have done, added up.

Sums of counters, of what is used and of what there is; a wait is the shortest one's. Figures that mean something of one
engine only, such as its cost table, are the first one's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import msgspec

from ..adapter_messages import AdapterState
from ..messages import EngineInfo
from ..stats_messages import EngineStats

MAX_RECENT_STEPS = 256
_OF_ONE = {"cost_table"}  # the first one's
_OF_INFO = ("num_kv_blocks", "max_num_seqs", "max_adapters")


def merged_info(infos: Sequence[EngineInfo]) -> EngineInfo:
    """Of engines of one model; a request must fit the smallest context."""
    sums = {name: sum(getattr(info, name) for info in infos) for name in _OF_INFO}
    return msgspec.structs.replace(
        infos[0],
        max_model_len=min(info.max_model_len for info in infos),
        is_exact=all(info.is_exact for info in infos),
        **sums,
    )


def merged_stats(parts: Sequence[EngineStats]) -> EngineStats:
    """`parts` are not empty."""
    first = parts[0]
    values: dict[str, Any] = {}
    for name in EngineStats.__struct_fields__:
        found = [getattr(part, name) for part in parts]
        match found[0]:
            case _ if name in _OF_ONE:
                values[name] = found[0]
            case _ if name == "integrity_error":
                values[name] = next((error for error in found if error), None)
            case _ if name == "wait_estimate_seconds":
                values[name] = min(found)
            case _ if name == "recent_steps":
                together = sorted((step for steps in found for step in steps), key=lambda step: -step.ago_s)
                values[name] = together[-MAX_RECENT_STEPS:]
            case int() | float():
                values[name] = sum(found)
            case dict():
                keys = dict.fromkeys(key for counts in found for key in counts)  # those that stand at nothing, too
                values[name] = {key: sum(counts.get(key, 0) for counts in found) for key in keys}
            case _ if name.endswith("_per_pos"):
                values[name] = [sum(column) for column in zip_longest(*found, fillvalue=0)]
            case _:
                values[name] = [entry for entries in found for entry in entries]
    return msgspec.structs.replace(first, **values)


def merged_adapters(parts: Sequence[Sequence[AdapterState]]) -> list[AdapterState]:
    """Copies of one content as one, in the best memory that any of them is in."""
    found: dict[str, AdapterState] = {}
    for state in (state for states in parts for state in states):
        other = found.get(state.content_hash)
        if other is not None:
            state = msgspec.structs.replace(
                state,
                tier="device" if "device" in (state.tier, other.tier) else "host",
                num_requests=state.num_requests + other.num_requests,
                draft_tokens=state.draft_tokens + other.draft_tokens,
                accepted_draft_tokens=state.accepted_draft_tokens + other.accepted_draft_tokens,
            )
        found[state.content_hash] = state
    return list(found.values())
