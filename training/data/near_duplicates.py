"""Texts that say nearly the same as one that is there already.

MinHash in bands (locality-sensitive hashing, by datasketch) finds which texts could be near; their shingles decide. So
a text is never called a duplicate by chance, and one that is near is missed in less than one of a thousand cases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...errors import UserError
from .text_identity import shingles, similarity

DEFAULT_THRESHOLD = 0.7
LEAST_THRESHOLD = 0.3
_NUM_PERM = 128


@dataclass(frozen=True, slots=True)
class Near:
    """The text that is nearest, by its key; `similarity` is Jaccard's over runs of characters, 0 to 1."""

    key: str
    similarity: float


class NearDuplicates:
    """Texts by their keys; two are near from `threshold` on, a Jaccard similarity from 0.3 to 1.

    What is in `common` (`common_shingles`) is left out of the comparison, unless a text has nothing else. Raises
    `UserError` where datasketch is not installed or the threshold is out of range.
    """

    def __init__(self, threshold: float = DEFAULT_THRESHOLD, common: frozenset[int] = frozenset()):
        if not LEAST_THRESHOLD <= threshold <= 1:
            raise UserError(
                f"the similarity of near duplicates is {threshold:g}; a number from {LEAST_THRESHOLD} to 1 is expected",
                param="near",
            )
        try:
            from datasketch import MinHash, MinHashLSH
        except ImportError:
            raise UserError(
                "near duplicates are found by datasketch, which is not installed: pip install 'specserve[synthesis]'"
            ) from None
        # Bands of r rows let pairs of similarity s through with chance 1 - (1 - s^r)^b: over 0.999 at the threshold.
        num_rows = next(rows for rows in (4, 3, 2) if (1 - threshold**rows) ** (_NUM_PERM // rows) < 1e-3 or rows == 2)
        bands = (_NUM_PERM // num_rows, num_rows)
        self._threshold, self._common = threshold, common
        self._index: Any = MinHashLSH(num_perm=_NUM_PERM, params=bands)
        self._empty: Any = MinHash(num_perm=_NUM_PERM, hashfunc=lambda value: value)
        self._shingles: dict[str, frozenset[int]] = {}
        self._order: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._shingles)

    def add(self, key: str, text: str) -> None:
        """Keep `text` under `key`, which no other has."""
        self._shingles[key] = found = self._compared(text)
        self._order[key] = len(self._order)
        self._index.insert(key, self._signature(found))

    def nearest(self, text: str, but: str | None = None) -> Near | None:
        """The nearest text whose key is not `but`, the first where two are as near; None below the threshold."""
        found = self._compared(text)
        keys = set(self._index.query(self._signature(found))) - {but}
        best: Near | None = None
        for key in sorted(keys, key=self._order.__getitem__):
            value = similarity(found, self._shingles[key])
            if value >= self._threshold and (best is None or value > best.similarity):
                best = Near(key, value)
        return best

    def _compared(self, text: str) -> frozenset[int]:
        found = shingles(text)
        return found - self._common or found

    def _signature(self, found: frozenset[int]) -> Any:
        signature = self._empty.copy()
        signature.update_batch(sorted(found))
        return signature
