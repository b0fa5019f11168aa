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


@dataclass(frozen=True, slots=True)
class Sketch:
    """What of a text is compared, and its MinHash: of use to all that have the same `common`."""

    shingles: frozenset[int]
    signature: Any


class NearDuplicates:
    """Texts by their keys; two are near from `threshold` on, a Jaccard similarity from 0.3 to 1.

    A text that is looked for in several, or added after it was looked for, is sketched once (`sketch`). What is in
    `common` (`common_shingles`) is left out of the comparison, unless a text has nothing else. Raises `UserError` where
    datasketch is not installed or the threshold is out of range.
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

    def sketch(self, found: frozenset[int]) -> Sketch:
        """Of the text whose `shingles` those are."""
        compared = found - self._common or found
        signature = self._empty.copy()
        signature.update_batch(compared)
        return Sketch(compared, signature)

    def add(self, key: str, text: str | Sketch) -> None:
        """Keep `text` under `key`, which no other has."""
        sketch = self._sketched(text)
        self._shingles[key] = sketch.shingles
        self._order[key] = len(self._order)
        self._index.insert(key, sketch.signature)

    def nearest(self, text: str | Sketch, but: str | None = None) -> Near | None:
        """The nearest text whose key is not `but`, the first where two are as near; None below the threshold."""
        sketch = self._sketched(text)
        keys = set(self._index.query(sketch.signature)) - {but}
        best: Near | None = None
        for key in sorted(keys, key=self._order.__getitem__):
            value = similarity(sketch.shingles, self._shingles[key])
            if value >= self._threshold and (best is None or value > best.similarity):
                best = Near(key, value)
        return best

    def _sketched(self, text: str | Sketch) -> Sketch:
        return self.sketch(shingles(text)) if isinstance(text, str) else text
