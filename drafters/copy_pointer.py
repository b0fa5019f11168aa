"""Where in the prompt a copy would go on: the head's window on tokens that no vocabulary holds.

Names, versions and numbers of a narrow task stand in the prompt, mostly in the order in which the output needs them.
The pointer moves behind each output token that it finds among the next few prompt tokens. Of another one it stays where
it is, or jumps behind the first place in the prompt where that token stands: free text takes words from anywhere. A
function of prompt and output alone: nothing is prefilled, and a rejected draft needs no rollback, only a new walk.
"""

from __future__ import annotations

from collections.abc import Sequence

NO_TOKEN = -1


class CopyPointer:
    """Walks through `prompt` from `start` as output tokens are followed.

    `moved`: 0, 1 (by one) or 2 (skipped some, or jumped).
    """

    __slots__ = ("_places", "_prompt", "_width", "moved", "position")

    def __init__(self, prompt: Sequence[int], start: int, width: int, jumps: bool = False):
        self._prompt = prompt
        self._width = width
        # token -> behind its first place; nothing stands behind the prompt's last token
        self._places = {prompt[idx]: idx + 1 for idx in reversed(range(start, len(prompt) - 1))} if jumps else None
        self.position = min(start, len(prompt))
        self.moved = 0

    def copy(self) -> CopyPointer:
        other = CopyPointer(self._prompt, self.position, self._width)
        other._places, other.moved = self._places, self.moved
        return other

    def follow(self, token: int) -> None:
        window = self._prompt[self.position : self.position + self._width]
        if token in window:
            idx = window.index(token)
            self.moved = 2 if idx else 1
            self.position += idx + 1
        elif self._places is not None and token in self._places:
            self.moved = 2
            self.position = self._places[token]
        else:
            self.moved = 0

    def window(self) -> list[int]:
        """The next `width` prompt tokens, `NO_TOKEN` behind the end."""
        tokens = list(self._prompt[self.position : self.position + self._width])
        return tokens + [NO_TOKEN] * (self._width - len(tokens))
