"""What each token of a trace says: characters in pieces, stop strings, rejected drafts, ends of all kinds."""

from __future__ import annotations

import random

import pytest
from tiny_models import make_tokenizer

from specserve.messages import TARGET, Delta, RejectedDraft, TokenTrace
from specserve.text.detokenizer import Detokenizer, TokenTexts
from specserve.text.traced_text import TracedText


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(300).backend_tokenizer


@pytest.fixture(scope="module")
def texts(tokenizer):
    return TokenTexts(tokenizer)


class Answer:
    """An output as the engine tells of it, delta by delta."""

    def __init__(self, tokenizer, texts, stop=(), include_stop=False):
        self._tokenizer = tokenizer
        self._reader = Detokenizer(texts, [], stop, include_stop)
        self._traced = TracedText(Detokenizer(texts, []))
        self._num = 0

    def ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def say(self, tokens, rejected=(), finish=None, num_silent=0) -> list[TokenTrace]:
        """The entries that come with one forward's tokens; `rejected` on the last."""
        text, stop = "", None
        for token in tokens[: len(tokens) - num_silent]:
            new, stop = self._reader.push(token)
            text += new
        if finish == "length" or num_silent:
            text += self._reader.flush()
        drafts = [RejectedDraft(token, "", "head", 0.5) for token in rejected]
        trace = [TokenTrace(token, "", "head", 0.5, self._num) for token in tokens[:-1]]
        trace += [TokenTrace(token, "", TARGET, None, self._num, drafts) for token in tokens[-1:]]
        self._num += 1
        delta = Delta("a", list(tokens), text, num_silent, trace=trace)
        if finish is not None:
            delta = Delta("a", list(tokens), text, num_silent, trace=trace, finish_reason=finish, stop_reason=stop)
        return self._traced.told(delta).trace


def said(trace: list[TokenTrace]) -> list[str]:
    return [entry.text for entry in trace]


def test_a_character_in_pieces_is_the_last_ones_and_comes_with_it(tokenizer, texts):
    answer = Answer(tokenizer, texts)
    pieces = answer.ids("\u20ac")
    assert len(pieces) == 3
    assert said(answer.say([*answer.ids("x"), pieces[0]])) == ["x"]
    assert said(answer.say(pieces[1:2])) == []
    assert said(answer.say([pieces[2], *answer.ids("y")])) == ["", "", "\u20ac", "y"]


@pytest.mark.parametrize("ends_by_itself", [False, True])
def test_a_character_that_is_never_complete_is_its_last_pieces(tokenizer, texts, ends_by_itself):
    answer = Answer(tokenizer, texts)
    pieces = answer.ids("\u20ac")[:2]
    assert said(answer.say(answer.ids("x"))) == ["x"]
    if ends_by_itself:
        eos = tokenizer.token_to_id("<|im_end|>")
        assert said(answer.say([*pieces, eos], finish="stop", num_silent=1)) == ["", "\ufffd", ""]
    else:
        assert said(answer.say(pieces[:1])) == []
        assert said(answer.say(pieces[1:], finish="length")) == ["", "\ufffd"]


def test_rejected_drafts_say_what_they_would_have_said_there(tokenizer, texts):
    answer = Answer(tokenizer, texts)
    euro, cent = answer.ids("\u20ac"), answer.ids("\u20ad")  # of the same two bytes, and another third
    assert euro[:2] == cent[:2]
    answer.say(euro[:1])
    (*_, last) = answer.say([euro[1], euro[2]], rejected=[cent[2], *answer.ids("k")])
    assert last.text == "\u20ac"
    assert [draft.text for draft in last.rejected] == ["\u20ad", "k"]
    (entry,) = answer.say(answer.ids("z"), rejected=euro)  # a draft leaves no trace in what follows
    assert [draft.text for draft in entry.rejected] == ["", "", "\u20ac"] and entry.text == "z"


@pytest.mark.parametrize("include_stop", [False, True])
def test_a_stop_string_cuts_the_entries_and_their_rejected_drafts(tokenizer, texts, include_stop):
    answer = Answer(tokenizer, texts, stop=("#%&",), include_stop=include_stop)
    hash_, percent, ampersand = ([idx] for idx in answer.ids("#%&"))
    other = answer.ids("~")
    first = answer.say(answer.ids("ab"), rejected=other)
    assert "".join(said(first)) == "ab" and first[-1].rejected
    assert answer.say(hash_, rejected=other) == []  # it may begin the stop string
    assert answer.say(percent, rejected=other) == []
    last = answer.say(ampersand, rejected=other, finish="stop")
    assert said(last) == (["#", "%", "&"] if include_stop else ["", "", ""])
    assert [bool(entry.rejected) for entry in last] == [include_stop] * 3


def test_text_that_only_looks_like_a_stop_string_is_told_with_its_tokens(tokenizer, texts):
    answer = Answer(tokenizer, texts, stop=("#%&",))
    assert answer.say(answer.ids("#")) == []
    assert said(answer.say(answer.ids("~"))) == ["#", "~"]
    assert answer.say(answer.ids("#%")) == []
    assert said(answer.say(answer.ids("#"), finish="length")) == ["#", "%", "#"]


def test_any_tokens_and_stops_join_to_the_text(tokenizer, texts):
    rng = random.Random(0)
    for _ in range(300):
        stops = [rng.choice(["e", "th", " a", "\ufffd", "x"]) for _ in range(rng.randrange(3))]
        answer = Answer(tokenizer, texts, stops, rng.random() < 0.5)
        reader = Detokenizer(texts, [], stops, answer._reader._include_stop)
        tokens = [rng.randrange(300) for _ in range(rng.randrange(1, 40))]
        want, stop, trace = "", None, []
        for idx, token in enumerate(tokens):
            new, stop = reader.push(token)
            want += new
            is_last = stop is not None or idx == len(tokens) - 1
            finish = None if not is_last else "stop" if stop is not None else "length"
            trace += answer.say([token], [rng.randrange(300) for _ in range(rng.randrange(3))], finish)
            assert want.startswith("".join(said(trace))) or is_last
            if is_last:
                break
        want += "" if stop is not None else reader.flush()
        assert "".join(said(trace)) == want
        assert [entry.token_id for entry in trace] == tokens[: len(trace)] and len(trace) == idx + 1
