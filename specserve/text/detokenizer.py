"""Token ids to text, as they come, and where a stop string ends a sequence.

Owns the text of one sequence. Text is released once it is certain: never half a UTF-8 character, never the beginning of
what may become a stop string, never anything past one. What a token adds behind whole characters is the same in every
sequence with nearly all tokenizers, so it is decoded once and remembered.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence

from tokenizers import Tokenizer

CONTEXT_TOKENS = 6  # prompt tokens decoded along, because some tokenizers write a space only between tokens
MAX_PENDING_TOKENS = 32  # without a whole character; each further token decodes all of them again
CHARACTER_TOKENS = 4  # that a character may take: each has a byte of it

# Behind text that ends with a whole character, a token adds the same text whatever else stands before it.
_LOCAL_DECODERS = (
    ["ByteLevel"],
    ["Metaspace"],
    ["Replace", "ByteFallback", "Fuse"],
    ["Replace", "ByteFallback", "Fuse", "Strip"],
)


class TokenTexts:
    """What the tokens of one tokenizer say, for the detokenizers of all sequences."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        kinds = _decoder_kinds(tokenizer)
        self.is_byte_level = kinds == ["ByteLevel"]
        self.is_local = kinds in _LOCAL_DECODERS
        self.added: tuple[dict[int, str], dict[int, str]] = {}, {}  # by local tokens; with special tokens, and without
        self._special = {idx for idx, token in tokenizer.get_added_tokens_decoder().items() if token.special}

    def is_silent(self, token: int, skip_special_tokens: bool) -> bool:
        """Whether decoding leaves `token` out."""
        return (skip_special_tokens and token in self._special) or self._tokenizer.id_to_token(token) is None

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, of which none is silent."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class Detokenizer:
    """Incremental text of one sequence; `push` a token at a time, `flush` at the end."""

    def __init__(
        self,
        texts: TokenTexts,
        prompt_token_ids: Sequence[int],
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ):
        self._texts = texts
        self._added = texts.added[skip_special_tokens]
        self._skip_special_tokens = skip_special_tokens
        context = prompt_token_ids[-CONTEXT_TOKENS:]
        self._context = [token for token in context if not texts.is_silent(token, skip_special_tokens)]  # text is out
        self._before: str | None = None  # the text of `_context`, once it was needed
        self._pending: list[int] = []  # tokens behind them
        self._is_settled = False  # nothing is pending, and output before it ends with a whole character
        self._stop = tuple(stop)
        self._stop_characters = frozenset("".join(string[:-1] for string in self._stop))  # that leave one unfinished
        self._include_stop = include_stop
        self._held = ""  # decoded, but perhaps the start of a stop string

    def fork(self) -> Detokenizer:
        """Another one that stands where this one does, to see what other tokens would say from here."""
        other = copy.copy(self)
        other._pending = list(self._pending)
        return other

    @property
    def is_whole(self) -> bool:
        """Whether the text of all tokens so far is known: none is a part of a character that is not complete."""
        return not self._pending

    def push(self, token: int) -> tuple[str, str | None]:
        """Text that `token` makes certain, and the stop string that it completes, if any."""
        new = self._added.get(token) if self._is_settled else None
        if new is None:
            new = self._decode_next(token)
        elif not self._texts.is_byte_level:
            self._context, self._before = [token], None
        return self._release(new) if self._stop else (new, None)

    def write(self, tokens: Sequence[int], num_silent: int, is_last: bool) -> str:
        """The text of further tokens of a sequence without stop strings; all that is left behind its last ones.

        The last `num_silent` of them are no text.
        """
        text = "".join([self.push(token)[0] for token in tokens[: len(tokens) - num_silent]])
        return text + self.flush() if is_last else text

    def flush(self) -> str:
        """What is left when the sequence ends for another reason than a stop string."""
        text, stop = self._release(self._decode_pending(final=True))
        if stop is not None:
            return text
        text, self._held = text + self._held, ""
        return text

    def _decode_next(self, token: int) -> str:
        if self._texts.is_silent(token, self._skip_special_tokens):
            return ""
        was_settled = self._is_settled
        self._pending.append(token)
        new = self._decode_pending()
        if new and was_settled and self._texts.is_local:
            self._added[token] = new
        return new

    def _decode_pending(self, final: bool = False) -> str:
        pending, before = self._pending, self._before
        if not pending:
            return ""
        if before is None:
            before = self._before = self._texts.decode(self._context)
        after = self._texts.decode(self._context + pending)
        self._is_settled = len(after) > len(before) and not after.endswith("\ufffd")
        if not self._is_settled and not final:
            if len(pending) <= MAX_PENDING_TOKENS:
                return ""
            pending = pending[:-CHARACTER_TOKENS]  # a character that began in these would be whole by now
            after = self._texts.decode(self._context + pending)
        self._pending = self._pending[len(pending) :]
        if self._is_settled and self._texts.is_byte_level:  # whose bytes are decoded without those before
            self._context, self._before = [], ""
        else:
            self._context, self._before = pending, None
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
        if text[-1:] not in self._stop_characters:
            self._held = ""
            return text, None
        num_held = max(
            (n for stop in self._stop for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])),
            default=0,
        )
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held], None


def _decoder_kinds(tokenizer: Tokenizer) -> list[str]:
    """The names of a tokenizer's decoders in order; none for a `Strip` of more than one character at the start."""
    if tokenizer.decoder is None:
        return []
    decoder = json.loads(tokenizer.decoder.__getstate__())
    parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return ["" if part.get("start", 0) > 1 or part.get("stop", 0) > 0 else part["type"] for part in parts]
