"""Triton kernel of verification: a program a sequence. verify.py launches it and states what it computes."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def verify_drafts(num_accepted, last_row, sampled, tokens, first_rows, num_drafts, MAX_DRAFTS: tl.constexpr):
    """Grid (sequences)."""
    seq = tl.program_id(0)
    first = tl.load(first_rows + seq)
    num = tl.where(first >= 0, tl.minimum(tl.load(num_drafts + seq), MAX_DRAFTS), 0)
    idx = tl.arange(0, MAX_DRAFTS)
    rows = tl.maximum(first, 0) + idx
    drawn = tl.load(sampled + rows, mask=idx < num, other=0)
    draft = tl.load(tokens + rows + 1, mask=idx < num, other=0)
    accepted = tl.min(tl.where((idx < num) & (drawn != draft), idx, num), axis=0)
    tl.store(num_accepted + seq, accepted)
    tl.store(last_row + seq, tl.where(first >= 0, first + accepted, -1))
