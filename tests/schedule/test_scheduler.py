"""The scheduler: budgets, fairness, preemption; no torch involved."""

import random

from specserve.messages import GenerateRequest, SamplingParams
from specserve.schedule.block_manager import BlockManager
from specserve.schedule.scheduler import Scheduler
from specserve.schedule.sequence import Sequence


def make(num_blocks=64, block_size=4, max_num_seqs=8, max_batched_tokens=32, max_prefill_rows=16):
    blocks = BlockManager(num_blocks, block_size)
    return Scheduler(
        blocks, max_num_seqs=max_num_seqs, max_batched_tokens=max_batched_tokens, max_prefill_rows=max_prefill_rows
    )


def sequence(seq_id, prompt_len, max_tokens=8, base=0):
    prompt = [base + i for i in range(prompt_len)]
    return Sequence(seq_id, GenerateRequest(str(seq_id), prompt, SamplingParams(max_tokens=max_tokens)))


def advance(scheduler, token=7):
    """One step as the engine does it, without drafts; returns what was scheduled."""
    items = scheduler.schedule()
    for item in items:
        seq = item.seq
        reaches_end = item.reaches_end
        seq.num_computed += item.num_rows
        scheduler.blocks.commit(seq.block_table, seq.block_keys, seq.root_key, seq.tokens, seq.num_computed)
        if reaches_end:
            seq.tokens.append(token)
            if seq.output_len == seq.sampling.max_tokens:
                scheduler.remove(seq)
    return items


def test_long_prefill_is_chunked_and_decodes_go_on_beside_it():
    scheduler = make()
    short, long = sequence(1, 4), sequence(2, 100, base=1000)
    scheduler.add(short)
    advance(scheduler)
    scheduler.add(long)
    while long.num_computed < 100:
        items = advance(scheduler)
        rows = {item.seq.seq_id: item.num_rows for item in items}
        assert rows.get(2, 0) <= (16 if rows.get(1) else 32)
        assert short.output_len == 8 or rows[1] == 1
    assert long.output_len >= 1


def test_short_prompt_overtakes_a_long_one_and_the_long_one_still_moves():
    scheduler = make(num_blocks=200)
    long, short = sequence(1, 400, base=1000), sequence(2, 20)
    scheduler.add(long)
    scheduler.add(short)
    rows = {item.seq.seq_id: item.num_rows for item in advance(scheduler)}
    assert rows[2] == 20 and rows[1] == 12


def test_budget_is_never_exceeded_and_everything_finishes_under_block_pressure():
    rng = random.Random(1)
    scheduler = make(num_blocks=12)
    pending = [sequence(i, rng.randrange(1, 30), rng.randrange(1, 12), base=100 * i) for i in range(1, 40)]
    everything = list(pending)
    steps = 0
    while pending or scheduler.has_work():
        if pending and rng.random() < 0.6:
            scheduler.add(pending.pop())
        items = advance(scheduler)
        assert sum(item.num_rows for item in items) <= 32
        error = scheduler.blocks.check_integrity(seq.block_table for seq in scheduler.sequences())
        assert error is None, error
        steps += 1
        assert steps < 5000
    assert all(seq.output_len == seq.sampling.max_tokens for seq in everything)
    assert scheduler.num_preemptions > 0
    assert scheduler.blocks.num_free == 12


def test_preempted_sequence_keeps_its_tokens_and_goes_first():
    scheduler = make(num_blocks=6, max_num_seqs=2)
    first, second = sequence(1, 8, 12), sequence(2, 8, 12, base=100)
    scheduler.add(first)
    scheduler.add(second)
    while not scheduler.num_preemptions:
        advance(scheduler)
    assert scheduler.waiting.first(0.0) is second and second.block_table == [] and second.output_len > 0
    kept = list(second.tokens)
    while scheduler.has_work():
        advance(scheduler)
    assert second.tokens[: len(kept)] == kept and second.output_len == 12


def test_drafts_never_preempt():
    scheduler = make(num_blocks=3, max_num_seqs=2)
    seq = sequence(1, 8, 3)
    scheduler.add(seq)
    advance(scheduler)
    (item,) = scheduler.schedule()
    assert scheduler.reserve_drafts(item, 9) == 3  # 9 tokens stand, 12 fit
    assert scheduler.num_preemptions == 0


def test_abort_frees_blocks_in_every_state():
    scheduler = make(num_blocks=16, max_num_seqs=1)
    seqs = [sequence(i, 8, base=100 * i) for i in (1, 2)]
    for seq in seqs:
        scheduler.add(seq)
    advance(scheduler)
    for seq in seqs:
        scheduler.remove(seq)
    assert scheduler.blocks.num_free == 16 and not scheduler.has_work()
