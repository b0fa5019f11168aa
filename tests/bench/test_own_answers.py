"""What an adapter's hidden states are computed in."""

import torch
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model

from bench.own_answers import lora_model
from specserve.training import lora_model as module
from specserve.training.data.dataset import Example
from specserve.training.head_fit import collect_states


def test_hidden_states_are_computed_in_bf16_where_the_cpu_multiplies_it(tmp_path, monkeypatch):
    base = make_tiny_model(tmp_path / "model")
    adapter = make_peft_adapter(base, tmp_path / "adapter", r=4, seed=1, std=0.3)
    row = Example(list(range(3, 23)), [False] * 10 + [True] * 10, 1)
    states = []
    for is_native, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        monkeypatch.setattr(module, "has_native_bf16", lambda is_native=is_native: is_native)
        model = lora_model(base, adapter, None)
        assert model.dtype == dtype
        states.append(collect_states(model, [row], 64)[0].float())
    assert torch.nn.functional.cosine_similarity(*states).min() > 0.95
