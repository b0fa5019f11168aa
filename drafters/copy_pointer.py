"""Where in the prompt a copy would go on: the head's window on tokens that no vocabulary holds.

Names, versions and numbers of a narrow task stand in the prompt, mostly in the order in which the output needs them.
The pointer moves behind each output token that it finds among the next few prompt tokens, and stays where it is
otherwise. A function of prompt and output alone: nothing is prefilled, and a rejected draft needs no rollback, only a
new walk.
"""

from __future__ import annotations

from collections.abc import Sequence

NO_TOKEN = -1


class CopyPointer:
    """Walks through `prompt` from `start` as output tokens are followed; `moved`: 0, 1 (by one) or 2 (skipped some)."""

    __slots__ = ("_prompt", "_width", "moved", "position")

    def __init__(self, prompt: Sequence[int], start: int, width: int):
        self._prompt = prompt
        self._width = width
        self.position = min(start, len(prompt))
        self.moved = 0

    def copy(self) -> CopyPointer:
        other = CopyPointer(self._prompt, self.position, self._width)
        other.moved = self.moved
        return other

    def follow(self, token: int) -> None:
        window = self._prompt[self.position : self.position + self._width]
        if token in window:
            idx = window.index(token)
            self.moved = 2 if idx else 1
            self.position += idx + 1
        else:
            self.moved = 0

    def window(self) -> list[int]:
        """The next `width` prompt tokens, `NO_TOKEN` behind the end."""
        tokens = list(self._prompt[self.position : self.position + self._width])
        return tokens + [NO_TOKEN] * (self._width - len(tokens))
