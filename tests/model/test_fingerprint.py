"""A base model's fingerprint changes with its weights, whatever its files call them, and not with their dtype."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_model

from specserve.model.fingerprint import base_fingerprint


@pytest.mark.parametrize("architecture", ["llama", "phi3", "granite4", "mistral3 that sees"])
def test_matrices_that_were_tuned_alone_make_another_model(tmp_path, architecture):
    path = make_tiny_model(tmp_path, architecture)
    before, file = base_fingerprint(path), path / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, file)
    assert base_fingerprint(path) == before
    tuned = {
        name: tensor if tensor.dim() == 1 else tensor + torch.randn_like(tensor) for name, tensor in tensors.items()
    }
    save_file(tuned, file)
    assert base_fingerprint(path) != before
