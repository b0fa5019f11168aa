"""The Triton kernel of a layer's linears of few rows with what stands around them. Semantics: linear_fused.py.

One program a tile of outputs. Before it waits for the launch in front it reads its weights into shared memory, HELD
blocks of them, and asks for more into the second cache level. Then it norms the rows, which every program does for
itself, multiplies, and goes on with its outputs where they are: in registers. Outputs that belong together, as two
halves of a head or gate and up, are 8 rows apart in a tile of 64, which is one thread of a tensor core's result.

Sums are those of linear_rows_triton.py: weights on the left, one fp32 accumulator, K ascending. Only USED of a tile's
64 outputs are read where a whole tile a program would leave multiprocessors without work; the others are zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .add_norm_triton import rms_scale
from .gated_activation_triton import gated
from .rope_kv_triton import rotated

_TILE = tl.constexpr(64)  # outputs: the rows of a warp group's instruction
_PREFETCH = tl.constexpr("{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.b32 $0, 0; }")


@triton.jit
def _row_scales(x, t, num_rows, in_size, x_stride, eps, NORM_ROWS: tl.constexpr, NORM_BLOCK: tl.constexpr):
    """[ROWS] by which rows `t` are multiplied, found of the first NORM_ROWS; t beyond these get 0."""
    r = tl.arange(0, NORM_ROWS)
    c = tl.arange(0, NORM_BLOCK)
    mask = (r < num_rows)[:, None] & (c < in_size)[None, :]
    rows = tl.load(x + r[:, None] * x_stride + c[None, :], mask=mask, other=0.0).to(tl.float32)
    scale = rms_scale(rows * rows, in_size, eps, NORM_ROWS, NORM_BLOCK)
    # As numbers, or picked by a sum with zeros: else all threads hold whole blocks, in the layout that `scale` has.
    if NORM_ROWS > 4:
        return tl.sum(tl.where(t[:, None] == r[None, :], scale[None, :], 0.0), axis=1)
    of_t = tl.zeros(t.shape, dtype=tl.float32)
    for row in tl.static_range(NORM_ROWS):
        of_t = tl.where(t == row, tl.sum(tl.where(r == row, scale, 0.0), axis=0), of_t)
    return of_t


@triton.jit
def _rows(x, norm, scale, t, row_mask, c, in_size, x_stride, HAS_NORM: tl.constexpr, DTYPE: tl.constexpr):
    """[ROWS, columns c] of x; or of fp32 rows x, normed and rounded as add_norm_triton.py does."""
    rows = tl.load(x + t[:, None] * x_stride + c[None, :], mask=row_mask[:, None] & (c < in_size)[None, :], other=0.0)
    if HAS_NORM:
        weight = tl.load(norm + c, mask=c < in_size, other=0.0).to(tl.float32)
        rows = (rows.to(tl.float32) * scale[:, None] * weight[None, :]).to(DTYPE)
    return rows


@triton.jit
def _weights(w_rows, is_output, c, in_size):
    """[64, columns c] of weights as they are held."""
    return tl.load(w_rows[:, None] + c[None, :], mask=is_output[:, None] & (c < in_size)[None, :], other=0.0)


@triton.jit
def _widened(w, HAS_SCALES: tl.constexpr, DTYPE: tl.constexpr):
    if HAS_SCALES:
        w = w.to(tl.float32).to(DTYPE)  # by way of fp32 for the interpreter
    return w


@triton.jit
def _outputs(r, tile, half, num_outputs, USED: tl.constexpr, IS_PAIRED: tl.constexpr):
    """(outputs, which of them are this program's) of a tile's rows r; of pairs, two that are `half` apart."""
    if IS_PAIRED:
        pair = r // 16 * 8 + r % 8
        is_output = pair < USED // 2
        pair += tile * (USED // 2)
        is_output = is_output & (pair < num_outputs // 2)
        outputs = pair // half * (2 * half) + pair % half + r // 8 % 2 * half
    else:
        outputs = tile * USED + r
        is_output = (r < USED) & (outputs < num_outputs)
    return outputs, is_output


@triton.jit
def _product(
    x, weight, scales, bias, norm, tile, half, num_outputs, num_rows, in_size, x_stride, weight_stride, eps,
    IS_PAIRED: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr, ROWS: tl.constexpr, NORM_ROWS: tl.constexpr, NORM_BLOCK: tl.constexpr, USED: tl.constexpr,
    HELD: tl.constexpr, HAS_REST: tl.constexpr, LINES: tl.constexpr, BLOCK_K: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """y [64, ROWS] of a tile's outputs, rounded to DTYPE, as linear_rows has it; waits for the launch in front."""
    outputs, is_output = _outputs(tl.arange(0, _TILE), tile, half, num_outputs, USED, IS_PAIRED)
    w_rows = weight + outputs.to(tl.int64) * weight_stride
    t = tl.arange(0, ROWS)
    row_mask = t < num_rows
    k = tl.arange(0, BLOCK_K)
    if IS_DEPENDENT:
        gdc_launch_dependents()
        if HAS_REST:
            _prefetch(weight, tile, half, num_outputs, in_size, weight_stride, IS_PAIRED, USED, LINES)
    held = ()
    for block in tl.static_range(HELD):
        held = held + (_weights(w_rows, is_output, block * BLOCK_K + k, in_size),)  # type: ignore[assignment]
    if IS_DEPENDENT:
        gdc_wait()
    scale = t.to(tl.float32)
    if HAS_NORM:
        scale = _row_scales(x, t, num_rows, in_size, x_stride, eps, NORM_ROWS, NORM_BLOCK)
    beside = ()
    if not HAS_NORM:  # all at once; what is normed was read for that
        for block in tl.static_range(HELD):
            beside = beside + (_rows(x, x, scale, t, row_mask, block * BLOCK_K + k, in_size, x_stride, False, DTYPE),)  # type: ignore[assignment]
    sums = tl.zeros((_TILE, ROWS), dtype=tl.float32)
    for block in tl.static_range(HELD):
        if HAS_NORM:
            rows = _rows(x, norm, scale, t, row_mask, block * BLOCK_K + k, in_size, x_stride, True, DTYPE)
        else:
            rows = beside[block]
        sums = tl.dot(_widened(held[block], HAS_SCALES, DTYPE), tl.trans(rows), sums)
    if HAS_REST:
        for start in range(HELD * BLOCK_K, in_size, BLOCK_K):
            w = _widened(_weights(w_rows, is_output, start + k, in_size), HAS_SCALES, DTYPE)
            rows = _rows(x, norm, scale, t, row_mask, start + k, in_size, x_stride, HAS_NORM, DTYPE)
            sums = tl.dot(w, tl.trans(rows), sums)
    if HAS_SCALES:
        sums *= tl.load(scales + outputs, mask=is_output, other=0.0)[:, None]
    y = sums.to(DTYPE)
    if HAS_BIAS:
        y = (y.to(tl.float32) + tl.load(bias + outputs, mask=is_output, other=0.0).to(tl.float32)[:, None]).to(DTYPE)
    return y


@triton.jit
def _prefetch(
    weight, tile, half, num_outputs, in_size, weight_stride,
    IS_PAIRED: tl.constexpr, USED: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """Ask for the first LINES lines of 128 bytes of a tile's weights."""
    outputs, is_output = _outputs(tl.arange(0, USED), tile, half, num_outputs, USED, IS_PAIRED)
    SIZE: tl.constexpr = weight.dtype.element_ty.primitive_bitwidth // 8
    offset = tl.arange(0, LINES) * (128 // SIZE)
    is_read = is_output[:, None] & (offset < in_size)[None, :]
    places = (weight + outputs.to(tl.int64)[:, None] * weight_stride + offset[None, :]).to(tl.int64)
    tl.inline_asm_elementwise(
        _PREFETCH, "=r,l,r", [places, is_read.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def _pairs(tile, num_pairs, USED: tl.constexpr):
    """(pairs [32], which of them are this program's) of a tile."""
    own = tl.arange(0, _TILE // 2)
    pairs = tile * (USED // 2) + own
    return pairs, (own < USED // 2) & (pairs < num_pairs)


@triton.jit
def _halves(y, ROWS: tl.constexpr):
    """First and second of pairs [32, ROWS] each, of y [64, ROWS] as `_outputs` has its rows."""
    apart = tl.permute(tl.reshape(y, (_TILE // 16, 2, 8, ROWS)), (0, 2, 3, 1))
    first, second = tl.split(apart)
    first, second = tl.reshape(first, (_TILE // 2, ROWS)), tl.reshape(second, (_TILE // 2, ROWS))
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def linear_add_kernel(
    residual, x, weight, scales, bias, num_rows, in_size, out_size, residual_stride, x_stride, weight_stride,
    HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr, ROWS: tl.constexpr, USED: tl.constexpr,
    HELD: tl.constexpr, HAS_REST: tl.constexpr, LINES: tl.constexpr, BLOCK_K: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of USED outputs,): the rows' outputs are added to the residual."""
    tile = tl.program_id(0)
    y = _product(
        x, weight, scales, bias, x, tile, out_size, out_size, num_rows, in_size, x_stride, weight_stride, 0.0,
        False, False, HAS_SCALES, HAS_BIAS, DTYPE, ROWS, 1, 1, USED, HELD, HAS_REST, LINES, BLOCK_K, IS_DEPENDENT,
    )  # fmt: skip
    outputs, is_output = _outputs(tl.arange(0, _TILE), tile, out_size, out_size, USED, False)
    t = tl.arange(0, ROWS)
    place = residual + t[None, :] * residual_stride + outputs[:, None]
    mask = is_output[:, None] & (t < num_rows)[None, :]
    total = tl.load(place, mask=mask, other=0.0).to(tl.float32) + y.to(tl.float32)
    tl.store(place, total.to(residual.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def linear_gated_kernel(
    out, x, weight, scales, bias, norm, num_rows, in_size, size, x_stride, weight_stride, eps,
    GELU: tl.constexpr, HAS_NORM: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, NORM_ROWS: tl.constexpr, NORM_BLOCK: tl.constexpr, USED: tl.constexpr,
    HELD: tl.constexpr, HAS_REST: tl.constexpr, LINES: tl.constexpr, BLOCK_K: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of USED / 2 of the `size` columns of out,)."""
    tile = tl.program_id(0)
    y = _product(
        x, weight, scales, bias, norm, tile, size, 2 * size, num_rows, in_size, x_stride, weight_stride, eps, True,
        HAS_NORM, HAS_SCALES, HAS_BIAS, DTYPE, ROWS, NORM_ROWS, NORM_BLOCK, USED, HELD, HAS_REST, LINES, BLOCK_K,
        IS_DEPENDENT,
    )  # fmt: skip
    columns, is_column = _pairs(tile, size, USED)
    gate, up = _halves(y, ROWS)
    t = tl.arange(0, ROWS)
    mask = is_column[:, None] & (t < num_rows)[None, :]
    tl.store(out + t[None, :] * size + columns[:, None], gated(gate, up, GELU).to(DTYPE), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def linear_rope_kernel(
    q, x, weight, scales, bias, norm, cos, sin, slot_mapping, k_cache, v_cache, num_rows, in_size, x_stride,
    weight_stride, k_stride, v_stride, eps,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    HAS_NORM: tl.constexpr, HAS_SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, DTYPE: tl.constexpr,
    ROWS: tl.constexpr, NORM_ROWS: tl.constexpr, NORM_BLOCK: tl.constexpr, USED: tl.constexpr,
    HELD: tl.constexpr, HAS_REST: tl.constexpr, LINES: tl.constexpr, BLOCK_K: tl.constexpr, IS_DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of USED / 2 of all heads' halves,)."""
    HALF: tl.constexpr = HEAD_DIM // 2
    NUM_ROTATED: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    NUM_PAIRS: tl.constexpr = (NUM_ROTATED + NUM_KV_HEADS) * HALF
    tile = tl.program_id(0)
    y = _product(
        x, weight, scales, bias, norm, tile, HALF, 2 * NUM_PAIRS, num_rows, in_size, x_stride, weight_stride, eps, True,
        HAS_NORM, HAS_SCALES, HAS_BIAS, DTYPE, ROWS, NORM_ROWS, NORM_BLOCK, USED, HELD, HAS_REST, LINES, BLOCK_K,
        IS_DEPENDENT,
    )  # fmt: skip
    pairs, is_pair = _pairs(tile, NUM_PAIRS, USED)
    first, second = _halves(y, ROWS)
    t = tl.arange(0, ROWS)
    heads, d = pairs // HALF, pairs % HALF
    mask = is_pair[:, None] & (t < num_rows)[None, :]
    is_rotated = mask & (heads < NUM_ROTATED)[:, None]
    angle = t[None, :] * HEAD_DIM + d[:, None]
    cos_first = tl.load(cos + angle, mask=is_rotated, other=0.0)
    cos_second = tl.load(cos + angle + HALF, mask=is_rotated, other=0.0)
    sin_first = tl.load(sin + angle, mask=is_rotated, other=0.0)
    sin_second = tl.load(sin + angle + HALF, mask=is_rotated, other=0.0)
    rotated_first = rotated(first, second, cos_first, sin_first).to(DTYPE)
    rotated_second = rotated(second, first, cos_second, sin_second).to(DTYPE)

    is_query = mask & (heads < NUM_HEADS)[:, None]
    target = q + t[None, :] * (NUM_HEADS * HEAD_DIM) + (heads * HEAD_DIM + d)[:, None]
    tl.store(target, rotated_first, mask=is_query)
    tl.store(target + HALF, rotated_second, mask=is_query)
    slot = tl.load(slot_mapping + t, mask=t < num_rows, other=-1)
    is_kept = (slot >= 0)[None, :] & (heads >= NUM_HEADS)[:, None]
    target = k_cache + slot[None, :] * k_stride + ((heads - NUM_HEADS) * HEAD_DIM + d)[:, None]
    tl.store(target, rotated_first, mask=is_rotated & is_kept)
    tl.store(target + HALF, rotated_second, mask=is_rotated & is_kept)
    is_value = mask & is_kept & (heads >= NUM_ROTATED)[:, None]
    target = v_cache + slot[None, :] * v_stride + ((heads - NUM_ROTATED) * HEAD_DIM + d)[:, None]
    tl.store(target, first.to(DTYPE), mask=is_value)
    tl.store(target + HALF, second.to(DTYPE), mask=is_value)
