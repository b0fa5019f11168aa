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

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .native.lora import NativeLoraBatch
    from .torch.lora import LoraBatch


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one forward pass. Tensors live on the model's device; lists are their host copies for CPU paths."""

    tokens: torch.Tensor  # [T] int64, in [0, V)
    positions: torch.Tensor  # [T] int64, 0-based position in the sequence
    slot_mapping: torch.Tensor  # [T] int64, where each row's K and V go: block * block_size + offset
    block_tables: torch.Tensor  # [S, N] int32, physical blocks in order; padding is 0 and never read
    cu_query_lens: torch.Tensor  # [S + 1] int32, first row of each sequence, then T
    context_lens: torch.Tensor  # [S] int32, tokens visible to the last row: already cached ones plus this step's rows
    hidden_indices: torch.Tensor  # [L + P] int64, rows whose hidden states are needed: those for logits, ascending; P
    block_size: int
    query_lens_list: list[int]  # [S]
    context_lens_list: list[int]  # [S]
    block_tables_list: list[list[int]]  # [S][blocks in use], unpadded
    lora: LoraBatch | NativeLoraBatch | None  # None when no row has an adapter

    @property
    def num_rows(self) -> int:
        return self.tokens.shape[0]
