"""Fused linears under Triton's interpreter: the bits of what they take the place of; test_under_triton.py runs it."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from linear_fused_cases import Case, check_add, check_gated, check_rope
from triton_interpreter import row_uniform_dot  # noqa: F401  (before anything imports triton)
from triton_process import sweep

from specserve.compute.cuda import fused_linears
from specserve.kernels import linear_fused
from specserve.kernels.linear_rows import linear_rows

COUNTS = (1, 3, 16)
DTYPES = (torch.bfloat16, torch.float16)
VARIANTS = {"dtype": DTYPES, "form": (None, "int8", "fp8"), "has_bias": (False, True)}
QUICK = (
    (torch.bfloat16, None, True), (torch.float16, None, False), (torch.bfloat16, "int8", False),
    (torch.float16, "fp8", True),
)  # fmt: skip


@sweep(VARIANTS, *QUICK)
def test_an_addition_to_the_residual_has_the_bits_of_its_two_launches(dtype, form, has_bias):
    check_add(Case(272, 72, dtype, "cpu", has_bias, form), COUNTS)


@sweep(VARIANTS, *QUICK)
def test_a_gated_activation_has_the_bits_of_its_three_launches(dtype, form, has_bias):
    kind = "gelu_tanh" if has_bias else "silu"
    check_gated(Case(144, 2 * 40, dtype, "cpu", has_bias, form), kind, COUNTS)


@sweep(VARIANTS, *QUICK)
def test_rotation_and_cache_writes_have_the_bits_of_their_three_launches(dtype, form, has_bias):
    heads = (3, 1, 24)
    check_rope(Case(144, 5 * 24, dtype, "cpu", has_bias, form), heads, COUNTS)


def test_heads_of_many_sizes_are_rotated():
    for heads in ((2, 1, 128), (4, 2, 8)):
        check_rope(Case(48, (heads[0] + 2 * heads[1]) * heads[2], torch.bfloat16, "cpu"), heads, (2,))


@pytest.mark.parametrize("num_programs", [1, 10])
def test_tiles_of_any_width_have_the_same_bits(num_programs, monkeypatch):
    monkeypatch.setattr(linear_fused, "_PROGRAMS", num_programs)
    check_add(Case(48, 200, torch.bfloat16, "cpu"), (2,))
    check_gated(Case(48, 200, torch.bfloat16, "cpu"), "silu", (2,))
    check_rope(Case(48, 192, torch.bfloat16, "cpu"), (2, 2, 32), (2,))


class Plain:
    """A linear with one order of sums, as the decoder has it on a GPU."""

    def __init__(self, in_size: int, out_size: int):
        self.case, self.in_size = Case(in_size, out_size, torch.bfloat16, "cpu"), in_size

    def __call__(self, x):
        return linear_rows(x, self.case.weights)

    def parts(self):
        return self.case.weights, None


def check_at_start(monkeypatch) -> set[str]:
    monkeypatch.setattr(fused_linears, "_ROWS_OF_EACH", 1)
    heads = {"num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = SimpleNamespace(rms_norm_eps=1e-5, activation="silu", **heads)
    linears = {"qkv": Plain(16, 32), "o": Plain(16, 16), "gate_up": Plain(16, 48), "down": Plain(32, 16)}
    norms = {"input_norm": linears["qkv"].case.norm, "mlp_norm": None}
    device = torch.device("cpu")
    return fused_linears._left_apart(linears, config, SimpleNamespace(**linears, **norms), torch.bfloat16, device)


def test_the_check_at_start_keeps_what_has_the_same_bits(monkeypatch):
    assert check_at_start(monkeypatch) == set()


def test_the_check_at_start_leaves_apart_what_differs_in_a_norm_or_a_residual(monkeypatch):
    def other_norm(x, *others):
        weight = x.weight * (1 + 2**-7)
        return rope(linear_fused.Normed(x.rows, weight, x.eps), *others)

    def no_addition(residual, x, weights, bias):
        residual.copy_(linear_rows(x, weights))

    rope = fused_linears.linear_rope_
    monkeypatch.setattr(fused_linears, "linear_rope_", other_norm)
    monkeypatch.setattr(fused_linears, "linear_add_", no_addition)
    assert check_at_start(monkeypatch) == {"qkv", "o", "down"}


def test_a_fused_linear_that_does_not_run_is_left_apart_and_the_log_says_why(monkeypatch, caplog):
    def refused(*_):
        raise RuntimeError("PTXAS: out of registers")

    monkeypatch.setattr(fused_linears, "linear_gated", refused)
    with caplog.at_level(logging.WARNING):
        assert check_at_start(monkeypatch) == {"gate_up"}
    assert "linears of gate_up do not run here" in caplog.text and "PTXAS: out of registers" in caplog.text
