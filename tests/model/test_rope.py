"""Frequencies and factors of rotary embeddings are those that transformers computes from the same config.json."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from specserve.model.config import ModelConfig
from specserve.model.rope import inverse_frequencies

SIZES = {"vocab_size": 8, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 4}
QWEN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
MINISTRAL = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0, "beta_slow": 1.0,
    "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1, "rope_theta": 1e6,
}  # fmt: skip
GPT_OSS = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {  # config.json, and the longest text
    "qwen 2.5, as its guide has it": (
        {"rope_theta": 1e6, "rope_scaling": QWEN, "max_position_embeddings": 32768},
        131072,
    ),
    "qwen 3, as its guide has it": (
        {"rope_theta": 1e6, "rope_scaling": QWEN, "max_position_embeddings": 40960},
        131072,
    ),
    "ministral 3": ({"rope_parameters": MINISTRAL, "max_position_embeddings": 262144}, 262144),
    "gpt-oss": ({"rope_parameters": {**GPT_OSS, "rope_theta": 1.5e5}, "max_position_embeddings": 131072}, 131072),
    "mscales that differ": (
        {"rope_parameters": {**MINISTRAL, "mscale": 0.7}, "max_position_embeddings": 262144},
        262144,
    ),
    "an attention factor": (
        {"rope_scaling": {**QWEN, "attention_factor": 1.3}, "max_position_embeddings": 512},
        131072,
    ),
    "no factor": ({"rope_scaling": {**QWEN, "factor": None}, "max_position_embeddings": 65536}, 65536),
    "no original length": ({"rope_scaling": {"type": "yarn", "factor": 2.0}, "max_position_embeddings": 4096}, 8192),
    "a range of one dimension": (
        {
            "rope_scaling": {**QWEN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
            "max_position_embeddings": 64,
        },
        131072,
    ),
    "llama 3.1": (
        {
            "rope_theta": 5e5,
            "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 8192},
            "max_position_embeddings": 131072,
        },
        131072,
    ),  # fmt: skip
    "linear": ({"rope_scaling": {"type": "linear", "factor": 4.0}, "max_position_embeddings": 4096}, 4096),
    "dynamic": ({"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 4096}, 4096),
}


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_the_factor_of_attention_are_those_of_transformers(tmp_path, case):
    raw, longest = CASES[case]
    config = CONFIG_MAPPING["llama"](**SIZES, **copy.deepcopy(raw))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **SIZES, **raw}))
    ours = ModelConfig.from_dir(tmp_path)
    (rope,) = ours.ropes.values()
    frequencies, factor = ROPE_INIT_FUNCTIONS[config.rope_parameters["rope_type"]](config)
    torch.testing.assert_close(inverse_frequencies(rope), frequencies, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-9)
    assert ours.max_position_embeddings == longest
