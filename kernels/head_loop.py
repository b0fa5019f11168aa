"""The lookahead heads' whole loop on the device: each sequence drafts from its own proposals, without the host.

Semantics, for sequence s with a head, after verification: its copy pointer follows the tokens that were kept,
sampled[f .. f + n] with f = first_rows[s] and n = num_accepted[s]. The state starts from row last_row[s] of `hidden`
and of the layer that the head taps; then K times: feed the newest token (first the last one kept, then each guess),
score task vocabulary and copy window, guess the most likely token. The arithmetic is that of `specserve.drafters.head`
in fp32 on bf16 weights; `chain_reference` is the definition. Heads of any sizes share the launches.

Three launches a position, each beginning while the one in front ends: the cell and what it gives to the queries, scores
by blocks of the vocabulary, the choice. What is read of a head at a position is its state's gates, both queries, the
vocabulary's embeddings, and three rows of tables. Guesses behind a head's own draft length, behind what is wanted,
behind one that is not a number, and of sequences without head are -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from .dependent_launch import dependent_launch
from .head_loop_tables import (
    CELL_BLOCK,
    CHUNK,
    TOKEN_BLOCK,
    HeadScratch,
    HeadTables,
    HeadTensors,
    LoopRows,
    PromptPool,
)

TILE_ROWS = 8  # a tensor core's least, as the right operand
_BLOCKS_S = (64, 512, 4096)  # sequences of a launch, padded: few binaries, each is compiled once


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Sizes of grids and programs, by the sm_90 binaries for 132 SMs.

    A cell's program holds 40 KB of weights for d = 256 in 8 warps of 128 registers, one of scores 32 KB in 4 warps of
    up to 255: an SM has two of either, so that one asks for weights while the other multiplies.
    """

    cell_programs: int = 2 * 132
    cell_registers: int = 128  # a thread; left alone Triton 3.6 takes 198
    score_programs: int = 2 * 132
    block_d: int = 256  # inputs at once; wider heads go on in further blocks
    block_q: int = 512  # outputs of both queries at once
    warps: int = 8  # of a cell, each a part of its inputs


SIZES = _Sizes()


def chain_reference(
    head: HeadTensors,
    state_size: int,
    last: torch.Tensor,
    tapped: torch.Tensor,
    prompt: Sequence[int],
    position: int,
    kept: Sequence[int],
    num_guesses: int,
    jump_start: int = -1,
) -> tuple[list[int], list[float], int]:
    """The definition, written to be read, for one sequence whose pointer stands at `position` before `kept`.

    Guesses, their probabilities, and the pointer behind `kept`. last and tapped are [H].
    """
    w = {field.name: getattr(head, field.name).cpu().float() for field in fields(head)}
    num_tokens, width = head.embed.shape[0] - 1, head.slot_bias.shape[0]
    local = [int(w["local_of"][token]) for token in prompt]

    def follow(pointer: int, token: int) -> tuple[int, int]:
        for idx, seen in enumerate(prompt[pointer : pointer + width]):
            if seen == token:
                return pointer + idx + 1, 1 if idx == 0 else 2
        for idx in range(jump_start, len(prompt) - 1) if jump_start >= 0 else ():
            if prompt[idx] == token:
                return idx + 1, 2
        return pointer, 0

    moved = 0
    for token in kept:
        position, moved = follow(position, token)
    pointer, fed = position, int(w["local_of"][kept[-1]])
    normed = [F.rms_norm(h.cpu().float(), h.shape, eps=1e-6) for h in (last, tapped)]
    state = torch.tanh(w["init_weight"] @ torch.cat(normed) + w["init_bias"])  # [d]
    guesses: list[int] = []
    probs: list[float] = []
    for _ in range(num_guesses):
        window = local[pointer : pointer + width]
        following = num_tokens if not width else window[0] if window else 0
        from_x = w["token_gates"][fed] + w["next_gates"][following] + w["move_gates"][moved]  # [3, d]
        from_s = w["state_gates"] @ state  # [3, d]
        reset, update = torch.sigmoid(from_x[:2] + from_s[:2])
        candidate = torch.tanh(from_x[2] + reset * (from_s[2] + w["candidate_bias"]))
        state = candidate + update * (state - candidate)
        query, copy_query = (state @ w["query_weight"]).chunk(2)
        vocab = w["embed"] @ query + w["out_bias"]  # [U]
        entries = (state @ w["slot_weight"][:, :width] + w["slot_bias"])[: len(window)]
        entries = entries + w["embed"][window] @ copy_query * state_size**-0.5
        every = torch.softmax(torch.cat([vocab, entries]), 0)
        merged, copied = every[:num_tokens].clone(), every[num_tokens + 1 :].clone()
        for idx, token in enumerate(window):
            if token < num_tokens:
                merged[token] += copied[idx]
                copied[idx] = 0.0
        prob, fed = float(merged.max()), int(merged.argmax())
        guess = int(w["token_of"][fed])
        if len(window) and float(copied.max()) > prob:
            prob, fed = float(copied.max()), num_tokens
            guess = prompt[pointer + int(copied.argmax())]
        guesses.append(guess)
        probs.append(min(prob, 1.0))
        pointer, moved = follow(pointer, guess)
    return guesses, probs, position


def list_warps(num_seqs: int) -> int:
    """Of the program that looks at all sequences: 4 warps do not hold what there is to know of some thousands."""
    return 4 if num_seqs <= _BLOCKS_S[1] else 16


def head_loop_(
    guesses: torch.Tensor,
    probabilities: torch.Tensor,
    rows: LoopRows,
    hidden: torch.Tensor,
    tapped: torch.Tensor,
    tables: HeadTables,
    pool: PromptPool,
    scratch: HeadScratch,
) -> None:
    """Write guesses [S, K] int32, token ids, and probabilities [S, K] fp32; moves the pool's pointers.

    hidden is [L, H], normed, tapped [N, L, H] of the same dtype: layer outputs that heads read. Rows of both are those
    of `sampled`. 3 + 3 K launches. Each moves a pointer once, so a warm-up must name no sequences. CPU tensors work
    under Triton's interpreter, for tests.
    """
    num_seqs, num_guesses = guesses.shape
    hidden_size = hidden.shape[1]
    assert guesses.stride() == probabilities.stride() and guesses.stride(1) == 1
    assert guesses.dtype == torch.int32 and probabilities.dtype == torch.float32
    assert hidden.stride(1) == tapped.stride(2) == 1 and hidden.dtype == tapped.dtype
    assert rows.seats.shape == rows.head_ids.shape == rows.last_row.shape == rows.num_guesses.shape == (num_seqs,)
    assert 1 <= num_seqs <= min(scratch.input_tokens.shape[0], _BLOCKS_S[-1]), num_seqs
    import triton

    from . import head_loop_choice_triton as of_sequences
    from .head_loop_cells_triton import begin_states, step_cells
    from .head_loop_scores_triton import score

    r, s = rows, scratch
    capacity, state_size = s.states.shape[1:]
    chunks = -(-hidden_size // CHUNK)
    assert s.partials.shape[0] == 2 * chunks, (s.partials.shape, hidden_size)
    max_cells, max_blocks, width = s.slots.shape[0], s.block_tokens.shape[1], s.slots.shape[2]
    table, who = (tables.addresses, tables.sizes), (r.seats, r.head_ids, r.last_row)
    fed = (s.input_tokens, s.moves, s.next_tokens)
    prompt_stride, score_stride = pool.tokens.stride(0), s.scores.stride(0)
    most_blocks = triton.next_power_of_2(max_blocks)
    block_d = min(SIZES.block_d, triton.next_power_of_2(max(16, state_size)))
    block_cell = max(block_d, 16 * SIZES.warps)
    tile = {"TILE_ROWS": TILE_ROWS, "CELL_BLOCK": CELL_BLOCK}
    overlaps = dependent_launch(hidden.device)

    def programs(num_items: int, most: int) -> tuple[int]:
        return (min(num_items, most),)

    of_sequences.list_work[(num_seqs,)](
        s.cells, s.blocks, r.seats, r.head_ids, r.last_row, r.num_guesses, tables.sizes, num_seqs,
        TOKEN_BLOCK=TOKEN_BLOCK, BLOCK_S=next(block for block in _BLOCKS_S if num_seqs <= block),
        MOST_CELLS=triton.next_power_of_2(max_cells), MOST_BLOCKS=most_blocks, num_warps=list_warps(num_seqs), **tile,
    )  # fmt: skip
    begin_states[programs(num_seqs * max_cells * 2 * chunks, SIZES.cell_programs)](
        s.partials, s.squares, hidden, tapped, r.last_row, s.cells, *table,
        hidden_size, hidden.stride(0), tapped.stride(1), tapped.stride(0), capacity, state_size, chunks,
        IS_BF16=hidden.dtype == torch.bfloat16, CHUNK=CHUNK, PARTS=SIZES.warps, num_warps=SIZES.warps, num_stages=1,
        **tile, **overlaps | {"launch_pdl": False},
    )  # fmt: skip
    of_sequences.start_sequences[(num_seqs,)](
        s.states[0], *fed, s.draft_positions, pool.positions, pool.tokens, pool.local, pool.lens,
        r.seats, r.head_ids, r.first_rows, r.num_accepted, r.last_row, r.sampled, s.partials, s.squares, *table,
        hidden_size, capacity, state_size, chunks, prompt_stride,
        BLOCK_D=triton.next_power_of_2(state_size), WIDTH=width, num_warps=4, **overlaps,
    )  # fmt: skip
    for idx in range(num_guesses):
        old, new = s.states[idx % 2], s.states[1 - idx % 2]
        step_cells[programs(num_seqs * max_cells, SIZES.cell_programs)](
            new, s.queries, s.slots, old, *fed, s.cells, *table, capacity, state_size, idx,
            BLOCK_D=block_cell, PARTS=SIZES.warps, BLOCK_Q=SIZES.block_q, WIDTH=width,
            num_warps=SIZES.warps, num_stages=1, maxnreg=SIZES.cell_registers, **tile, **overlaps,
        )  # fmt: skip
        score[programs(num_seqs * (1 + max_blocks), SIZES.score_programs)](
            s.scores, s.block_stats, s.block_tokens, s.entry_scores, s.entry_tokens, s.queries, s.slots,
            s.draft_positions, pool.local, pool.lens, *who, r.num_guesses, s.blocks, *table,
            num_seqs, capacity, state_size, score_stride, max_blocks, prompt_stride, idx,
            TOKEN_BLOCK=TOKEN_BLOCK, BLOCK_D=block_d, WIDTH=width, num_warps=4, num_stages=1, **tile, **overlaps,
        )  # fmt: skip
        of_sequences.choose[(num_seqs,)](
            guesses, probabilities, *fed, s.draft_positions, s.scores, s.block_stats, s.block_tokens,
            s.entry_scores, s.entry_tokens, pool.tokens, pool.local, pool.lens, *who, r.num_guesses, *table,
            capacity, max_blocks, score_stride, prompt_stride, guesses.stride(0), idx,
            MOST_BLOCKS=most_blocks, TOKEN_BLOCK=TOKEN_BLOCK, WIDTH=width, num_warps=1, **overlaps,
        )  # fmt: skip
