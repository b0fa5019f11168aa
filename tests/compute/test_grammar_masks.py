"""The masks of a step: which rows get one, and where they stand."""

import random

import numpy as np
import pytest
from grammar_places import VOCAB, compile_all, places_of
from tiny_models import make_tokenizer

from specserve.compute.grammar_masks import MaskMaker
from specserve.messages import GenerateRequest, SamplingParams
from specserve.schedule.row_group import RowGroup
from specserve.schedule.sequence import Sequence

WORDS = (VOCAB + 31) // 32


@pytest.fixture(scope="module")
def compiled():
    return compile_all(make_tokenizer(VOCAB - 3).backend_tokenizer)


def sequence(idx, grammar=None):
    return Sequence(idx, GenerateRequest(str(idx), [1], SamplingParams(9, temperature=float(idx % 2))), grammar)


def step_of(rng, compiled, num):
    """The groups of a step; one has no grammar."""
    places = [(None, None, [5]), *places_of(rng, compiled, num)]
    groups, first = [], 0
    for idx, (grammar, _, drafts) in enumerate(rng.sample(places, len(places))):
        groups.append(RowGroup(sequence(idx, grammar), first, drafts))
        first += len(drafts) + 1
    return groups


def rows_of(groups):
    return {row for group in groups for row in range(group.first_row, group.first_row + group.num_rows)}


def test_masks_stand_in_the_room_that_is_given_whatever_it_held(compiled):
    rng, maker, held = random.Random(5), MaskMaker(WORDS), np.full((500, WORDS), -1, dtype=np.int32)
    for num in (1, 40, 2):
        groups = step_of(rng, compiled, num)
        want = MaskMaker(WORDS).masks(groups, also_greedy=True)
        got = maker.masks(groups, also_greedy=True, room=lambda num_rows: held[:num_rows])
        assert set(got.rows) == rows_of(group for group in groups if group.seq.grammar is not None)
        assert got.rows == want.rows and np.array_equal(got.bits, want.bits) and np.shares_memory(got.bits, held)


def test_only_rows_that_are_drawn_get_masks_where_the_others_can_be_asked(compiled):
    groups = step_of(random.Random(8), compiled, 20)
    masks = MaskMaker(WORDS).masks(groups)
    drawn = [group for group in groups if group.seq.grammar is not None and not group.is_greedy]
    assert 0 < len(drawn) < len(groups) and set(masks.rows) == rows_of(drawn)
    assert MaskMaker(WORDS).masks([group for group in groups if group.is_greedy]) is None
