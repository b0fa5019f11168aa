"""Sources that need no weights: what they guess, how sources are combined, and that wrong ones are given up."""

import pytest

from specserve.drafters.acceptance import Acceptance, SharedAcceptance
from specserve.drafters.chooser import DraftChooser
from specserve.drafters.copy_pointer import CopyPointer
from specserve.drafters.ngram import NgramSource
from specserve.drafters.prediction import PredictionSource
from specserve.drafters.protocol import Guess


def draft_of(source, tokens, max_tokens):
    """What a source proposes when it is alone."""
    source.begin(tokens)
    draft = []
    while len(draft) < max_tokens and (guess := source.peek()) is not None:
        draft.append(guess.token)
        source.follow(guess.token)
    return draft


def test_ngram_copies_the_continuation_whose_context_agrees_furthest_back():
    text = [1, 2, 3, 4, 50, 9, 2, 3, 4, 60, 8, 1, 2, 3, 4]
    proposal = draft_of(NgramSource(), text, 3)
    assert proposal == [50, 9, 2]


def test_ngram_prefers_the_most_recent_of_equal_matches():
    proposal = draft_of(NgramSource(), [5, 6, 70, 5, 6, 71, 5, 6], 1)
    assert proposal == [71]


def test_ngram_continues_a_loop_past_the_end_of_the_text():
    proposal = draft_of(NgramSource(), [1, 2, 3, 1, 2, 3, 1, 2, 3], 7)
    assert proposal == [1, 2, 3, 1, 2, 3, 1]


def test_ngram_has_nothing_to_say_about_new_text():
    assert draft_of(NgramSource(), [1, 2, 3, 4], 4) == []
    assert draft_of(NgramSource(), [1], 4) == []


def test_ngram_index_grows_with_the_text():
    drafter = NgramSource()
    text = [1, 2, 3]
    assert draft_of(drafter, text, 2) == []
    text += [9, 1, 2]
    proposal = draft_of(drafter, text, 2)
    assert proposal == [3, 9]


def test_prediction_follows_diverges_and_resynchronises():
    prompt, prediction = [100, 101], [1, 2, 3, 4, 5, 6, 7, 8]
    drafter = PredictionSource(prediction, len(prompt))
    text = list(prompt)
    proposal = draft_of(drafter, text, 3)
    assert proposal == [1, 2, 3]
    text += [1, 2]
    proposal = draft_of(drafter, text, 3)
    assert proposal == [3, 4, 5]
    text += [99]
    assert draft_of(drafter, text, 3) == []
    text += [4, 5]
    proposal = draft_of(drafter, text, 5)
    assert proposal == [6, 7, 8]
    text += [6, 7, 8]
    assert draft_of(drafter, text, 3) == []


def test_prediction_resynchronises_near_the_pointer():
    prediction = [1, 2, 10, 11, 3, 4, 5, 1, 2, 20, 21]
    drafter = PredictionSource(prediction, 0)
    text = [1, 2, 10, 11, 3, 4, 5]
    draft_of(drafter, text, 1)
    text += [77, 1, 2]
    proposal = draft_of(drafter, text, 2)
    assert proposal == [20, 21]


def test_ngram_goes_on_from_a_token_that_another_source_proposed():
    source = NgramSource()
    source.begin([1, 2, 3, 4, 9, 9, 1, 2])
    assert source.peek().token == 3
    source.follow(4)  # not what it said: (2, 4) never occurred, so there is nothing to copy
    assert source.peek() is None
    source = NgramSource()
    source.begin([1, 2, 3, 7, 2, 5, 6, 7, 1, 2])
    source.follow(5)
    assert source.peek().token == 6


class Fixed:
    prior = (0.5, 0.9)

    def __init__(self, tokens, levels, source="fixed"):
        self.source, self.all, self.levels = source, tokens, levels
        self.followed = []

    def begin(self, tokens):
        self.followed = []

    def peek(self):
        idx = len(self.followed)
        return Guess(self.all[idx], self.levels[idx]) if idx < len(self.all) else None

    def follow(self, token):
        self.followed.append(token)


class Broken:
    source = "broken"
    prior = (1.0,)

    def __init__(self, method):
        self.method = method

    def begin(self, tokens):
        if self.method == "begin":
            raise RuntimeError("drafter bug")

    def peek(self):
        if self.method == "peek":
            raise RuntimeError("drafter bug")
        return Guess(7, 0)

    def follow(self, token):
        raise RuntimeError("drafter bug")


def grow(chooser, tokens, price, limit=8):
    chooser.begin(tokens)
    while len(chooser.tokens) < limit and chooser.extend(price):
        pass
    return chooser.tokens


def test_each_position_takes_the_most_credible_guess_and_all_sources_follow_it():
    first, second = Fixed([1, 2, 3], [1, 0, 0], "first"), Fixed([4, 5, 6], [0, 1, 1], "second")
    chooser = DraftChooser([first, second])
    assert grow(chooser, [0], price=0.0) == [1, 5, 6]
    assert chooser.chosen == ["first", "second", "second"]
    assert first.followed == second.followed == [1, 5, 6]


def test_a_draft_ends_where_its_survival_falls_below_the_price():
    assert grow(DraftChooser([Fixed([1, 2, 3], [1, 0, 0])]), [0], price=0.4) == [1, 2]
    assert grow(DraftChooser([Fixed([1], [0])]), [0], price=0.6) == []


def test_guesses_are_learned_whether_chosen_or_not():
    shared = SharedAcceptance()
    loud, right = Fixed([1, 2], [1, 1], "loud"), Fixed([8, 9], [0, 0], "right")
    for _ in range(30):
        chooser = DraftChooser([loud, right], shared)
        grow(chooser, [0], price=0.0)
        chooser.observe([8])
    assert shared.rate(loud, 1) < 0.3 < 0.8 < shared.rate(right, 0)
    assert grow(DraftChooser([loud, right], shared), [0], price=0.3)[0] == 8


def test_what_comes_after_the_first_wrong_draft_is_not_learned_from():
    shared = SharedAcceptance()
    source = Fixed([1, 2, 3], [1, 0, 0])
    chooser = DraftChooser([source], shared)
    grow(chooser, [0], price=0.0)
    chooser.observe([9])
    assert shared.counts["fixed"].tolist() == [0.0, 0.0, 0.0, 1.0]


def test_a_sequence_learns_faster_than_its_adapter_and_a_record_survives_its_dump():
    shared, source = SharedAcceptance(), Fixed([1], [1])
    own = Acceptance(shared)
    for _ in range(8):
        own.observe(source, Guess(1, 1), False)
    assert own.rate(source, Guess(1, 1)) < shared.rate(source, 1) < 0.9
    again = SharedAcceptance(shared.dump())
    assert again.rate(source, 1) == pytest.approx(shared.rate(source, 1), abs=1e-3)


@pytest.mark.parametrize("method", ["begin", "peek", "follow"])
@pytest.mark.parametrize("order", [0, 1])
def test_a_broken_source_is_dropped_and_the_others_go_on(order, method):
    good, broken = Fixed([1, 2], [1, 1]), Broken(method)
    chooser = DraftChooser([broken, good] if order else [good, broken])
    for _ in range(2):
        grow(chooser, [0], 0.0)
    assert chooser.sources == [good]
    assert chooser.tokens == [1, 2]


def test_copy_pointer_moves_behind_what_it_finds_ahead_and_stays_otherwise():
    pointer = CopyPointer([10, 11, 12, 13, 14, 15], start=1, width=3)
    assert pointer.window() == [11, 12, 13]
    pointer.follow(11)
    assert (pointer.moved, pointer.window()) == (1, [12, 13, 14])
    pointer.follow(14)
    assert (pointer.moved, pointer.window()) == (2, [15, -1, -1])
    pointer.follow(10)
    assert (pointer.moved, pointer.window()) == (0, [15, -1, -1])


def test_copy_pointer_that_jumps_goes_behind_the_first_place_of_what_it_does_not_find_ahead():
    pointer = CopyPointer([10, 11, 12, 13, 11, 14, 15, 16], start=1, width=2, jumps=True)
    pointer.follow(15)
    assert (pointer.moved, pointer.window()) == (2, [16, -1])
    other = pointer.copy()
    other.follow(11)
    assert (other.moved, other.window()) == (2, [12, 13])
    other.follow(12)
    assert (other.moved, other.window()) == (1, [13, 11])
    for token in (10, 99):  # before the start, and nowhere
        other.follow(token)
        assert (other.moved, other.window()) == (0, [13, 11])
    other.follow(16)
    assert other.window() == [13, 11]  # nothing stands behind it
    assert pointer.window() == [16, -1]
