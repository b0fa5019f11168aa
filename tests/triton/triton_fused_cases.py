"""Fused linears under Triton's interpreter: the bits of what they take the place of; test_under_triton.py runs it."""

from __future__ import annotations

import pytest
import torch
from linear_fused_cases import Case, check_add, check_gated, check_rope
from triton_interpreter import row_uniform_dot  # noqa: F401  (before anything imports triton)
from triton_process import sweep

from specserve.kernels import linear_fused

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
