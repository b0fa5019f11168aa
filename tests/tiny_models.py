"""Tiny random models of every supported architecture, as Hugging Face directories with a small real tokenizer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    'Pack my box with five dozen liquor jugs, and print 0123456789 in JSON: {"a": [1, 2.5], "b": null}.',
    "A server answers many requests; each names an adapter, and each answer streams token by token.",
]
MODEL_TYPES = {
    "llama": "llama",
    "mistral": "mistral",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma3": "gemma3_text",
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with ChatML special tokens, trained on a few sentences; equal on every call."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", bos_token="<|im_start|>", pad_token="<|endoftext|>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_tiny_model(
    path: str | Path, architecture: str = "llama", *, vocab_size: int = 320, seed: int = 0, **overrides
):
    """Write a random fp32 model of `architecture` with its tokenizer to `path`; returns the path.

    `overrides` go to the transformers configuration. Weights are larger than the usual initialisation, so that logits
    differ enough for greedy decoding to be stable.
    """
    path = Path(path)
    tokenizer = make_tokenizer(vocab_size - len(SPECIAL_TOKENS))
    assert len(tokenizer) <= vocab_size
    eos = tokenizer.convert_tokens_to_ids("<|im_end|>")
    settings = {**SIZES, "vocab_size": vocab_size, "eos_token_id": eos, "bos_token_id": None, "pad_token_id": 0}
    if architecture == "gemma3":
        settings |= {"query_pre_attn_scalar": 16, "sliding_window": 12, "num_hidden_layers": 3}
        settings["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
    config = CONFIG_MAPPING[MODEL_TYPES[architecture]](**{**settings, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight += torch.randn_like(weight) * 0.1
            elif name.endswith("bias"):
                weight.copy_(torch.randn_like(weight) * 0.1)
            else:
                weight.copy_(torch.randn_like(weight) * (1.5 / weight.shape[-1] ** 0.5))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    generation = path / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": eos}))
    return path
