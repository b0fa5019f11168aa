"""PEFT directories: all that PEFT writes for LoRA gives peft's tokens; all else is refused with one sentence."""

import json
import shutil

import pytest
import torch
from engine_fixture import make_engine, request, run, tokens_of
from peft import PeftModel
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model
from transformers import AutoModelForCausalLM

from specserve.errors import AdapterError
from specserve.lora import WEIGHTS_FILE, read_adapter
from specserve.model.config import ModelConfig

KINDS = {
    "rank 1": {"r": 1},
    "rank 64, large alpha": {"r": 64, "lora_alpha": 128},
    "rslora": {"r": 8, "use_rslora": True},
    "attention only": {"target_modules": ["q_proj", "v_proj"]},
    "one module": {"target_modules": ["down_proj"], "r": 5},
    "rank and alpha patterns": {
        "r": 4,
        "rank_pattern": {"q_proj": 7, r"layers\.0\.mlp\.up_proj": 2},
        "alpha_pattern": {"o_proj": 3, "down_proj": 40},
    },
    "one layer": {"layers_to_transform": [1]},
    "embedding": {"embed": True},
    "lm_head": {"lm_head": True},
    "everything": {"embed": True, "lm_head": True, "r": 6, "use_rslora": True},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        kind: make_peft_adapter(model_dir, root / kind.replace(" ", "_").replace(",", ""), seed=i, std=0.15, **kwargs)
        for i, (kind, kwargs) in enumerate(KINDS.items())
    }


@pytest.fixture(scope="module")
def engine(model_dir):
    return make_engine(model_dir)


@pytest.fixture(scope="module")
def mixed(engine, adapters):
    """Every kind of adapter and the base in one batch, twice, with logprobs."""
    hashes = {kind: engine.load_adapter(kind, path).content_hash for kind, path in adapters.items()}
    requests = [
        request(f"{kind} {i}", [3, 1, 4, 1, 5, 9, 2, 6 + i], adapter=h, max_tokens=12, ignore_eos=True, logprobs=0)
        for i in range(2)
        for kind, h in [*hashes.items(), ("base", None)]
    ]
    return run(engine, requests)


def peft_reference(model_dir, path, prompt, num_tokens):
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    if path is not None:
        model = PeftModel.from_pretrained(model, path)
    model.eval()
    ids = torch.tensor([prompt])
    logprobs = []
    with torch.inference_mode():
        for _ in range(num_tokens):
            row = model(input_ids=ids).logits[0, -1]
            token = int(row.argmax())
            logprobs.append(float(row.log_softmax(-1)[token]))
            ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return ids[0, len(prompt) :].tolist(), logprobs


@pytest.mark.parametrize("kind", [*KINDS, "base"])
def test_mixed_batch_equals_peft_adapter_by_adapter(mixed, adapters, model_dir, kind):
    base = mixed["base 0"].tokens
    for i in range(2):
        tokens, logprobs = peft_reference(model_dir, adapters.get(kind), [3, 1, 4, 1, 5, 9, 2, 6 + i], 12)
        result = mixed[f"{kind} {i}"]
        assert result.error is None and result.tokens == tokens
        assert [item.logprob for item in result.logprobs] == pytest.approx(logprobs, abs=1e-4)
    if kind != "base":
        base_logprobs = [item.logprob for item in mixed["base 0"].logprobs]
        assert mixed[f"{kind} 0"].tokens != base or [
            item.logprob for item in mixed[f"{kind} 0"].logprobs
        ] != pytest.approx(base_logprobs, abs=1e-3), "the adapter changes nothing, so this test shows nothing"


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "qwen3", "gemma3"])
def test_other_architectures_equal_peft(architecture, tmp_path):
    model_dir = make_tiny_model(tmp_path / "model", architecture)
    path = make_peft_adapter(model_dir, tmp_path / "a", r=4, std=0.15, embed=architecture == "gemma3")
    engine = make_engine(model_dir)
    content_hash = engine.load_adapter("a", path).content_hash
    results = tokens_of(
        run(
            engine,
            [
                request("a", [3, 1, 4, 1, 5], adapter=content_hash, max_tokens=10, ignore_eos=True),
                request("b", [3, 1, 4, 1, 5], max_tokens=10, ignore_eos=True),
            ],
        )
    )
    assert results["a"] == peft_reference(model_dir, path, [3, 1, 4, 1, 5], 10)[0]
    assert results["b"] == peft_reference(model_dir, None, [3, 1, 4, 1, 5], 10)[0]


def test_identity_is_the_content_not_the_name(engine, adapters, tmp_path):
    path = adapters["rank 1"]
    copy = shutil.copytree(path, tmp_path / "renamed")
    assert engine.load_adapter("x", copy).content_hash == engine.load_adapter("y", path).content_hash
    tensors = load_file(copy / WEIGHTS_FILE)
    name = next(iter(tensors))
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, copy / WEIGHTS_FILE)
    assert engine.load_adapter("x", copy).content_hash != engine.load_adapter("y", path).content_hash


# -- refusals


def edit_config(path, **changes):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(path, change):
    tensors = load_file(path / WEIGHTS_FILE)
    save_file(change(tensors), path / WEIGHTS_FILE)


def first(tensors, side):
    return next(name for name in sorted(tensors) if f"lora_{side}" in name)


def drop_b(tensors):
    del tensors[first(tensors, "B")]
    return tensors


def wrong_shape(tensors):
    name = first(tensors, "A")
    tensors[name] = torch.zeros(tensors[name].shape[0], 99)
    return tensors


def poison(value):
    def change(tensors):
        tensors[first(tensors, "A")][0, 0] = value
        return tensors

    return change


def rename(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


def garbage(size):
    return lambda path: (path / WEIGHTS_FILE).write_bytes(size.to_bytes(8, "little") + b"x" * 64)


def truncate(path):
    data = (path / WEIGHTS_FILE).read_bytes()
    (path / WEIGHTS_FILE).write_bytes(data[: len(data) // 2])


def overlap(path):
    data = (path / WEIGHTS_FILE).read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    names = [name for name in header if name != "__metadata__"]
    header[names[1]]["data_offsets"] = header[names[0]]["data_offsets"]
    new = json.dumps(header).encode()
    (path / WEIGHTS_FILE).write_bytes(len(new).to_bytes(8, "little") + new + data[8 + size :])


def pickled(path):
    (path / WEIGHTS_FILE).unlink()
    (path / "adapter_model.bin").write_bytes(b"\x80\x04")


REFUSALS = {
    "no config": (lambda path: (path / "adapter_config.json").unlink(), "adapter_config.json"),
    "config is no JSON": (lambda path: (path / "adapter_config.json").write_text("{"), "not valid JSON"),
    "config is a list": (lambda path: (path / "adapter_config.json").write_text("[]"), "peft_type"),
    "deep config": (lambda path: (path / "adapter_config.json").write_text("[" * 100_000), "not valid JSON"),
    "other peft type": (lambda path: edit_config(path, peft_type="IA3"), "IA3"),
    "dora": (lambda path: edit_config(path, use_dora=True), "DoRA"),
    "bias": (lambda path: edit_config(path, bias="all"), "bias"),
    "lora bias": (lambda path: edit_config(path, lora_bias=True), "bias"),
    "modules to save": (lambda path: edit_config(path, modules_to_save=["lm_head"]), "modules_to_save"),
    "pissa": (lambda path: edit_config(path, init_lora_weights="pissa_niter_4"), "pissa"),
    "remote code": (lambda path: edit_config(path, auto_map={"x": "y"}), "remote code"),
    "rank of config": (lambda path: edit_config(path, r=3), "rank"),
    "rank a million": (lambda path: edit_config(path, r=10**6), "rank"),
    "alpha NaN": (lambda path: edit_config(path, lora_alpha=float("nan")), "lora_alpha"),
    "pickle": (pickled, "pickle"),
    "truncated": (truncate, "safetensors"),
    "huge header": (garbage(2**60), "safetensors"),
    "overlapping tensors": (overlap, "safetensors"),
    "missing B": (lambda path: edit_tensors(path, drop_b), "lora_B"),
    "wrong shape": (lambda path: edit_tensors(path, wrong_shape), "99.*wants"),
    "NaN": (lambda path: edit_tensors(path, poison(float("nan"))), "NaN"),
    "infinity": (lambda path: edit_tensors(path, poison(float("inf"))), "infinite"),
    "unknown module": (lambda path: edit_tensors(path, rename("q_proj", "z_proj")), "z_proj"),
    "layer beyond the model": (lambda path: edit_tensors(path, rename("layers.1.", "layers.77.")), "layers"),
    "no tensors": (lambda path: save_file({}, path / WEIGHTS_FILE), "no LoRA tensors"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_unservable_adapter_is_refused_with_one_clear_sentence(engine, adapters, tmp_path, name):
    spoil, word = REFUSALS[name]
    path = shutil.copytree(adapters["rslora"], tmp_path / "spoiled")
    spoil(path)
    before = engine.stats()
    with pytest.raises(AdapterError, match=f"(?s){word}") as caught:
        engine.load_adapter("spoiled", path)
    assert "\n" not in str(caught.value) and "spoiled" in str(caught.value)
    assert engine.stats() == before


def test_rank_above_the_limit_is_refused(adapters, model_dir):
    with pytest.raises(AdapterError, match="max-lora-rank"):
        read_adapter(adapters["rank 64, large alpha"], ModelConfig.from_dir(model_dir), max_rank=32)


def test_trained_embedding_beside_an_embedding_lora_is_refused(engine, adapters, tmp_path):
    path = shutil.copytree(adapters["embedding"], tmp_path / "trained")

    def train(tensors):
        name = next((n for n in tensors if n.endswith("embed_tokens.base_layer.weight")), None)
        if name is None:
            name = "base_model.model.model.embed_tokens.base_layer.weight"
            tensors[name] = engine.decoder.base_tensor("model.embed_tokens.weight").float().clone()
        tensors[name] = tensors[name] + 1.0
        return tensors

    edit_tensors(path, train)
    with pytest.raises(AdapterError, match="trained embedding"):
        engine.load_adapter("trained", path)
