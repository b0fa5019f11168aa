import json

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A tiny model's directory."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def talker(tmp_path_factory):
    """A model of random weights whose texts end soon: what ends them weighs more."""
    path = make_tiny_model(
        tmp_path_factory.mktemp("talker") / "model", max_position_embeddings=4096, tie_word_embeddings=False
    )
    weights = load_file(path / "model.safetensors")
    eos = json.loads((path / "config.json").read_text())["eos_token_id"]
    weights["lm_head.weight"][eos] *= 4
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path
