"""Layers that have the same modules are read together, and lie as they would one by one."""

from __future__ import annotations

import pytest
import torch
from adapter_edits import base_of, edit_tensors
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file

from specserve.adapter_files import WEIGHTS_FILE
from specserve.adapters.lora import read_adapter
from specserve.adapters.slab import as_in_peft
from specserve.compute.native.lora import to_native
from specserve.kernels.lora import LoraPair


@pytest.fixture(scope="module")
def base(model_dir):
    return base_of(model_dir, torch.bfloat16)


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("layers")
    first = r"model.layers.0.self_attn.q_proj"
    return {
        "alike": make_peft_adapter(model_dir, root / "alike", r=6),
        "other rank": make_peft_adapter(model_dir, root / "rank", rank_pattern={first: 5}, embed=True, lm_head=True),
        "other alpha": make_peft_adapter(model_dir, root / "alpha", alpha_pattern={first: 5}),
        "one layer": make_peft_adapter(model_dir, root / "one", layers_to_transform=[1], target_modules=["q_proj"]),
    }


@pytest.mark.parametrize("name", ["alike", "other rank", "other alpha", "one layer"])
@pytest.mark.parametrize("lay_out", [as_in_peft, to_native])
def test_each_pair_is_what_it_would_be_alone(base, adapters, name, lay_out):
    adapter = read_adapter(adapters[name], base, lay_out=lay_out)
    tensors = load_file(adapters[name] / WEIGHTS_FILE)
    assert len(adapter.pairs) == len(tensors) // 2
    for (layer, module), pair in adapter.layers.items():
        a, b = (
            next(t for k, t in tensors.items() if f"layers.{layer}." in k and f"{module}.lora_{side}" in k)
            for side in "AB"
        )
        rank = a.shape[0]
        scale = (5 if name == "other alpha" and (layer, module) == (0, "q_proj") else 16) / rank
        want = lay_out(LoraPair(a.bfloat16(), b.bfloat16(), scale), torch.empty)
        assert torch.equal(pair.a, want.a) and torch.equal(pair.b, want.b) and pair.scale == want.scale
        assert all(one.is_contiguous() and one.data_ptr() % 64 == 0 for one in pair[:2])


def test_what_torch_is_asked_for_does_not_grow_with_the_layers(base, adapters):
    shapes = []

    def noted(pair, empty):
        shapes.append((tuple(pair.a.shape), tuple(pair.b.shape)))
        return to_native(pair, empty)

    read_adapter(adapters["alike"], base, lay_out=noted)
    assert len(shapes) == 7 and all(a[0] == b[0] == base.config.num_layers == 2 for a, b in shapes)


def test_a_file_of_several_dtypes_and_odd_places_is_read_as_it_is(base, adapters, tmp_path, model_dir):
    path = make_peft_adapter(model_dir, tmp_path / "mixed", r=3, target_modules=["q_proj", "v_proj"])
    names = sorted(load_file(path / WEIGHTS_FILE))
    dtypes = (torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float32)
    edit_tensors(path, lambda tensors: {k: tensors[k].to(dtypes[idx % 5]) for idx, k in enumerate(names)})
    stored = load_file(path / WEIGHTS_FILE)
    adapter = read_adapter(path, base)
    assert len({tensor.dtype for tensor in stored.values()}) == 5
    for (layer, module), pair in adapter.layers.items():
        for side, served in (("A", pair.a), ("B", pair.b)):
            (key,) = [k for k in stored if f"layers.{layer}." in k and f"{module}.lora_{side}" in k]
            assert torch.equal(served, stored[key].bfloat16()), key
