"""Heads that loop on the device draft what HeadSource drafts; the kernels run in processes of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from head_cases import VOCAB_SIZE, Sequences, host_chain, mixed_heads, random_head, reference_chain, trained_heads
from triton_process import needs_triton

from specserve.drafters.chains import NOBODY, ChainTable
from specserve.drafters.chooser import DraftChooser
from specserve.drafters.head_device import DeviceHeads, SeatedSequence
from specserve.drafters.head_files import HeadError
from specserve.drafters.head_source import HeadSource
from specserve.drafters.protocol import Guess
from specserve.kernels.head_loop_tables import LoopRows


def make_device_heads(device: str = "cpu", **changes) -> DeviceHeads:
    sizes = dict(
        hidden_size=64, vocab_size=VOCAB_SIZE, tap_layers=[0, 1], max_heads=2, max_num_seqs=3, max_prompt_len=20,
        max_draft_len=6, max_state_size=40, max_vocab=200, max_window=8,
    )  # fmt: skip
    return DeviceHeads(**sizes | changes, device=device)


@pytest.mark.parametrize("seed", range(4))
def test_the_reference_drafts_what_head_source_drafts(seed):
    sequences = Sequences(mixed_heads(), 4, VOCAB_SIZE, torch.float32, "cpu", seed)
    hidden, tapped = torch.randn(2, 5, 64, generator=sequences.generator)
    for source, prompt in zip(sequences.sources, sequences.prompts, strict=True):
        tokens = prompt + prompt[2:4] + sequences._tokens(source.head, 3)
        want = host_chain(source, tokens, hidden, tapped, 3, 8)
        result = reference_chain(source, prompt, tokens, hidden, tapped, 3, 8)
        assert result[0] == want[0] and result[1] == pytest.approx(want[1], abs=1e-5)


def chain_source(table: ChainTable | None = None):
    return (table or ChainTable(4)).source("a", random_head(0, 16, 100, 4))


def set_chain(source, tokens, probabilities, num_tokens):
    source.table.set(np.array([source.row]), np.array([tokens]), np.array([probabilities]), np.array([num_tokens]))


def test_a_chain_speaks_while_the_draft_is_its_own():
    source = chain_source()
    source.begin([1, 2])
    assert source.peek() is None, "no chain yet"
    set_chain(source, [7, 8, -1, 9], [0.95, 0.5, 0.0, 0.9], 2)
    source.begin([1, 2])
    assert source.peek() == Guess(7, 11)
    source.follow(7)
    assert source.peek() == Guess(8, 6)
    source.follow(8)
    assert source.peek() is None, "the chain has ended"
    source.begin([1, 2])
    source.follow(6)
    assert source.peek() is None
    source.follow(7)
    assert source.peek() is None, "it must not find back to a chain that was left"
    source.begin([1, 2, 7])
    assert source.peek() is None, "the chain belongs to a shorter sequence"


def test_a_chain_of_numbers_that_are_none_is_silent():
    source = chain_source()
    set_chain(source, [7, 8], [float("nan"), 0.5], 1)
    source.begin([1])
    assert source.peek() is None
    set_chain(source, [7, 8], [1.0, 0.0], 1)
    source.begin([1])
    assert source.peek() == Guess(7, 11)


def test_a_chooser_drafts_from_a_chain_under_the_heads_name():
    source = chain_source()
    assert (source.source, source.prior) == (HeadSource.source, HeadSource.prior)
    set_chain(source, [7, 8], [0.95, 0.9], 2)
    chooser = DraftChooser([source])
    chooser.begin([1, 2])
    while chooser.extend(0.0):
        pass
    assert chooser.tokens == [7, 8] and chooser.chosen == ["head", "head"]


def test_rows_of_chains_are_given_once_and_again_without_what_they_held():
    table, head = ChainTable(4), random_head(0, 16, 100, 4)
    sources = {str(num): table.source(str(num), head) for num in range(200)}
    assert len({source.row for source in sources.values()} - {NOBODY}) == 200
    for num, source in enumerate(sources.values()):
        set_chain(source, [num], [0.9], 1)
        source.begin([1])
        assert source.peek().token == num
    row = sources["5"].row
    del sources["5"], source
    assert "5" not in table.row_of and not table.wanted[row]
    again = table.source("6", head)  # under the name of one that is still held
    assert again.row == row and table.row_of["6"] == row
    again.begin([1])
    assert again.peek() is None
    del sources["6"]
    assert table.row_of["6"] == row


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"max_state_size": 8}, "state_size is 16, heads on the device have at most 8"),
        ({"max_vocab": 99}, "vocab is 100"),
        ({"max_window": 2}, "copy_window is 4"),
        ({"tap_layers": [1, 5]}, "tap_layer is 0"),
        ({"hidden_size": 32}, "hidden_size 64, not 32"),
    ],
    ids=str,
)
def test_heads_that_do_not_fit_are_refused_with_the_reason(change, reason):
    heads = make_device_heads(**change)
    with pytest.raises(HeadError, match=reason):
        heads.add_head(random_head(0, 16, 100, 4))


def test_a_head_that_finds_no_memory_is_refused_and_holds_no_place(monkeypatch):
    heads, head = make_device_heads(max_heads=1), random_head(0, 16, 100, 4)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("specserve.drafters.head_device.head_tensors", full)
        with pytest.raises(HeadError, match="no memory for it on cpu"):
            heads.add_head(head)
    assert heads.add_head(head) == 0


def test_slots_are_given_once_a_head_and_again_after_it_left():
    heads = make_device_heads()
    a, b, c = (random_head(seed, 16, 100, 4) for seed in range(3))
    assert [heads.add_head(head) for head in (a, b, a)] == [0, 1, 0]
    with pytest.raises(HeadError, match="all 2 places"):
        heads.add_head(c)
    heads.remove_head(a)
    heads.remove_head(a)
    assert heads.id_of(a) == -1 and heads.add_head(c) == 0


def test_a_prompt_longer_than_its_place_goes_without_its_head():
    heads, head = make_device_heads(), random_head(0, 16, 100, 4)
    heads.add_head(head)
    assert heads.add_sequences([SeatedSequence(seat, [1] * (20 + seat), head) for seat in range(2)]) == [True, False]
    assert heads._pool.lens.tolist() == [20, 0, 0]


def test_a_sequence_that_comes_back_stands_behind_its_output():
    heads, head = make_device_heads(), random_head(0, 16, 100, 4, copy_start=1)
    heads.add_head(head)
    prompt = [5, 6, 7, 8, 9]
    heads.add_sequences([SeatedSequence(2, prompt, head, [6, 300, 8])])
    assert heads._pool.positions.tolist() == [0, 0, 4]
    written = []
    came_back = SeatedSequence(2, prompt, head, [6, 300, 8, 9], has_prompt=True)
    heads.add_sequences(
        [came_back], lambda writes: written.extend((idx.tolist(), new.tolist()) for _, idx, new in writes)
    )
    assert written == [([2], [5])]  # its place in the prompt, and no more


@pytest.mark.gpu
@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_mixed_heads_draft_what_head_source_drafts(dtype):
    sequences = Sequences(mixed_heads(), 22, VOCAB_SIZE, dtype, "cuda")
    for num_guesses in (8, 1, 4):
        sequences.step(num_guesses)


@pytest.mark.gpu
@needs_triton
def test_cuda_trained_heads_draft_what_head_source_drafts():
    sequences = Sequences(trained_heads(), 13, 49152, torch.bfloat16, "cuda")
    for num_guesses in (8, 6):
        sequences.step(num_guesses)


@pytest.mark.gpu
@needs_triton
def test_cuda_loop_replays_in_a_graph_for_a_head_that_joined_after_the_capture():
    first, second = random_head(1, 16, 100, 4, tap_layer=0), random_head(2, 40, 200, 8, tap_layer=0)
    prompt = second.config.vocab[:20]
    heads = make_device_heads("cuda")

    def ints(*values: int) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device="cuda")

    hidden, tapped = torch.randn(3, 64), torch.randn(2, 3, 64)
    static_hidden, static_taps = hidden.cuda(), tapped.cuda()
    sampled = torch.tensor([prompt[3], prompt[4], prompt[5]], device="cuda")
    rows = LoopRows(ints(-1), ints(-1), ints(0), ints(1), ints(1), ints(6), sampled)
    heads.launch(rows, static_hidden, static_taps, 6)  # compiles outside the capture, moves no pointer
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        heads.launch(rows, static_hidden, static_taps, 6)
    heads.add_head(first)
    head_id = heads.add_head(second)
    heads.add_sequences([SeatedSequence(1, prompt, second)])
    rows.seats.fill_(1)
    rows.head_ids.fill_(head_id)
    graph.replay()
    source = HeadSource(second, prompt)
    tokens = prompt + prompt[3:5]
    assert heads.guesses[0].tolist() == reference_chain(source, prompt, tokens, hidden, tapped[0], 1, 6)[0]
