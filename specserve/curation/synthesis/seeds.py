"""The seeds of a synthesis and the rows held out of it, read from JSONL.

Owns that all seeds are of one format, and which of them an ask shows.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...file_hash import input_hash
from ...training.data.open_rows import with_answer
from ...training.data.rows import parse_object, row_texts
from .row_shapes import Kind, Pair, RowShape, kind_of, read_pair, shape_of


@dataclass(frozen=True, slots=True)
class Seeds:
    """Rows of one format, in the order of their file; `sha256` is of the file."""

    path: Path
    sha256: str
    shape: RowShape
    pairs: list[Pair]
    rows: list[dict[str, Any]]

    @property
    def kind(self) -> Kind:
        return self.shape.kind

    def sample(self, num: int, rng: random.Random) -> list[Pair]:
        """`num` different seeds, or all; of rows with labels, answers that few seeds have come as often as others."""
        groups: dict[str, list[Pair]] = {}
        for pair in self.pairs:
            groups.setdefault(pair.group, []).append(pair)
        left = [rng.sample(group, len(group)) for group in groups.values()]
        chosen: list[Pair] = []
        while left and len(chosen) < num:
            for group in rng.sample(left, len(left)):
                chosen.append(group.pop())
            left = [group for group in left if group]
        return chosen[:num]


def read_seeds(path: Path, schema: dict[str, Any] | None, *, inputs_only: bool = False) -> Seeds:
    """Raises `UserError` that names the file, the line and the field; seeds of two formats are refused."""
    pairs: list[Pair] = []
    rows: list[dict[str, Any]] = []
    kinds: dict[Kind, int] = {}
    for line, where, value in _objects(path):
        kind = kind_of(value, where)
        kinds.setdefault(kind, line)
        if len(kinds) > 1:
            (first, first_line), (other, other_line) = kinds.items()
            raise UserError(
                f"{path}: line {first_line} is a row with {_shown(first)} and line {other_line} one with "
                f"{_shown(other)}; seeds are of one format, so make each from a file of its own",
                param="seeds",
            )
        if (
            inputs_only
            and kind == "prompt"
            and value.get("completion") is None
            and isinstance(value.get("prompt"), str)
        ):
            pairs.append(Pair(value["prompt"], "", line))
        else:
            pairs.append(read_pair(value, kind, line, where))
        rows.append(value)
    if not pairs:
        raise UserError(f"{path} holds no rows; a synthesis begins with at least one", param="seeds")
    return Seeds(path, input_hash(path), shape_of(next(iter(kinds)), pairs, schema), pairs, rows)


def read_held_out(paths: Sequence[Path]) -> dict[str, str]:
    """The inputs of all rows of these files by file and line; rows may lack their answer. Raises `UserError`."""
    texts: dict[str, str] = {}
    names = Counter(path.name for path in paths)
    for path in paths:
        shown = path.name if names[path.name] == 1 else path  # two folders may have a dev.jsonl each
        num_before = len(texts)
        for line, where, value in _objects(path):
            row = with_answer(value) or value
            texts[f"{shown} line {line}"] = read_pair(row, kind_of(row, where), line, where).text
        if len(texts) == num_before:
            raise UserError(f"{path} holds no rows", param="held_out")
    return texts


def _objects(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    for line, text in row_texts(path):
        where = f"{path} line {line}"
        yield line, where, parse_object(text, where)


def _shown(kind: Kind) -> str:
    names = {"prompt": "a prompt", "messages": "messages", "classify": "labels"}
    return names.get(kind, f"a query, to {kind}")
