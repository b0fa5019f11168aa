"""Tables for a terminal: numbers as cells, columns as wide as their widest one."""

from __future__ import annotations

from collections.abc import Sequence


def figure(value: float | None, form: str = ".3f") -> str:
    """A number as a cell; "-" where there is none."""
    return "-" if value is None else f"{value:{form}}"


def text_table(rows: Sequence[Sequence[str]], num_left: int = 0) -> str:
    """`rows`, the heading first, right-aligned but for the first `num_left` columns; no line ends in blanks."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = zip(row, widths, strict=True)
        padded = [c.ljust(width) if idx < num_left else c.rjust(width) for idx, (c, width) in enumerate(cells)]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)
