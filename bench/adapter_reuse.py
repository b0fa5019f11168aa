"""Which adapters should stay in memory: how much of Zipf's uses does each rule find there?

Simulates uses one after the other, no time and no sizes. Rules: least recently used; GreedyDual-Size-Frequency with
counts that go with their entry (as published) and that outlive it; ours (`specserve.adapters.reuse`), for several
half-lives; the best fixed choice in hindsight is the limit. Uses: popularity that is fixed, that moves by 37 ranks
every thousand uses, and with every fourth use an adapter that never comes back.

    python -m bench.adapter_reuse [--adapters 1000] [--places 32] [--uses 6000]
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Sequence
from typing import Protocol

import click

from specserve.adapters import reuse

from . import common, options


class Rule(Protocol):
    def use(self, key: str) -> None: ...
    def value(self, key: str) -> float: ...
    def evicted(self, key: str) -> None: ...


class LeastRecentlyUsed:
    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._now = 0

    def use(self, key: str) -> None:
        self._now += 1
        self._last[key] = self._now

    def value(self, key: str) -> float:
        return self._last[key]

    def evicted(self, key: str) -> None:
        del self._last[key]


class GreedyDual:
    """GDSF of equal sizes and costs: uses, plus the value of the last one that left when it was used last."""

    def __init__(self, outlives: bool):
        self._outlives = outlives
        self._uses: dict[str, int] = {}
        self._values: dict[str, float] = {}
        self._left = 0.0

    def use(self, key: str) -> None:
        self._uses[key] = self._uses.get(key, 0) + 1
        self._values[key] = self._left + self._uses[key]

    def value(self, key: str) -> float:
        return self._values[key]

    def evicted(self, key: str) -> None:
        self._left = max(self._left, self._values.pop(key))
        if not self._outlives:
            del self._uses[key]


class Ours:
    def __init__(self, half_life: int):
        self._scores = reuse.ReuseScores(half_life)

    def use(self, key: str) -> None:
        self._scores.use(key)

    def value(self, key: str) -> float:
        return self._scores.value(key, 1.0, 1.0)

    def evicted(self, key: str) -> None:
        pass


def found(rule: Rule, uses: Sequence[str], places: int) -> float:
    """Share of `uses` that were in memory."""
    held: set[str] = set()
    num_found = 0
    for key in uses:
        num_found += key in held
        if key not in held and len(held) >= places:
            gone = min(held, key=rule.value)
            held.remove(gone)
            rule.evicted(gone)
        held.add(key)
        rule.use(key)
    return num_found / len(uses)


@click.command(help=__doc__.partition("\n")[0])
@options.at_least(2, "--adapters", 1000)
@options.at_least(1, "--places", 32)
@options.at_least(1, "--uses", 6000)
@options.numbers("--half-life", "128,512,2048", "Uses after which a use counts half, in our rule.")
@options.save("adapter_reuse", default=False)
def main(adapters: int, places: int, uses: int, half_life: list[int], save: bool) -> None:
    rng = random.Random(0)
    weights = list(itertools.accumulate(1 / rank for rank in range(1, adapters + 1)))

    def draw() -> int:
        return rng.choices(range(adapters), cum_weights=weights)[0]

    traces = {
        "fixed": [str(draw()) for _ in range(uses)],
        "moving": [str((draw() + 37 * (idx // 1000)) % adapters) for idx in range(uses)],
        "scanned": [str(draw()) if idx % 4 else f"once-{idx}" for idx in range(uses)],
    }
    rules: dict[str, Callable[[], Rule]] = {
        "least recently used": LeastRecentlyUsed,
        "GDSF": lambda: GreedyDual(outlives=False),
        "GDSF, counts outlive": lambda: GreedyDual(outlives=True),
        **{f"ours, half-life {num}": (lambda num=num: Ours(num)) for num in half_life},  # type: ignore[misc]
    }
    click.echo(f"limit: {weights[min(places, adapters) - 1] / weights[-1]:.3f} of uses, the most popular ones held")
    figures = {
        name: {trace: round(found(make(), keys, places), 3) for trace, keys in traces.items()}
        for name, make in rules.items()
    }
    for name, of_rule in figures.items():
        click.echo(f"{name}: {of_rule}")
    fields = {"commit": common.commit(), "adapters": adapters, "places": places, "uses": uses, "figures": figures}
    common.report("adapter_reuse", fields, save)


if __name__ == "__main__":
    main()
