"""The one ragged batch of a step: prefill chunks, decodes and verifications differ only in their number of rows.

Letters in shape comments, everywhere in the project:
    T rows (tokens) of the step      S sequences in the step        L rows whose logits are needed
    P rows that are pooled
    H hidden size   V vocabulary     Hq, Hkv query and KV heads     D head size
    N block-table width              R LoRA rank                    K draft length

`ModelRunner` fills it, nobody changes it after that, and it is passed explicitly. Rows of one sequence are adjacent and
in order of position; sequences of one adapter are adjacent, so that they form one LoRA segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .native.lora import NativeLoraBatch
    from .torch.lora import LoraBatch


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass, as lists; and as tensors on the model's device, for who asks: behind a step of the
    native path each of torch's small operations takes 40 us or more, and it needs none."""

    token_ids: Sequence[int]  # [T] in [0, V)
    starts: Sequence[int]  # [S] position of each sequence's first row
    query_lens: Sequence[int]  # [S] rows of each
    tables: Sequence[Sequence[int]]  # [S][N] physical blocks in order; those behind the last row's are not read
    hidden_rows: Sequence[int]  # [L + P] rows whose hidden states are needed: those for logits, ascending; P
    num_logits: int  # L
    block_size: int
    device: torch.device
    lora: LoraBatch | NativeLoraBatch | None  # None when no row has an adapter

    @property
    def num_rows(self) -> int:
        return len(self.token_ids)

    @cached_property
    def context_lens(self) -> list[int]:
        """[S] tokens visible to each sequence's last row: already cached ones plus this step's rows."""
        return [start + num for start, num in zip(self.starts, self.query_lens, strict=True)]

    @cached_property
    def tokens(self) -> torch.Tensor:
        """[T] int64."""
        return torch.tensor(self.token_ids, device=self.device)

    @cached_property
    def positions(self) -> torch.Tensor:
        """[T] int64, 0-based position in the sequence."""
        spans = map(range, self.starts, self.context_lens)
        return torch.tensor(list(itertools.chain.from_iterable(spans)), device=self.device)

    @cached_property
    def slot_mapping(self) -> torch.Tensor:
        """[T] int64, where each row's K and V go: block * block_size + offset."""
        size = self.block_size
        spans = zip(self.tables, self.starts, self.context_lens, strict=True)
        slots = [table[at // size] * size + at % size for table, start, end in spans for at in range(start, end)]
        return torch.tensor(slots, device=self.device)

    @cached_property
    def hidden_indices(self) -> torch.Tensor:
        """[L + P] int64."""
        return torch.tensor(self.hidden_rows, dtype=torch.int64, device=self.device)
