"""What is measured: batches without LoRAs, with mixed random ones, and with finished ones on their own tasks.

Every round asks every peer for the same prompts, adapters and number of greedy tokens, in turn.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ..tasks import in_turn
from .columns import Peer
from .random_adapters import NUM_ADAPTERS
from .worker import WorkerError, make_request

NO_LORA, MIXED_LORAS, TASK_LORAS = CASES = ("no LoRA", f"{NUM_ADAPTERS} mixed LoRAs", "task LoRAs")
WARM_UP_TOKENS = 8


@dataclass(slots=True)
class Cell:
    """Figures of one case: per peer and round. Tokens are kept only until they are compared."""

    adapters: str  # one of CASES
    batch: int
    tokens_per_s: dict[str, list[float]] = field(default_factory=dict)
    decode_tokens_per_s: dict[str, list[float]] = field(default_factory=dict)
    equal_share: dict[str, list[float]] = field(default_factory=dict)


def interleaved(
    peers: list[Peer], batches: list[int], prompts: list[list[int]], task_prompts: list[list[list[int]]],
    num_tokens: int, rounds: int,
) -> list[Cell]:  # fmt: skip
    """Every round runs every case; peers take turns within a case, in reverse order every other round."""
    cells = [Cell(case, batch) for case in CASES if case != TASK_LORAS or task_prompts for batch in batches]
    for cell in cells:
        warm_up = make_request(prompts[: cell.batch], _adapters(cell, 0), WARM_UP_TOKENS, "off")
        measure_round(Cell(cell.adapters, cell.batch), peers, warm_up)
    print("warmed up", flush=True)
    next_prompts, next_tasks = itertools.cycle(prompts), in_turn(task_prompts)
    for round_idx in range(rounds):
        for cell in cells:
            if cell.adapters == TASK_LORAS:
                requests = _task_requests(cell.batch, next_tasks, len(task_prompts), num_tokens)
            else:
                chosen = list(itertools.islice(next_prompts, cell.batch))
                requests = [make_request(chosen, _adapters(cell, round_idx), num_tokens, "off")]
            for request in requests:
                measure_round(cell, peers if round_idx % 2 == 0 else peers[::-1], request)
        print(f"round {round_idx + 1} of {rounds} done", flush=True)
    return cells


def _adapters(cell: Cell, first: int) -> list[int | None]:
    """The first request's adapter moves on with the round; at batch 8 all adapters are in the batch."""
    return [None if cell.adapters == NO_LORA else (first + i) % NUM_ADAPTERS for i in range(cell.batch)]


def _task_requests(
    batch: int, next_tasks: Iterator[tuple[int, list[int]]], num_tasks: int, num_tokens: int
) -> list[dict[str, Any]]:
    """One batch, or at batch 1 a request of each task; the tasks take turns, and so do each task's prompts."""
    picked = list(itertools.islice(next_tasks, batch if batch > 1 else num_tasks))
    return [
        make_request(
            [prompt for _, prompt in part], [NUM_ADAPTERS + task for task, _ in part], num_tokens, "off", False
        )
        for part in ([picked] if batch > 1 else [[one] for one in picked])
    ]


def common_prefix_share(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """Mean share of each sequence before it first differs from the reference: do the peers do the same work?"""
    shares = []
    for ours, theirs in zip(tokens, reference, strict=True):
        length = max(len(ours), len(theirs))
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), length))
        shares.append(min(same, len(theirs)) / length)
    return statistics.mean(shares)


def measure_round(cell: Cell, peers: list[Peer], request: dict[str, Any]) -> None:
    tokens: dict[str, list[list[int]]] = {}
    for peer in peers:
        worker = peer.worker(cell.adapters != NO_LORA, cell.batch)
        if worker is None:
            continue
        answer = worker.measure(request | {"mode": peer.mode})
        num_tokens = sum(map(len, answer["token_ids"]))
        if request["ignore_eos"] and num_tokens != cell.batch * request["num_tokens"]:
            raise WorkerError(f"{peer.name} gave {num_tokens} tokens, asked were {cell.batch * request['num_tokens']}")
        cell.tokens_per_s.setdefault(peer.name, []).append(num_tokens / answer["wall_s"])
        decode = answer["num_decode_tokens"] / answer["decode_s"] if answer["decode_s"] > 0 else math.nan
        cell.decode_tokens_per_s.setdefault(peer.name, []).append(decode)
        tokens[peer.name] = answer["token_ids"]
    reference = tokens["specserve"] if "specserve" in tokens else next(iter(tokens.values()), [])
    for name, token_ids in tokens.items():
        cell.equal_share.setdefault(name, []).append(common_prefix_share(token_ids, reference))
