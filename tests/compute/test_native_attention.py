"""Attention of the native path over contexts of several splits (kernels/cpu/attention.h), at every level."""

from __future__ import annotations

import random

import pytest
import torch
from decoder_driver import Driver, native_choice
from tiny_models import MINISTRAL, make_tiny_model

from specserve.compute.loader import load_model

CPU = torch.device("cpu")
SPLIT = 256
LENGTH = 2 * SPLIT + 75
GROWING = MINISTRAL | {"original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.1}
# Heads of 32 elements are whole tiles of AMX; 20 are not, 80 are two and a half, 96 are one and a half of what is
# weighed at once, and 256 are the most.
MODELS = {
    "whole tiles": ("llama", {"num_attention_heads": 6, "hidden_size": 192, "head_dim": 32}),
    "part of a tile, each head its keys": ("llama", {"num_key_value_heads": 4, "head_dim": 20}),
    "windows over splits, wide heads": ("gemma3", {"head_dim": 96, "sliding_window": SPLIT + 21}),
    "tiles and a half, queries that grow": ("ministral3", {"head_dim": 80, "rope_parameters": GROWING}),
    "the widest heads, capped scores": ("gemma2", {"head_dim": 256}),
    "windows within splits, capped scores": (
        "gemma2",
        {"head_dim": 64, "sliding_window": 40, "num_key_value_heads": 1},
    ),
    "heads of a panel": ("llama", {"head_dim": 64}),
    "all heads normed as one, no norms before": ("olmo3", {"head_dim": 64, "sliding_window": SPLIT + 21}),
}


def random_tokens(num: int, seed: int) -> list[int]:
    return torch.randint(320, (num,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.fixture(scope="module", params=MODELS, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def model_dir(request, tmp_path_factory):
    architecture, overrides = MODELS[request.param]
    return make_tiny_model(tmp_path_factory.mktemp("model"), architecture, max_position_embeddings=1024, **overrides)


@pytest.fixture(scope="module")
def expected(model_dir):
    """Logits [LENGTH, V] of the torch path in float32."""
    driver = Driver(load_model(model_dir, CPU, "fp32"), num_blocks=LENGTH // 4 + 1)
    return driver.step([(driver.sequence(), random_tokens(LENGTH, 1))])[0]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_has_the_same_bits_in_every_batch_over_several_splits(model_dir, expected, library, dtype):
    """In one prompt; in chunks beside another sequence; in verifications and alone; with more threads. What was never
    written is NaN."""
    prompt = random_tokens(LENGTH, 1)

    def driver(num_threads: int) -> Driver:
        driver = Driver(load_model(model_dir, CPU, dtype, [native_choice(library, num_threads)]), num_blocks=160)
        for cache in (*driver.kv.k, *driver.kv.v):
            cache.fill_(float("nan"))
        return driver

    one, two, three = map(driver, (1, 2, 3))
    (whole,) = one.step([(one.sequence(), prompt)])
    error = (whole - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < (1e-5 if dtype == "fp32" else 0.03), error
    chunks, seq, other, rng, start = [], two.sequence(), two.sequence(), random.Random(0), 0
    while start < LENGTH:
        end = min(LENGTH, start + rng.choice([3, 40, 100, 300]))
        rows, _ = two.step([(seq, prompt[start:end]), (other, random_tokens(rng.choice([1, 4, 9]), start))])
        chunks.append(rows)
        start = end
    assert torch.equal(torch.cat(chunks), whole)
    for start in (SPLIT - 3, 2 * SPLIT - 3, LENGTH - 9):
        seq, other = three.sequence(), three.sequence()
        three.step([(seq, prompt[:start])])
        (alone,) = three.step([(seq, prompt[start : start + 1])])
        verified, _ = three.step([(seq, prompt[start + 1 : start + 8]), (other, prompt[:5])])
        assert torch.equal(torch.cat([alone, verified]), whole[start : start + 8])
