"""Paged attention equals its definition for ragged rows, scattered blocks, windows, head groups and dtypes."""

from __future__ import annotations

import random

import pytest
import torch

from specserve.kernels.attention import attention_reference, paged_attention, plan_attention, store_kv

CPU = torch.device("cpu")
CASES = {  # (rows, context) of each sequence
    "one decode": [(1, 9)],
    "first token": [(1, 1)],
    "decodes of skewed lengths": [(1, 1), (1, 70), (1, 8), (1, 33)],
    "whole prompts": [(5, 5), (40, 40)],
    "later chunks": [(20, 61), (3, 24)],
    "mixed": [(4, 30), (1, 17), (24, 41), (1, 3), (5, 5), (16, 16), (17, 50)],
}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def scene(case, heads, dtype, block_size, shuffle):
    """Queries, caches whose unused slots are NaN, block tables, and each sequence's own K and V."""
    num_heads, num_kv_heads, head_dim = heads
    generator = torch.Generator().manual_seed(0)
    counts = [-(-context // block_size) for _, context in case]
    free = list(range(sum(counts) + 3))
    if shuffle:
        random.Random(1).shuffle(free)
    tables = [[free.pop(0) for _ in range(count)] for count in counts]
    num_slots = (sum(counts) + 3) * block_size
    k_cache, v_cache = (torch.full((num_slots, num_kv_heads, head_dim), torch.nan, dtype=dtype) for _ in "kv")
    q = torch.randn(sum(rows for rows, _ in case), num_heads, head_dim, generator=generator).to(dtype)
    own = []
    for (_, context), table in zip(case, tables, strict=True):
        k, v = (torch.randn(context, num_kv_heads, head_dim, generator=generator).to(dtype) for _ in "kv")
        slots = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(context)])
        store_kv(k, v, k_cache, v_cache, slots)
        own.append((k, v))
    return q, k_cache, v_cache, tables, own


def check(case, heads, dtype, block_size, shuffle, window, softcap=None):
    q, k_cache, v_cache, tables, own = scene(case, heads, dtype, block_size, shuffle)
    rows, contexts = [r for r, _ in case], [c for _, c in case]
    group = heads[0] // heads[1]
    plan = plan_attention(rows, contexts, tables, block_size, window, group, dtype, CPU)
    out = paged_attention(q, k_cache, v_cache, plan, 0.3, softcap)
    assert out.shape == (sum(rows), heads[0] * heads[2]) and out.dtype == dtype
    start = 0
    for num_rows, context, (k, v) in zip(rows, contexts, own, strict=True):
        expected = attention_reference(q[start : start + num_rows], k, v, context - num_rows, 0.3, window, softcap)
        actual = out[start : start + num_rows].float()
        torch.testing.assert_close(actual, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        start += num_rows
    return plan


@pytest.mark.parametrize("window", [None, 1, 12])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ragged_rows_equal_the_definition(case, window):
    for shuffle in (False, True):
        check(case, (6, 2, 16), torch.float32, 4, shuffle, window)


@pytest.mark.parametrize("heads", [(4, 4, 16), (4, 1, 8), (9, 3, 64), (2, 2, 6)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_head_groups_and_dtypes(heads, dtype):
    check(CASES["mixed"], heads, dtype, 8, True, None)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_capped_scores(dtype):
    check(CASES["mixed"], (6, 2, 16), dtype, 4, True, 12, softcap=1.5)


@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_block_sizes(block_size):
    check(CASES["mixed"], (4, 2, 8), torch.float32, block_size, True, 12)


def test_contiguous_blocks_are_read_in_place():
    plan = plan_attention([1, 1], [20, 20], [[3, 4, 5], [5, 3, 4]], 8, None, 1, torch.float32, CPU)
    assert plan[0].keys == slice(24, 44)
    assert isinstance(plan[1].keys, torch.Tensor)


def test_a_window_looks_at_its_own_blocks_only():
    plan = plan_attention([1], [40], [[9, 1, 5, 6, 7]], 8, 12, 1, torch.float32, CPU)
    assert plan[0].keys == slice(52, 64)  # positions 28..39: the last two blocks, which are one run
