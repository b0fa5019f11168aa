"""Drafters that need no weights: what they propose, and that they give up when they are wrong."""

import pytest

from specserve.drafters.acceptance import AcceptanceModel
from specserve.drafters.chooser import DraftChooser
from specserve.drafters.ngram import NgramDrafter
from specserve.drafters.prediction import PredictionDrafter
from specserve.drafters.protocol import Proposal


def test_ngram_copies_the_continuation_whose_context_agrees_furthest_back():
    text = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 8, 1, 2, 3, 4]
    proposal = NgramDrafter().propose(text, 3)
    assert proposal is not None and proposal.tokens == [50, 9, 2]


def test_ngram_prefers_the_most_recent_of_equal_matches():
    proposal = NgramDrafter().propose([5, 6, 70, 5, 6, 71, 5, 6], 1)
    assert proposal is not None and proposal.tokens == [71]


def test_ngram_continues_a_loop_past_the_end_of_the_text():
    proposal = NgramDrafter().propose([1, 2, 3, 1, 2, 3, 1, 2, 3], 7)
    assert proposal is not None and proposal.tokens == [1, 2, 3, 1, 2, 3, 1]


def test_ngram_has_nothing_to_say_about_new_text():
    assert NgramDrafter().propose([1, 2, 3, 4], 4) is None
    assert NgramDrafter().propose([1], 4) is None


def test_ngram_index_grows_with_the_text():
    drafter = NgramDrafter()
    text = [1, 2, 3]
    assert drafter.propose(text, 2) is None
    text += [9, 1, 2]
    proposal = drafter.propose(text, 2)
    assert proposal is not None and proposal.tokens == [3, 9]


def test_prediction_follows_diverges_and_resynchronises():
    prompt, prediction = [100, 101], [1, 2, 3, 4, 5, 6, 7, 8]
    drafter = PredictionDrafter(prediction, len(prompt))
    text = list(prompt)
    proposal = drafter.propose(text, 3)
    assert proposal is not None and proposal.tokens == [1, 2, 3]
    text += [1, 2]
    proposal = drafter.propose(text, 3)
    assert proposal is not None and proposal.tokens == [3, 4, 5]
    text += [99]
    assert drafter.propose(text, 3) is None
    text += [4, 5]
    proposal = drafter.propose(text, 5)
    assert proposal is not None and proposal.tokens == [6, 7, 8]
    text += [6, 7, 8]
    assert drafter.propose(text, 3) is None


def test_prediction_resynchronises_near_the_pointer():
    prediction = [1, 2, 10, 11, 3, 4, 5, 1, 2, 20, 21]
    drafter = PredictionDrafter(prediction, 0)
    text = [1, 2, 10, 11, 3, 4, 5]
    drafter.propose(text, 1)
    text += [77, 1, 2]
    proposal = drafter.propose(text, 2)
    assert proposal is not None and proposal.tokens == [20, 21]


def test_survival_falls_with_rejections_and_rises_with_acceptance():
    model = AcceptanceModel()
    before = model.survival(2, 4)
    assert all(a >= b for a, b in zip(before, before[1:], strict=False))
    for _ in range(20):
        model.observe(2, 4, 0)
    assert model.survival(2, 1)[0] < 0.1 < before[0]
    for _ in range(100):
        model.observe(2, 4, 4)
    assert model.survival(2, 1)[0] > 0.9


class Fixed:
    source = "fixed"

    def __init__(self, tokens, survival, source="fixed"):
        self.proposal = Proposal(tokens, survival, source)
        self.seen = []

    def propose(self, tokens, max_tokens):
        return Proposal(self.proposal.tokens[:max_tokens], self.proposal.survival[:max_tokens], self.proposal.source)

    def observe(self, num_drafted, num_accepted):
        self.seen.append((num_drafted, num_accepted))


class Broken:
    source = "broken"

    def propose(self, tokens, max_tokens):
        raise RuntimeError("drafter bug")

    def observe(self, num_drafted, num_accepted):
        raise AssertionError


def test_chooser_takes_the_most_valuable_proposal_cuts_it_and_reports_back_to_it():
    weak, strong = Fixed([1, 2], [0.5, 0.2]), Fixed([3, 4, 5], [0.9, 0.6, 0.1])
    chooser = DraftChooser([weak, strong])
    proposal = chooser.propose([0], 8, row_price=0.3)
    assert proposal is not None and proposal.tokens == [3, 4]
    chooser.observe(2, 1)
    assert strong.seen == [(2, 1)] and weak.seen == []


def test_chooser_drafts_nothing_that_does_not_pay():
    assert DraftChooser([Fixed([1], [0.2])]).propose([0], 8, row_price=0.3) is None
    assert DraftChooser([Fixed([1], [0.9])]).propose([0], 0, row_price=0.0) is None


@pytest.mark.parametrize("order", [0, 1])
def test_broken_drafter_is_dropped_and_the_others_go_on(order):
    good = Fixed([1], [0.9])
    chooser = DraftChooser([Broken(), good] if order else [good, Broken()])
    for _ in range(2):
        proposal = chooser.propose([0], 4, 0.0)
        assert proposal is not None and proposal.tokens == [1]
