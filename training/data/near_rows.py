"""Rows that say nearly what others say, in one file or across training and held-out rows.

Owns what of a row is compared, all that its messages say, and how pairs are shown; when two are near is
`near_duplicates`'. Near rows are no mistakes by themselves: a person looks at them.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from ...errors import UserError
from .near_duplicates import DEFAULT_THRESHOLD, NearDuplicates
from .row_messages import Conversation
from .text_identity import common_shingles, shingles

MAX_ROWS = 10_000  # of each file; each takes about 30 KB meanwhile
_SHOWN = 2  # pairs
_SHOWN_LEN = 100  # letters of each
_BEFORE = 30  # letters that both have, shown before the first that they do not


@dataclass(frozen=True, slots=True)
class NearPair:
    """A training row and the row that it is near, by their lines."""

    line: int
    other: int
    similarity: float


@dataclass(frozen=True, slots=True)
class NearRows:
    """`within`: training rows near an earlier one; `held_out`: near a held-out row."""

    within: list[NearPair]
    held_out: list[NearPair]


def text_of(conversation: Conversation) -> str:
    """All that the messages say."""
    texts = [message.get("content") for message in conversation.messages]
    return "\n".join(text for text in texts if isinstance(text, str))


def near_rows(train: Mapping[int, str], held_out: Mapping[int, str]) -> NearRows:
    """Of texts by their lines, the first `MAX_ROWS` of each. Raises `UserError` where datasketch is not installed.

    A row that is near an earlier one stands for nothing further, so that many copies of one make as many pairs.
    """
    parts = {line: shingles(text) for line, text in islice(train.items(), MAX_ROWS)}
    common = common_shingles(list(parts.values()))
    earlier, held = NearDuplicates(DEFAULT_THRESHOLD, common), NearDuplicates(DEFAULT_THRESHOLD, common)
    for line, text in islice(held_out.items(), MAX_ROWS):
        held.add(str(line), text)
    found = NearRows([], [])
    for line in list(parts):
        sketch = earlier.sketch(parts.pop(line))
        if (near := held.nearest(sketch)) is not None:
            found.held_out.append(NearPair(line, int(near.key), near.similarity))
        if (near := earlier.nearest(sketch)) is not None:
            found.within.append(NearPair(line, int(near.key), near.similarity))
        else:
            earlier.add(str(line), sketch)
    return found


def near_report(
    train: Mapping[int, str], held_out: Mapping[int, str], repeated: Collection[int], shared: Collection[int]
) -> list[str]:
    """Lines of a report on texts by their lines; training rows that repeat an earlier one, or are held out as they are,
    were named before."""
    own = {line: text for line, text in train.items() if line not in repeated}
    try:
        found = near_rows(own, held_out)
    except UserError as error:
        return [str(error)]
    found = NearRows(found.within, [pair for pair in found.held_out if pair.line not in shared])
    return list(lines_of(found, own, held_out))


def lines_of(found: NearRows, train: Mapping[int, str], held_out: Mapping[int, str]) -> Iterator[str]:
    """The numbers, and the nearest pairs of each kind where they begin to differ."""
    part = f" of the first {MAX_ROWS}" if max(len(train), len(held_out)) > MAX_ROWS else ""
    for what, pairs, others, name in (
        ("training rows that are nearly an earlier one", found.within, train, "line"),
        ("training rows that are nearly a held-out one", found.held_out, held_out, "held-out line"),
    ):
        yield f"{what} (similarity from {DEFAULT_THRESHOLD} on){part}: {len(pairs)}"
        for pair in sorted(pairs, key=lambda pair: -pair.similarity)[:_SHOWN]:
            first, second = (" ".join(text.split()) for text in (train[pair.line], others[pair.other]))
            start = max(0, len(os.path.commonprefix([first, second])) - _BEFORE)
            yield f"  {pair.similarity:.2f}  line {pair.line}: {_from(first, start)}"
            yield f"        {name} {pair.other}: {_from(second, start)}"


def _from(text: str, start: int) -> str:
    end = start + _SHOWN_LEN
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")
