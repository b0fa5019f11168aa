"""Requests as a simulated server gets them: when, for which adapter, how long, how urgent. Functions of a seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True, slots=True)
class SimulatedRequest:
    arrival_s: float
    adapter: int
    prompt_len: int
    output_len: int
    max_tokens: int  # what the client asks for; its output ends before
    kind: str = "all"  # whose figures it belongs to
    priority: int = 0
    deadline_s: float | None = None  # after its arrival
    shared_len: int = 0  # of its prompt, the start that all prompts of its adapter have
    caller: str = ""


@dataclass(frozen=True, slots=True)
class Lengths:
    """Of prompts and outputs, uniform between half and one and a half of the means."""

    prompt: int = 200
    output: int = 64

    def draw(self, rng: random.Random) -> tuple[int, int]:
        return tuple(rng.randint(max(1, mean // 2), max(1, 3 * mean // 2)) for mean in (self.prompt, self.output))


def poisson(
    num: int, rate: float, adapters: Sequence[int], seed: str, *, zipf_exponent: float = 1.0,
    lengths: Lengths = Lengths(), kind: str = "all", priority: int = 0, deadline_s: float | None = None,
    in_turn: bool = False,
) -> Iterator[SimulatedRequest]:  # fmt: skip
    """`num` arrivals of a Poisson process; adapters by Zipf, the first the most popular, or each in its turn."""
    rng, now = random.Random(seed), 0.0
    weights = list(accumulate((idx + 1) ** -zipf_exponent for idx in range(len(adapters))))
    for idx in range(num):
        now += rng.expovariate(rate)
        adapter = adapters[idx % len(adapters)] if in_turn else rng.choices(adapters, cum_weights=weights)[0]
        prompt_len, output_len = lengths.draw(rng)
        yield SimulatedRequest(now, adapter, prompt_len, output_len, 4 * output_len, kind, priority, deadline_s)


def burst(
    num: int, at_s: float, adapter: int, seed: str, lengths: Lengths = Lengths(), caller: str = ""
) -> Iterator[SimulatedRequest]:
    """`num` requests for one adapter within a second."""
    rng = random.Random(seed)
    for idx in range(num):
        prompt_len, output_len = lengths.draw(rng)
        yield SimulatedRequest(
            at_s + idx / num, adapter, prompt_len, output_len, 4 * output_len, "burst", caller=caller
        )


def merged(*parts: Iterator[SimulatedRequest]) -> list[SimulatedRequest]:
    return sorted((request for part in parts for request in part), key=lambda request: request.arrival_s)
