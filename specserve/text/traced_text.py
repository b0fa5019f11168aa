"""What each token of a trace adds to the text, as soon as that is certain.

Owns no text: what a sequence says is decided elsewhere, with its stop strings. Invariant: the texts of the entries
that were given out join to a beginning of the text of all deltas, at the end to all of it; nothing that a stop string
cut off is told, of rejected drafts neither.
"""

from __future__ import annotations

from collections import deque

import msgspec

from ..messages import Delta, RejectedDraft, TokenTrace
from .detokenizer import Detokenizer


class _Entry(msgspec.Struct, eq=False):
    token: TokenTrace
    text_len: int  # that it adds, before a stop string cuts


class TracedText:
    """Of one sequence, whose tokens `detokenizer` reads, which knows no stop strings."""

    def __init__(self, detokenizer: Detokenizer):
        self._detokenizer = detokenizer
        self._entries: deque[_Entry] = deque()  # not given out
        self._num_whole = 0  # of them, before those that begin a character which is not complete
        self._latest: _Entry | None = None  # that was read as text
        self._text = ""  # of the deltas, of no entry that was given out

    def told(self, delta: Delta) -> Delta:
        """`delta` with the trace of the tokens whose text is certain now, instead of that of its own tokens."""
        trace, is_last = delta.trace or [], delta.finish_reason is not None
        num_text = len(trace) - delta.num_silent
        for idx, token in enumerate(trace):
            self._read(token, idx < num_text)
        self._text += delta.text
        if is_last:
            self._end()
        certain = []
        while self._entries and (is_last or (self._num_whole and self._entries[0].text_len <= len(self._text))):
            entry = self._entries.popleft()
            self._num_whole -= 1
            certain.append(msgspec.structs.replace(entry.token, text=self._text[: entry.text_len]))
            self._text = self._text[entry.text_len :]
        return msgspec.structs.replace(delta, trace=certain)

    def _read(self, token: TokenTrace, is_text: bool) -> None:
        if token.rejected:
            token = msgspec.structs.replace(token, rejected=self._with_texts(token.rejected))
        entry = _Entry(token, 0)
        if is_text:
            entry.text_len = len(self._detokenizer.push(token.token_id)[0])
            self._latest = entry
        self._entries.append(entry)
        if self._detokenizer.is_whole:
            self._num_whole = len(self._entries)

    def _with_texts(self, drafts: list[RejectedDraft]) -> list[RejectedDraft]:
        """Which go on from where the output stands, one behind the other."""
        other = self._detokenizer.fork()
        return [msgspec.structs.replace(draft, text=other.push(draft.token_id)[0]) for draft in drafts]

    def _end(self) -> None:
        """What is left of an incomplete character is its last token's; drafts behind a cut are forgotten."""
        rest = self._detokenizer.flush()
        if self._latest is not None:
            self._latest.text_len += len(rest)
        if sum(entry.text_len for entry in self._entries) <= len(self._text):
            return
        start = 0
        for entry in self._entries:
            if start >= len(self._text):
                entry.token = msgspec.structs.replace(entry.token, rejected=[])
            start += entry.text_len
