"""Which replica gets a request, and which one another copy of its adapter: by who has the adapter, then by who has the
start of the prompt, then by load.

Plain bookkeeping without clock, tensors or network: what routes and what simulates call the same code. Loads are tokens
that a replica still owes. A cold adapter stays where it is; a hot one may have as many copies as its share of all load
asks for, and an overloaded replica may lose any. An adapter that nobody has goes to its home: the first replica of an
order of its own (rendezvous hashing, Thaler and Ravishankar 1998) that is not overloaded (consistent hashing with
bounded loads, Mirrokni, Thorup and Zadimoghaddam 2016), so that replicas which come and go move few adapters.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from .prefixes import PrefixMap

BOUND = 1.25  # of the mean load, beside `SLACK_TOKENS`: who has more is overloaded
SLACK_TOKENS = 512.0  # that a replica may owe before anybody is kept from it
HALF_LIFE = 512  # requests after which the share of one in the load counts half
COPIES_A_SHARE = 2.0  # copies of an adapter that asks for what one replica serves
PREFIX_WEIGHT = 0.25  # of a prompt token that is computed, beside one that is generated
MAX_RECENT = 1 << 16  # adapters that had a replica and left, and whose replica is remembered


@dataclass(frozen=True, slots=True)
class Route:
    """`replica` serves the request; `spread_to` should get a copy of its adapter meanwhile."""

    replica: str
    spread_to: str | None = None


class AffinityPolicy:
    """Of one set of replicas, named by texts."""

    def __init__(self) -> None:
        self._loads: dict[str, int] = {}
        self._shares = Shares()
        self._prefixes = PrefixMap()
        self._recent: dict[str, str] = {}  # adapter -> the replica that had it last; newest last

    @property
    def loads(self) -> dict[str, int]:
        """Tokens that each replica owes."""
        return dict(self._loads)

    def set_replicas(self, replicas: Iterable[str]) -> None:
        """These serve now; what others owed is owed no more."""
        serving = set(replicas)
        for gone in self._loads.keys() - serving:
            del self._loads[gone]
            self._prefixes.forget(gone)
        for new in sorted(serving - self._loads.keys()):
            self._loads[new] = 0

    def began(self, replica: str, cost: int) -> None:
        """A request of so many tokens was sent there."""
        if replica in self._loads:
            self._loads[replica] += cost

    def ended(self, replica: str, cost: int) -> None:
        """It is owed no more."""
        if replica in self._loads:
            self._loads[replica] = max(0, self._loads[replica] - cost)

    def left(self, replica: str, adapter: str) -> None:
        """`adapter` made room there; a copy in slower memory may have stayed, or its files in the disk's cache."""
        self._recent.pop(adapter, None)
        self._recent[adapter] = replica
        if len(self._recent) > MAX_RECENT:
            del self._recent[next(iter(self._recent))]

    def route(
        self,
        adapter: str | None,
        cost: int,
        prefixes: Sequence[bytes] = (),
        holders: Collection[str] = (),
        refusing: Collection[str] = (),
    ) -> Route | None:
        """For a request of `cost` tokens whose adapter, if it has one, `holders` have; None where nobody can serve it.

        `prefixes` are of `prefix_keys`; `refusing` replicas have refused it.
        """
        serving = [replica for replica in self._loads if replica not in refusing]
        able = serving if adapter is None else [replica for replica in serving if replica in holders]
        if not able:
            return None
        self._shares.count(adapter or "", cost)
        matched = self._prefixes.matched_tokens(prefixes)
        best = min(able, key=lambda replica: (self._owed_beside(replica, matched), replica))
        self._prefixes.note(prefixes, best)
        return Route(best, self._spread(adapter, best, able) if adapter is not None else None)

    def home(self, adapter: str, refusing: Collection[str] = ()) -> str | None:
        """Where an adapter is loaded that nobody has, or only `refusing` replicas; None where there is no other."""
        able = [replica for replica in self._loads if replica not in refusing]
        if not able:
            return None
        limit = self._limit()
        last = self._recent.get(adapter)
        if last in able and self._loads[last] <= limit:
            return last
        ranked = sorted(able, key=lambda replica: rank(adapter, replica))
        return next((replica for replica in ranked if self._loads[replica] <= limit), ranked[0])

    def copies(self, adapter: str) -> int:
        """How many replicas may have it for its share of the load."""
        wanted = math.ceil(COPIES_A_SHARE * self._shares.of(adapter) * len(self._loads) - 1e-9)
        return min(max(1, wanted), len(self._loads))

    def _owed_beside(self, replica: str, matched: dict[str, int]) -> float:
        return self._loads[replica] - PREFIX_WEIGHT * matched.get(replica, 0)

    def _spread(self, adapter: str, best: str, holders: Sequence[str]) -> str | None:
        others = self._loads.keys() - set(holders)
        if not others or len(holders) >= len(self._loads):
            return None
        is_overloaded = self._loads[best] > self._limit()
        if len(holders) < self.copies(adapter) and self._loads[best] > SLACK_TOKENS:
            return self.home(adapter, refusing=holders)
        if is_overloaded:
            idle = self.home(adapter, refusing=holders)
            return idle if idle is not None and self._loads[idle] <= self._mean() else None
        return None

    def _mean(self) -> float:
        return sum(self._loads.values()) / max(1, len(self._loads))

    def _limit(self) -> float:
        return BOUND * self._mean() + SLACK_TOKENS


class Shares:
    """Of each adapter in the load, recent requests counting most."""

    _GROWTH = 2.0 ** (1 / HALF_LIFE)

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._total = 0.0
        self._unit = 1.0  # what a token counts now: it grows, instead of all counts shrinking

    def count(self, adapter: str, cost: int) -> None:
        self._unit *= self._GROWTH
        self._counts[adapter] = self._counts.get(adapter, 0.0) + cost * self._unit
        self._total += cost * self._unit
        if self._unit > 1e12:
            self._begin_anew()

    def of(self, adapter: str) -> float:
        return self._counts.get(adapter, 0.0) / self._total if self._total else 0.0

    def _begin_anew(self) -> None:
        kept = {name: count / self._unit for name, count in self._counts.items()}
        self._counts = {name: count for name, count in kept.items() if count > 1e-6}
        self._total, self._unit = sum(self._counts.values()), 1.0


def rank(adapter: str, replica: str) -> bytes:
    """The place of a replica in an adapter's own order of them."""
    return blake2b(f"{adapter}\0{replica}".encode(), digest_size=8).digest()
