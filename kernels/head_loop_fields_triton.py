"""What the kernels of the heads' loop share: how they find a head's tensors and sizes, and products with fp32's bits.

The tables are those of head_loop_tables.py, fields in their order. No launch writes them, so they may be read before
the launch in front is done.
"""

from __future__ import annotations

import triton
import triton.language as tl

INIT_WEIGHT: tl.constexpr = tl.constexpr(0)
INIT_BIAS: tl.constexpr = tl.constexpr(1)
EMBED: tl.constexpr = tl.constexpr(2)
OUT_BIAS: tl.constexpr = tl.constexpr(3)
TOKEN_GATES: tl.constexpr = tl.constexpr(4)
NEXT_GATES: tl.constexpr = tl.constexpr(5)
MOVE_GATES: tl.constexpr = tl.constexpr(6)
STATE_GATES: tl.constexpr = tl.constexpr(7)
CANDIDATE_BIAS: tl.constexpr = tl.constexpr(8)
QUERY_WEIGHT: tl.constexpr = tl.constexpr(9)
SLOT_WEIGHT: tl.constexpr = tl.constexpr(10)
SLOT_BIAS: tl.constexpr = tl.constexpr(11)
LOCAL_OF: tl.constexpr = tl.constexpr(12)
TOKEN_OF: tl.constexpr = tl.constexpr(13)
NUM_ADDRESSES: tl.constexpr = tl.constexpr(14)
STATE_SIZE: tl.constexpr = tl.constexpr(0)
NUM_TOKENS: tl.constexpr = tl.constexpr(1)
WINDOW: tl.constexpr = tl.constexpr(2)
DRAFT_LEN: tl.constexpr = tl.constexpr(3)
TAP: tl.constexpr = tl.constexpr(4)
KEY_SIZE: tl.constexpr = tl.constexpr(5)
JUMP_START: tl.constexpr = tl.constexpr(6)
NUM_SIZES: tl.constexpr = tl.constexpr(7)
WORK_WIDTH: tl.constexpr = tl.constexpr(5)


@triton.jit
def size_of(sizes, head, field):
    return tl.load(sizes + head * NUM_SIZES + field)


@triton.jit
def state_size_of(sizes, head):
    """The head's d; rows of weights are padded, so that loads may be vectors."""
    return tl.multiple_of(tl.load(sizes + head * NUM_SIZES + STATE_SIZE), 16)


@triton.jit
def weights_of(addresses, head, field):
    address = tl.load(addresses + head * NUM_ADDRESSES + field)
    return tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)


@triton.jit
def floats_of(addresses, head, field):
    address = tl.load(addresses + head * NUM_ADDRESSES + field)
    return tl.multiple_of(address.to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def ids_of(addresses, head, field):
    return tl.load(addresses + head * NUM_ADDRESSES + field).to(tl.pointer_type(tl.int32))


@triton.jit
def tanh(x):
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def parts_of(x):
    """x fp32 as the sum of three bf16, largest first: 24 bits, as many as it has."""
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    return high, middle, (rest - middle.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def dot_parts(weight, high, middle, low, acc):
    """acc + weight @ the sum of the parts, weight in bf16, on tensor cores."""
    acc = tl.dot(weight, high, acc)
    acc = tl.dot(weight, middle, acc)
    return tl.dot(weight, low, acc)
