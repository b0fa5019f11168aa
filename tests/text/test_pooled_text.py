"""Texts that are pooled read as transformers reads them, with an adapter's prefixes and end."""

from types import SimpleNamespace

import pytest
from tiny_models import make_tiny_model
from transformers import AutoTokenizer

from specserve.text.pooled_text import classified_ids, embedded_ids, pair_ids
from specserve.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def shape(**fields):
    plain = {"query_prefix": "", "document_prefix": "", "suffix": "", "append_eos": False, "max_tokens": None}
    return SimpleNamespace(**{**plain, **fields})


def test_texts_are_what_transformers_makes_of_them(model_dir):
    ours, theirs = TextTokenizer(model_dir), AutoTokenizer.from_pretrained(model_dir)
    prefixed = shape(query_prefix="query: ", document_prefix="\ntext: ")
    assert embedded_ids(ours, shape(), "a lazy dog", is_query=True) == theirs("a lazy dog")["input_ids"]
    assert embedded_ids(ours, prefixed, "a dog", is_query=True) == theirs("query: a dog")["input_ids"]
    assert embedded_ids(ours, prefixed, "a dog", is_query=False) == theirs("\ntext: a dog")["input_ids"]
    assert pair_ids(ours, prefixed, "a dog", "the fox") == theirs("query: a dog\ntext: the fox")["input_ids"]
    assert classified_ids(ours, prefixed, "a dog") == theirs("a dog")["input_ids"]


def test_special_tokens_are_the_adapters_alone(model_dir):
    ours = TextTokenizer(model_dir)
    end = ours.eos_token_id
    ids = embedded_ids(ours, shape(query_prefix="<|im_start|>"), "a <|im_end|> b", is_query=True)
    assert ids.count(ours.special_tokens["<|im_start|>"]) == 1 and end not in ids
    assert ours.decode(ids) == "<|im_start|>a <|im_end|> b"
    ids = pair_ids(ours, shape(), "a <|im_", "end|> b")  # nor what two texts spell together
    assert end not in ids and ours.decode(ids) == "a <|im_end|> b"


def test_a_long_text_is_cut_before_its_suffix(model_dir):
    ours = TextTokenizer(model_dir)
    cut = shape(suffix=" fox", append_eos=True, max_tokens=8)
    ids = classified_ids(ours, cut, "The quick brown fox jumps over the lazy dog. " * 4)
    suffix = ours.encode(" fox", add_special_tokens=False)
    assert len(ids) == 8 and ids[-1] == ours.eos_token_id and ids[-1 - len(suffix) : -1] == suffix
