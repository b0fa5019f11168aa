"""Programs of a launch that run side by side, in any order, leave the same bits; interpreted.

Attention's programs share a tile's splits and the last to arrive joins them: what a card would show as a wrong token in
a thousand. LoRA's and the sampler's share nothing, which is looked at as well.
"""

from __future__ import annotations

import attention_cases
import pytest
import torch
import triton
import triton.language as tl
from lora_cases import LoraCase, make_slots
from program_order import side_by_side
from sampling_cases import make_rows, make_tensors, run_kernels
from triton_interpreter import row_uniform_dot  # noqa: F401  (before anything imports triton)

SEEDS = range(4)  # of orders of accesses


@triton.jit
def last_adds(out, parts, arrived, HAS_BARRIER: tl.constexpr):
    part = tl.arange(0, 4)
    tl.store(parts + tl.program_id(0) * 4 + part, part + tl.program_id(0))
    if HAS_BARRIER:
        tl.debug_barrier()
    if tl.atomic_add(arrived, 1) == tl.num_programs(0) - 1:
        tl.store(out, tl.sum(tl.load(parts + tl.arange(0, 16)), axis=0))


@pytest.mark.parametrize("has_barrier", [False, True])
def test_what_others_may_not_have_seen_yet_is_found(has_barrier):
    sums = set()
    for seed in SEEDS:
        out, parts, arrived = (torch.zeros(num, dtype=torch.int32) for num in (1, 16, 1))
        with side_by_side(seed):
            last_adds[(4,)](out, parts, arrived, HAS_BARRIER=has_barrier)
        sums.add(int(out))
    assert (sums == {48}) == has_barrier


@pytest.mark.parametrize("window", [None, 300])
@pytest.mark.parametrize("num_programs", [2, 3])
def test_whoever_is_last_joins_all_splits_of_attention(num_programs, window):
    scene = attention_cases.make_scene([(3, 1100), (1, 200)], (4, 2, 16), torch.bfloat16, "cpu")
    alone = scene.run(window, 1)
    for seed in SEEDS:
        with side_by_side(seed):
            out = scene.run(window, num_programs, joins=True)  # looks that all counts are 0 again
        torch.testing.assert_close(out, alone, rtol=0, atol=0, equal_nan=True)


def test_loras_programs_share_nothing():
    slots = make_slots([(16, 3, 64), (5, None, 65)], torch.bfloat16)
    case = LoraCase(slots, 14, torch.bfloat16)
    case.set_rows([0] * 9 + [1] * 3)
    alone = case.run()
    with side_by_side(0):
        assert torch.equal(case.run(), alone)


def test_the_samplers_programs_share_nothing():
    logits, rows = make_rows("normal", 5000)
    params = make_tensors(rows, 5000, "cpu")
    alone = run_kernels(logits, params)
    with side_by_side(0):
        assert run_kernels(logits, params) == alone
