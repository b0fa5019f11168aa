"""The heads' device loop under Triton's interpreter against HeadSource; test_under_triton.py runs it as a process."""

from __future__ import annotations

import pytest
import torch
from head_cases import VOCAB_SIZE, Sequences, mixed_heads, random_head, trained_heads
from triton_interpreter import row_uniform_dot  # noqa: F401  (before anything imports triton)
from triton_process import sweep

from specserve.drafters.head_device import SeatedSequence
from specserve.kernels.head_loop import TILE_ROWS
from specserve.kernels.head_loop_choice_triton import list_work
from specserve.kernels.head_loop_tables import WORK_WIDTH, HeadTables
from specserve.kernels.tiles import build_tiles_reference


@sweep(
    {"dtype": (torch.float32, torch.bfloat16), "steps": ((7, 1), (2,))}, (torch.float32, (7, 1)), (torch.bfloat16, (2,))
)
def test_mixed_heads_draft_what_head_source_drafts_step_after_step(dtype, steps):
    sequences = Sequences(mixed_heads(), 8, VOCAB_SIZE, dtype, "cpu")
    for num_guesses in steps:
        sequences.step(num_guesses)


@pytest.mark.slow
def test_trained_heads_draft_what_head_source_drafts():
    sequences = Sequences(trained_heads(), 3, 49152, torch.bfloat16, "cpu")
    sequences.step(2)


def test_more_sequences_of_one_head_than_a_tile_holds():
    head = random_head(5, 16, 50, 4, hidden_size=8, draft_len=3, tap_layer=0)
    Sequences([head], 22, VOCAB_SIZE, torch.float32, "cpu").step(4)


def test_a_chain_has_the_same_bits_alone_and_beside_others():
    heads = [random_head(seed, 40, 70, 4, draft_len=3, tap_layer=0) for seed in (11, 12)]
    sequences = Sequences(heads, 14, VOCAB_SIZE, torch.bfloat16, "cpu")
    sequences.step(3)
    together = sequences.device_heads.results[:, :14, :3].clone()
    for idx in (0, 8, 13):
        assert torch.equal(sequences.alone(idx), together[:, idx])


@pytest.mark.parametrize("head_ids", [[0, 0, 1, -1, 1, 2, 2], [1] * 20 + [0], [3, 0]], ids=str)
def test_work_is_listed_by_tiles_and_by_blocks(head_ids):
    sizes = {0: (48, 130, 5), 1: (16, 64, 3), 2: (32, 63, 9), 3: (0, 0, 0)}  # d, task tokens, draft length; 3: it left
    tables, rows = HeadTables.allocate(4, "cpu"), len(head_ids)
    for head, (d, num_tokens, draft_len) in sizes.items():
        tables.sizes[head, :4] = torch.tensor([d, num_tokens, 0, draft_len])
    wanted = [2 + idx % 5 for idx in range(rows)]
    ids, num_guesses = torch.tensor([head_ids, wanted], dtype=torch.int32)
    here = torch.zeros(rows, dtype=torch.int32)
    lists = torch.full((2, 1 + rows * 8, WORK_WIDTH), -9, dtype=torch.int32)
    list_work[(rows,)](
        lists[0], lists[1], here, ids, here, num_guesses, tables.sizes, rows,
        TILE_ROWS=TILE_ROWS, CELL_BLOCK=16, TOKEN_BLOCK=64, BLOCK_S=64, MOST_CELLS=8, MOST_BLOCKS=8,
    )  # fmt: skip
    tiles = build_tiles_reference(head_ids, TILE_ROWS)
    for work, column, block_size in ((lists[0], 0, 16), (lists[1], 1, 64)):
        want = [
            [first, end, head, block, min(sizes[head][2], max(wanted[first:end]))]
            for first, end, head in tiles
            for block in range(-(-(sizes[head][column] + column) // block_size) if sizes[head][0] else 0)
        ]
        assert work[0, 0] == len(want) and work[1 : 1 + len(want)].tolist() == want
        assert (work[1 + len(want) :] == -9).all()


def test_hidden_states_of_several_chunks():
    head = random_head(6, 16, 50, 8, hidden_size=1100)
    Sequences([head], 3, VOCAB_SIZE, torch.float32, "cpu").step(3)


def test_a_state_wider_than_a_program_reads_at_once_and_a_window_wider_than_a_tile():
    head = random_head(13, 270, 90, 20, hidden_size=8, draft_len=3, tap_layer=0)
    Sequences([head], 3, VOCAB_SIZE, torch.float32, "cpu").step(3)


def test_a_state_of_nan_says_nothing_and_leaves_others_alone():
    heads = [random_head(7, 16, 50, 4, tap_layer=0), random_head(8, 16, 50, 4, tap_layer=0)]
    heads[0].weights.out_weight.fill_(float("nan"))
    sequences = Sequences(heads, 4, VOCAB_SIZE, torch.float32, "cpu")
    sequences.step(3)
    sequences.step(3)


def test_a_head_that_joins_a_used_slot_is_served_by_the_same_tables():
    first, second = random_head(9, 16, 50, 4, tap_layer=0), random_head(10, 16, 50, 4, tap_layer=0)
    sequences = Sequences([first], 2, VOCAB_SIZE, torch.float32, "cpu")
    sequences.step(2)
    addresses = sequences.device_heads._tables.addresses.data_ptr()
    sequences.device_heads.remove_head(first)
    later = Sequences([second], 2, VOCAB_SIZE, torch.float32, "cpu", seed=1)
    heads = sequences.device_heads
    assert heads.add_head(second) == 0
    heads.add_sequences([SeatedSequence(later.seat(idx), p, second) for idx, p in enumerate(later.prompts)])
    later.device_heads = heads
    later.step(3)
    assert heads._tables.addresses.data_ptr() == addresses
