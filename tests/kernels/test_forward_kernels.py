"""The kernels of the GPU's forward pass equal their definitions: interpreter, compiler, and CUDA."""

from __future__ import annotations

import attention_cases
import elementwise_cases
import pytest
import torch
from attention_cases import CASES
from bench_process import bench_record
from elementwise_cases import HEADS, TOLERANCE
from triton_process import needs_triton

from specserve.kernels.gated_activation import KINDS, gated_activation
from specserve.kernels.ragged_attention import (
    MAX_SPLITS,
    block_parameters,
    choose_programs,
    choose_split_len,
    largest_tile_rows,
)

ATTENTION_HEADS = ((2, 2, 64), (9, 3, 64), (4, 1, 128), (8, 1, 128), (9, 3, 24), (3, 1, 256))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("hidden", (200, 4096))
def test_pooled_rows_on_a_gpu(dtype, hidden):
    elementwise_cases.check_pooled_rows(dtype, hidden, "cuda")


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("hidden", [576, 20000])  # few, as each is compiled
def test_addition_and_norm_on_cuda(hidden):
    elementwise_cases.check_add_norm(torch.bfloat16, hidden, "cuda")
    elementwise_cases.check_add_norm(torch.bfloat16, hidden, "cuda", torch.float32)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_head_norms_rotation_and_kv_write_on_cuda(dtype, heads):
    for norms_turned in {False, heads[3]}:
        elementwise_cases.check_rope(dtype, heads, "cuda", norms_turned)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [8, 100, 1536])
def test_gated_activation_on_cuda(dtype, kind, size):
    elementwise_cases.check_activation(dtype, kind, size, "cuda")


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="kind='relu': must be one of silu, gelu_tanh"):
        gated_activation(torch.zeros(1, 2), "relu")


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("case", CASES)
def test_cuda_attention_of_ragged_rows_by_any_number_of_programs(case, window):
    scene = attention_cases.make_scene(CASES[case], (6, 2, 16), torch.float32, "cuda")
    attention_cases.check(scene, window, (1, 2, 4, 32), split_len=64 if case == "mixed" else 256)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("heads", ATTENTION_HEADS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_cuda_attention_of_head_groups(dtype, heads):
    scene = attention_cases.make_scene(CASES["mixed"], heads, dtype, "cuda")
    attention_cases.check(scene, None, (1, 4))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("heads", [(8, 4, 256), (9, 3, 64)], ids=str)
def test_cuda_attention_of_capped_scores(heads):
    scene = attention_cases.make_scene(CASES["mixed"], heads, torch.bfloat16, "cuda", softcap=2.0)
    attention_cases.check(scene, 100, (1, 4))
    attention_cases.check_same_row_alone(torch.bfloat16, heads, 100, "cuda", (1, 4), softcap=2.0)


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("tile_rows", [1, 16, 32])  # with 4 heads a group: 16, 64 and 128 rows of a matrix product
def test_cuda_attention_of_tile_sizes(tile_rows):
    scene = attention_cases.make_scene(CASES["mixed"], (8, 2, 128), torch.bfloat16, "cuda", tile_rows=tile_rows)
    attention_cases.check(scene, 70, (1, 2))


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize(
    ("heads", "tiles"),
    [
        ((32, 8, 128), (1, 4, 8, 16, 32)),
        ((9, 3, 64), (1, 4, 16, 21, 42)),
        ((4, 1, 256), (1, 4, 16)),
        ((12, 2, 80), (1, 8, 21)),
    ],
    ids=str,
)
def test_a_row_of_attention_has_the_same_bits_alone_and_in_a_mixed_batch(heads, tiles, window):
    attention_cases.check_same_row_alone(torch.bfloat16, heads, window, "cuda", tiles)


@pytest.mark.gpu
@needs_triton
def test_short_contexts_leave_nothing_to_join_on_cuda():
    attention_cases.check_short_contexts("cuda")


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize(("num_programs", "joins"), [(1, False), (4, False), (4, True)])
def test_cuda_attention_replays_in_a_graph_with_other_tables(num_programs, joins):
    attention_cases.check_other_tables(num_programs, "cuda", joins)


def test_programs_fill_the_device_and_no_more():
    small = {"row_bytes": 1 << 17, "num_rows": 8}
    assert choose_programs(1, 8, 132, **small) == 32 and choose_programs(8, 8, 132, **small) == 4
    assert choose_programs(64, 8, 132, **small) == 1 and choose_programs(0, 8, 132, **small) == 32
    for tiles in range(1, 300, 7):
        num = choose_programs(tiles, 3, 132, **small)
        assert num == 1 or tiles * 3 * num <= 2 * 132
        assert num == 32 or 2 * 132 < tiles * 3 * (num + 1)
    assert choose_programs(8, 8, 132, row_bytes=1 << 17, num_rows=1024) == 1  # more partial results than there is room


@pytest.mark.parametrize("heads", ATTENTION_HEADS, ids=str)
def test_the_largest_tiles_are_small_where_there_are_few_of_them(heads):
    num_heads, num_kv_heads, head_dim = heads
    sizes = [largest_tile_rows(n, num_heads // num_kv_heads, head_dim, num_kv_heads, 132) for n in (1, 512, 1 << 16)]
    assert sizes == sorted(sizes)
    for tile_rows in sizes:
        blocks = block_parameters(tile_rows, num_heads // num_kv_heads, head_dim, 2)
        assert blocks["BLOCK_M"] in ((64,) if head_dim > 128 else (64, 128)) or num_heads // num_kv_heads == 3


@pytest.mark.parametrize("heads", ATTENTION_HEADS, ids=str)
def test_cards_with_less_shared_memory_have_smaller_tiles_that_leave_room_for_three_blocks(heads):
    num_heads, num_kv_heads, head_dim = heads
    group, most_shared = num_heads // num_kv_heads, 99 << 10
    sizes = {largest_tile_rows(n, group, head_dim, num_kv_heads, 100, most_shared) for n in (1, 512, 1 << 16)}
    for tile_rows in {1, *sizes}:
        blocks = block_parameters(tile_rows, group, head_dim, 2, most_shared)
        assert blocks["num_stages"] == 3 and blocks["BLOCK_M"] <= (32 if head_dim > 128 else 64)
        held = blocks["num_stages"] - 1  # of K and V each
        assert 2 * held * 2 * blocks["BLOCK_N"] * blocks["BLOCK_D"] + 34 * 1024 <= most_shared
    for size in (64, 128):  # more query heads than fit otherwise
        assert block_parameters(1, 96, size, 2, most_shared)["num_stages"] == 2


def test_splits_hold_the_longest_context():
    for max_model_len in (1, 64, 256, 257, 8192, 8193, 40_960, 131_072):
        length = choose_split_len(max_model_len)
        assert length & (length - 1) == 0 and 256 <= length and max_model_len <= length * MAX_SPLITS
    assert choose_split_len(8192) == 256 and choose_split_len(131_072) == 4096


def test_tiles_that_are_too_large_are_refused():
    with pytest.raises(ValueError, match="tile_rows=64 with 4 query heads"):
        block_parameters(64, 4, 128, 2)
    with pytest.raises(ValueError, match="heads of a multiple of 8 up to 256"):
        block_parameters(8, 4, 264, 2)


@needs_triton
def test_the_kernel_bench_runs_end_to_end_without_a_gpu():
    record = bench_record("attention_kernels", "--dry-run", "--before", "--tile-rows", "--budget", "600")
    assert record["left_out"] == 0
    kinds = {case["kind"] for case in record["results"]}
    assert kinds == {"decode", "verify", "prefill", "add_rms_norm", "rope_store", "gated_activation"}
