"""Which replica gets a request: who would be done with it first, by what each owes, what it has and how fast it is.

Plain bookkeeping without tensors or network, its times given: what routes and what simulates call the same code. All is
counted in tokens. A replica owes what it was sent for; one without the adapter would have to read it first, which is
worth the tokens that it generates meanwhile; the start of a prompt that it has computed is worth what it saves. So
requests go where their adapter is until waiting there costs more than a copy elsewhere. A copy beyond what the
adapter's share of all load asks for counts `COPY_WEIGHT` times, since it takes room from adapters that are asked for as
much: a cold adapter stays on one replica and a hot one spreads.

What nobody has goes, where loads are about equal, to the replica that had it last, or is the first in an order that the
adapter has of its own (rendezvous hashing, Thaler and Ravishankar 1998): few adapters move when replicas come and go.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

from .pace import FIRST_PACE, Pace
from .prefixes import PrefixMap

HALF_LIFE = 512  # requests after which the share of one in the load counts half
COPIES_A_SHARE = 2.0  # copies of an adapter that asks for what one replica serves
COPY_WEIGHT = 4.0
PREFIX_WEIGHT = 0.25  # of a prompt token that is computed, beside one that is generated
FIRST_LOAD_S = 0.25  # that reading an adapter is expected to take, until one was read
LEARNING = 0.1
MAX_RECENT = 1 << 16  # adapters that had a replica and left, and whose replica is remembered


@dataclass(frozen=True, slots=True)
class Route:
    """`replica` serves the request; it may have to read the adapter first."""

    replica: str
    has_adapter: bool


class AffinityPolicy:
    """Of one set of replicas, named by texts."""

    def __init__(self) -> None:
        self._loads: dict[str, int] = {}
        self._paces: dict[str, Pace] = {}
        self._load_s = FIRST_LOAD_S
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
            del self._loads[gone], self._paces[gone]
            self._prefixes.forget(gone)
        for new in sorted(serving - self._loads.keys()):
            self._loads[new], self._paces[new] = 0, Pace(self._mean_pace())

    def began(self, replica: str, cost: int, now_s: float) -> None:
        """A request of so many tokens was sent there."""
        if replica in self._loads:
            self._paces[replica].moved(now_s, is_busy=self._loads[replica] > 0)
            self._loads[replica] += cost

    def ended(self, replica: str, cost: int, now_s: float) -> None:
        """It is owed no more."""
        if replica in self._loads:
            self._paces[replica].moved(now_s, is_busy=self._loads[replica] > 0, done=cost)
            self._loads[replica] = max(0, self._loads[replica] - cost)

    def was_read(self, seconds: float) -> None:
        """Reading an adapter took so long."""
        self._load_s += LEARNING * (seconds - self._load_s)

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
        """For a request of `cost` tokens whose adapter, if it has one, `holders` have; None where nobody is left.

        `prefixes` are of `prefix_keys`; `refusing` replicas have refused it.
        """
        able = [replica for replica in self._loads if replica not in refusing]
        if not able:
            return None
        self._shares.count(adapter or "", cost)
        matched = self._prefixes.matched_tokens(prefixes)
        reading = self._reading_tokens(adapter, holders) if adapter is not None else 0.0

        def owed(replica: str) -> float:
            missing = reading if adapter is not None and replica not in holders else 0.0
            return self._waiting(replica) + missing - PREFIX_WEIGHT * matched.get(replica, 0)

        best = min(able, key=lambda replica: (owed(replica), replica))
        if adapter is not None and not any(replica in holders for replica in able):
            best = self.home(adapter, refusing) or best
        self._prefixes.note(prefixes, best)
        return Route(best, adapter is None or best in holders)

    def home(self, adapter: str, refusing: Collection[str] = ()) -> str | None:
        """Where an adapter is read that nobody has, or only `refusing` replicas; None where there is no other."""
        able = [replica for replica in self._loads if replica not in refusing]
        if not able:
            return None
        preferred = self._recent.get(adapter)
        if preferred not in able:
            preferred = min(able, key=lambda replica: rank(adapter, replica))
        drawn = self._load_s * self._mean_pace()
        return min(
            able, key=lambda replica: (self._waiting(replica) - (drawn if replica == preferred else 0.0), replica)
        )

    def copies(self, adapter: str) -> int:
        """How many replicas may have it for its share of the load."""
        wanted = math.ceil(COPIES_A_SHARE * self._shares.of(adapter) * len(self._loads) - 1e-9)
        return min(max(1, wanted), len(self._loads))

    def _reading_tokens(self, adapter: str, holders: Collection[str]) -> float:
        weight = COPY_WEIGHT if len(holders) >= self.copies(adapter) else 1.0
        return weight * self._load_s * self._mean_pace()

    def _waiting(self, replica: str) -> float:
        """What it owes, in tokens of a replica of mean pace: who is slow owes more."""
        return self._loads[replica] * self._mean_pace() / self._paces[replica].tokens_per_s

    def _mean_pace(self) -> float:
        paces = self._paces.values()
        return sum(pace.tokens_per_s for pace in paces) / len(paces) if paces else FIRST_PACE


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
