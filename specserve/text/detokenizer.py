"""Token ids to text, as they come, and where a stop string ends a sequence.

Owns the text of one sequence. Text is released once it is certain: never half a UTF-8 character, never the beginning of
what may become a stop string, never anything past one.
"""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer

CONTEXT_TOKENS = 6  # prompt tokens decoded along, because some tokenizers write a space only between tokens


class Detokenizer:
    """Incremental text of one sequence; `push` a token at a time, `flush` at the end."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ):
        self._tokenizer = tokenizer
        self._ids = list(prompt_token_ids[-CONTEXT_TOKENS:])
        self._prefix_idx = 0
        self._read_idx = len(self._ids)
        self._stop = tuple(stop)
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._held = ""  # decoded, but perhaps the start of a stop string

    def push(self, token: int) -> tuple[str, str | None]:
        """Text that `token` makes certain, and the stop string that it completes, if any."""
        self._ids.append(token)
        return self._release(self._decode_new(final=False))

    def flush(self) -> str:
        """What is left when the sequence ends for another reason than a stop string."""
        text, stop = self._release(self._decode_new(final=True))
        if stop is not None:
            return text
        text, self._held = text + self._held, ""
        return text

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip_special_tokens)

    def _decode_new(self, final: bool) -> str:
        before = self._decode(self._ids[self._prefix_idx : self._read_idx])
        after = self._decode(self._ids[self._prefix_idx :])
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._prefix_idx, self._read_idx = self._read_idx, len(self._ids)
        return after[len(before) :]

    def _release(self, new: str) -> tuple[str, str | None]:
        if not self._stop:
            return new, None
        text = self._held + new
        found = [(idx + len(stop), idx, stop) for stop in self._stop if (idx := text.find(stop)) >= 0]
        if found:
            _, idx, stop = min(found)  # the one that was complete first, as if text came letter by letter
            self._held = ""
            return text[: idx + len(stop)] if self._include_stop else text[:idx], stop
        num_held = max(
            (n for stop in self._stop for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None
