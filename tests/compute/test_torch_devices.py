"""The torch path serves on any device, adapters included: nothing that a step computes with is made on another one.

There need be no other device: a whole engine runs on torch's meta device, whose tensors have shapes and no values. What
it reads back for the host is made up, all zeros.
"""

from __future__ import annotations

import importlib.util

import msgspec
import numpy as np
import pytest
import torch
from engine_fixture import make_engine, request, run, tokens_of
from lookahead_adapters import make_lookahead_adapter
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from specserve.compute.loader import choose_paths, load_model
from specserve.compute.torch.decoder import Decoder
from specserve.compute.torch.lora import AdapterSlots
from specserve.config import EngineConfig

META = torch.device("meta")


class ZerosAreRead(TorchFunctionMode):
    """`tolist` and `numpy` of a tensor without values give zeros; it stays where it is until then."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        reads = (torch.Tensor.tolist, torch.Tensor.numpy)
        if func in (torch.Tensor.cpu, *reads) and args[0].device == META:
            if func is torch.Tensor.cpu:
                return args[0]
            zeros = np.zeros(args[0].shape, dtype=np.float32 if args[0].is_floating_point() else np.int64)
            return zeros if func is torch.Tensor.numpy else zeros.tolist()
        return func(*args, **(kwargs or {}))


class Elsewhere(TorchDispatchMode):
    """Notes each operation that makes a tensor that is not on the meta device; a single value of one there is zero."""

    def __init__(self):
        super().__init__()
        self.operations: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            return 0.0 if args[0].is_floating_point() else 0
        out = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(out):
            is_copied = func is torch.ops.aten.lift_fresh.default  # numpy's numbers, on their way to the device
            if isinstance(tensor, torch.Tensor) and tensor.device != META and not is_copied:
                self.operations.add(f"{func} {tuple(tensor.shape)}")
        return out


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), "gemma3", tie_word_embeddings=False)


@pytest.mark.parametrize("config", [EngineConfig(), EngineConfig(kernels="torch")], ids=["no triton", "kernels=torch"])
def test_torch_serves_on_cuda_with_its_own_lora(model_dir, monkeypatch, config):
    if config.kernels == "auto":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    decoder = load_model(model_dir, META, choices=choose_paths(config, torch.device("cuda")))
    assert type(decoder) is Decoder and type(decoder.slots()) is AdapterSlots


def test_a_step_makes_its_tensors_on_the_decoders_device(model_dir, tmp_path):
    """LoRAs on all modules, a lookahead head, windows, scattered blocks, drafts, every sampler, log-probabilities."""
    hot = {"temperature": 1.0, "top_p": 0.5, "top_k": 9, "min_p": 0.1}
    edited = {"repetition_penalty": 1.2, "presence_penalty": 0.5, "logit_bias": {3: 1.0}, "min_tokens": 2}
    with ZerosAreRead():
        # 64 blocks of 4 tokens, of 3 layers with 2 KV heads of 16: few enough to lie scattered.
        tight = {"kv_cache_gib": 64 * 4 * 3 * 2 * 2 * 16 * 4 / 2**30, "block_size": 4, "max_model_len": 100}
        engine = make_engine(model_dir, device="meta", kernels="torch", **tight)
        paths = [
            make_peft_adapter(model_dir, tmp_path / "a", r=4, embed=True, lm_head=True),
            make_lookahead_adapter(model_dir, tmp_path / "b"),
            make_peft_adapter(model_dir, tmp_path / "c", r=4, seed=1),
        ]
        hashes = [engine.load_adapter(path.name, path).content_hash for path in paths]
        requests = [
            request("a", range(5, 30), adapter=hashes[0], logprobs=2),
            request("b", [1, 2, 3], adapter=hashes[1], mode="fixed", **hot, **edited),
            request("c", range(9), adapter=hashes[2], mode="fixed", **edited),
            request("d", range(50), mode="fixed", prompt_logprobs=1, **hot),
            request("e", range(3, 20), adapter=hashes[2], max_tokens=40),
        ]
        elsewhere = Elsewhere()
        with elsewhere:
            again = [msgspec.structs.replace(item, request_id=f"{item.request_id} again") for item in requests]
            results = run(engine, [*requests, *again], stagger=2)
    assert all(len(tokens) >= 16 for tokens in tokens_of(results).values())
    assert results["b"].usage.accepted_by_source.get("head"), "no head has drafted"
    assert not elsewhere.operations
