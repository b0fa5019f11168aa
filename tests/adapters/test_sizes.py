"""What an adapter takes in memory is known before it is read, and it can lie elsewhere as one piece."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from adapter_edits import base_of
from lookahead_adapters import make_lookahead_adapter
from peft_adapters import make_peft_adapter

from specserve.adapter_files import HISTORY_FILE, WEIGHTS_FILE
from specserve.adapters.lora import read_adapter
from specserve.adapters.sizes import expected_bytes
from specserve.adapters.slab import as_in_peft
from specserve.compute.native.lora import to_native
from specserve.drafters.head import WEIGHT_NAMES
from specserve.drafters.task_history import expected_bytes as history_bytes


@pytest.fixture(scope="module")
def base(model_dir):
    return base_of(model_dir, torch.bfloat16)


@pytest.fixture(scope="module")
def adapters(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("sizes")
    return {
        "rank 3": make_peft_adapter(model_dir, root / "3", r=3, target_modules=["q_proj"]),
        "rank 100": make_peft_adapter(model_dir, root / "100", r=100, embed=True, lm_head=True),
        "lookahead": make_lookahead_adapter(model_dir, root / "head", seed=1, draft_len=4),
    }


@pytest.mark.parametrize("lay_out", [as_in_peft, to_native])
def test_what_is_expected_suffices_and_is_little_more(base, adapters, lay_out):
    for name, path in adapters.items():
        adapter = read_adapter(path, base, lay_out=lay_out)
        expected = expected_bytes(path, base.lora_dtype.itemsize)
        padding = 3 if name == "rank 3" else 1.2  # of a rank of 3 to 8, which devices need
        more = 0
        if (lookahead := adapter.lookahead) is not None:
            more = 4 * 1024 * 65  # tokens that its vocabulary may be padded by
            more += history_bytes(path / HISTORY_FILE) - lookahead.history.num_bytes  # while it is read
        assert adapter.num_bytes <= expected <= padding * adapter.num_bytes + more, (name, adapter.num_bytes, expected)


def test_files_that_are_none_count_by_their_size_and_missing_ones_not_at_all(tmp_path):
    assert expected_bytes(tmp_path, 2) == 0
    weights = tmp_path / WEIGHTS_FILE
    headers = [
        json.dumps({"x.lora_A.weight": {"dtype": "F32", "shape": [rank, 8], "data_offsets": [0, 8]}}).encode()
        for rank in (1 << 40, -(1 << 40))
    ]
    wrong = [struct.pack("<Q", len(header)) + header for header in headers]
    for content in (b"", b"x" * 99, struct.pack("<Q", 1 << 60) + b"{}", *wrong):
        weights.write_bytes(content)
        assert expected_bytes(tmp_path, 2) == len(content)
    weights.unlink()
    (tmp_path / HISTORY_FILE).write_bytes(b"no history")
    assert expected_bytes(tmp_path, 2) == 10


def test_a_copy_is_one_piece_with_the_same_values_and_learns_with_the_first(base, adapters):
    for path in adapters.values():
        adapter = read_adapter(path, base, lay_out=to_native)
        copies = []
        there = adapter.copied(lambda tensor, copies=copies: copies.append(tensor.clone()) or copies[-1])
        assert there.num_bytes == adapter.num_bytes and there.info() == adapter.info()
        assert there.layers.keys() == adapter.layers.keys() and (there.embed is None) == (adapter.embed is None)
        for one, other in zip(there.pairs, adapter.pairs, strict=True):
            assert torch.equal(one.a, other.a) and torch.equal(one.b, other.b) and one.scale == other.scale
            assert {one.a.untyped_storage().data_ptr(), one.b.untyped_storage().data_ptr()} == {copies[0].data_ptr()}
        if adapter.lookahead is None:
            assert len(copies) == 1
        else:
            assert len(copies) == 1 + len(WEIGHT_NAMES) and there.lookahead.acceptance is adapter.lookahead.acceptance
            assert there.lookahead.history is adapter.lookahead.history is not None
            heads = there.lookahead.head.weights, adapter.lookahead.head.weights
            assert all(torch.equal(*(getattr(head, name) for head in heads)) for name in WEIGHT_NAMES)
