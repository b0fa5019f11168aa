"""The LoRA kernels under Triton's interpreter against their reference; test_under_triton.py runs it as a process."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from triton_interpreter import row_uniform_dot  # noqa: F401  (before anything imports triton)

# isort: split
from lora_cases import POPULARITY, RANKS, LoraCase, make_runs, make_slots

from specserve.adapters.lora import LoraAdapter
from specserve.compute.cuda.lora import LM_HEAD, DeviceAdapterSlots, DeviceLoraBatch
from specserve.compute.decoder_weights import GROUPS
from specserve.errors import UserError
from specserve.kernels import lora_blocks
from specserve.kernels.lora import LoraPair
from specserve.kernels.lora_tables import LoraShape, LoraTables
from specserve.model.config import ModelConfig
from specserve.model.shapes import module_shapes

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)


def check(case: LoraCase, tolerance: float) -> torch.Tensor:
    result = case.run()
    torch.testing.assert_close(result.float(), case.reference(), atol=tolerance, rtol=tolerance)
    untouched = case.row_slots == -1
    assert torch.equal(result[untouched], case.y[untouched])
    return result


@DTYPES
@pytest.mark.parametrize("popularity", POPULARITY)
def test_kernels_equal_their_reference(dtype, popularity):
    row_slots = [slot for slot, rows in make_runs(popularity, len(RANKS), 5, 20) for _ in range(rows)]
    case = LoraCase(make_slots(RANKS, dtype), len(row_slots) + 2, dtype)
    case.set_rows(row_slots)  # two rows of padding
    check(case, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_16_bits_lose_nothing_of_a_wide_y(dtype):
    """As logits are: what expand multiplies has about fp32's accuracy, also where h is beyond fp16's range."""
    slots = make_slots([(16, 16, 3)], dtype)
    case = LoraCase(slots, 3, dtype, y_dtype=torch.float32)
    case.set_rows([0, 0, 0])
    case.x[1] *= 1000
    case.x[2].fill_(60000)
    expected = case.reference()
    error = (case.run() - expected).abs().amax(1) / expected.abs().amax(1)
    assert (error < 2e-6).all(), error


@pytest.mark.parametrize("ranks", [(256, 1, 65), (64, None, 3), (None, 16, None), (None, None, None)], ids=str)
def test_any_rank_and_untargeted_modules(ranks):
    case = LoraCase(make_slots([ranks], torch.float32), 3, torch.float32, max_rank=256)
    case.set_rows([0, 0, -1])
    result = check(case, 1e-5)
    column = 0
    for rank, out_size in zip(ranks, case.out_sizes, strict=True):
        columns = slice(column, column + out_size)
        assert torch.equal(result[:, columns], case.y[:, columns]) == (rank is None)
        column += out_size


@pytest.mark.parametrize(
    "in_size, out_sizes", [(1, (1,)), (600, (130,)), (1700, (300, 257)), (48, (1030, 16, 129))], ids=str
)
def test_sizes_over_several_splits_and_blocks_of_columns(in_size, out_sizes, monkeypatch):
    ranks = [(3, 20, 16)[: len(out_sizes)], (16, 1, None)[: len(out_sizes)]]
    slots = make_slots(ranks, torch.float32, "cpu", in_size, out_sizes)
    case = LoraCase(slots, 6, torch.float32, in_size=in_size, out_sizes=out_sizes)
    case.set_rows([1, 0, 0, -1, 1])
    spread = check(case, 1e-5)
    few = replace(lora_blocks.SIZES, expand_programs=3, shrink_programs=2)
    monkeypatch.setattr(lora_blocks, "SIZES", few)
    assert torch.equal(case.run(), spread), "how much a program takes must not change bits"


@DTYPES
def test_a_row_has_the_same_bits_wherever_it_stands(dtype):
    """A row alone, as decode sees it, and the same row deep in a prefill chunk of several tiles."""
    slots = make_slots([(16, 3, 64), (8, 8, 8)], dtype)
    chunk_case = LoraCase(slots, 40, dtype)
    chunk_case.set_rows([1, 1] + [0] * 35)
    chunk = chunk_case.run()
    single = LoraCase(slots, 1, dtype)
    single.set_rows([0])
    for row in (2, 9, 17, 18, 36):
        single.x.copy_(chunk_case.x[row])
        single.y.copy_(chunk_case.y[row])
        assert torch.equal(single.run()[0], chunk[row])


@DTYPES
def test_neither_the_rows_of_a_tile_nor_the_tables_largest_rank_change_bits(dtype, monkeypatch):
    slots = make_slots([(16, 3, 72), (8, 20, 8)], dtype)
    case = LoraCase(slots, 24, dtype, max_rank=72)
    case.set_rows([1, 1] + [0] * 20)
    narrow = case.run()
    monkeypatch.setattr(lora_blocks, "tile_rows_of", lambda num_rows, dtype: 16)
    wide = LoraCase(slots, 24, dtype, max_rank=256)
    wide.x, wide.y = case.x, case.y
    wide.set_rows([1, 1] + [0] * 20)
    assert torch.equal(wide.run(), narrow)


@pytest.mark.parametrize("tile_rows", [8, 16])
def test_the_list_of_blocks_equals_its_reference_and_fits_the_bound(tile_rows, monkeypatch):
    monkeypatch.setattr(lora_blocks, "tile_rows_of", lambda num_rows, dtype: tile_rows)
    ranks = [16, 1, 72, 0, 32]
    tables = LoraTables({"o": LoraShape(8, (8,))}, 5, 80, torch.float32, "cpu")
    for slot, rank in enumerate(ranks):
        if rank:
            tables.set_slot(slot, {"o": [LoraPair(torch.zeros(rank, 8), torch.zeros(8, rank), 1.0)]})
    rng = random.Random(tile_rows)
    for num_rows, longest in ((0, 1), (1, 1), (17, 40), (64, 1), (100, 30), (600, 90)):
        rows: list[int] = []
        while len(rows) < num_rows:
            rows += [rng.randrange(-1, 5)] * rng.randint(1, longest)
        rows = rows[:num_rows]
        segments = sum(slot >= 0 and (row == 0 or rows[row - 1] != slot) for row, slot in enumerate(rows))
        expected = lora_blocks.list_blocks_reference(rows, ranks, tile_rows)
        size = lora_blocks.max_blocks(num_rows, segments, tables)
        assert len(expected) <= size
        for room in (size, 3):  # entries beyond the table are dropped
            blocks = lora_blocks.new_blocks(room + 1, "cpu").fill_(77)
            lora_blocks.list_blocks_(blocks[:-1], torch.tensor(rows, dtype=torch.int32), tables)
            used = min(len(expected), room)
            assert blocks[0, 0] == used and (blocks[-1] == 77).all(), "written outside the table"
            assert [tuple(entry) for entry in blocks[1 : 1 + used].tolist()] == expected[:used]


def test_infinities_stay_in_their_own_rows():
    case = LoraCase(make_slots([(8, 3, 16), (8, 8, 8)], torch.float32), 6, torch.float32)
    case.set_rows([0, 0, 0, 1, 1, -1])
    case.x[1] = float("inf")
    result = case.run()
    assert not result[1].isfinite().any() and result[[0, 2, 3, 4, 5]].isfinite().all()


def test_rows_may_be_strided():
    case = LoraCase(make_slots(RANKS, torch.float32), 9, torch.float32)
    case.set_rows([0, 0, 1, 3, 5, 5])
    expected = case.run()
    wide_x, wide_y = torch.randn(9, case.x.shape[1] + 5), torch.randn(9, case.y.shape[1] + 7)
    wide_x[:, : case.x.shape[1]], wide_y[:, : case.y.shape[1]] = case.x, case.y
    case.x, view, rest = (
        wide_x[:, : case.x.shape[1]],
        wide_y[:, : case.y.shape[1]],
        wide_y[:, case.y.shape[1] :].clone(),
    )
    case.launch(view)
    assert torch.equal(view, expected) and torch.equal(wide_y[:, view.shape[1] :], rest)


def test_the_same_launch_serves_an_adapter_that_joins_and_one_that_leaves():
    """What a graph's replay rests on: the launch sees equal addresses before and after, only data differs."""
    case = LoraCase(make_slots([(8, 8, 8), (3, None, 65)], torch.bfloat16), 5, torch.bfloat16)
    case.set_rows([0, 1, 1, -1, 0])
    tensors = (case.entry.records, case.blocks, case.scratch)
    addresses = [tensor.data_ptr() for tensor in tensors]
    before = check(case, 2e-2)
    case.slots[1] = make_slots([(None, 64, 1)], torch.bfloat16)[0]
    case.tables.set_slot(1, {"group": case.slots[1]})
    joined = check(case, 2e-2)
    assert torch.equal(joined[[0, 4]], before[[0, 4]]) and not torch.equal(joined[1], before[1])
    case.tables.clear_slot(1)
    left = case.run()
    assert torch.equal(left[[0, 4]], before[[0, 4]]) and torch.equal(left[1:4], case.y[1:4])
    assert [tensor.data_ptr() for tensor in tensors] == addresses and case.tables.entry("group") is case.entry


def test_tables_keep_the_adapters_own_tensors_where_they_are_aligned_and_copies_where_not():
    tables = LoraTables({"o": LoraShape(64, (32,))}, 1, 16, torch.bfloat16, "cpu")
    a, b = torch.randn(8, 64).bfloat16(), torch.randn(32, 8).bfloat16()
    tables.set_slot(0, {"o": [LoraPair(a, b, 0.3)]})
    assert tables.records[0, 0, :3].tolist() == [a.data_ptr(), b.data_ptr(), 8]
    assert tables.records[0, 0, 3:].int().view(torch.float32).item() == pytest.approx(0.3)
    shifted = torch.randn(8 * 64 + 1).bfloat16()[1:].view(8, 64)
    tables.set_slot(0, {"o": [LoraPair(shifted, b, 1.0)]})
    assert tables.records[0, 0, 0] != shifted.data_ptr() and tables.records[0, 0, 0] % 16 == 0


@DTYPES
def test_embedding_lora_gathers_the_tokens_columns(dtype):
    vocab, hidden = 90, 70
    tables = LoraTables({"embed": LoraShape(vocab, (hidden,))}, 3, 20, dtype, "cpu")
    pairs = [LoraPair(torch.randn(r, vocab).to(dtype), torch.randn(hidden, r).to(dtype), 0.5) for r in (20, 3)]
    for slot, pair in enumerate(pairs):
        tables.set_slot(slot, {"embed": [pair]})
    row_slots = [0, 0, 1, -1, 2, 1]
    tokens, y = torch.tensor([0, 89, 89, 5, 7, 40]), torch.randn(6, hidden).to(dtype)
    expected = y.float().clone()
    for row, slot in enumerate(row_slots):
        if slot in (0, 1):
            a, b, scale = pairs[slot]
            expected[row] += scale * (b.float() @ a[:, tokens[row]].float())
    entry = tables.entry("embed")
    ids = torch.tensor(row_slots, dtype=torch.int32)
    blocks = lora_blocks.new_blocks(lora_blocks.max_blocks(6, 6, tables), "cpu")
    lora_blocks.list_blocks_(blocks, ids, tables)
    scratch = torch.full((lora_blocks.scratch_size(entry, 6, is_embedding=True),), float("nan"))
    result = y.clone()
    lora_blocks.lora_embedding_add_(result, tokens, entry, blocks, scratch)
    torch.testing.assert_close(result.float(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    assert torch.equal(result[[3, 4]], y[[3, 4]])


CONFIG = cast(
    ModelConfig,
    SimpleNamespace(
        num_layers=2, hidden_size=24, num_heads=3, num_kv_heads=1, head_dim=8, intermediate_size=40, vocab_size=50
    ),
)


def make_adapter(name: str, rank: int, *, extra: bool = False) -> LoraAdapter:
    shapes = module_shapes(CONFIG)

    def pair(module: str) -> LoraPair:
        in_size, out_size = shapes[module]
        return LoraPair(torch.randn(rank, in_size), torch.randn(out_size, rank), 0.5)

    layers = {(layer, module): pair(module) for layer in range(2) for module in ("q_proj", "v_proj", "down_proj")}
    embed, lm_head = (pair("embed_tokens"), pair("lm_head")) if extra else (None, None)
    return LoraAdapter(name, name, layers, embed, lm_head, rank, text_hash=None)


def batch_of(slots: DeviceAdapterSlots, rows: list[str | None], groups: Iterable[str]) -> DeviceLoraBatch:
    row_slots = torch.tensor([-1 if name is None else slots.slot_of(name) for name in rows], dtype=torch.int32)
    return slots.launches(slots.new_blocks(len(rows)), row_slots, len(rows), frozenset(groups))


def test_a_device_batch_adds_each_rows_own_adapter_to_every_module():
    slots = DeviceAdapterSlots(CONFIG, torch.device("cpu"), capacity=3, max_rows=6, dtype=torch.float32, max_rank=16)
    adapters = {"a": make_adapter("a", 4), "b": make_adapter("b", 16, extra=True)}
    slots.activate(list(adapters.values()))
    assert slots.targeted_groups == {"qkv", "down", "embed_tokens", "lm_head"}
    rows = ["a", "a", None, "b", "b", "a"]
    batch = batch_of(slots, rows, slots.targeted_groups)
    shapes = module_shapes(CONFIG)
    for layer in range(2):
        for group, modules in GROUPS.items():
            x = torch.randn(6, shapes[modules[0]][0])
            y = torch.randn(6, sum(shapes[module][1] for module in modules))
            expected, column = y.clone(), 0
            for module in modules:
                for row, name in enumerate(rows):
                    pair = adapters[name].layers.get((layer, module)) if name else None
                    if pair is not None:
                        expected[row, column : column + pair.b.shape[0]] += pair.scale * (pair.b @ (pair.a @ x[row]))
                column += shapes[module][1]
            batch.add_(layer, group, x, y)
            torch.testing.assert_close(y, expected, atol=1e-4, rtol=1e-5)
    embed, lm_head = adapters["b"].embed, adapters["b"].lm_head
    assert embed is not None and lm_head is not None
    tokens, y = torch.tensor([1, 2, 3, 4, 49, 0]), torch.zeros(6, 24)
    batch.add_embedding_(tokens, y)
    expected = torch.zeros(6, 24)
    expected[3:5] = embed.scale * (embed.a[:, tokens[3:5]].t() @ embed.b.t())
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    x, logits = torch.randn(3, 24), torch.zeros(3, 50)
    batch_of(slots, ["a", None, "b"], (LM_HEAD,)).add_lm_head_(x, logits)
    assert not logits[:2].any()
    torch.testing.assert_close(logits[2], lm_head.scale * (lm_head.b @ (lm_head.a @ x[2])), atol=1e-4, rtol=1e-5)
    batch_of(slots, rows, ("qkv",)).add_(0, "down", torch.randn(6, 40), y)  # is not launched
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)


def test_the_least_recently_used_adapter_makes_room_and_one_in_use_never():
    slots = DeviceAdapterSlots(CONFIG, torch.device("cpu"), capacity=2, max_rows=4, dtype=torch.float32, max_rank=16)
    a, b, c, d = (make_adapter(name, 2) for name in "abcd")
    slots.activate([a, b])
    slots.activate([a])
    kept, given = slots.slot_of("a"), slots.slot_of("b")
    slots.activate([c, a])  # a is the older of the two, but in use
    assert slots.slot_of("a") == kept and slots.slot_of("c") == given
    with pytest.raises(KeyError):
        slots.slot_of("b")
    slots.free("a")
    assert not slots.tables.records[kept].any()
    slots.activate([d])
    assert slots.slot_of("d") == kept
    with pytest.raises(UserError, match="3 adapters in one step, but there is room for 2"):
        slots.activate([a, b, c])
    with pytest.raises(UserError, match="rank 17"):
        slots.activate([make_adapter("wide", 17)])
