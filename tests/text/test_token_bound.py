"""The least number of tokens that bytes can be, held against what tokenizers of the usual kinds make of them."""

import random

import pytest
from tiny_models import CORPUS, make_tokenizer
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, trainers

from specserve.text.token_bound import BYTE_OF, TokenBound

PIECES = [
    *CORPUS,
    " ",
    "\n",
    "  ",
    "é",
    "e\u0301",
    "\u1112\u1161\u11ab",
    "\u2126\u212b",
    "\U0001f600",
    "a",
    "Ab",
    "\x00",
    "the",
]
PIECES += ["<|im_end|>", "<|im_end|>   ", "\u0344", "ω\u0314\u0342\u0345", "\ufb2c"]


def trained(**parts):
    tokenizer = Tokenizer(
        models.BPE(
            unk_token=parts.pop("unk_token", None), fuse_unk=True, byte_fallback=parts.pop("byte_fallback", False)
        )
    )
    special = [f"<0x{byte:02X}>" for byte in range(256)] if tokenizer.model.byte_fallback else []
    for name, part in parts.items():
        setattr(tokenizer, name, part)
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=[*special, "<unk>"], show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, " " * 90], trainer)
    return tokenizer


def byte_level(normalizer=None, **token):
    tokenizer = make_tokenizer(320).backend_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if token:
        tokenizer.add_tokens([AddedToken("the", **token)])
    return tokenizer


def without_bytes(missing, normalizer=None):
    """As many vocabularies are: bytes that the corpus did not have are missing, and dropped from texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocab = [char for char, byte in BYTE_OF.items() if byte not in missing]
    tokenizer.model = models.BPE(vocab={char: idx for idx, char in enumerate(vocab)}, merges=[])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return tokenizer


BOUNDED = {
    "byte level": byte_level,
    "misses bytes": lambda: without_bytes(b"ab \x00"),
    "composed": lambda: byte_level(normalizers.NFC()),
    "swallows space": lambda: byte_level(lstrip=True, rstrip=True),
    "metaspace": lambda: trained(normalizer=normalizers.Replace(" ", "▁"), byte_fallback=True, unk_token="<unk>"),
}  # fmt: skip
UNBOUNDED = {
    "strips": lambda: byte_level(normalizers.Strip()),
    "drops": lambda: byte_level(normalizers.Sequence([normalizers.NFC(), normalizers.StripAccents()])),
    "unknown words": lambda: trained(unk_token="<unk>"),
    "misses bytes of composed letters": lambda: without_bytes(b"\xcc\x81", normalizers.NFC()),
    "leaves out unknown letters": trained,
    "drops white space": lambda: trained(pre_tokenizer=pre_tokenizers.Whitespace(), byte_fallback=True),
}


def texts(rng):
    for piece in PIECES:
        yield piece * 300
    for _ in range(60):
        yield "".join(rng.choices(rng.choices(PIECES, k=3), k=rng.randint(0, 300)))


@pytest.mark.parametrize("kind", [*BOUNDED, *UNBOUNDED])
def test_no_text_has_fewer_tokens_than_the_bound_says(kind):
    tokenizer = {**BOUNDED, **UNBOUNDED}[kind]()
    bound = TokenBound(tokenizer)
    for text in texts(random.Random(1)):
        assert bound.min_num_tokens(text) <= len(tokenizer.encode(text, add_special_tokens=False).ids), text[:40]


@pytest.mark.parametrize("kind", [*BOUNDED, *UNBOUNDED])
def test_a_tokenizer_has_a_bound_unless_it_may_drop_text(kind):
    least = TokenBound({**BOUNDED, **UNBOUNDED}[kind]()).min_num_tokens("x" * 1_000_000)
    assert least >= 2500 if kind in BOUNDED else least == 0, least
