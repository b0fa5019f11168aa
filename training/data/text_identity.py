"""When two texts are the same, and the words and letters by which they are compared otherwise.

Invariant: what `normal_text` makes equal differs only in case, white space and the forms that Unicode calls compatible.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import chain

SHINGLE_LEN = 5  # characters: short texts have some, and languages without spaces have words of them
_UNSPACED = r"\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # scripts whose letters are words of their own here
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


def normal_text(text: str) -> str:
    """`text` without what makes no difference: case, white space, compatible forms (NFKC)."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def text_key(text: str) -> str:
    """What two texts share if `normal_text` makes them equal: 32 hexadecimal digits."""
    return hashlib.sha256(normal_text(text).encode("utf-8", "surrogatepass")).hexdigest()[:32]


def words(text: str) -> list[str]:
    """The words of the normal text, punctuation left out."""
    return _WORD.findall(normal_text(text))


def shingles(text: str) -> frozenset[int]:
    """32-bit hashes of all runs of `SHINGLE_LEN` characters of the normal text; of a shorter one, of all of it."""
    data = normal_text(text)
    starts = range(max(1, len(data) - SHINGLE_LEN + 1))
    return frozenset(zlib.crc32(data[idx : idx + SHINGLE_LEN].encode("utf-8", "surrogatepass")) for idx in starts)


def common_shingles(parts: Sequence[frozenset[int]]) -> frozenset[int]:
    """Those that more than half of at least three texts have, by the shingles of each: instructions, headings, what
    every row of a task has."""
    if len(parts) < 3:
        return frozenset()
    counts = Counter(chain.from_iterable(parts))
    return frozenset(shingle for shingle, num in counts.items() if num > len(parts) / 2)


def similarity(first: frozenset[int], second: frozenset[int]) -> float:
    """Jaccard's: shingles that both have among those that one has, 0 to 1 ("resemblance", Broder 1997)."""
    both = len(first & second)
    return both / (len(first) + len(second) - both)
