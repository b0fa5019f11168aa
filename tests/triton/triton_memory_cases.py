"""What steps on CUDA are said to take, against what is allocated; interpreted, so host and device are one memory."""

from __future__ import annotations

import weakref

import pytest
import torch
from engine_fixture import make_engine, request, run
from tiny_models import make_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from triton_interpreter import row_uniform_dot  # noqa: F401  (before anything imports triton)

from specserve.compute.cuda import step_memory
from specserve.compute.cuda.buckets import most_logits, padded
from specserve.compute.cuda.build import make_path
from specserve.compute.cuda.layers import LayersPart
from specserve.drafting.cost_model import CostModel


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that were made within it: those that live, and the most that did at once."""

    def __init__(self):
        super().__init__()
        self.held = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        returns = func._schema.returns
        if isinstance(result, torch.Tensor) and returns and returns[0].alias_info is None:
            self.held += result.nbytes
            self.most = max(self.most, self.held)
            weakref.finalize(result, self._free, result.nbytes)
        return result

    def _free(self, num_bytes: int) -> None:
        self.held -= num_bytes


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_buffers_and_layers_take_what_they_are_said_to_take(architecture, tmp_path, monkeypatch):
    made, of_layers = [], []
    launch = LayersPart._launch

    def measured_path(decoder, inputs):
        with Allocated() as allocated:
            path = make_path(decoder, inputs)
        made.append((decoder, inputs.limits, allocated.held, path))  # while it lives
        return path

    def measured_launch(layers, bucket):
        with Allocated() as allocated:
            launch(layers, bucket)
        of_layers.append((bucket.num_rows, allocated.most))

    monkeypatch.setattr("specserve.engine.engine.measured_costs", lambda *_: CostModel({1: 0.01, 64: 0.02}))
    monkeypatch.setattr(LayersPart, "_launch", measured_launch)
    model_dir = make_tiny_model(tmp_path, architecture)
    engine = make_engine(model_dir, measured_path, kernels="triton", max_num_seqs=8, max_batched_tokens=64)
    assert len(run(engine, [request("a", range(3, 51), max_tokens=1)])["a"].tokens) == 1
    ((decoder, limits, held, _),) = made
    config, dtype, num_rows = decoder.config, decoder.compute_dtype, padded(limits.max_rows)
    said = step_memory.buffer_bytes(config, dtype, limits, num_rows, most_logits(num_rows, config.vocab_size))
    reserved = step_memory._ATTENTION_BYTES + step_memory._EDITS_BYTES
    assert held <= said and said - reserved <= 1.5 * held, (held, said)
    assert of_layers
    for num_rows, most in of_layers:
        layer = step_memory.layer_bytes(config, dtype, num_rows)
        assert most <= layer <= 3 * most, (num_rows, most, layer)
    assert step_memory.step_bytes(config, dtype, limits) > said + 2 * layer
