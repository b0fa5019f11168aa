"""Masks of many sequences in one call are those of each alone, whatever their drafts are and whoever fails."""

import json
import random

import numpy as np
import pytest
from tiny_models import make_tokenizer

from specserve.grammar.compiler import GrammarCompiler
from specserve.grammar.mask_batch import MaskBatch, make_executor
from specserve.messages import GrammarSpec

VOCAB = 320
SPECS = [
    GrammarSpec("regex", "(?s:.*)"),
    GrammarSpec("regex", "[a-c]{1,4}( [a-c])?"),
    GrammarSpec("choice", '["ab", "abc", "b"]'),
    GrammarSpec("json_schema", json.dumps({"type": "object", "properties": {"kind": {"enum": ["fox", "dog"]}},
                                           "required": ["kind"], "additionalProperties": False})),
    GrammarSpec("lark", 'start: "x" b | /[a-c]+/\nb: "z" X\nX: /a/ & /b/\n'),  # nothing may follow xz
]  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(VOCAB - 3).backend_tokenizer


@pytest.fixture(scope="module")
def compiled(tokenizer):
    compiler = GrammarCompiler(tokenizer, VOCAB, [tokenizer.token_to_id("<|im_end|>")])
    return [compiler.compile(spec) for spec in SPECS]


@pytest.fixture(scope="module")
def executor():
    return make_executor()


def allowed(grammar):
    row = np.zeros(grammar.compiled.mask_words, dtype=np.int32)
    grammar.fill_mask(row)
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(rng, grammar, num, wrong_rate):
    """Tokens that may come next, now and then one that may not."""
    tokens = []
    for _ in range(num):
        choices = allowed(grammar)
        wrong = rng.choice([rng.randrange(VOCAB), *grammar.compiled.eos_token_ids, VOCAB, -1, 10**12])
        tokens.append(rng.choice(choices) if choices and rng.random() >= wrong_rate else wrong)
        if not grammar.advance(tokens[-1:]):
            tokens += [rng.randrange(VOCAB) for _ in range(rng.randrange(3))]
            break
    grammar.rewind()
    return tokens


def places_of(rng, compiled, num):
    """Places in grammars, each with a twin at the same place, and drafts."""
    places = []
    for _ in range(num):
        base, ignores = rng.choice(compiled), rng.random() < 0.5
        grammar, twin = base.start(ignores), base.start(ignores)
        said = walk(rng, grammar, rng.randrange(6), wrong_rate=0.05)
        assert grammar.commit(said) == twin.commit(said)
        drafts = walk(rng, grammar, rng.randrange(5), wrong_rate=0.2) if rng.random() < 0.7 else []
        places.append((grammar, twin, drafts))
    return places


def masks(executor, places):
    bits = np.full((sum(len(d) + 1 for _, d in places), (VOCAB + 31) // 32), -1, dtype=np.int32)
    batch = MaskBatch(places, bits)
    batch.compute(executor)
    batch.finish()
    return bits


def test_masks_of_a_batch_are_those_of_each_sequence_alone(compiled, executor):
    rng = random.Random(3)
    seen = {"failed": 0, "error": 0, "cut": 0, "complete": 0, "hidden": 0}
    for num in (1, 1, 2, 40, 80, 120):
        places = places_of(rng, compiled, num)
        bits = masks(executor, [(grammar, drafts) for grammar, _, drafts in places])
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


def test_matcher_that_fails_spoils_no_other(compiled, executor, tokenizer):
    x, z, a = (tokenizer.token_to_id(letter) for letter in "xza")
    free, dead = compiled[0], compiled[4]
    places = [(free.start(), []), (dead.start(), [x, z]), (dead.start(), []), (free.start(), [a])]
    stuck = places[2][0]
    assert stuck.commit([x, z]) == 2
    bits = masks(executor, places)
    assert bits[[0, 1, 2, 5, 6]].any(axis=1).all() and not bits[[3, 4]].any()
    assert stuck.problem and not places[0][0].problem
    assert [grammar.error for grammar, _ in places] == [""] * 4
    assert places[1][0].commit([a]) == 1
