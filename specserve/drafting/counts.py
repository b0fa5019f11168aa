"""What came of drafts, adapter by adapter, as metrics tell it; these counts decide nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..adapters.lora import LoraAdapter
from ..stats_messages import AdapterDrafts

_PRICE_RATE = 1 / 64  # of the running mean in metrics


class DraftLengths:
    """How long drafts were, and how far they were right; which says of each position in a draft how often it was."""

    __slots__ = ("_accepted", "_drafted")

    def __init__(self) -> None:
        self._drafted: Counter[int] = Counter()  # drafts by length
        self._accepted: Counter[int] = Counter()

    def add(self, drafted: int, accepted: int) -> None:
        """A draft, of at least one token."""
        self._drafted[drafted] += 1
        self._accepted[accepted] += 1

    def drafted_per_pos(self) -> list[int]:
        """Drafts that had a token at each position, the first one first."""
        return _at_least(self._drafted)

    def accepted_per_pos(self) -> list[int]:
        """Drafts whose token there was kept; as long a list."""
        found = _at_least(self._accepted)
        return found + [0] * (max(self._drafted, default=0) - len(found))


def _at_least(by_length: Counter[int]) -> list[int]:
    """How many are of length 1 or more, of 2 or more, and so on."""
    sums, num = [], 0
    for length in range(max(by_length, default=0), 0, -1):
        num += by_length[length]
        sums.append(num)
    return sums[::-1]


@dataclass(slots=True)
class Counts:
    """Of one adapter."""

    num_verifications: int = 0
    generated: int = 0
    drafted: int = 0
    accepted: int = 0
    row_price: float | None = None  # running mean over steps
    lengths: DraftLengths = field(default_factory=DraftLengths)
    told: AdapterDrafts | None = None  # what was last said of them

    def add(self, drafted: int, accepted: int, generated: int) -> None:
        """A verification of one sequence."""
        self.num_verifications += 1
        self.drafted += drafted
        self.accepted += accepted
        self.generated += generated
        if drafted:
            self.lengths.add(drafted, accepted)

    def add_price(self, price: float) -> None:
        """Of a step's next row."""
        self.row_price = price if self.row_price is None else self.row_price + _PRICE_RATE * (price - self.row_price)


class AdapterCounts:
    """By content hash; None: the base model."""

    def __init__(self, adapters: Mapping[str, LoraAdapter]):
        self._adapters = adapters
        self._counts: dict[str | None, Counts] = {}

    def of(self, content_hash: str | None) -> Counts:
        return self._counts.setdefault(content_hash, Counts())

    def forget(self, content_hash: str) -> None:
        self._counts.pop(content_hash, None)

    def totals(self, content_hash: str) -> tuple[int, int]:
        """Drafts verified, and accepted, of an adapter since it was loaded."""
        counts = self._counts.get(content_hash)
        return (counts.drafted, counts.accepted) if counts is not None else (0, 0)

    def told(self) -> list[AdapterDrafts]:
        """Made anew for those alone that were served since the last call: it is asked for between two steps."""
        adapters = self._adapters
        return [
            _told(counts, None if key is None else adapters[key].name)
            for key, counts in self._counts.items()
            if key is None or key in adapters
        ]


def _told(counts: Counts, name: str | None) -> AdapterDrafts:
    told = counts.told
    if told is None or told.num_verifications != counts.num_verifications:
        told = counts.told = AdapterDrafts(
            name=name,
            num_verifications=counts.num_verifications,
            generated_tokens=counts.generated,
            draft_tokens=counts.drafted,
            accepted_draft_tokens=counts.accepted,
            row_price=counts.row_price or 0.0,
            drafted_per_pos=counts.lengths.drafted_per_pos(),
            accepted_per_pos=counts.lengths.accepted_per_pos(),
        )
    return told
