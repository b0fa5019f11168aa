"""What the heads' loop reads and writes on the device: heads, prompts, a step's sequences, and what launches hand on.

A head is a row of `HeadTables`: addresses of its tensors and its sizes. Adding one writes that row, so a captured CUDA
graph goes on serving; tables have rows, buffers have columns for the largest. Semantics: head_loop.py.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch

CELL_BLOCK = 16  # units of the state that a program makes
TOKEN_BLOCK = 64  # of the task vocabulary that a program scores
CHUNK = 512  # hidden units of an item of the first product
WORK_WIDTH = 5  # int32s of an entry of a list of work


@dataclass(frozen=True, slots=True)
class HeadTensors:
    """One head where the kernels read it. d state size, U task vocabulary plus one, W window, V vocabulary, H hidden.

    d is a multiple of 16, so that rows of weights are aligned: zeros behind a head's own state size, which stay zero.
    What a token, the token at the pointer, and a move give to the cell's gates are tables of ready sums: fp32, as they
    are products, and read by a row a position instead of the weights that they were made of.
    """

    init_weight: torch.Tensor  # [d, 2H] bf16, columns: last hidden state, then the tapped one
    init_bias: torch.Tensor  # [d] fp32
    embed: torch.Tensor  # [U, d] bf16, "another token" last
    out_bias: torch.Tensor  # [U] fp32
    token_gates: torch.Tensor  # [U, 3, d] fp32: reset, update, candidate
    next_gates: torch.Tensor  # [U, 3, d] fp32, of the token at the pointer
    move_gates: torch.Tensor  # [3, 3, d] fp32, the gates' bias included
    state_gates: torch.Tensor  # [3, d, d] bf16, the state's columns last
    candidate_bias: torch.Tensor  # [d] fp32, inside the reset
    query_weight: torch.Tensor  # [d, 2d] bf16: state -> query on the vocabulary, then on the window's tokens
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

    addresses: torch.Tensor  # [heads, 14] int64, in the order of HeadTensors
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
        assert head.embed.dtype == torch.bfloat16 and head.token_gates.dtype == head.out_bias.dtype == torch.float32
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
    """What launches hand on, for up to S sequences and heads up to the given sizes.

    D, the largest state, is a multiple of 16; C and B are the blocks of the largest state and vocabulary.
    """

    cells: torch.Tensor  # [1 + S * C, WORK_WIDTH] int32, a list of work
    blocks: torch.Tensor  # [1 + S * B, WORK_WIDTH] int32
    input_tokens: torch.Tensor  # [S] int32, in the head's vocabulary
    moves: torch.Tensor  # [S] int32
    next_tokens: torch.Tensor  # [S] int32, at the copy pointer, in the head's vocabulary
    draft_positions: torch.Tensor  # [S] int32, of the copy pointer within the draft
    partials: torch.Tensor  # [chunks, S, D] fp32
    squares: torch.Tensor  # [chunks, S] fp32
    states: torch.Tensor  # [2, S, D] fp32
    queries: torch.Tensor  # [C, S, 2D] fp32: what each block of the state gives to both queries
    slots: torch.Tensor  # [C, S, width] fp32: and to the window's entries; width is a power of two
    scores: torch.Tensor  # [S, max_vocab + 1] fp32
    block_stats: torch.Tensor  # [3, S, B] fp32: best score, largest of all, sum of exp(score - largest)
    block_tokens: torch.Tensor  # [S, B] int32, with the best score
    entry_scores: torch.Tensor  # [S, width] fp32, -inf where the window is not filled
    entry_tokens: torch.Tensor  # [S, width] int32, in the head's vocabulary

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
        def floats(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=device)

        def ints(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        max_state_size = -(-max_state_size // 16) * 16
        chunks = 2 * -(-hidden_size // CHUNK)
        num_cells, num_blocks = -(-max_state_size // CELL_BLOCK), -(-(max_vocab + 1) // TOKEN_BLOCK)
        width = max(16, 1 << (max_window - 1).bit_length() if max_window else 0)
        input_tokens, moves, next_tokens, draft_positions = ints(4, num_seqs)
        return cls(
            cells=ints(1 + num_seqs * num_cells, WORK_WIDTH),
            blocks=ints(1 + num_seqs * num_blocks, WORK_WIDTH),
            input_tokens=input_tokens,
            moves=moves,
            next_tokens=next_tokens,
            draft_positions=draft_positions,
            partials=floats(chunks, num_seqs, max_state_size),
            squares=floats(chunks, num_seqs),
            states=floats(2, num_seqs, max_state_size),
            queries=floats(num_cells, num_seqs, 2 * max_state_size),
            slots=floats(num_cells, num_seqs, width),
            scores=floats(num_seqs, max_vocab + 1),
            block_stats=floats(3, num_seqs, num_blocks),
            block_tokens=ints(num_seqs, num_blocks),
            entry_scores=floats(num_seqs, width),
            entry_tokens=ints(num_seqs, width),
        )


@dataclass(frozen=True, slots=True)
class LoopRows:
    """The step's sequences and what verification left; views of static buffers. Equal heads are best neighbours."""

    seats: torch.Tensor  # [S] int32, places in the pool, each at most once; -1: none
    head_ids: torch.Tensor  # [S] int32, -1: none
    first_rows: torch.Tensor  # [S] int32, row of the newest token
    num_accepted: torch.Tensor  # [S] int32
    last_row: torch.Tensor  # [S] int32, -1: no token was drawn
    num_guesses: torch.Tensor  # [S] int32, at most so many are wanted
    sampled: torch.Tensor  # [L] int64
