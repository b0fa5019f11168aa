"""Drafts of several sequences with some of them right, for the verification kernel on any device."""

from __future__ import annotations

import random
from typing import NamedTuple

import torch

from specserve.kernels.verify import verify_drafts_
from specserve.verifier import accepted_tokens


class Verification(NamedTuple):
    sampled: torch.Tensor  # [L] int64
    tokens: torch.Tensor  # [L] int64
    first_rows: torch.Tensor  # [S] int32, -1: padding
    num_drafts: torch.Tensor  # [S] int32


def make_verification(seed: int, num_seqs: int = 9) -> Verification:
    """Sequences of 0 to 64 drafts, none, some or all right; every third place is padding."""
    rng = random.Random(seed)
    sampled, tokens, first_rows, num_drafts = [], [], [], []
    for idx in range(num_seqs):
        if idx % 3 == 2:
            first_rows.append(-1)
            num_drafts.append(rng.choice([0, 5]))  # whatever an older step left there
            continue
        drafts = [rng.randrange(100) for _ in range(rng.choice([0, 1, 5, 16, 64]))]
        right = rng.choice([0, len(drafts) // 2, len(drafts)])
        drawn = [token if i < right or rng.random() < 0.5 else token + 1 for i, token in enumerate(drafts)]
        first_rows.append(len(sampled))
        num_drafts.append(len(drafts))
        tokens += [rng.randrange(100), *drafts]
        sampled += [*drawn, rng.randrange(100)]
    ints = torch.tensor([first_rows, num_drafts], dtype=torch.int32)
    return Verification(torch.tensor(sampled), torch.tensor(tokens), ints[0], ints[1])


def run_verify(case: Verification, device: str = "cpu") -> tuple[list[int], list[int]]:
    sampled, tokens, first_rows, num_drafts = (tensor.to(device) for tensor in case)
    num_accepted, last_row = (torch.full_like(first_rows, -7) for _ in range(2))
    verify_drafts_(num_accepted, last_row, sampled, tokens, first_rows, num_drafts)
    return num_accepted.tolist(), last_row.tolist()


def verified_one_by_one(case: Verification) -> tuple[list[int], list[int]]:
    """By the host's verifier."""
    num_accepted, last_row = [], []
    for first, num in zip(case.first_rows.tolist(), case.num_drafts.tolist(), strict=True):
        if first < 0:
            num_accepted.append(0)
            last_row.append(-1)
            continue
        drafts, drawn = case.tokens[first + 1 : first + 1 + num], case.sampled[first : first + 1 + num]
        num_accepted.append(len(accepted_tokens(drafts.tolist(), drawn.tolist())) - 1)
        last_row.append(first + num_accepted[-1])
    return num_accepted, last_row
