"""The Triton kernel of the gated activation: a program has one row and one block of columns of gate and of up.

Semantics and launch: gated_activation.py. tanh is written by the sigmoid, (1 + tanh(u)) / 2 = sigmoid(2 u), which needs
no device library and saturates to 0 and 1 where exp overflows.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def gated(x, up, GELU: tl.constexpr):
    """act(x) * up in fp32. Multiply-adds are written out, or their rounding would be the compiler's choice."""
    z = x
    if GELU:
        z = 1.5957691216057308 * tl.fma(0.044715 * x * x, x, x)  # 2 sqrt(2 / pi)
    return x / (1.0 + tl.exp(-z)) * up


@triton.jit
def gated_activation_kernel(
    out, gate_up, size, out_stride, gate_up_stride, GELU: tl.constexpr, BLOCK: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (rows, column blocks)."""
    if IS_DEPENDENT:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < size
    source = gate_up + row * gate_up_stride
    x = tl.load(source + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(source + size + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + columns, gated(x, up, GELU).to(out.dtype.element_ty), mask=mask)
