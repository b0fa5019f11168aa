"""What is measured: batches without LoRAs, with mixed random ones, and with finished ones on their own tasks.

Every round asks every peer for the same prompts, adapters and number of greedy tokens, in turn. Prompts have a rate of
their own where others like them are asked for one token; decoding is what the whole batch does: from every request's
first token to the first request's end, or to the last one's where answers end by themselves (task LoRAs). There is no
such time, and NaN is said, where a request ends before the last one begins. The difference of two requests' times is
no rate: beside other load it may be negative.
"""

from __future__ import annotations

import itertools
import math
import random
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
    prompt_tokens_per_s: dict[str, list[float]] = field(default_factory=dict)  # only where prompts are timed apart
    equal_share: dict[str, list[float]] = field(default_factory=dict)


class Prompts:
    """Token ids to begin with: those given, again and again, or `length` random ones each, never the same twice.

    Random ones have one length, and no two share what a cache may keep.
    """

    def __init__(self, given: list[list[int]], length: int, vocab: range):
        self.are_apart = length > 0
        self._length, self._vocab, self._random = length, vocab, random.Random(0)
        self._given, self._next = given, itertools.cycle(given)

    def warm_up(self, num: int) -> list[list[int]]:
        return self.take(num) if self.are_apart else self._given[:num]

    def take(self, num: int) -> list[list[int]]:
        if self.are_apart:
            return [self._random.choices(self._vocab, k=self._length) for _ in range(num)]
        return list(itertools.islice(self._next, num))


def interleaved(
    peers: list[Peer], batches: list[int], prompts: Prompts, task_prompts: list[list[list[int]]], num_tokens: int,
    rounds: int,
) -> list[Cell]:  # fmt: skip
    """Every round runs every case; peers take turns within a case, in reverse order every other round."""
    cells = [Cell(case, batch) for case in CASES if case != TASK_LORAS or task_prompts for batch in batches]
    for cell in cells:
        warm_up = make_request(prompts.warm_up(cell.batch), _adapters(cell, 0), WARM_UP_TOKENS, "off")
        measure_round(Cell(cell.adapters, cell.batch), peers, warm_up)
    print("warmed up", flush=True)
    next_tasks = in_turn(task_prompts)
    for round_idx in range(rounds):
        for cell in cells:
            turn = peers if round_idx % 2 == 0 else peers[::-1]
            if cell.adapters == TASK_LORAS:
                for request in _task_requests(cell.batch, next_tasks, len(task_prompts), num_tokens):
                    measure_round(cell, turn, request)
                continue
            adapters = _adapters(cell, round_idx)
            request = make_request(prompts.take(cell.batch), adapters, num_tokens, "off")
            first = make_request(prompts.take(cell.batch), adapters, 1, "off") if prompts.are_apart else None
            measure_round(cell, turn, request, first)
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


def measure_round(cell: Cell, peers: list[Peer], request: dict[str, Any], first: dict[str, Any] | None = None) -> None:
    """`first` asks for one token after other prompts of the same lengths: its time is that of the prompts."""
    tokens: dict[str, list[list[int]]] = {}
    for peer in peers:
        worker = peer.worker(cell.adapters != NO_LORA, cell.batch)
        if worker is None:
            continue
        if first:
            rate = sum(map(len, first["prompts"])) / worker.measure(first | {"mode": peer.mode})["wall_s"]
            cell.prompt_tokens_per_s.setdefault(peer.name, []).append(rate)
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
