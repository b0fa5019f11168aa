"""Attention of ragged queries over the paged KV cache: prefill chunks, decodes and verifications in one call.

Semantics, for row r of a sequence at position p with window w: out[r] = softmax(scale * q[r] K^T) V over the sequence's
cached positions max(0, p - w + 1) .. p. Query heads share KV heads in groups (GQA, Ainslie et al. 2023).

`plan` turns the step's tables into per-sequence views once; every layer of the same window reuses it. On the CPU a
sequence whose blocks are one contiguous run is read in place, without a copy. CUDA takes the same path for now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """How one sequence attends: its rows, where its keys lie, and its mask."""

    start: int
    num_rows: int
    run: tuple[int, int] | None  # first and end slot, when the keys are contiguous
    slots: torch.Tensor | None  # [keys] int64 otherwise
    mask: torch.Tensor | None  # [G * rows, keys] additive; None when every row sees every key


AttentionPlan = list[SequencePlan]


def store_kv(k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slots: torch.Tensor) -> None:
    """Write k, v [T, Hkv, D] to the slots [T] of the caches [num_slots, Hkv, D]."""
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v)


def plan_attention(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    window: int | None,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> AttentionPlan:
    """Views and masks of a step for all layers with `window`; `group_size` query heads share a KV head."""
    plan, start = [], 0
    for num_rows, context_len, table in zip(query_lens, context_lens, block_tables, strict=True):
        first_position = context_len - num_rows
        first_key = max(0, first_position - window + 1) if window else 0
        num_keys = context_len - first_key
        mask = None
        if num_rows > 1:  # a single row sees exactly the keys from first_key on
            rows = torch.arange(first_position, context_len).unsqueeze(1)
            keys = torch.arange(first_key, context_len).unsqueeze(0)
            hidden = keys > rows
            if window:
                hidden |= keys <= rows - window
            mask = torch.zeros(num_rows, num_keys, dtype=dtype).masked_fill_(hidden, -torch.inf)
            mask = mask.repeat(group_size, 1).to(device)
        run, slots = _locate(table, first_key, context_len, block_size, device)
        plan.append(SequencePlan(start, num_rows, run, slots, mask))
        start += num_rows
    return plan


def _locate(
    table: Sequence[int], first_key: int, end: int, block_size: int, device: torch.device
) -> tuple[tuple[int, int] | None, torch.Tensor | None]:
    first_block = first_key // block_size
    used = table[first_block : -(-end // block_size)]
    if all(b - a == 1 for a, b in zip(used, used[1:], strict=False)):
        base = used[0] * block_size - first_block * block_size
        return (base + first_key, base + end), None
    positions = torch.arange(first_key, end)
    blocks = torch.tensor(table)[positions // block_size]
    return None, (blocks * block_size + positions % block_size).to(device)


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, plan: AttentionPlan, scale: float
) -> torch.Tensor:
    """out [T, Hq * D] for q [T, Hq, D] and one layer's caches [num_slots, Hkv, D]."""
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    out = torch.empty_like(q)
    for seq in plan:
        if seq.run is not None:
            first, end = seq.run
            k, v = k_cache[first:end], v_cache[first:end]  # [keys, Hkv, D]
        else:
            k, v = k_cache.index_select(0, seq.slots), v_cache.index_select(0, seq.slots)
        k, v = k.transpose(0, 1).unsqueeze(0), v.transpose(0, 1).unsqueeze(0)  # [1, Hkv, keys, D]
        rows = q[seq.start : seq.start + seq.num_rows]
        if seq.num_rows == 1:
            folded = rows.view(1, num_kv_heads, group, head_dim)
            result = F.scaled_dot_product_attention(folded, k, v, scale=scale)
            out[seq.start] = result.view(num_heads, head_dim)
        else:
            folded = rows.view(seq.num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
            folded = folded.reshape(1, num_kv_heads, group * seq.num_rows, head_dim)
            result = F.scaled_dot_product_attention(folded, k, v, attn_mask=seq.mask, scale=scale)
            result = result.view(num_kv_heads, group, seq.num_rows, head_dim).permute(2, 0, 1, 3)
            out[seq.start : seq.start + seq.num_rows] = result.reshape(seq.num_rows, num_heads, head_dim)
    return out.view(num_rows, num_heads * head_dim)


def attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first_position: int, scale: float, window: int | None = None
) -> torch.Tensor:
    """One sequence in float32 by the definition: q [rows, Hq, D] from `first_position`, k and v [keys, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape)
    for row in range(q.shape[0]):
        position = first_position + row
        first = max(0, position - window + 1) if window else 0
        for head in range(q.shape[1]):
            keys = k[first : position + 1, head // group].float()
            weights = (scale * (keys @ q[row, head].float())).softmax(0)
            out[row, head] = weights @ v[first : position + 1, head // group].float()
    return out.reshape(q.shape[0], -1)
