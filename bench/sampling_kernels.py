"""What does the end of a step cost on a GPU: sampling with each kind of parameters, penalties, verification of drafts?

The limit is one reading of the logits at the measured copy bandwidth. Greedy rows are compared with torch.argmax, rows
with top-k and top-p with a sort of the vocabulary in torch, which knows neither ties nor fp64 masses. Times are of
captured launches. Cases are left out once --budget seconds are over, and said to be.

    python -m bench.sampling_kernels [--budget 25] [--dry-run]
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from specserve.kernels.logit_edits import ENTRY, ROW, edit_logits_, restore_logits_
from specserve.kernels.sampling import SamplingRow, SamplingScratch, SamplingTensors, sample_logits_
from specserve.kernels.verify import verify_drafts_

from .gpu_cases import Case, case_command
from .gpu_timing import seconds_per_call
from .shapes import LLAMA8B, SMOLLM2

MODES: dict[str, tuple[SamplingRow, dict[str, bool]]] = {
    "greedy": (SamplingRow(), {"draws": False}),
    "temperature": (SamplingRow(0.8, uniform=0.4), {"cuts_top_k": False, "cuts_top_p": False}),
    "top_p": (SamplingRow(0.8, top_p=0.95, uniform=0.4), {"cuts_top_k": False}),
    "top_k top_p": (SamplingRow(0.8, top_k=50, top_p=0.95, uniform=0.4), {}),
    "greedy, all stages": (SamplingRow(), {}),
}


def by_sorting(logits: torch.Tensor, row: SamplingRow) -> torch.Tensor:
    """The common way in torch: sort, cut, draw."""
    values, order = (logits / row.temperature).sort(dim=-1, descending=True)
    if row.top_k:
        values[:, row.top_k :] = -torch.inf
    probs = values.softmax(dim=-1)
    probs[probs.cumsum(dim=-1) - probs > row.top_p] = 0.0
    sums = probs.cumsum(dim=-1)
    picked = (sums > row.uniform * sums[:, -1:]).int().argmax(dim=-1, keepdim=True)
    return order.gather(1, picked)


def sample(mode: str, num_rows: int, vocab_size: int, limit: float, device: torch.device) -> dict[str, Any]:
    row, stages = MODES[mode]
    logits = torch.empty(num_rows, vocab_size, device=device).normal_(std=3.0)
    host = SamplingTensors.allocate(num_rows, vocab_size, 0, "cpu")
    host.write([row] * num_rows)
    params = SamplingTensors.allocate(num_rows, vocab_size, 0, device)
    params.copy_(host)
    tokens = torch.empty(num_rows, dtype=torch.int64, device=device)
    bad = torch.empty(num_rows, dtype=torch.int32, device=device)
    result: dict[str, Any] = {"kind": mode, "rows": num_rows, "vocab": vocab_size}
    result["limit_us"] = round(logits.nbytes / limit * 1e6, 2)
    scratch = SamplingScratch.allocate(num_rows, vocab_size, device)
    call = functools.partial(sample_logits_, tokens, bad, logits, params, scratch, **stages)
    result["us"] = round(seconds_per_call([call], device) * 1e6, 2)
    if mode in ("greedy", "top_p", "top_k top_p"):
        torch_way = (lambda: by_sorting(logits, row)) if row.temperature else (lambda: logits.argmax(dim=-1))
        result["torch_us"] = round(seconds_per_call([torch_way], device) * 1e6, 2)
    return result


def verify(num_seqs: int, num_drafts: int, device: torch.device) -> dict[str, Any]:
    rows = num_seqs * (num_drafts + 1)
    tokens = torch.zeros(rows, dtype=torch.int64, device=device)
    first = torch.arange(0, rows, num_drafts + 1, dtype=torch.int32, device=device)
    nums = torch.full_like(first, num_drafts)
    out = torch.empty_like(first), torch.empty_like(first)
    seconds = seconds_per_call([lambda: verify_drafts_(*out, tokens, tokens, first, nums)], device)
    return {"kind": "verify", "sequences": num_seqs, "drafts": num_drafts, "us": round(seconds * 1e6, 2)}


def edits(num_rows: int, num_tokens: int, vocab_size: int, limit: float, device: torch.device) -> dict[str, Any]:
    """Penalties on so many tokens of each row, and what stood there put back; the limit is the bytes that move."""
    entries, rows = np.zeros(num_rows * num_tokens, ENTRY), np.zeros(num_rows, ROW)
    entries["token"] = np.tile(np.arange(num_tokens) * (vocab_size // num_tokens), num_rows)
    entries["count"] = 1
    rows["first"] = rows["saved"] = np.arange(num_rows) * num_tokens
    rows["end"], rows["repetition"], rows["presence"] = rows["first"] + num_tokens, 1.1, 0.5
    logits = torch.empty(num_rows, vocab_size, device=device).normal_(std=3.0)
    saved = torch.empty(len(entries), device=device)
    records = [torch.from_numpy(array.view(np.int32)).to(device) for array in (rows, entries)]

    def edit_and_restore() -> None:
        edit_logits_(logits, *records, saved)
        restore_logits_(logits, *records, saved)

    seconds, num_bytes = seconds_per_call([edit_and_restore], device), len(entries) * (ENTRY.itemsize + 4 + 6 * 4)
    result = {"kind": "penalties", "rows": num_rows, "vocab": vocab_size, "tokens": num_tokens}
    return result | {"limit_us": round(num_bytes / limit * 1e6, 2), "us": round(seconds * 1e6, 2)}


def plan(is_dry: bool, limit: float, device: torch.device) -> list[Case]:
    """Cases, most telling first."""
    large, small = LLAMA8B.vocab_size, SMOLLM2.vocab_size
    shapes = ((2, 100),) if is_dry else ((64, large), (1, large), (8, large), (64, small), (256, large))
    cases: list[Case] = [lambda: verify(2 if is_dry else 64, 8, device)]
    sizes = ((2, 20),) if is_dry else ((1, 500), (64, 500), (64, 4000))
    cases += [lambda n=n, t=t: edits(n, t, 100 if is_dry else large, limit, device) for n, t in sizes]
    cases += [lambda m=m, n=n, v=v: sample(m, n, v, limit, device) for n, v in shapes for m in MODES]
    return cases


main = case_command("sampling_kernels", __doc__, plan, budget_s=25.0)


if __name__ == "__main__":
    main()
