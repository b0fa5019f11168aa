"""Incremental text: equal to decoding at once, never half a character, never past a stop string."""

import random

import pytest
from tiny_models import make_tiny_model
from tokenizers import Tokenizer

from specserve.text.detokenizer import Detokenizer

TEXTS = ["plain words, and more", "naïve café — 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🎉🎉 日本語", "a\n\n  b\t{}", "🎉"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_file(str(make_tiny_model(tmp_path_factory.mktemp("model")) / "tokenizer.json"))


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_and_hold_no_broken_character(tokenizer, text):
    detokenizer = Detokenizer(tokenizer, encode(tokenizer, "prompt"))
    pieces = [detokenizer.push(token)[0] for token in encode(tokenizer, text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_unfinished_character_at_the_end_is_flushed(tokenizer):
    ids = encode(tokenizer, "x🎉")
    detokenizer = Detokenizer(tokenizer, [])
    text = "".join(detokenizer.push(token)[0] for token in ids[:-1])
    assert text == "x"
    assert detokenizer.flush() in ("", "\ufffd")


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(tokenizer, include):
    detokenizer = Detokenizer(tokenizer, [], stop=("END", "ENDING"), include_stop=include)
    text, stop = "", None
    for token in encode(tokenizer, "abcENDINGdef"):
        new, stop = detokenizer.push(token)
        text += new
        if stop:
            break
    assert stop == "END"
    assert text == ("abcEND" if include else "abc")


def test_text_that_only_looks_like_a_stop_is_released(tokenizer):
    detokenizer = Detokenizer(tokenizer, [], stop=("ENDED",))
    text = ""
    for token in encode(tokenizer, "abEND"):
        text += detokenizer.push(token)[0]
        assert not text.endswith("E")
    assert text == "ab"
    assert detokenizer.flush() == "END"


def test_random_stops_agree_with_searching_the_whole_text(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        whole = "".join(rng.choice("ab ") for _ in range(30))
        stops = ["".join(rng.choice("ab ") for _ in range(rng.randrange(2, 6))) for _ in range(3)]
        detokenizer = Detokenizer(tokenizer, [], stop=stops)
        text, hit = "", None
        for token in encode(tokenizer, whole):
            new, hit = detokenizer.push(token)
            text += new
            if hit:
                break
        text += "" if hit else detokenizer.flush()
        first = min(((whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole), default=None)
        assert text == (whole if first is None else whole[: first[1]])
