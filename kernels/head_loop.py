"""The lookahead heads' whole loop on the device: each sequence drafts from its own proposals, without the host.

Semantics, for sequence s with a head, after verification: its copy pointer follows the tokens that were kept,
sampled[f .. f + n] with f = first_rows[s] and n = num_accepted[s]. The state starts from row last_row[s] of `hidden`
and of the layer that the head taps; then K times: feed the newest token (first the last one kept, then each guess),
score task vocabulary and copy window, guess the most likely token. The arithmetic is that of `specserve.drafters.head`
in fp32 on bf16 weights; `chain_reference` is the definition. Heads of any sizes share the launches.

A head is a row of `HeadTables`: addresses of its tensors and its sizes. Adding one writes that row, so a captured CUDA
graph goes on serving; tables have rows, buffers have columns for the largest. Plain launches, five a position.
Guesses behind a head's own draft length, behind one that is not a number, and of sequences without head are -1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from .tiles import build_tiles_

TILE_ROWS = 16
_BLOCK_N = 32
_BLOCK_K = 64
_CELL_BLOCK_K = 32  # six products at a time: more would not fit into registers
_CHUNK = 512  # hidden units a program of the first product


@dataclass(frozen=True, slots=True)
class HeadTensors:
    """One head where the kernels read it. d state size, U task vocabulary plus one, W window, V vocabulary.

    d is a multiple of 16, so that rows of weights are aligned: zeros behind a head's own state size, which stay zero.
    """

    init_weight: torch.Tensor  # [2H, d] bf16
    init_bias: torch.Tensor  # [d] fp32
    embed: torch.Tensor  # [U, d] bf16, "another token" last
    out_bias: torch.Tensor  # [U] fp32
    moves: torch.Tensor  # [3, d] bf16
    next_weight: torch.Tensor  # [d, d] bf16
    gates_x: torch.Tensor  # [d, 3d] bf16
    gates_s: torch.Tensor  # [d, 3d] bf16
    gates_bias: torch.Tensor  # [3d] fp32
    candidate_bias: torch.Tensor  # [d] fp32
    out_weight: torch.Tensor  # [d, d] bf16
    copy_weight: torch.Tensor  # [d, d] bf16
    slot_weight: torch.Tensor  # [d, W up to a multiple of 16] bf16
    slot_bias: torch.Tensor  # [W] fp32
    local_of: torch.Tensor  # [V] int32: index in the task vocabulary, U - 1 for other tokens
    token_of: torch.Tensor  # [U - 1] int32

    @property
    def num_bytes(self) -> int:
        return sum(getattr(self, field.name).nbytes for field in fields(self))


@dataclass(frozen=True, slots=True)
class HeadTables:
    """Where the heads are; row h is head id h."""

    addresses: torch.Tensor  # [heads, 16] int64, in the order of HeadTensors
    # [heads, 7] int32: d, U - 1, W, draft length (0: no head), row of `tapped`, own state size, first prompt token that
    # the copy pointer may jump behind (-1: none)
    sizes: torch.Tensor

    @classmethod
    def allocate(cls, max_heads: int, device: torch.device | str) -> HeadTables:
        addresses = torch.zeros(max_heads, len(fields(HeadTensors)), dtype=torch.int64, device=device)
        return cls(addresses, torch.zeros(max_heads, 7, dtype=torch.int32, device=device))

    def set(
        self, head_id: int, head: HeadTensors, state_size: int, draft_len: int, tap: int, jump_start: int = -1
    ) -> None:
        """`head` must stay alive until the id is set again or no launch names it; `state_size` is without zeros."""
        tensors = [getattr(head, field.name) for field in fields(HeadTensors)]
        assert all(tensor.is_contiguous() and tensor.data_ptr() % 16 == 0 for tensor in tensors)
        assert head.embed.shape[1] % 16 == head.slot_weight.shape[1] % 16 == 0
        assert head.embed.dtype == torch.bfloat16 and head.out_bias.dtype == torch.float32
        d, num_tokens, width = head.embed.shape[1], head.embed.shape[0] - 1, head.slot_bias.shape[0]
        self.addresses[head_id] = torch.tensor([tensor.data_ptr() for tensor in tensors])
        sizes = [d, num_tokens, width, draft_len, tap, state_size, jump_start]
        self.sizes[head_id] = torch.tensor(sizes, dtype=torch.int32)


@dataclass(frozen=True, slots=True)
class PromptPool:
    """What the heads know of each running sequence; C places."""

    tokens: torch.Tensor  # [C, max_len] int32, the prompt
    local: torch.Tensor  # [C, max_len] int32, the prompt in its head's vocabulary
    lens: torch.Tensor  # [C] int32
    positions: torch.Tensor  # [C] int32, of the copy pointer behind the tokens that were kept

    @classmethod
    def allocate(cls, num_seqs: int, max_len: int, device: torch.device | str) -> PromptPool:
        prompts = torch.zeros(2, num_seqs, max_len, dtype=torch.int32, device=device)
        ints = torch.zeros(2, num_seqs, dtype=torch.int32, device=device)
        return cls(prompts[0], prompts[1], ints[0], ints[1])


@dataclass(frozen=True, slots=True)
class HeadScratch:
    """What launches hand on, for up to S sequences and heads up to the given sizes; D is a multiple of 16."""

    tiles: torch.Tensor  # [S, 3] int32, of sequences with one head
    input_tokens: torch.Tensor  # [S] int32, in the head's vocabulary
    moves: torch.Tensor  # [S] int32
    draft_positions: torch.Tensor  # [S] int32, of the copy pointer within the draft
    partials: torch.Tensor  # [chunks, S, D] fp32
    squares: torch.Tensor  # [chunks, S] fp32
    states: torch.Tensor  # [2, S, D] fp32
    x: torch.Tensor  # [S, D] fp32
    queries: torch.Tensor  # [2, S, D] fp32
    scores: torch.Tensor  # [S, max_vocab + 1] fp32
    entry_scores: torch.Tensor  # [S, max_window] fp32

    @classmethod
    def allocate(
        cls,
        num_seqs: int,
        hidden_size: int,
        max_state_size: int,
        max_vocab: int,
        max_window: int,
        device: torch.device | str,
    ) -> HeadScratch:
        def make(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        ints = torch.zeros(3, num_seqs, dtype=torch.int32, device=device)
        max_state_size = -(-max_state_size // 16) * 16
        chunks = 2 * -(-hidden_size // _CHUNK)
        return cls(
            tiles=torch.zeros(num_seqs, 3, dtype=torch.int32, device=device),
            input_tokens=ints[0],
            moves=ints[1],
            draft_positions=ints[2],
            partials=make(chunks, num_seqs, max_state_size),
            squares=make(chunks, num_seqs),
            states=make(2, num_seqs, max_state_size),
            x=make(num_seqs, max_state_size),
            queries=make(2, num_seqs, max_state_size),
            scores=make(num_seqs, max_vocab + 1),
            entry_scores=make(num_seqs, max(1, max_window)),
        )


@dataclass(frozen=True, slots=True)
class LoopRows:
    """The step's sequences and what verification left; views of static buffers. Equal heads are best neighbours."""

    seats: torch.Tensor  # [S] int32, places in the pool, each at most once; -1: none
    head_ids: torch.Tensor  # [S] int32, -1: none
    first_rows: torch.Tensor  # [S] int32, row of the newest token
    num_accepted: torch.Tensor  # [S] int32
    last_row: torch.Tensor  # [S] int32, -1: no token was drawn
    sampled: torch.Tensor  # [L] int64


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
    d, num_tokens, width = w["embed"].shape[1], head.embed.shape[0] - 1, head.slot_bias.shape[0]
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
    state = torch.tanh(torch.cat(normed) @ w["init_weight"] + w["init_bias"])  # [d]
    guesses: list[int] = []
    probs: list[float] = []
    for _ in range(num_guesses):
        window = local[pointer : pointer + width]
        following = num_tokens if not width else window[0] if window else 0
        x = w["embed"][fed] + w["moves"][moved] + w["embed"][following] @ w["next_weight"]
        from_x, from_s = x @ w["gates_x"] + w["gates_bias"], state @ w["gates_s"]
        reset, update = torch.sigmoid(from_x[: 2 * d] + from_s[: 2 * d]).chunk(2)
        candidate = torch.tanh(from_x[2 * d :] + reset * (from_s[2 * d :] + w["candidate_bias"]))
        state = candidate + update * (state - candidate)
        vocab = w["embed"] @ (state @ w["out_weight"]) + w["out_bias"]  # [U]
        entries = (state @ w["slot_weight"][:, :width] + w["slot_bias"])[: len(window)]
        entries = entries + w["embed"][window] @ (state @ w["copy_weight"]) * state_size**-0.5
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
    of `sampled`. 4 + 5 K launches. Each moves a pointer once, so a warm-up must name no sequences. CPU tensors work
    under Triton's interpreter, for tests.
    """
    num_seqs, num_guesses = guesses.shape
    hidden_size = hidden.shape[1]
    assert guesses.stride() == probabilities.stride() and guesses.stride(1) == 1
    assert guesses.dtype == torch.int32 and probabilities.dtype == torch.float32
    assert hidden.stride(1) == tapped.stride(2) == 1 and hidden.dtype == tapped.dtype
    assert rows.seats.shape == rows.head_ids.shape == rows.last_row.shape == (num_seqs,)
    assert 1 <= num_seqs <= scratch.x.shape[0], num_seqs
    import triton

    from . import head_loop_triton as kernels

    r, s = rows, scratch
    capacity, state_size = s.x.shape
    tiles, num_tiles = s.tiles[:num_seqs], num_seqs  # each sequence may have a head of its own
    max_window, table = s.entry_scores.shape[1], (tables.addresses, tables.sizes)
    width = max(16, triton.next_power_of_2(max_window))
    blocks = triton.cdiv(state_size, _BLOCK_N)
    chunks = -(-hidden_size // _CHUNK)
    assert s.partials.shape[0] == 2 * chunks, (s.partials.shape, hidden_size)
    tile = {"TILE_ROWS": TILE_ROWS, "BLOCK_N": _BLOCK_N, "BLOCK_K": _BLOCK_K}
    prompt_stride, state_stride = pool.tokens.stride(0), s.x.stride(0)
    build_tiles_(tiles, r.head_ids, TILE_ROWS)
    kernels.walk_pointers[(num_seqs,)](
        s.input_tokens, s.moves, s.draft_positions, pool.positions, pool.tokens, pool.lens, r.seats, r.head_ids,
        r.first_rows, r.num_accepted, r.last_row, r.sampled, *table, prompt_stride, WIDTH=width,
    )  # fmt: skip
    kernels.begin_states[(num_tiles, blocks, 2 * chunks)](
        s.partials, s.squares, hidden, tapped, r.last_row, tiles, *table,
        hidden_size, hidden.stride(0), tapped.stride(1), tapped.stride(0), capacity, state_stride, chunks,
        IS_BF16=hidden.dtype == torch.bfloat16, CHUNK=_CHUNK, **tile,
    )  # fmt: skip
    kernels.finish_states[(num_seqs, blocks)](
        s.states[0], s.partials, s.squares, r.head_ids, r.last_row, *table,
        hidden_size, capacity, state_stride, chunks, BLOCK_N=_BLOCK_N,
    )  # fmt: skip
    for idx in range(num_guesses):
        old, new = s.states[idx % 2], s.states[1 - idx % 2]
        kernels.feed[(num_tiles, blocks)](
            s.x, s.input_tokens, s.moves, s.draft_positions, pool.local, pool.lens, r.seats, tiles, *table,
            prompt_stride, state_stride, idx, **tile,
        )  # fmt: skip
        kernels.step_cells[(num_tiles, blocks)](
            new, old, s.x, r.last_row, tiles, *table, state_stride, idx, **tile | {"BLOCK_K": _CELL_BLOCK_K}
        )
        kernels.make_queries[(num_tiles, triton.cdiv(max(state_size, max_window), _BLOCK_N), 3)](
            s.queries, s.entry_scores, new, r.last_row, tiles, *table,
            capacity, state_stride, s.entry_scores.stride(0), idx, **tile,
        )  # fmt: skip
        kernels.score_tokens[(num_tiles, triton.cdiv(s.scores.shape[1], _BLOCK_N))](
            s.scores, s.queries[0], r.last_row, tiles, *table, state_stride, s.scores.stride(0), idx, **tile
        )
        kernels.choose[(num_seqs,)](
            guesses, probabilities, s.input_tokens, s.moves, s.draft_positions, s.scores, s.entry_scores, s.queries[1],
            pool.tokens, pool.local, pool.lens, r.seats, r.head_ids, r.last_row, *table, prompt_stride,
            state_stride, s.scores.stride(0), s.entry_scores.stride(0), guesses.stride(0), idx,
            WIDTH=width, BLOCK_U=1024, BLOCK_K=_BLOCK_K,
        )  # fmt: skip
