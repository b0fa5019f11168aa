"""The decoder gives the logits of transformers for every architecture, however rows are cut into batches."""

from __future__ import annotations

import json

import pytest
import torch
from decoder_driver import Driver, native_choice
from tiny_models import load_theirs, make_tiny_model
from transformers import AutoModelForCausalLM

from specserve.compute.loader import load_model
from specserve.kernels.rope_kv import rope_reference
from specserve.model.rope import Rope, RopeConfig, rotate

CPU = torch.device("cpu")
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "original_max_position_embeddings": 128,
    "short_factor": [1.0, 1.0, 1.1, 1.3, 1.7, 2.5],
    "long_factor": [1.0, 1.2, 2.0, 4.0, 8.0, 16.0],
}
SLIDING = {"sliding_window": 12}
GEMMA = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}
OLMO3 = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 5e5},
    "full_attention": {**YARN, "rope_theta": 5e5, "attention_factor": 1.2},
}
FAMILIES = {
    "llama": ("llama", {}),
    "llama, untied": ("llama", {"tie_word_embeddings": False}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama, linear rope": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama, no groups": ("llama", {"num_key_value_heads": 4}),
    "llama, wide heads": ("llama", {"head_dim": 32}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, sliding": ("mistral", SLIDING),
    "ministral3": ("ministral3", {"sliding_window": 24}),
    "mistral3 that sees": ("mistral3 that sees", {}),
    "qwen2": ("qwen2", {}),
    "qwen2, sliding above layer 1": ("qwen2", {**SLIDING, "use_sliding_window": True, "max_window_layers": 1}),
    "qwen3": ("qwen3", {}),
    "qwen3, yarn rope": ("qwen3", {"rope_parameters": YARN}),
    "qwen3, biases": ("qwen3", {"attention_bias": True}),
    "smollm3": ("smollm3", {}),
    "smollm3, sliding": ("smollm3", {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 12}),
    "phi3": ("phi3", {}),
    "phi3, sliding": ("phi3", SLIDING),
    "phi3, longrope of a part": ("phi3", {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}),
    "granite": ("granite", {}),
    "granite, untied, other multipliers": (
        "granite",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True}
        | {"embedding_multiplier": 0.3, "residual_multiplier": 1.7, "logits_scaling": 0.125},
    ),
    "olmo2": ("olmo2", {}),
    "olmo2, heads of a panel": ("olmo2", {"head_dim": 64, "tie_word_embeddings": True}),
    "olmo3": ("olmo3", {"rope_parameters": OLMO3}),
    "granite4": ("granite4", {}),
    "granite4, no positions": ("granite4", {"position_embedding_type": None}),
    "exaone4": ("exaone4", {}),
    "exaone4, positions everywhere": ("exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "glm": ("glm", {}),
    "glm4": ("glm4", {}),
    "seed_oss": ("seed_oss", {}),
    "ernie4_5": ("ernie4_5", {"use_bias": True}),
    "hunyuan": (
        "hunyuan",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 1000.0, "factor": 1.0}},
    ),
    "gemma2": ("gemma2", {}),
    "gemma2, scores without a cap": ("gemma2", {"attn_logit_softcapping": None, "head_dim": 32}),
    "gemma3": ("gemma3", {}),
    "gemma3, softcap": ("gemma3", {"final_logit_softcapping": 5.0}),
    "gemma3 that sees": ("gemma3 that sees", {"rope_parameters": GEMMA}),
    "gemma3, own attention scale": ("gemma3", {"query_pre_attn_scalar": 24}),
}


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda name: name.replace(", ", "-").replace(" ", "_"))
def family(request, tmp_path_factory):
    """(path, transformers' model) in float32."""
    architecture, overrides = FAMILIES[request.param]
    path = make_tiny_model(tmp_path_factory.mktemp("model"), architecture, **overrides)
    return path, load_theirs(path).eval()


@pytest.fixture(scope="module", params=["torch", "native"])
def models(request, family):
    """(path, ours, transformers') in float32."""
    path, reference = family
    choices = [native_choice()] if request.param == "native" else []
    return path, load_model(path, CPU, "fp32", choices), reference


def tokens(num_tokens: int, seed: int = 0, vocab_size: int = 320) -> list[int]:
    return torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.inference_mode()
def reference_logits(reference, prompt: list[int]) -> torch.Tensor:
    return reference(torch.tensor([prompt])).logits[0].float()


def test_logits_equal_transformers(models):
    _, decoder, reference = models
    prompt = tokens(40)
    driver = Driver(decoder)
    (logits,) = driver.step([(driver.sequence(), prompt)])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, reference_logits(reference, prompt), atol=1e-4, rtol=0)


def test_greedy_tokens_equal_transformers(models):
    """Every generated token is the one that transformers ranks first after the tokens before it."""
    _, decoder, reference = models
    prompt = tokens(20)
    generated = Driver(decoder).greedy(prompt, 64)
    ranked = reference_logits(reference, prompt + generated).argmax(-1)
    assert generated == ranked[len(prompt) - 1 : -1].tolist()


def test_prefill_in_ragged_chunks_equals_whole(models):
    _, decoder, _ = models
    prompt = tokens(45)
    driver = Driver(decoder)
    (whole,) = driver.step([(driver.sequence(), prompt)])
    chunked, seq = [], driver.sequence()
    for start, end in [(0, 7), (7, 8), (8, 27), (27, 29), (29, 45)]:
        chunked += driver.step([(seq, prompt[start:end])])
    torch.testing.assert_close(torch.cat(chunked), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "contiguous"])
def test_a_mixed_batch_equals_each_sequence_alone(models, shuffle):
    """A prefill chunk, a first chunk, two decodes and a verification of four rows, in one forward."""
    _, decoder, reference = models
    cached = [tokens(9, 1), [], tokens(30, 2), tokens(17, 3), tokens(4, 4)]
    new = [tokens(14, 5), tokens(6, 6), tokens(1, 7), tokens(4, 8), tokens(1, 9)]
    driver = Driver(decoder, shuffle=shuffle)
    seqs = [driver.sequence() for _ in cached]
    driver.step([(seq, rows) for seq, rows in zip(seqs, cached, strict=True) if rows])
    for logits, before, rows in zip(driver.step(list(zip(seqs, new, strict=True))), cached, new, strict=True):
        expected = reference_logits(reference, before + rows)[len(before) :]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_many_decodes_in_one_batch_equal_transformers(models):
    _, decoder, reference = models
    prompts = [tokens(n, n) for n in (3, 21, 8, 30, 12, 1, 16, 5)]
    driver = Driver(decoder, num_blocks=128)
    seqs = [driver.sequence() for _ in prompts]
    driver.step(list(zip(seqs, prompts, strict=True)))
    for logits, prompt in zip(driver.step([(seq, [7]) for seq in seqs]), prompts, strict=True):
        expected = reference_logits(reference, [*prompt, 7])[-1:]
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_rejected_rows_leave_no_trace(models):
    _, decoder, reference = models
    prompt, right = tokens(20), tokens(3, 5)
    driver = Driver(decoder)
    seq = driver.sequence()
    driver.step([(seq, prompt)])
    driver.step([(seq, tokens(4, 6))])
    driver.truncate(seq, len(prompt))
    (logits,) = driver.step([(seq, right)])
    torch.testing.assert_close(logits, reference_logits(reference, prompt + right)[-3:], atol=1e-4, rtol=0)


def old_form(path) -> None:
    """Rewrite config.json as transformers 4 wrote it."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    params = config.pop("rope_parameters")
    if "sliding_attention" in params:
        if config["model_type"] != "olmo3":
            config["rope_local_base_freq"] = params["sliding_attention"]["rope_theta"]
            config["sliding_window_pattern"] = 2
            config.pop("layer_types")
        params = params["full_attention"]
    config["rope_theta"] = params.pop("rope_theta")
    config["rope_scaling"] = params if params["rope_type"] != "default" else None
    config.pop("head_dim", None) if not config["model_type"].startswith("gemma") else None
    file.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "family",
    [("llama", {"rope_parameters": LLAMA3}), ("llama", {}), ("gemma2", {}), ("gemma3", {}), ("qwen2", {})]
    + [("olmo3", {"rope_parameters": OLMO3})],
    ids=str,
)
def test_the_older_form_of_config_json_means_the_same(tmp_path, family):
    architecture, overrides = family
    path = make_tiny_model(tmp_path, architecture, **overrides)
    if architecture == "gemma3":
        overrides["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    before = load_model(path, CPU).config
    old_form(path)
    assert load_model(path, CPU).config == before


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gemma3"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_sixteen_bit_weights_on_the_cpu(tmp_path, architecture, dtype):
    path = make_tiny_model(tmp_path, architecture)
    decoder = load_model(path, CPU, dtype)
    driver = Driver(decoder)
    prompt = tokens(20)
    (logits,) = driver.step([(driver.sequence(), prompt)])
    torch_dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    rounded = AutoModelForCausalLM.from_pretrained(path, dtype=torch_dtype).eval().float()
    expected = reference_logits(rounded, prompt)  # weights of 16 bits, arithmetic of 32
    tolerance = 2e-2 if decoder.compute_dtype == torch.float32 else 0.3
    assert logits.isfinite().all()
    assert float((logits - expected).abs().mean()) < tolerance * float(expected.std())
    generated = driver.greedy(prompt, 8)
    assert all(0 <= token < 320 for token in generated)


class RecordingLora:
    """Adds constants at every hook, as an adapter would."""

    def __init__(self):
        self.groups: list[tuple[int, str, tuple[int, ...], tuple[int, ...]]] = []

    def add_(self, layer, group, x, y):
        self.groups.append((layer, group, tuple(x.shape), tuple(y.shape)))

    def add_embedding_(self, tokens, y):
        y += 0.25

    def add_lm_head_(self, x, logits):
        logits += 3.0


def test_lora_hooks_see_every_linear_once_and_in_order(tmp_path):
    decoder = load_model(make_tiny_model(tmp_path), CPU)
    driver, lora = Driver(decoder), RecordingLora()
    seq = driver.sequence()
    (with_lora,) = driver.step([(seq, tokens(5))], lora)
    expected = [("qkv", 64, 128), ("o", 64, 64), ("gate_up", 64, 192), ("down", 96, 64)]
    assert lora.groups == [
        (layer, group, (5, size_in), (5, size_out)) for layer in range(2) for group, size_in, size_out in expected
    ]
    driver.truncate(seq, 0)
    (without,) = driver.step([(seq, tokens(5))])
    assert not torch.allclose(with_lora, without + 3.0, atol=1e-2)  # the embedding hook acted too


def test_gemma_scales_the_embedding_lora_with_the_embedding(tmp_path):
    """As PEFT does: (embedding + LoRA) * sqrt(hidden size)."""
    path = make_tiny_model(tmp_path, "gemma3")
    decoder = load_model(path, CPU, "fp32")
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    embed = reference.get_input_embeddings()
    scale = float(embed.embed_scale)
    prompt = tokens(10)
    with torch.inference_mode():
        inputs = embed(torch.tensor([prompt])) + 0.25 * scale
        expected = reference(inputs_embeds=inputs).logits[0] + 3.0
    driver = Driver(decoder)
    (logits,) = driver.step([(driver.sequence(), prompt)], RecordingLora())
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)


def test_the_rotation_is_the_one_that_the_gpus_kernel_is_held_to():
    rope = Rope(RopeConfig("default", 1e4, 16), CPU)
    x, positions = torch.randn(5, 3, 16), torch.tensor([0, 1, 7, 300, 4000])
    cos, sin = rope.cos_sin(positions, torch.float32)  # [T, 1, D]
    torch.testing.assert_close(rotate(x, cos, sin), rope_reference(x, cos[:, 0], sin[:, 0], None, 0.0))
