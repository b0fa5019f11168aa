"""The real base model pools as transformers and peft do, eight LoRAs mixed.

In float32 every value is within 1e-5. In bf16 transformers rounds each layer's result, so that single values of its
embeddings, of length 1, are up to 0.006 from those in float32; ours are nearer, and within 1e-3 of peft's in the mean.
Slow: the default model must have been fetched (`specserve pull`).
"""

import numpy as np
import pytest
import torch
from engine_fixture import make_engine, run, text
from pooling_adapters import make_pooling_adapter, peft_hidden, peft_outputs

from specserve.adapters.pooling_config import PoolingConfig
from specserve.model.store import resolve_model
from specserve.text.tokenizer import TextTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.real_model]
NUM_LABELS = {"classify": 10, "rerank": 1}
KINDS = {
    "last": ("FEATURE_EXTRACTION", None),
    "mean": ("FEATURE_EXTRACTION", PoolingConfig("embed", pooling="mean")),
    "classify": ("SEQ_CLS", None),
    "rerank": ("SEQ_CLS", None),
}
TEXTS = (
    "a compiler for a small language",
    "The package holds the development files of a library that reads and writes images in many formats. " * 4,
    "Where is the nearest station?",
)


@pytest.fixture(scope="module")
def model_dir():
    return resolve_model("")


@pytest.fixture(scope="module")
def adapter_dirs(model_dir, tmp_path_factory):
    """Two of each kind, as large as trained ones."""
    root = tmp_path_factory.mktemp("adapters")
    return {
        f"{kind} {seed}": make_pooling_adapter(
            model_dir, root / f"{kind}{seed}", task, num_labels=NUM_LABELS.get(kind, 0),
            config=config, r=16, std=0.01, seed=seed,
        )
        for kind, (task, config) in KINDS.items()
        for seed in range(2)
    }  # fmt: skip


@pytest.fixture(scope="module")
def asked(model_dir):
    """Name -> (what pools it, its prompt)."""
    tokenizer = TextTokenizer(model_dir)
    prompts = [tokenizer.encode(words) for words in TEXTS]
    names = [f"{kind} {seed}" for kind in KINDS for seed in range(2)]
    return {f"{name}: {idx}": (name, prompt) for idx, prompt in enumerate(prompts) for name in (*names, "base")}


def pooled(model_dir, adapter_dirs, asked, dtype):
    """Name -> values."""
    engine = make_engine(model_dir, kv_cache_gib=0.3, max_batched_tokens=256, dtype=dtype)
    hashes = {name: engine.load_adapter(name, path).content_hash for name, path in adapter_dirs.items()}
    texts = [
        text(key, prompt, "score" if name.split()[0] in NUM_LABELS else "embed", adapter=hashes.get(name))
        for key, (name, prompt) in asked.items()
    ]
    return {key: result.values for key, result in run(engine, texts).items()}


def expected(model_dir, adapter_dirs, name, prompt, dtype):
    kind = name.split()[0]
    if kind in NUM_LABELS:
        return peft_outputs(model_dir, adapter_dirs[name], prompt, NUM_LABELS[kind], dtype).numpy()
    hidden = peft_hidden(model_dir, adapter_dirs.get(name), prompt, dtype).double().numpy()
    values = hidden.mean(axis=0) if kind == "mean" else hidden[-1]
    return values / np.linalg.norm(values)


def test_in_float32_every_value_equals_pefts(model_dir, adapter_dirs, asked):
    ours = pooled(model_dir, adapter_dirs, asked, "fp32")
    for key, (name, prompt) in asked.items():
        want = expected(model_dir, adapter_dirs, name, prompt, torch.float32)
        np.testing.assert_allclose(ours[key], want, atol=1e-5, rtol=1e-5, err_msg=key)


def test_in_bf16_values_are_nearer_to_float32_than_pefts(model_dir, adapter_dirs, asked):
    ours, errors = pooled(model_dir, adapter_dirs, asked, "bf16"), []
    for key, (name, prompt) in asked.items():
        exact, theirs = (
            expected(model_dir, adapter_dirs, name, prompt, dtype) for dtype in (torch.float32, torch.bfloat16)
        )
        if name.split()[0] not in NUM_LABELS:
            assert np.sqrt(np.mean((ours[key] - theirs) ** 2)) <= 1e-3, key
        errors.append((np.linalg.norm(ours[key] - exact), np.linalg.norm(theirs - exact)))
    own, of_peft = np.mean(errors, axis=0)
    assert own < of_peft
