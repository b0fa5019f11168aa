"""`python -m bench.cpu_steps` runs every kind of step, with every part it has, and knows what a step asks for."""

from __future__ import annotations

import pytest
from bench_process import bench_record

from bench.cpu_cases import Case
from bench.shapes import LLAMA3B, SMOLLM2


def test_the_bench_runs_dry_and_ends_in_its_json_line():
    options = ["--kernels", "native", "--kernels", "torch", "--adapters", "2", "--neighbours", "1"]
    record = bench_record("cpu_steps", "--dry-run", *options)
    assert record["limit"]["gb_per_s"] > 0 and record["limit"]["gflops"][record["limit"]["peak"]] > 0
    native, torch = record["results"]["native"], record["results"]["torch"]
    assert native.keys() == torch.keys() and {"1 row at 40", "64 rows of 8 at 40", "prompt of 30, LoRAs at 40"} <= set(
        native
    )
    assert all(0 < case["limit_ms"] and 0 < case["beside_over_alone"] for case in (*native.values(), *torch.values()))
    assert "attention" in native["1 row at 40"]["phases"]


def test_the_bench_of_loading_says_what_stays_and_what_the_peak_was():
    record = bench_record("load_memory", "--shape", "tiny")
    assert record["decoder"] == "NativeDecoder" and 0 < record["held_bytes"] <= record["peak_bytes"]


def test_a_step_asks_for_its_weights_and_keys_and_a_product_for_each():
    smollm2, llama3b = SMOLLM2.config(), LLAMA3B.config()
    assert Case(1, 1, 0).num_bytes(smollm2, 16, 2) == pytest.approx(2 * 134.5e6, rel=0.01)
    assert Case(1, 1, 0).num_operations(llama3b) == pytest.approx(2 * 3.21e9, rel=0.01)
    keys = Case(8, 1, 2048).num_bytes(llama3b, 16, 2) - Case(8, 1, 0).num_bytes(llama3b, 16, 2)
    assert keys == 8 * 2048 * 28 * 2 * 8 * 128 * 2
    prompt, rows = Case(1, 512, 0, is_prompt=True), Case(512, 1, 0)
    head = 2 * 511 * llama3b.vocab_size * llama3b.hidden_size
    attention = 4 * 28 * 24 * 128 * (512 * 513 / 2 - 512)
    assert rows.num_operations(llama3b) - prompt.num_operations(llama3b) == head - attention
