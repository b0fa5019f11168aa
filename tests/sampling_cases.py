"""Rows of logits with every kind of parameters, for the sampling kernels on any device."""

from __future__ import annotations

import random

import torch

from specserve.kernels.sampling import SamplingRow, SamplingScratch, SamplingTensors, sample_logits_
from specserve.messages import SamplingParams
from specserve.sampler import best_of_rows, sample_rows

PARAMS = [
    SamplingRow(),
    SamplingRow(1.0),
    SamplingRow(0.7, min_p=0.05),
    SamplingRow(1.0, top_k=1),
    SamplingRow(1.3, top_k=7),
    SamplingRow(1.0, top_k=10**6),
    SamplingRow(1.0, top_p=1e-6),
    SamplingRow(0.8, top_p=0.9),
    SamplingRow(2.5, top_p=0.999),
    SamplingRow(0.9, top_k=50, top_p=0.8, min_p=0.02),
    SamplingRow(1e-4, top_p=0.95),
]
SHAPES = {
    "normal": lambda n, v, g: torch.randn(n, v, generator=g) * 3,
    "flat": lambda n, v, g: torch.zeros(n, v) - 7.25,
    "peaked": lambda n, v, g: torch.randn(n, v, generator=g) * 40,
    "ties": lambda n, v, g: torch.randint(-3, 3, (n, v), generator=g).float(),  # both zeros among them
    "negative": lambda n, v, g: -(torch.randn(n, v, generator=g) ** 2) - 1.0,
}


def make_rows(shape: str, vocab_size: int, seed: int = 0) -> tuple[torch.Tensor, list[SamplingRow]]:
    """A row of logits for each of PARAMS, uniform numbers from 0 to just below 1; -inf at a third of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    logits = SHAPES[shape](len(PARAMS), vocab_size, generator)
    logits[::2, torch.randperm(vocab_size, generator=generator)[: vocab_size // 3]] = -torch.inf
    if shape == "ties":
        logits[logits == 0] *= torch.where(torch.rand(int((logits == 0).sum()), generator=generator) < 0.5, -1.0, 1.0)
    uniforms = [0.0, 1 - 2**-53, *[rng.random() for _ in PARAMS]]
    rng.shuffle(uniforms)
    return logits, [row._replace(uniform=u) for row, u in zip(PARAMS, uniforms, strict=False)]


def make_tensors(rows, vocab_size: int, device: str, masks: torch.Tensor | None = None) -> SamplingTensors:
    """Parameters on `device`, as the engine brings them there; `masks` is bool [M, V]."""
    num_masks = 0 if masks is None else masks.shape[0]
    host = SamplingTensors.allocate(len(rows), vocab_size, num_masks, "cpu")
    host.write(rows)
    tensors = SamplingTensors.allocate(len(rows), vocab_size, num_masks, device)
    tensors.copy_(host)
    for idx in range(num_masks):
        tensors.masks[idx].copy_(pack(masks[idx]))
    return tensors


def pack(allowed: torch.Tensor) -> torch.Tensor:
    """int32 words of a bool mask [V]."""
    bits = torch.zeros(-(-allowed.shape[0] // 32) * 32, dtype=torch.int64)
    bits[: allowed.shape[0]] = allowed
    words = (bits.view(-1, 32) << torch.arange(32)).sum(1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def run_kernels(logits: torch.Tensor, params: SamplingTensors, **stages: bool) -> tuple[list[int], list[int]]:
    num_rows, vocab_size = logits.shape
    tokens = torch.full((num_rows,), -5, device=logits.device)
    bad = torch.full((num_rows,), -5, dtype=torch.int32, device=logits.device)
    scratch = SamplingScratch.allocate(num_rows + 1, vocab_size, logits.device)
    sample_logits_(tokens, bad, logits, params, scratch, **stages)
    return tokens.tolist(), bad.tolist()


def sample_on_the_host(logits: torch.Tensor, rows: list[SamplingRow]) -> list[int]:
    """What `specserve.sampler` draws."""
    best = best_of_rows(logits)[1].tolist()
    hot = [idx for idx, row in enumerate(rows) if row.temperature]
    if not hot:
        return best
    params = [
        (
            SamplingParams(
                max_tokens=1,
                temperature=rows[idx].temperature,
                top_k=rows[idx].top_k,
                top_p=rows[idx].top_p,
                min_p=rows[idx].min_p,
            ),
            rows[idx].uniform,
        )
        for idx in hot
    ]
    for idx, token in zip(hot, sample_rows(logits[hot], params).tolist(), strict=True):
        best[idx] = token
    return best
