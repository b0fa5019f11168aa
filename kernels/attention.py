"""Attention of ragged queries over the paged KV cache: prefill chunks, decodes and verifications in one call.

Semantics, for row r of a sequence at position p with window w: out[r] = softmax(scale * q[r] K^T) V over the sequence's
cached positions max(0, p - w + 1) .. p. Query heads share KV heads in groups of G (GQA, Ainslie et al. 2023). With a
softcap c each score s is c * tanh(s / c) before the softmax.

`plan_attention` turns the step's tables into index tensors and masks once; every layer of the same window reuses them.
One call a sequence, which reads its blocks in place when they are one contiguous run: on a CPU eight decodes padded to
one call took 1.8 to 5 times as long at 1000 keys, without a clear gain at 200. Nothing but a sequence's own written
positions is ever read. The torch path's, on any device; CUDA's own is ragged_attention.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .softcap import softcap_

# Up to here a group's heads are folded into rows, so that K is read once a group; beyond it there are rows enough, and
# the mask is not repeated for each head.
MAX_FOLDED_ROWS = 16


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """One sequence: its rows, where its keys lie, and its mask."""

    start: int
    num_rows: int
    keys: slice | torch.Tensor  # KV positions: a contiguous run, or [keys] int64
    mask: torch.Tensor | None  # additive, [G * rows, keys] if folded, else [rows, keys]; None: every row sees every key


def store_kv(
    k: torch.Tensor, v: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write k, v [T, Hkv, D] to `slot_mapping` [T] of the caches [KV positions, Hkv, D]."""
    k_cache.index_copy_(0, slot_mapping, k)
    v_cache.index_copy_(0, slot_mapping, v)


def plan_attention(
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    block_tables: Sequence[Sequence[int]],
    block_size: int,
    window: int | None,
    group_size: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[SequencePlan]:
    """Indices and masks of a step for all layers with `window`; `group_size` query heads share a KV head."""
    plan = []
    start = 0
    for num_rows, context_len, table in zip(query_lens, context_lens, block_tables, strict=True):
        first_position = context_len - num_rows
        first_key = max(0, first_position - window + 1) if window else 0
        mask = None
        if num_rows > 1:  # a single row sees exactly the keys from first_key on
            mask = _mask(first_position, num_rows, first_key, context_len, window, dtype, device)
            mask = mask.repeat(group_size, 1) if num_rows <= MAX_FOLDED_ROWS else mask
        plan.append(SequencePlan(start, num_rows, _locate(table, first_key, context_len, block_size, device), mask))
        start += num_rows
    return plan


def _mask(
    first_position: int,
    num_rows: int,
    first_key: int,
    end: int,
    window: int | None,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    rows = torch.arange(first_position, first_position + num_rows, device=device).unsqueeze(1)
    keys = torch.arange(first_key, end, device=device).unsqueeze(0)
    hidden = keys > rows
    if window:
        hidden |= keys <= rows - window
    return torch.zeros(num_rows, end - first_key, dtype=dtype, device=device).masked_fill_(hidden, -torch.inf)


def _locate(
    table: Sequence[int], first_key: int, end: int, block_size: int, device: torch.device
) -> slice | torch.Tensor:
    first_block = first_key // block_size
    used = table[first_block : -(-end // block_size)]
    if all(b - a == 1 for a, b in zip(used, used[1:], strict=False)):
        base = (used[0] - first_block) * block_size
        return slice(base + first_key, base + end)
    positions = torch.arange(first_key, end, device=device)
    blocks = torch.tensor(table, device=device)[positions // block_size]
    return blocks * block_size + positions % block_size


def paged_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    plan: Sequence[SequencePlan],
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """out [T, Hq * D] for q [T, Hq, D] and one layer's caches [KV positions, Hkv, D]."""
    out = torch.empty_like(q)
    for seq in plan:
        _attend_sequence_(out, q, k_cache, v_cache, seq, scale, softcap)
    return out.view(q.shape[0], q.shape[1] * q.shape[2])


def _attend_sequence_(
    out: torch.Tensor,
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    seq: SequencePlan,
    scale: float,
    softcap: float | None,
) -> None:
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k_cache.shape[1]
    group = num_heads // num_kv_heads
    if isinstance(seq.keys, slice):
        k, v = k_cache[seq.keys], v_cache[seq.keys]  # [keys, Hkv, D]
    else:
        k, v = k_cache.index_select(0, seq.keys), v_cache.index_select(0, seq.keys)
    k, v = k.transpose(0, 1), v.transpose(0, 1)  # [Hkv, keys, D]
    if seq.num_rows == 1:
        folded = q[seq.start].view(1, num_kv_heads, group, head_dim)
        result = _attend(folded, k.unsqueeze(0), v.unsqueeze(0), None, scale, softcap)
        out[seq.start] = result.view(num_heads, head_dim)
        return
    end = seq.start + seq.num_rows
    heads = q[seq.start : end].view(seq.num_rows, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    if seq.num_rows <= MAX_FOLDED_ROWS:
        folded = heads.reshape(1, num_kv_heads, group * seq.num_rows, head_dim)
        result = _attend(folded, k.unsqueeze(0), v.unsqueeze(0), seq.mask, scale, softcap)
    else:
        k, v = (t.unsqueeze(1).expand(-1, group, -1, -1) for t in (k, v))  # [Hkv, G, keys, D], no copy
        result = _attend(heads, k, v, seq.mask, scale, softcap)
    result = result.view(num_kv_heads, group, seq.num_rows, head_dim).permute(2, 0, 1, 3)
    out[seq.start : end].view(seq.num_rows, num_kv_heads, group, head_dim).copy_(result)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """As torch's own attention, which knows no softcap: q [.., rows, D], k and v [.., keys, D] -> [.., rows, D]."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    scores = q.float() @ k.float().transpose(-1, -2)  # [.., rows, keys]
    softcap_(scores.mul_(scale), softcap)
    if mask is not None:
        scores += mask
    return scores.softmax(-1).to(v.dtype) @ v


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    first_position: int,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """One sequence in float32 by the definition: q [rows, Hq, D] from `first_position`, k and v [keys, Hkv, D]."""
    group = q.shape[1] // k.shape[1]
    out = torch.empty(q.shape)
    for row in range(q.shape[0]):
        position = first_position + row
        first = max(0, position - window + 1) if window else 0
        for head in range(q.shape[1]):
            keys = k[first : position + 1, head // group].float()
            scores = scale * (keys @ q[row, head].float())
            softcap_(scores, softcap)
            weights = scores.softmax(0)
            out[row, head] = weights @ v[first : position + 1, head // group].float()
    return out.reshape(q.shape[0], -1)
