"""Multi-adapter LoRA: every row gets its own adapter's update and nothing else, on each path."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from lora_cases import IN_SIZE, OUT_SIZES, POPULARITY, RANKS, TilesCase, make_case, make_runs, make_slots, row_slots_of
from places import ROOT
from triton_process import compile_for_hopper, import_without_triton, needs_triton, run_cases

from specserve.kernels.lora_stack import LoraStack, add_lora_
from specserve.kernels.lora_tiles import lora_reference, split_k
from specserve.kernels.segments import Segments
from specserve.kernels.sgmv import sgmv_reference

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CUDA_TOLERANCE = TOLERANCE | {torch.float32: 1e-4}  # thousands of inputs, summed in another order


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
        segments = Segments.build(runs, 3)
        x, y = torch.randn(segments.num_rows, IN_SIZE), torch.randn(segments.num_rows, sum(OUT_SIZES))
        result = y.clone()
        add_lora_(result, x, stack, segments)
        torch.testing.assert_close(result, sgmv_reference(y, x, stack, segments), atol=1e-4, rtol=1e-5)
        assert torch.equal(result[:, sum(OUT_SIZES[:2]) :], y[:, sum(OUT_SIZES[:2]) :]), "untargeted module was touched"


def test_both_references_agree():
    x, y, stack, segments = make_case("uniform", torch.float32, max_segment=4, num_segments=9)
    torch.testing.assert_close(
        sgmv_reference(y, x, stack, segments),
        lora_reference(y, x, [list(modules) for modules in stack.slots], OUT_SIZES, row_slots_of(segments)),
    )


def test_infinities_stay_in_their_own_rows():
    """Padding repeats a row; whatever stands in it must not leak into another adapter's rows."""
    stack = LoraStack(make_slots([(8, 8, 8)] * 3, torch.float32), OUT_SIZES)
    segments = Segments.build([(0, 2), (1, 3), (2, 2)], 3)
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
    add_lora_(y, torch.randn(3, IN_SIZE), stack, Segments.build([(0, 2), (1, 1)], 2))
    assert stack.is_empty and torch.equal(y, torch.ones_like(y))


def test_segments_merge_equal_neighbours_and_drop_empty_runs():
    segments = Segments.build([(2, 0), (1, 2), (1, 3), (0, 0), (1, 1), (-1, 2), (0, 1)], 3)
    assert segments.starts == (0, 6, 8, 9) and segments.slots == (1, -1, 0)
    assert segments.has_adapters


def test_segments_without_rows_are_valid():
    segments = Segments.build([], 0)
    assert segments.starts == (0,) and segments.slots == () and not segments.has_adapters


def test_selected_rows_keep_their_slots():
    segments = Segments.build([(-1, 2), (0, 5), (2, 1), (0, 4)], 3)
    rows = [1, 4, 5, 6, 7, 11]
    selected = segments.select(rows)
    all_slots = row_slots_of(segments)
    assert row_slots_of(selected) == [all_slots[row] for row in rows]
    assert selected.starts == (0, 1, 4, 5, 6)


@pytest.mark.parametrize("lens", [(1,) * 8, (5,) * 8])
def test_adapters_of_equal_ranks_and_rows_share_one_launch_without_copies(lens):
    segments = Segments.build(list(enumerate(lens)), 8)
    (launch,) = segments.plan(tuple(range(8)), 8)
    assert (launch.lo, launch.hi, launch.width) == (0, 8, lens[0])
    assert launch.rows == slice(0, sum(lens)) and launch.gather is None and launch.valid is None


def test_a_prefill_chunk_does_not_pad_the_decodes_beside_it():
    segments = Segments.build([(0, 1), (1, 300), (2, 1), (3, 1)], 4)
    launches = segments.plan((0, 1, 2, 3), 8)
    assert sum((launch.hi - launch.lo) * launch.width for launch in launches) == 303


def test_unused_members_are_not_read_at_either_end():
    segments = Segments.build([(3, 1), (4, 1)], 8)
    (launch,) = segments.plan(tuple(range(8)), 8)
    assert (launch.lo, launch.hi) == (3, 5)


def test_kernels_import_without_triton():
    import_without_triton("specserve.kernels.lora_tiles, specserve.kernels.tiles")


@needs_triton
def test_triton_kernels_under_the_interpreter():
    run_cases("triton_lora_cases.py")


@needs_triton
def test_triton_kernels_compile_for_hopper(tmp_path):
    compile_for_hopper("triton_lora_compile.py", tmp_path)


@needs_triton
def test_the_bench_for_gpus_runs_end_to_end():
    command = [sys.executable, "-m", "bench.lora_kernels", "--dry-run", "--budget", "600"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-4000:]
    record = json.loads(result.stdout.splitlines()[-1])
    assert record["bench"] == "lora_kernels" and record["left_out"] == 0
    assert {case["mix"] for case in record["results"]} == {"distinct", "uniform", "zipf", "identical"}


@pytest.mark.parametrize("in_size", [1, 70, 512, 576, 4096, 11008, 14336, 53248])
def test_splits_cover_k_once_and_depend_on_nothing_else(in_size):
    num_splits, chunk = split_k(in_size)
    assert (num_splits - 1) * chunk < in_size <= num_splits * chunk and num_splits <= 16


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("popularity", POPULARITY)
@pytest.mark.parametrize("max_segment", [1, 5, 60])
@pytest.mark.parametrize(
    "in_size, out_sizes", [(IN_SIZE, OUT_SIZES), (4096, (4096, 1024, 1024)), (14336, (4096,))], ids=str
)
def test_cuda_kernels_equal_the_reference(dtype, popularity, max_segment, in_size, out_sizes):
    ranks = [modules[: len(out_sizes)] for modules in RANKS]
    slots = make_slots(ranks, dtype, "cuda", in_size, out_sizes)
    row_slots = [slot for slot, rows in make_runs(popularity, len(RANKS), 12, max_segment) for _ in range(rows)]
    case = TilesCase(slots, len(row_slots) + 3, dtype, in_size=in_size, out_sizes=out_sizes, device="cuda")
    case.set_rows(row_slots)
    result = case.run()
    tolerance = CUDA_TOLERANCE[dtype]
    torch.testing.assert_close(result.float(), case.reference(), atol=tolerance, rtol=tolerance)
    assert torch.equal(result[case.row_slots == -1], case.y[case.row_slots == -1])


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
def test_a_row_has_the_same_bits_on_cuda_wherever_it_stands(dtype):
    slots = make_slots([(16, 3, 64)], dtype, "cuda", 4096, (4096, 1024, 1024))
    case = TilesCase(slots, 35, dtype, in_size=4096, out_sizes=(4096, 1024, 1024), device="cuda")
    case.set_rows([0] * 35)
    chunk = case.run()
    for row in (0, 7, 15, 16, 34):
        case.set_rows([-1] * row + [0])
        assert torch.equal(case.run()[row], chunk[row])
    single = TilesCase(slots, 1, dtype, in_size=4096, out_sizes=(4096, 1024, 1024), device="cuda")
    single.set_rows([0])
    single.x.copy_(case.x[34:])
    single.y.copy_(case.y[34:])
    assert torch.equal(single.run()[0], chunk[34])


@pytest.mark.gpu
@needs_triton
def test_a_graph_replays_with_other_slots_and_with_another_adapter_in_a_slot():
    slots = make_slots(RANKS, torch.bfloat16, "cuda")
    case = TilesCase(slots, 20, torch.bfloat16, device="cuda")
    case.set_rows([0] * 18)
    y = case.y.clone()
    case.launch(y)  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        case.launch(y)
    for row_slots in ([0, 1, 3, 5, 6], [3] * 20, [-1] * 20):
        case.set_rows(row_slots)
        y.copy_(case.y)
        graph.replay()
        torch.testing.assert_close(y.float(), case.reference(), atol=2e-2, rtol=2e-2)
    case.slots[3] = make_slots([(65, None, 7)], torch.bfloat16, "cuda")[0]
    case.tables.set_slot(3, {"group": case.slots[3]})
    case.set_rows([3] * 10 + [1] * 10)
    y.copy_(case.y)
    graph.replay()
    torch.testing.assert_close(y.float(), case.reference(), atol=2e-2, rtol=2e-2)
