"""Launches that begin before the one in front of them is done read and write nothing too early; interpreted.

What a card would show now and then, as a wrong token in a thousand, is seen here in every run.
"""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from attention_cases import make_scene
from engine_fixture import make_engine, request, run
from head_cases import VOCAB_SIZE, Sequences, mixed_heads
from launch_order import LaunchOrder
from lookahead_adapters import make_lookahead_adapter
from tiny_models import make_tiny_model
from triton.language.extra.cuda import gdc_wait
from triton_interpreter import row_uniform_dot  # noqa: F401  (before anything imports triton)

from specserve.drafting.cost_model import CostModel
from specserve.kernels import linear_fused
from specserve.kernels.add_norm import add_rms_norm_
from specserve.kernels.dependent_launch_triton import pass_on
from specserve.kernels.ragged_attention import attention_scratch, ragged_attention_
from specserve.kernels.rope_kv import rope_store_

torch.set_num_threads(1)


@triton.jit
def twice(out, x, READS_EARLY: tl.constexpr, WAITS: tl.constexpr):
    value = tl.load(x)
    if WAITS:
        gdc_wait()
    if not READS_EARLY:
        value = tl.load(x)
    tl.store(out, 2 * value)


@pytest.mark.parametrize(
    ("waits", "between", "fault"),
    [
        (True, False, "twice reads too early"),
        (True, True, ""),
        (False, True, "a program of twice ends without waiting"),
    ],
)
def test_what_is_read_too_early_is_found(waits, between, fault, monkeypatch):
    x, out = torch.ones(2, 1, 16)
    order = LaunchOrder()
    monkeypatch.setitem(globals(), "gdc_wait", order._wait)
    with order:
        add_rms_norm_(x.view(1, 16), x.view(1, 16), x, 1e-5)  # writes x, and its norm elsewhere
        if between:
            x.sin()  # does not begin early, so what is in front of it is done
        twice[(1,)](out, x, READS_EARLY=True, WAITS=waits, launch_pdl=True)
    assert order.faults == ({fault} if fault else set())


def test_programs_that_depend_on_one_another_are_found():
    words = torch.zeros(3 * 16, dtype=torch.int32)
    with LaunchOrder() as order:
        pass_on[(3,)](words, words, BLOCK=16, IS_DEPENDENT=False)
    assert order.faults == {"a program of pass_on reads what another one writes"}


def test_the_trial_of_a_device():
    words = torch.zeros(2, 3 * 16, dtype=torch.int32)
    with LaunchOrder() as order:
        for idx in range(4):
            pass_on[(3,)](words[1 - idx % 2], words[idx % 2], BLOCK=16, IS_DEPENDENT=True, launch_pdl=True)
    assert not order.faults and (words[0] == 4).all()


def test_the_heads_loop():
    sequences = Sequences(mixed_heads()[1:3], 4, VOCAB_SIZE, torch.bfloat16, "cpu")
    with LaunchOrder() as order:
        sequences.step(2)
        sequences.step(1)
    assert not order.faults
    assert order.early == {"start_sequences": 2, "step_cells": 3, "score": 3, "choose": 3}


@pytest.mark.parametrize("joins", [False, True], ids=["a second launch joins", "the last program joins"])
def test_layers_of_attention_whose_programs_share_splits(joins):
    scene = make_scene([(1, 40), (1, 300)], (2, 1, 16), torch.bfloat16, "cpu", tile_rows=1)
    qkv = scene.q._base.flatten(1)
    (cos, sin), slots = torch.zeros(2, len(qkv), 16), torch.tensor([-1] * len(qkv))
    scratch, out = attention_scratch(len(qkv), 2, 16, "cpu"), torch.zeros(len(qkv), 32, dtype=torch.bfloat16)
    arrived = torch.zeros(len(scene.tiles), dtype=torch.int32) if joins else None
    caches = scene.k_cache, scene.v_cache
    with LaunchOrder() as order:
        for _ in range(2):
            rope_store_(qkv, cos, sin, slots, *caches, 2, 1, None, None, 0.0)
            ragged_attention_(
                out, scene.q, *caches, scene.tiles, scene.positions, scene.block_tables, scratch, arrived,
                block_size=16, scale=1.0, window=None, split_len=128, num_programs=3, tile_rows=1,
            )  # fmt: skip
    assert not order.faults
    joining = {} if joins else {"join_splits_kernel": 2}
    assert order.early == {"rope_store_kernel": 2, "ragged_attention_kernel": 2} | joining


@pytest.mark.parametrize("is_exact", [False, True])
def test_steps_of_an_engine(is_exact, tmp_path, monkeypatch):
    """Prompts and verifications, with LoRAs and without, whose linears are cuBLAS's or ours, fused and apart."""
    monkeypatch.setattr("specserve.engine.engine.measured_costs", lambda *_: CostModel({1: 0.01, 64: 0.02}))
    monkeypatch.setattr(linear_fused, "_PROGRAMS", 1)
    model_dir = make_tiny_model(tmp_path / "model", num_hidden_layers=1 + is_exact)
    settings = {"exact": "on", "dtype": "bf16"} if is_exact else {}
    adapter = make_lookahead_adapter(model_dir, tmp_path / "adapter", tap_layer=int(is_exact), history=False)
    with LaunchOrder() as order:
        engine = make_engine(model_dir, kernels="triton", max_num_seqs=3, max_batched_tokens=32, **settings)
        prompts = ((20, None), (4, engine.load_adapter("lora", adapter).content_hash))
        options = {"mode": "fixed", "max_draft_tokens": 2, "max_tokens": 2}
        mixed = [request(idx, range(5, 5 + num), adapter=name, **options) for idx, (num, name) in enumerate(prompts)]
        results = run(engine, mixed) | run(engine, [request("bare", [5, 6], **options)])
    assert not any(result.error for result in results.values())
    assert not order.faults
    of_layers = {"add_rms_norm_kernel", "rope_store_kernel", "ragged_attention_kernel", "lora_shrink", "lora_expand"}
    ours = {"linear_rows_kernel", "linear_add_kernel", "linear_gated_kernel", "linear_rope_kernel"}
    assert set(order.early) >= of_layers | (ours if is_exact else set())
