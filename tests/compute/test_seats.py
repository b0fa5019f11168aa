"""Tables on the device that outlive a step, without a GPU: seats of sequences, and what is written to tables."""

import random

import numpy as np
import torch

from specserve.compute.cuda.buffers import Writer
from specserve.compute.cuda.seats import Seats
from specserve.messages import GenerateRequest, SamplingParams
from specserve.schedule.sequence import Sequence


def test_every_sequence_of_a_step_has_a_seat_of_its_own_with_its_blocks():
    """While sequences come and go, grow, and lose their blocks; more in all than there are seats. Some steps fail
    before or after what is new was taken, and some have no room for all of it."""
    rng, num_seats, next_block = random.Random(0), 6, 1
    seats = Seats(num_seats, 40, torch.device("cpu"))
    alive: list[Sequence] = []
    for step in range(300):
        while len(alive) < num_seats or rng.random() < 0.1:
            alive.append(Sequence(step, GenerateRequest(f"r{step}", [1], SamplingParams(max_tokens=9))))
        for seq in alive:
            if rng.random() < 0.05:
                seq.block_table.clear()
                seq.forget_blocks()
            if rng.random() < 0.3 and len(seq.block_table) < 37 or not seq.block_table:
                seq.block_table += range(next_block, next_block := next_block + rng.randint(1, 3))
        chosen = rng.sample(alive, rng.randint(1, num_seats))
        owners = seats.owners.copy()
        places = seats.seat(chosen)
        assert len(set(places.tolist())) == len(chosen) and places.tolist() == seats.seats_of(chosen).tolist()
        if rng.random() < 0.1:
            if rng.random() < 0.5:
                seats.take_new(rng.choice((0, 2, 100)))
            continue
        new_places, new_blocks = seats.take_new(rng.choice((0, 2, 100)))
        seats.wrote_new()
        assert len(set(new_places)) == len(new_places) and seats.take_new(100) == ([], [])
        padding = [seats.nowhere] * 3
        seats.flat[[*new_places, *padding]] = torch.tensor([*new_blocks, 9, 9, 9], dtype=torch.int32)
        for seq, place in zip(chosen, places.tolist(), strict=True):
            num = len(seq.block_table)
            assert seats.tables[place, :num].tolist() == seats.host_tables[place, :num].tolist() == seq.block_table
        again = seats.owners.copy()
        assert (
            np.array_equal(seats.seat(chosen), places)
            and np.array_equal(seats.owners, again)
            and (again >= owners).all()
        )
        alive = [seq for seq in alive if rng.random() > 0.05]


def test_entries_of_several_tables_are_written_behind_as_few_copies_as_hold_them(monkeypatch):
    monkeypatch.setattr(Writer, "_MOST", 16)
    rng, writer = np.random.default_rng(0), Writer(torch.device("cpu"))
    tables = [torch.zeros(3, 20, dtype=torch.int32), torch.zeros(50, dtype=torch.int32)]
    want = [table.numpy().reshape(-1).copy() for table in tables]
    for lens in ((3, 4), (0, 0), (16, 1), (40, 33), (0, 16)):
        writes = []
        for table, expected, num in zip(tables, want, lens, strict=True):
            index, values = rng.permutation(table.numel())[:num], rng.integers(1, 99, num, dtype=np.int32)
            expected[index] = values
            writes.append((table, index, values))
        writer(writes)
        assert all(
            np.array_equal(table.numpy().reshape(-1), expected) for table, expected in zip(tables, want, strict=True)
        )
