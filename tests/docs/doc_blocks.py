"""Fenced blocks of the README and of docs/, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from places import ROOT

_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
PAGES = [ROOT / "README.md", *(page for page in sorted((ROOT / "docs").rglob("*.md")) if page.name != "log.md")]


class Block(NamedTuple):
    page: Path
    idx: int
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}-{self.idx}"


def blocks(language: str) -> list[Block]:
    return [
        Block(page, idx, match[2])
        for page in PAGES
        for idx, match in enumerate(_BLOCK.finditer(page.read_text()))
        if match[1] == language
    ]


def commands(text: str) -> Iterator[str]:
    """The commands of a shell block, each with its further lines, comments left out."""
    command = ""
    for line in text.splitlines():
        command += line + "\n"
        if line.endswith("\\"):
            continue
        try:
            words = shlex.split(command, comments=True)
        except ValueError:  # a quotation goes on
            continue
        if words:
            yield command
        command = ""
    assert not command.strip(), f"a quotation does not end: {command}"
