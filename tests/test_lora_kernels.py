"""Multi-adapter LoRA: every row gets its own adapter's update and nothing else, on each path."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lora_cases import IN_SIZE, OUT_SIZES, POPULARITY, RANKS, make_case, make_slots, row_slots_of

from specserve.kernels.bgmv import bgmv_reference, bgmv_triton_
from specserve.kernels.lora_stack import LoraStack, add_lora_
from specserve.kernels.segments import Segments
from specserve.kernels.sgmv import sgmv_reference, sgmv_triton_

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("max_segment", [1, 5, 60])
@pytest.mark.parametrize("num_segments", [1, 7, 20])
def test_cpu_path_equals_the_reference(dtype, popularity, max_segment, num_segments):
    x, y, stack, segments = make_case(popularity, dtype, max_segment=max_segment, num_segments=num_segments)
    expected = sgmv_reference(y, x, stack, segments)
    result = y.clone()
    add_lora_(result, x, stack, segments)
    torch.testing.assert_close(result.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    no_adapter = [row for row, slot in enumerate(row_slots_of(segments)) if slot == -1]
    assert torch.equal(result[no_adapter], y[no_adapter])


@pytest.mark.parametrize("rank", [1, 3, 8, 16, 64, 256])
@pytest.mark.parametrize("lens", [(1, 1, 1), (5, 5, 5), (1, 0, 1), (300, 1, 2), (4, 5, 3)], ids=str)
def test_cpu_path_serves_every_rank_and_row_layout(rank, lens):
    stack = LoraStack(make_slots([(rank, rank, None)] * 3, torch.float32), OUT_SIZES)
    for runs in (list(enumerate(lens)), [(-1, 2), *reversed(list(enumerate(lens)))]):
        segments = Segments.build(runs, 3, "cpu")
        x, y = torch.randn(segments.num_rows, IN_SIZE), torch.randn(segments.num_rows, sum(OUT_SIZES))
        result = y.clone()
        add_lora_(result, x, stack, segments)
        torch.testing.assert_close(result, sgmv_reference(y, x, stack, segments), atol=1e-4, rtol=1e-5)
        assert torch.equal(result[:, sum(OUT_SIZES[:2]) :], y[:, sum(OUT_SIZES[:2]) :]), "untargeted module was touched"


def test_both_references_agree():
    x, y, stack, segments = make_case("uniform", torch.float32, max_segment=4, num_segments=9)
    torch.testing.assert_close(
        sgmv_reference(y, x, stack, segments), bgmv_reference(y, x, stack, row_slots_of(segments))
    )


def test_infinities_stay_in_their_own_rows():
    """Padding repeats a row; whatever stands in it must not leak into another adapter's rows."""
    stack = LoraStack(make_slots([(8, 8, 8)] * 3, torch.float32), OUT_SIZES)
    segments = Segments.build([(0, 2), (1, 3), (2, 2)], 3, "cpu")
    x, y = torch.randn(7, IN_SIZE), torch.zeros(7, sum(OUT_SIZES))
    x[0] = float("inf")
    add_lora_(y, x, stack, segments)
    assert not y[0].isfinite().any() and y[1:].isfinite().all()


def test_y_may_be_columns_of_a_wider_tensor():
    x, y, stack, segments = make_case("uniform", torch.float32, max_segment=5, num_segments=9)
    wide = torch.zeros(len(y), y.shape[1] + 9)
    add_lora_(wide[:, 4 : 4 + y.shape[1]], x, stack, segments)
    add_lora_(y.zero_(), x, stack, segments)
    assert torch.equal(wide[:, 4 : 4 + y.shape[1]], y) and not wide[:, :4].any() and not wide[:, -5:].any()


def test_a_stack_without_weights_is_empty_and_does_nothing():
    stack = LoraStack([[None, None, None]] * 2, OUT_SIZES)
    y = torch.ones(3, sum(OUT_SIZES))
    add_lora_(y, torch.randn(3, IN_SIZE), stack, Segments.build([(0, 2), (1, 1)], 2, "cpu"))
    assert stack.is_empty and torch.equal(y, torch.ones_like(y))


def test_segments_merge_equal_neighbours_and_drop_empty_runs():
    segments = Segments.build([(2, 0), (1, 2), (1, 3), (0, 0), (1, 1), (-1, 2), (0, 1)], 3, "cpu")
    assert segments.starts == (0, 6, 8, 9) and segments.slots == (1, -1, 0)
    assert segments.has_adapters and not segments.is_single_row


def test_segments_without_rows_are_valid():
    segments = Segments.build([], 0, "cpu")
    assert segments.starts == (0,) and segments.slots == () and not segments.has_adapters


def test_selected_rows_keep_their_slots():
    segments = Segments.build([(-1, 2), (0, 5), (2, 1), (0, 4)], 3, "cpu")
    rows = [1, 4, 5, 6, 7, 11]
    selected = segments.select(rows)
    all_slots = row_slots_of(segments)
    assert row_slots_of(selected) == [all_slots[row] for row in rows]
    assert selected.starts == (0, 1, 4, 5, 6)


@pytest.mark.parametrize("lens", [(1,) * 8, (5,) * 8])
def test_adapters_of_equal_ranks_and_rows_share_one_launch_without_copies(lens):
    segments = Segments.build(list(enumerate(lens)), 8, "cpu")
    (launch,) = segments.plan(tuple(range(8)), 8)
    assert (launch.lo, launch.hi, launch.width) == (0, 8, lens[0])
    assert launch.rows == slice(0, sum(lens)) and launch.gather is None and launch.valid is None


def test_a_prefill_chunk_does_not_pad_the_decodes_beside_it():
    segments = Segments.build([(0, 1), (1, 300), (2, 1), (3, 1)], 4, "cpu")
    launches = segments.plan((0, 1, 2, 3), 8)
    assert sum((launch.hi - launch.lo) * launch.width for launch in launches) == 303


def test_unused_members_are_not_read_at_either_end():
    segments = Segments.build([(3, 1), (4, 1)], 8, "cpu")
    (launch,) = segments.plan(tuple(range(8)), 8)
    assert (launch.lo, launch.hi) == (3, 5)


def test_kernels_import_without_triton():
    code = "import sys; sys.modules['triton'] = None; import specserve.kernels.lora_stack, specserve.kernels.bgmv"
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code], env=env, check=True, timeout=120)


@needs_triton
def test_triton_kernels_under_the_interpreter():
    cases = Path(__file__).with_name("triton_lora_cases.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(cases)]
    env = os.environ | {"TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-6000:] + result.stderr[-2000:]


@needs_triton
def test_triton_kernels_compile_for_hopper(tmp_path):
    script = Path(__file__).with_name("triton_lora_compile.py")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(script.parents[1])}
    result = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-6000:]


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("max_segment", [1, 5, 60])
def test_cuda_kernels_equal_the_reference_and_each_other(dtype, popularity, max_segment):
    x, y, stack, segments = make_case(popularity, dtype, max_segment=max_segment, num_segments=12, device="cuda")
    expected = sgmv_reference(y, x, stack, segments)
    dispatched, sgmv_y, bgmv_y = y.clone(), y.clone(), y.clone()
    add_lora_(dispatched, x, stack, segments)
    sgmv_triton_(sgmv_y, x, stack, segments)
    bgmv_triton_(bgmv_y, x, stack, segments)
    torch.testing.assert_close(sgmv_y.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(sgmv_y, bgmv_y) and torch.equal(dispatched, sgmv_y)
    no_adapter = [row for row, slot in enumerate(row_slots_of(segments)) if slot == -1]
    assert torch.equal(sgmv_y[no_adapter], y[no_adapter])


@pytest.mark.gpu
@needs_triton
def test_cuda_bgmv_replays_in_a_graph_with_other_slots():
    ranks = [modules for modules in RANKS if any(modules)]
    x, y, stack, _ = make_case("uniform", torch.float32, max_segment=1, num_segments=1, ranks=ranks, device="cuda")
    x, y = torch.randn(4, IN_SIZE, device="cuda"), torch.zeros(4, sum(OUT_SIZES), device="cuda")
    first = Segments.build([(0, 1), (1, 1), (2, 1), (-1, 1)], len(ranks), "cuda")
    bgmv_triton_(y, x, stack, first)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        bgmv_triton_(y, x, stack, first)
    other = Segments.build([(3, 1), (0, 1), (-1, 1), (1, 1)], len(ranks), "cuda")
    assert first.row_slots is not None and other.row_slots is not None
    first.row_slots.copy_(other.row_slots)
    y.zero_()
    graph.replay()
    torch.testing.assert_close(y, sgmv_reference(torch.zeros_like(y), x, stack, other), atol=1e-5, rtol=1e-5)
