"""Verification on the device: how many leading drafts of each sequence equal what was drawn at their positions.

Semantics, for sequence s whose newest token is the step's input at row f = first_rows[s], with d = num_drafts[s] drafts
behind it (tokens[f+1 .. f+d], one row each; rows of input and of logits coincide):
    num_accepted[s] = the largest n <= d such that sampled[f+i] == tokens[f+1+i] for all i < n
    last_row[s] = f + num_accepted[s], whose hidden state drew the last token that is kept
The rule of `specserve.schedule.verifier`. Padding has first row -1 and gets (0, -1); nothing of it is read.
"""

from __future__ import annotations

import torch

MAX_DRAFTS = 64


def verify_reference(
    sampled: torch.Tensor, tokens: torch.Tensor, first_rows: list[int], num_drafts: list[int]
) -> tuple[list[int], list[int]]:
    """The definition, written to be read: (num_accepted, last_row) by sequence."""
    accepted, last = [], []
    for first, num in zip(first_rows, num_drafts, strict=True):
        n = 0
        while first >= 0 and n < num and sampled[first + n] == tokens[first + 1 + n]:
            n += 1
        accepted.append(n)
        last.append(first + n)
    return accepted, last


def verify_drafts_(
    num_accepted: torch.Tensor,
    last_row: torch.Tensor,
    sampled: torch.Tensor,
    tokens: torch.Tensor,
    first_rows: torch.Tensor,
    num_drafts: torch.Tensor,
) -> None:
    """Write num_accepted and last_row [S] int32; sampled and tokens [L] int64, first_rows and num_drafts [S] int32.

    No sequence has more than `MAX_DRAFTS` drafts. CPU tensors work under Triton's interpreter, for tests.
    """
    for table in (num_accepted, last_row, first_rows, num_drafts):
        assert table.dtype == torch.int32 and table.shape == first_rows.shape, (table.dtype, table.shape)
    assert sampled.dtype == tokens.dtype == torch.int64, (sampled.dtype, tokens.dtype)
    from .verify_triton import verify_drafts

    verify_drafts[(first_rows.shape[0],)](
        num_accepted, last_row, sampled, tokens, first_rows, num_drafts, MAX_DRAFTS=MAX_DRAFTS
    )
