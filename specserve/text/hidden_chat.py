"""A conversation on its way through a chat template, with marks in the place of what must stay letters.

Special tokens are control characters: a template may write them, what a message spells may not become one.
"""

from __future__ import annotations

import re
import secrets
from dataclasses import dataclass
from typing import Any


class Marks:
    """Stand-ins, which nobody can guess, for texts whose special tokens must stay letters while a template renders."""

    def __init__(self) -> None:
        self._nonce = secrets.token_hex(16)
        self._texts: dict[str, str] = {}  # by mark
        self._known: dict[str, str] = {}

    def new(self, text: str) -> str:
        """Another mark that stands for `text`."""
        mark = f"{self._nonce}{len(self._texts):08x}"
        self._texts[mark] = text
        return mark

    def of(self, text: str) -> str:
        """The mark that stands for `text`, the same one each time."""
        if text not in self._known:
            self._known[text] = self.new(text)
        return self._known[text]

    def parts(self, rendered: str) -> list[tuple[str, bool]]:
        """`rendered` in order: (text, whether a mark stood for it). A mark that the template broke is text."""
        parts = re.split(f"({self._nonce}[0-9a-f]{{8}})", rendered)
        return [(self._texts.get(part, part), part in self._texts) for part in parts]

    @property
    def num_chars(self) -> int:
        return sum(map(len, self._texts.values()))


@dataclass(frozen=True, slots=True)
class HiddenChat:
    """A conversation as its template is given it, `marks` in the place of texts that must stay letters."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    marks: Marks
    last_mark: str | None  # where the text is to end
    variables: dict[str, Any]  # what else the template reads
