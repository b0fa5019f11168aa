"""Likely tokens as a teacher told them, as rows of the trainer's file, and the mean of what several told."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ...teachers import TopTokens
from ...training.data.teacher_logits import TopLogits

_LEAST = -60_000.0  # within float16


def mixed(tops: Sequence[TopTokens]) -> TopTokens:
    """The mean of several teachers' probabilities, best first; a token that one does not name has none from it."""
    ids, logprobs = [], []
    for at in range(len(tops[0].ids)):
        probs: dict[int, float] = {}
        for top in tops:
            for token, logprob in zip(top.ids[at], top.logprobs[at], strict=True):
                probs[token] = probs.get(token, 0.0) + float(np.exp(logprob)) / len(tops)
        best = sorted(probs.items(), key=lambda item: (-item[1], item[0]))
        ids.append(tuple(token for token, _ in best))
        logprobs.append(tuple(float(np.log(prob)) if prob > 0 else _LEAST for _, prob in best))
    return TopTokens(tuple(ids), tuple(logprobs))


def as_logits(top: TopTokens, num_top: int, vocab_size: int | None = None) -> TopLogits:
    """The `num_top` best of each token; places that nothing is known of have the id -1.

    Ids from `vocab_size` on are left out: models of a family pad their vocabularies to different sizes, with rows that
    are no tokens.
    """
    shape = (len(top.ids), num_top)
    ids, logprobs = np.full(shape, -1, np.int32), np.zeros(shape, np.float16)
    for at, (tokens, values) in enumerate(zip(top.ids, top.logprobs, strict=True)):
        pairs = zip(tokens, values, strict=True)
        known = [(token, value) for token, value in pairs if vocab_size is None or token < vocab_size][:num_top]
        for place, (token, value) in enumerate(known):
            ids[at, place], logprobs[at, place] = token, min(max(value, _LEAST), 0.0)
    return TopLogits(ids, logprobs)
