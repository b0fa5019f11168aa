"""The heads' device loop under Triton's interpreter against HeadSource; test_under_triton.py runs it as a process."""

from __future__ import annotations

import pytest
import torch
from head_cases import VOCAB_SIZE, Sequences, mixed_heads, random_head, trained_heads
from triton_interpreter import row_uniform_dot  # noqa: F401  (before anything imports triton)
from triton_process import sweep

from specserve.drafters.head_device import SeatedSequence


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


def test_hidden_states_of_several_chunks():
    head = random_head(6, 16, 50, 8, hidden_size=1100)
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
