"""Incremental text: equal to decoding at once, never half a character, never past a stop string."""

import random

import pytest
from tiny_models import make_tiny_model
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from specserve.text.detokenizer import MAX_PENDING_TOKENS, Detokenizer, TokenTexts

TEXTS = ["plain words, and more", "naïve café — 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 🎉🎉 日本語", "a\n\n  b\t{}", "🎉"]
SPACES = decoders.Replace("▁", " ")
DECODERS = {
    "byte level": None,
    "gemma": decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse()]),
    "llama": decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "metaspace": decoders.Metaspace(),
    "word piece": decoders.WordPiece(),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.from_file(str(make_tiny_model(tmp_path_factory.mktemp("model")) / "tokenizer.json"))


@pytest.fixture(scope="module")
def texts(tokenizer):
    return TokenTexts(tokenizer)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def sentencepiece_like(decoder):
    """Letters, runs of spaces and two words; everything else is bytes."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁▁▁", "##er", "un", "▁un"]
    pieces += [chr(code) for code in range(33, 127)]
    model = models.BPE({piece: idx for idx, piece in enumerate(pieces)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoder
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    return tokenizer


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", DECODERS)
def test_text_is_that_of_all_tokens_at_once(tokenizer, kind, skip):
    if DECODERS[kind] is not None:
        tokenizer = sentencepiece_like(DECODERS[kind])
    texts, rng = TokenTexts(tokenizer), random.Random(0)
    special = [idx for idx, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    for _ in range(40):  # what one sequence decoded the next ones remember
        parts = [encode(tokenizer, rng.choice([*TEXTS, " ", " un", "<tool>"])) for _ in range(6)]
        ids = [token for part in parts for token in (*part, *rng.choices([*special, 10**6], k=rng.randrange(3)))]
        prompt, output = ids[: (num := rng.choice([0, len(parts[0])]))], ids[num:]
        detokenizer = Detokenizer(texts, prompt, skip_special_tokens=skip)
        text = "".join(detokenizer.push(token)[0] for token in output) + detokenizer.flush()
        known = prompt[-6:]  # some tokenizers write other spaces behind nothing
        whole, before = (tokenizer.decode(tokens, skip_special_tokens=skip) for tokens in (known + output, known))
        assert text == whole[len(before) :]


def test_tokens_that_never_make_a_character_are_not_kept_for_long(tokenizer, texts, monkeypatch):
    start, middle = (tokenizer.token_to_id(piece) for piece in "âĤ")
    lens = []
    monkeypatch.setattr(texts, "decode", lambda ids: lens.append(len(ids)) or TokenTexts.decode(texts, ids))
    detokenizer = Detokenizer(texts, [])
    ids = [start, middle] * 100 + encode(tokenizer, "x€")
    text = "".join(detokenizer.push(token)[0] for token in ids)
    assert text.strip("\ufffd") == "x€" and max(lens) <= 2 * MAX_PENDING_TOKENS


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_and_hold_no_broken_character(tokenizer, texts, text):
    detokenizer = Detokenizer(texts, encode(tokenizer, "prompt"))
    pieces = [detokenizer.push(token)[0] for token in encode(tokenizer, text)]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == text


def test_unfinished_character_at_the_end_is_flushed(tokenizer, texts):
    ids = encode(tokenizer, "x🎉")
    detokenizer = Detokenizer(texts, [])
    text = "".join(detokenizer.push(token)[0] for token in ids[:-1])
    assert text == "x"
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize("include", [False, True])
def test_stop_string_across_tokens(tokenizer, texts, include):
    detokenizer = Detokenizer(texts, [], stop=("END", "ENDING"), include_stop=include)
    text, stop = "", None
    for token in encode(tokenizer, "abcENDINGdef"):
        new, stop = detokenizer.push(token)
        text += new
        if stop:
            break
    assert stop == "END"
    assert text == ("abcEND" if include else "abc")


def test_text_that_only_looks_like_a_stop_is_released(tokenizer, texts):
    detokenizer = Detokenizer(texts, [], stop=("ENDED",))
    text = ""
    for token in encode(tokenizer, "abEND"):
        text += detokenizer.push(token)[0]
        assert not text.endswith("E")
    assert text == "ab"
    assert detokenizer.flush() == "END"


def test_random_stops_agree_with_searching_the_whole_text(tokenizer, texts):
    rng = random.Random(0)
    for _ in range(200):
        whole = "".join(rng.choice("ab ") for _ in range(30))
        stops = ["".join(rng.choice("ab ") for _ in range(rng.randrange(2, 6))) for _ in range(3)]
        detokenizer = Detokenizer(texts, [], stop=stops)
        text, hit = "", None
        for token in encode(tokenizer, whole):
            new, hit = detokenizer.push(token)
            text += new
            if hit:
                break
        text += "" if hit else detokenizer.flush()
        first = min(((whole.find(stop) + len(stop), whole.find(stop)) for stop in stops if stop in whole), default=None)
        assert text == (whole if first is None else whole[: first[1]])
