"""Tables for a terminal: columns as wide as their widest cell."""

from __future__ import annotations

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], num_left: int = 0) -> str:
    """`rows`, the heading first, right-aligned but for the first `num_left` columns; no line ends in blanks."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [c.ljust(width) if idx < num_left else c.rjust(width) for idx, (c, width) in enumerate(cells)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
