"""Masks of many sequences in one call are those of each alone, whatever their drafts are and whoever fails."""

import random

import numpy as np
import pytest
from grammar_places import VOCAB, allowed, compile_all, places_of
from tiny_models import make_tokenizer

from specserve.grammar.mask_batch import MaskBatch


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(VOCAB - 3).backend_tokenizer


@pytest.fixture(scope="module")
def compiled(tokenizer):
    return compile_all(tokenizer)


@pytest.fixture(scope="module", params=[1, 3])
def batch(request):
    return MaskBatch(request.param)


def masks(batch, places):
    bits = np.full((sum(len(d) + 1 for _, d in places), (VOCAB + 31) // 32), -1, dtype=np.int32)
    batch.fill(places, bits)
    return bits


def test_masks_of_a_batch_are_those_of_each_sequence_alone(compiled, batch):
    rng = random.Random(3)
    seen = {"failed": 0, "error": 0, "cut": 0, "complete": 0, "hidden": 0}
    for num in (1, 1, 2, 40, 80, 120):
        places = places_of(rng, compiled, num)
        bits = masks(batch, [(grammar, drafts) for grammar, _, drafts in places])
        first = 0
        for grammar, twin, drafts in places:
            want = np.full((len(drafts) + 1, bits.shape[1]), -1, dtype=np.int32)
            twin.fill_masks(drafts, want)
            assert np.array_equal(bits[first : first + len(want)], want), (drafts, twin.problem)
            assert (grammar.problem, grammar.error) == (twin.problem, twin.error)
            first += len(want)
            seen["failed"] += bool(twin.problem and not twin.error)
            seen["error"] += bool(twin.error)
            seen["cut"] += not want[-1].any()
            seen["complete"] += twin.is_terminated
            seen["hidden"] += bool(twin.hidden)
            token = rng.choice(allowed(twin) or [0])
            assert grammar.forced_tokens() == twin.forced_tokens()
            assert grammar.commit([token]) == twin.commit([token]) and grammar.is_terminated == twin.is_terminated
    assert min(seen.values()) >= 2, seen


def test_matcher_that_fails_spoils_no_other(compiled, batch, tokenizer):
    x, z, a = (tokenizer.token_to_id(letter) for letter in "xza")
    free, dead = compiled[0], compiled[4]
    places = [(free.start(), []), (dead.start(), [x, z]), (dead.start(), []), (free.start(), [a])]
    stuck = places[2][0]
    assert stuck.commit([x, z]) == 2
    bits = masks(batch, places)
    assert bits[[0, 1, 2, 5, 6]].any(axis=1).all() and not bits[[3, 4]].any()
    assert stuck.problem and not places[0][0].problem
    assert [grammar.error for grammar, _ in places] == [""] * 4
    assert places[1][0].commit([a]) == 1
