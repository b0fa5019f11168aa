"""Copies of the base's embedding: rounding is none, every way that numbers took; training is, however small."""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from specserve.adapters.base_copies import BaseCopies
from specserve.errors import AdapterError

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KEY, MODULE = "base_model.model.model.embed_tokens.weight", "model.embed_tokens"


@pytest.fixture(scope="module")
def original():
    """Magnitudes from fp16's smallest to 100, and more rows than are read at once."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** (torch.rand(5000, 16, generator=generator) * 10 - 8)
    return sizes * torch.randn(5000, 16, generator=generator).sign()


def copies_of(tmp_path, weight, served, ties_embedding=False):
    save_file({"model.embed_tokens.weight": weight, "x": torch.zeros(3)}, tmp_path / "model.safetensors")
    return BaseCopies(tmp_path, ties_embedding, served)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_an_unchanged_copy_passes_however_it_was_rounded(original, tmp_path, stored):
    base = original.to(stored)
    for served, trained, saved in itertools.product(DTYPES, DTYPES, (*DTYPES, torch.float64)):
        copies_of(tmp_path, base, served).check("a", KEY, MODULE, base.to(trained).to(saved))


def test_a_copy_of_what_the_base_was_rounded_from_passes(original, tmp_path):
    for stored in DTYPES:
        copies_of(tmp_path, original.to(stored), torch.float32).check("a", KEY, MODULE, original)


@pytest.mark.parametrize("stored", DTYPES, ids=str)
@pytest.mark.parametrize("row", [3, 4999])
def test_a_change_of_one_element_is_seen(original, tmp_path, stored, row):
    base = original.to(stored)
    for served, trained, saved in itertools.product(DTYPES, DTYPES, DTYPES):
        copy = base.to(trained, copy=True)
        copy[row] += copy[row].abs().max() * 0.01
        with pytest.raises(AdapterError, match="differs from the base model's by more than rounding"):
            copies_of(tmp_path, base, served).check("a", KEY, MODULE, copy.to(saved))


def test_the_smallest_change_of_a_bf16_embedding_is_seen(original, tmp_path):
    base = original.bfloat16()
    copy = base.clone()
    copy.view(torch.int16)[0, 0] += 1  # the next number that bf16 has
    with pytest.raises(AdapterError, match="differs"):
        copies_of(tmp_path, base, torch.bfloat16).check("a", KEY, MODULE, copy.float())


def test_nan_a_head_that_is_tied_and_a_base_that_is_gone(original, tmp_path):
    copy = original.clone()
    copies_of(tmp_path, original, torch.float32, ties_embedding=True).check("a", KEY, "lm_head", copy)
    copy[0, 0] = float("nan")
    copies = copies_of(tmp_path, original, torch.float32)
    with pytest.raises(AdapterError, match="differs"):
        copies.check("a", KEY, MODULE, copy)
    with pytest.raises(AdapterError, match="cannot be compared with the base model: .* no tensor lm_head.weight"):
        copies.check("a", KEY, "lm_head", original)
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    for broken in (data[: len(data) // 2], b"\xff" * 100, b""):
        file.write_bytes(broken)
        with pytest.raises(AdapterError, match="cannot be compared with the base model: "):
            copies.check("a", KEY, MODULE, original)
    file.unlink()
    with pytest.raises(AdapterError, match="cannot be compared with the base model: "):
        copies.check("a", KEY, MODULE, original)
