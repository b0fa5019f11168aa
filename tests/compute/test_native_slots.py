"""Tables of adapters' addresses for the native forward, while adapters come and go."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import torch

from specserve.adapters.lora import LoraAdapter
from specserve.compute.native.lora import NativeSlots, to_native
from specserve.kernels.lora import LoraPair
from specserve.kernels.native import Lora
from specserve.model.shapes import LINEARS


class CountedLayers(dict):
    num_looks = 0

    def items(self):
        CountedLayers.num_looks += 1
        return super().items()


SHAPES = SimpleNamespace(num_layers=2)  # all that tables ask of a model's configuration


def make_adapter(name):
    pairs = {
        (layer, module): to_native(LoraPair(torch.randn(4, 32), torch.randn(64, 4), float(layer)))
        for layer in range(SHAPES.num_layers)
        for module in ("q_proj", "down_proj")
    }
    return LoraAdapter(name, name, CountedLayers(pairs), None, None, 4, None)


def table_of(slots, adapters):
    slots.activate(adapters)
    batch = slots.batch([(adapter.content_hash, 1) for adapter in adapters], [])
    entries = (Lora * (len(adapters) * slots._num_layers * len(LINEARS))).from_address(batch.table_address)
    return [ctypes.string_at(ctypes.addressof(entry), ctypes.sizeof(entry)) for entry in entries], batch


def expected(adapters):
    return [
        bytes(Lora(pair.a.data_ptr(), pair.b.data_ptr(), pair.b.shape[1], pair.scale) if pair else Lora())
        for adapter in adapters
        for layer in range(SHAPES.num_layers)
        for module in LINEARS
        for pair in (adapter.layers.get((layer, module)),)
    ]


def test_a_step_of_adapters_that_never_met_looks_at_no_weights_again():
    slots = NativeSlots(SHAPES, torch.float32)
    adapters = [make_adapter(f"{idx}") for idx in range(4)]
    CountedLayers.num_looks = 0
    for first in range(4):
        for num in range(1, 5 - first):
            active = adapters[first : first + num][::-1]
            table, _ = table_of(slots, active)
            assert table == expected(active)
    assert CountedLayers.num_looks == 4


def test_an_adapter_that_comes_back_is_read_where_it_lies_now():
    slots = NativeSlots(SHAPES, torch.float32)
    one, other = make_adapter("one"), make_adapter("other")
    assert table_of(slots, [one, other])[0] == expected([one, other])
    for is_freed in (True, False):
        again = make_adapter("one")
        if is_freed:
            slots.free("one")
        assert table_of(slots, [again, other])[0] == expected([again, other])
