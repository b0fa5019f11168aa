"""The forward pass's kernels under Triton's interpreter; test_under_triton.py runs this file as a process.

Of the products of cases, windows, heads and dtypes each value is met once; the rest of them is slow.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import attention_cases
import elementwise_cases
import pytest
import torch
from attention_cases import CASES
from elementwise_cases import HEADS, NORM_SIZES, TOLERANCE
from triton_interpreter import row_uniform_dot  # noqa: F401  (before anything imports triton)
from triton_process import sweep

from specserve.compute.cuda import attention_order
from specserve.kernels import add_norm, ragged_attention
from specserve.kernels.gated_activation import BLOCK, KINDS


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden", NORM_SIZES)
def test_addition_and_norm(dtype, hidden):
    elementwise_cases.check_add_norm(dtype, hidden, "cpu")


def test_addition_and_norm_with_a_residual_in_float32():
    elementwise_cases.check_add_norm(torch.bfloat16, 72, "cpu", torch.float32)


def test_rows_longer_than_a_block(monkeypatch):
    monkeypatch.setattr(add_norm, "MAX_BLOCK", 64)
    for dtype in TOLERANCE:
        elementwise_cases.check_add_norm(dtype, 200, "cpu")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_norms_rotation_and_kv_write(dtype, heads):
    for norms_turned in {False, heads[3]}:
        elementwise_cases.check_rope(dtype, heads, "cpu", norms_turned)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_gated_activation(dtype, kind):
    for size in (8, 100, BLOCK + 12):
        elementwise_cases.check_activation(dtype, kind, size, "cpu")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden", (8, 200))
def test_pooled_rows(dtype, hidden):
    elementwise_cases.check_pooled_rows(dtype, hidden, "cpu")


@sweep(
    {"case": CASES, "window": (None, 1, 100)},
    ("mixed", 100),
    ("decodes of skewed lengths", None),
    ("first token", 1),
    ("one decode", None),
)
def test_attention_of_ragged_rows_by_any_number_of_programs(case, window):
    scene = attention_cases.make_scene(CASES[case], (6, 2, 16), torch.float32, "cpu")
    attention_cases.check(scene, window, (1, 2, 4), split_len=64 if case == "mixed" else 256)


@sweep(
    {"dtype": TOLERANCE, "heads": ((2, 2, 64), (9, 3, 24), (4, 1, 128), (8, 1, 80), (3, 1, 256))},
    (torch.float32, (2, 2, 64)),
    (torch.bfloat16, (9, 3, 24)),
    (torch.float16, (4, 1, 128)),
    (torch.bfloat16, (8, 1, 80)),
    (torch.float16, (3, 1, 256)),
)
def test_attention_of_head_groups_and_dtypes(dtype, heads):
    scene = attention_cases.make_scene([(5, 133), (1, 40)], heads, dtype, "cpu")
    attention_cases.check(scene, None, (1, 2), split_len=128)


@pytest.mark.parametrize("block_size", [1, 3, 64])
def test_attention_of_block_sizes(block_size):
    scene = attention_cases.make_scene([(5, 70), (1, 200)], (4, 2, 8), torch.float32, "cpu", block_size=block_size)
    attention_cases.check(scene, 50, (1, 2))


@pytest.mark.parametrize("tile_rows", [1, 3, 32])
def test_attention_of_tile_sizes(tile_rows):
    case = [(tile_rows + 5, 60), (1, 30)]
    scene = attention_cases.make_scene(case, (4, 2, 8), torch.bfloat16, "cpu", tile_rows=tile_rows)
    attention_cases.check(scene, 20, (1, 2))


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_attention_of_capped_scores(softcap):
    scene = attention_cases.make_scene([(5, 133), (1, 40)], (6, 2, 16), torch.float32, "cpu", softcap=softcap)
    attention_cases.check(scene, 100, (1, 2), split_len=64)


@sweep(
    {"dtype": TOLERANCE, "window": (None, 100), "softcap": (None, 2.0)},
    (torch.float32, None, None),
    (torch.bfloat16, 100, 2.0),
    (torch.float16, None, None),
)
def test_a_row_has_the_same_bits_alone_and_in_a_mixed_batch(dtype, window, softcap):
    attention_cases.check_same_row_alone(dtype, (6, 2, 16), window, "cpu", softcap=softcap)


def test_tiles_of_a_device_that_sum_differently_are_found(monkeypatch):
    config = SimpleNamespace(num_heads=6, num_kv_heads=2, head_dim=16, attention_scale=0.3, attention_softcap=None)
    check = partial(attention_order.tiles_that_differ, config, torch.bfloat16, torch.device("cpu"))
    monkeypatch.setattr(attention_order, "_NUM_ROWS", 4)
    monkeypatch.setattr(attention_order, "_CONTEXT", 48)
    assert check() == []

    def differs(out, *args, tile_rows, **options):
        ragged_attention.ragged_attention_(out, *args, tile_rows=tile_rows, **options)
        out += 2.0**-10 * (tile_rows == 42)

    monkeypatch.setattr(attention_order, "ragged_attention_", differs)
    assert check() == [42]


def test_short_contexts_leave_nothing_to_join():
    attention_cases.check_short_contexts("cpu")


def test_attention_of_a_cache_beyond_31_bits(monkeypatch):
    scene = attention_cases.make_scene([(5, 130), (1, 40)], (4, 2, 8), torch.bfloat16, "cpu")
    narrow = scene.run(None, 2)
    monkeypatch.setattr(ragged_attention, "MOST_PLACES", scene.k_cache.numel() - 1)
    torch.testing.assert_close(scene.run(None, 2), narrow, rtol=0, atol=0, equal_nan=True)


def test_attention_of_other_tables_in_the_same_buffers():
    attention_cases.check_other_tables(4, "cpu")
