"""Lookahead heads on a device: who is where in the tables of kernels/head_loop.py.

`DeviceHeads` owns the heads' tensors, the static buffers and the places of running sequences; `launch` only launches,
so a CUDA graph can hold it. What came out is brought back with the step's tokens and spoken by `chains.ChainSource`.
Whoever drives this says where a sequence is; a place is given by one sequence at a time, from `add_sequences` on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from ..kernels.head_loop import head_loop_
from ..kernels.head_loop_tables import HeadScratch, HeadTables, HeadTensors, LoopRows, PromptPool
from .copy_pointer import CopyPointer
from .head import WEIGHT_NAMES
from .head_files import HeadError, LookaheadHeadFile

MAX_STATE_SIZE, MAX_VOCAB, MAX_WINDOW = 512, 8192, 16  # of heads that a device takes


def head_tensors(head: LookaheadHeadFile, vocab_size: int, device: torch.device | str) -> HeadTensors:
    """The head without the padding of its vocabulary, weights in bf16 as the files have them, rows aligned.

    What is added up in the cell's input is multiplied here, once, in fp32.
    """
    vocab = torch.tensor(head.config.vocab, dtype=torch.int32)
    num, d = len(vocab), head.config.state_size
    zeros = -d % 16
    w = {name: getattr(head.weights, name)[0].float().to(device) for name in WEIGHT_NAMES}

    def matrix(x: torch.Tensor, more_columns: int = zeros, more_rows: int = 0) -> torch.Tensor:
        return F.pad(x, (0, more_columns, 0, more_rows)).to(torch.bfloat16).contiguous()

    def floats(x: torch.Tensor, more: int = zeros) -> torch.Tensor:
        return F.pad(x, (0, more)).contiguous().clone()

    def gates(x: torch.Tensor) -> torch.Tensor:
        return floats(x.unflatten(-1, (3, d)))  # [rows, 3, d]

    def unpadded(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:num], x[-1:]])

    local_of = torch.full((vocab_size,), num, dtype=torch.int32)
    local_of[vocab.long()] = torch.arange(num, dtype=torch.int32)
    embed = unpadded(w["embed"])
    queries = [F.pad(w[name], (0, zeros)) for name in ("out_weight", "copy_weight")]
    return HeadTensors(
        init_weight=matrix(w["init_weight"].T, 0, zeros),
        init_bias=floats(w["init_bias"][0]),
        embed=matrix(embed),
        out_bias=floats(unpadded(w["out_bias"][0]), 0),
        token_gates=gates(embed @ w["gates_x"]),
        next_gates=gates(embed @ w["next_weight"] @ w["gates_x"]),
        move_gates=gates(w["moves"] @ w["gates_x"] + w["gates_bias"]),
        state_gates=matrix(F.pad(w["gates_s"].view(d, 3, d).permute(1, 2, 0), (0, 0, 0, zeros))),
        candidate_bias=floats(w["candidate_bias"][0]),
        query_weight=matrix(torch.cat(queries, 1), 0, zeros),
        slot_weight=matrix(w["slot_weight"], -head.config.copy_window % 16, zeros),
        slot_bias=floats(w["slot_bias"][0], 0),
        local_of=local_of.to(device),
        token_of=vocab.to(device),
    )


@dataclass(frozen=True, slots=True)
class SeatedSequence:
    """A sequence that takes a place, or comes back to the one that its prompt lies at.

    `output` is what it has already: the next launch follows only what comes then.
    """

    seat: int
    prompt: Sequence[int]
    head: LookaheadHeadFile
    output: Sequence[int] = ()
    has_prompt: bool = False


Write = Callable[[Sequence[tuple[torch.Tensor, np.ndarray, np.ndarray]]], None]


def write_now(writes: Sequence[tuple[torch.Tensor, np.ndarray, np.ndarray]]) -> None:
    """table.view(-1)[index] = values of each, int64 and int32; waits for the device to copy from ordinary memory."""
    for table, index, values in writes:
        device = table.device
        table.view(-1).index_copy_(0, torch.from_numpy(index).to(device), torch.from_numpy(values).to(device))


class DeviceHeads:
    """Heads of up to the given sizes for up to `max_num_seqs` sequences; all memory but the heads' is taken here.

    `results` [2, max_num_seqs, max_draft_len] int32 holds `guesses` (token ids, -1: none) and the bits of
    `probabilities`, so that one copy brings both; launches fill [:, :S, :K].
    """

    def __init__(
        self,
        *,
        hidden_size: int,
        vocab_size: int,
        tap_layers: Sequence[int],
        max_heads: int,
        max_num_seqs: int,
        max_prompt_len: int,
        max_draft_len: int,
        max_state_size: int = MAX_STATE_SIZE,
        max_vocab: int = MAX_VOCAB,
        max_window: int = MAX_WINDOW,
        device: torch.device | str,
    ) -> None:
        self.tap_layers = tuple(tap_layers)  # row of `tapped` -> layer
        self._limits = {"state_size": max_state_size, "copy_window": max_window, "vocab": max_vocab}
        self._hidden_size, self._vocab_size = hidden_size, vocab_size
        self._max_prompt_len, self._device = max_prompt_len, torch.device(device)
        self._tables = HeadTables.allocate(max_heads, device)
        self._pool = PromptPool.allocate(max_num_seqs, max_prompt_len, device)
        self._scratch = HeadScratch.allocate(max_num_seqs, hidden_size, max_state_size, max_vocab, max_window, device)
        self.results = torch.full((2, max_num_seqs, max_draft_len), -1, dtype=torch.int32, device=device)
        self.guesses = self.results[0]  # [S, K] int32
        self.probabilities = self.results[1].view(torch.float32)  # [S, K]
        self._heads: dict[int, tuple[LookaheadHeadFile, HeadTensors]] = {}  # by head id
        self._local_of: dict[int, np.ndarray] = {}  # by head id, on the host
        self._id_of: dict[int, int] = {}  # id() of a head -> its number in the tables

    def add_head(self, head: LookaheadHeadFile) -> int:
        """Its number in the tables; a new one is brought to the device. Raises `HeadError` where it does not fit."""
        head_id = self._id_of.get(id(head))
        if head_id is not None:
            return head_id
        config = head.config
        sizes = {"state_size": config.state_size, "copy_window": config.copy_window, "vocab": len(config.vocab)}
        for field, limit in self._limits.items():
            if sizes[field] > limit:
                raise HeadError(f"{field} is {sizes[field]}, heads on the device have at most {limit}")
        if config.tap_layer not in self.tap_layers:
            raise HeadError(f"tap_layer is {config.tap_layer}, the device keeps the output of {list(self.tap_layers)}")
        if config.hidden_size != self._hidden_size or config.vocab[-1] >= self._vocab_size:
            raise HeadError(f"it is for another model: hidden_size {config.hidden_size}, not {self._hidden_size}")
        free = set(range(self._tables.sizes.shape[0])) - self._heads.keys()
        if not free:
            raise HeadError(f"all {len(self._heads)} places for heads on the device are taken")
        head_id = min(free)
        try:
            tensors = head_tensors(head, self._vocab_size, self._device)
        except torch.OutOfMemoryError as error:
            raise HeadError(f"there is no memory for it on {self._device}") from error
        tap, jump_start = self.tap_layers.index(config.tap_layer), config.copy_start if config.copy_jumps else -1
        self._tables.set(head_id, tensors, config.state_size, config.draft_len, tap, jump_start)
        self._heads[head_id] = head, tensors
        self._local_of[head_id] = tensors.local_of.cpu().numpy()
        self._id_of[id(head)] = head_id
        return head_id

    def id_of(self, head: LookaheadHeadFile) -> int:
        """Its number in the tables, -1 if it was not added."""
        return self._id_of.get(id(head), -1)

    def tensors(self, head: LookaheadHeadFile) -> HeadTensors:
        """What is held of a head that was added."""
        return self._heads[self._id_of[id(head)]][1]

    def remove_head(self, head: LookaheadHeadFile) -> None:
        """Let go of a head that no later launch names; unknown ones are ignored."""
        head_id = self._id_of.pop(id(head), None)
        if head_id is not None:
            self._tables.sizes[head_id].zero_()
            del self._heads[head_id], self._local_of[head_id]

    def add_sequences(self, sequences: Sequence[SeatedSequence], write: Write = write_now) -> list[bool]:
        """They take their places; False for one whose prompt is too long, so that it goes without its head.

        `write` brings entries to tables on the device, before the next launch.
        """
        pool, index, values = self._pool, [], []
        seats, positions, new_seats, lens = [], [], [], []
        fits = [len(one.prompt) <= self._max_prompt_len for one in sequences]
        for one, has_room in zip(sequences, fits, strict=True):
            if not has_room:
                continue
            config = one.head.config
            pointer = CopyPointer(one.prompt, config.copy_start, config.copy_window, config.copy_jumps)
            for token in one.output:
                pointer.follow(token)
            seats.append(one.seat)
            positions.append(pointer.position)
            if not one.has_prompt:
                tokens = np.array(one.prompt, np.int32)
                index.append(np.arange(len(tokens)) + one.seat * self._max_prompt_len)
                values.append(np.stack([tokens, self._local_of[self._id_of[id(one.head)]][tokens]]))
                new_seats.append(one.seat)
                lens.append(len(tokens))
        writes = []
        if index:
            places, both = np.concatenate(index), np.concatenate(values, axis=1)
            writes.append((pool.lens, np.array(new_seats), np.array(lens, np.int32)))
            writes += [(pool.tokens, places, both[0]), (pool.local, places, both[1])]
        if seats:
            writes.append((pool.positions, np.array(seats), np.array(positions, np.int32)))
        write(writes)
        return fits

    def launch(self, rows: LoopRows, hidden: torch.Tensor, tapped: torch.Tensor, num_guesses: int) -> None:
        """Draft for the sequences of `rows`: `guesses` and `probabilities` [:S, :num_guesses] are written.

        hidden [L, H] and tapped [layers, L, H] are rows that logits were made of, in the order of `sampled`.
        """
        num_seqs = rows.seats.shape[0]
        head_loop_(
            self.guesses[:num_seqs, :num_guesses],
            self.probabilities[:num_seqs, :num_guesses],
            rows,
            hidden,
            tapped,
            self._tables,
            self._pool,
            self._scratch,
        )
