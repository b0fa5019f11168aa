"""An endpoint's tokens, which it tells as texts, as ids of the student's tokenizer: equal bytes are one token.

An answer maps if its tokens are those into which the student's tokenizer divides it, one by one. Endpoints tell nothing
of where an answer ends, so that an end which came counts as certain.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...teachers import Answer, TokenLogprob, TopTokens
from ...text.tokenizer import TextTokenizer
from ...training.data.teacher_logits import TopLogits
from .likely_tokens import as_logits


class TokenMapping:
    """`num_unmapped` counts likely tokens that the student does not have, in answers that map."""

    def __init__(self, tokenizer: TextTokenizer):
        self._bytes = {token: bytes(tokenizer.token_bytes(token)) for token in range(tokenizer.vocab_size)}
        self._ids: dict[bytes, int] = {}
        # Special tokens last: their texts are their own unless letters have them, and the end of an answer is likely.
        for token in sorted(self._bytes, key=tokenizer.is_special):
            self._ids.setdefault(self._bytes[token], token)
        self.num_unmapped = 0

    def logits(self, answer: Answer, ids: Sequence[int], num_top: int) -> tuple[TopLogits | None, str | None]:
        """Of `ids`, the student's tokens of the answer and its end; or None, and what does not fit."""
        told = answer.logprobs
        if told is None:
            return None, "the endpoint gives no logprobs"
        wanted = [self._bytes[token] for token in ids]
        tokens = [item.token for item in told]
        if tokens != wanted and tokens != wanted[:-1]:
            pairs = zip((*tokens, b""), (*wanted, b""), strict=False)
            theirs, ours = next(((a, b) for a, b in pairs if a != b), (b"", b""))
            return None, f"{_shown(theirs)} where the student has {_shown(ours)}"
        tops = [self._top(item, token) for item, token in zip(told, ids, strict=False)]
        if len(tokens) < len(ids):
            tops.append([(ids[-1], 0.0)])
        top = TopTokens(
            tuple(tuple(token for token, _ in place) for place in tops),
            tuple(tuple(logprob for _, logprob in place) for place in tops),
        )
        return as_logits(top, num_top), None

    def _top(self, item: TokenLogprob, token: int) -> list[tuple[int, float]]:
        """The likely tokens in one place, best first; the one that came is the student's own there."""
        found: dict[int, float] = {}
        for content, logprob in item.top:
            mapped = token if content == item.token else self._ids.get(content)
            if mapped is None:
                self.num_unmapped += 1
            else:
                found.setdefault(mapped, logprob)
        if not found:
            found[token] = item.logprob
        return sorted(found.items(), key=lambda pair: -pair[1])


def _shown(token: bytes) -> str:
    return repr(token.decode("utf-8", "backslashreplace"))
