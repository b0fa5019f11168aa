"""Multi-adapter LoRA: every row gets its own adapter's update and nothing else, on each path."""

from __future__ import annotations

import pytest
import torch
from bench_process import bench_record
from lora_cases import IN_SIZE, OUT_SIZES, POPULARITY, RANKS, LoraCase, make_runs, make_slots
from triton_process import needs_triton

from specserve.kernels.lora import lora_add_pair_, lora_reference
from specserve.kernels.lora_blocks import split_k

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
CUDA_TOLERANCE = TOLERANCE | {torch.float32: 1e-4}  # thousands of inputs, summed in another order


@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("rank", [1, 3, 16, 256])
def test_a_module_in_torch_equals_the_definition_and_writes_its_own_columns(rank, dtype):
    ((pair,),) = make_slots([(rank,)], dtype, out_sizes=(33,))
    x, wide = torch.randn(5, IN_SIZE).to(dtype), torch.randn(5, 40).to(dtype)
    before = wide.clone()
    lora_add_pair_(wide[:, 4:37], x, pair)
    expected = lora_reference(before[:, 4:37], x, [[pair]], (33,), [0] * 5)
    torch.testing.assert_close(wide[:, 4:37].float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(wide[:, :4], before[:, :4]) and torch.equal(wide[:, 37:], before[:, 37:])


@needs_triton
def test_the_bench_for_gpus_runs_end_to_end():
    record = bench_record("lora_kernels", "--dry-run", "--budget", "600")
    assert record["left_out"] == 0
    assert {case["mix"] for case in record["results"]} == {"distinct", "uniform", "zipf", "identical"}


@pytest.mark.parametrize("in_size", [1, 70, 512, 576, 4096, 11008, 14336, 53248])
def test_splits_cover_k_once_and_depend_on_no_batch(in_size):
    for dtype, most in ((torch.bfloat16, 32), (torch.float32, 64)):
        num_splits, chunk = split_k(in_size, dtype)
        assert (num_splits - 1) * chunk < in_size <= num_splits * chunk and num_splits <= most


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
    case = LoraCase(slots, len(row_slots) + 3, dtype, in_size=in_size, out_sizes=out_sizes, device="cuda")
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
    case = LoraCase(slots, 35, dtype, in_size=4096, out_sizes=(4096, 1024, 1024), device="cuda")
    case.set_rows([0] * 35)
    chunk = case.run()
    for row in (0, 7, 15, 16, 34):
        case.set_rows([-1] * row + [0])
        assert torch.equal(case.run()[row], chunk[row])
    single = LoraCase(slots, 1, dtype, in_size=4096, out_sizes=(4096, 1024, 1024), device="cuda")
    single.set_rows([0])
    single.x.copy_(case.x[34:])
    single.y.copy_(case.y[34:])
    assert torch.equal(single.run()[0], chunk[34])
    many = LoraCase(slots, 300, dtype, in_size=4096, out_sizes=(4096, 1024, 1024), max_rank=256, device="cuda")
    many.x[200:235], many.y[200:235] = case.x, case.y
    many.set_rows([-1] * 200 + [0] * 35)
    assert torch.equal(many.run()[200:235], chunk), "tiles of more rows and wider tables must not change bits"


@pytest.mark.gpu
@needs_triton
def test_a_graph_replays_with_other_slots_and_with_another_adapter_in_a_slot():
    slots = make_slots(RANKS, torch.bfloat16, "cuda")
    case = LoraCase(slots, 20, torch.bfloat16, device="cuda")
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
