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
        for idx in range(self.position, min(self.position + self._width, len(self._prompt))):
            if self._prompt[idx] == token:
                self.moved = 1 if idx == self.position else 2
                self.position = idx + 1
                return
        self.moved = 0

    def follow_all(self, tokens: Sequence[int]) -> None:
        """As `follow`, of one after the other; quicker for many. `moved` stays as it was."""
        prompt, width, position = self._prompt, self._width, self.position
        for token in tokens:
            window = prompt[position : position + width]
            if token in window:
                position += window.index(token) + 1
        self.position = position

    def window(self) -> list[int]:
        """The next `width` prompt tokens, `NO_TOKEN` behind the end."""
        tokens = list(self._prompt[self.position : self.position + self._width])
        return tokens + [NO_TOKEN] * (self._width - len(tokens))
