"""A linear layer whose rows have the same bits at every number of rows, where libraries choose a sum's order by it.

Semantics, for x [T, K] and weight [N, K] in one 16-bit dtype, bias [N] or none:
    y[t, n] = round(sum over k of x[t, k] * weight[n, k]),   with a bias round(y[t, n] + bias[n])
Each sum is one fp32 accumulator that takes k in ascending order, 16 at a time, by tensor cores: no split of K, nothing
that depends on T or on the row's place. Up to MOST_TILED_ROWS rows are multiplied by our kernel, more by cuBLASLt,
which sums in that order too once it may not split K (`hold_one_order`). A bias is added to the rounded product by
both, since how a library joins it with the product is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .dependent_launch import dependent_launch
from .written_rounding import WRITTEN_ROUNDING

MOST_TILED_ROWS = 64  # beyond, weights are no longer all of the time, and cuBLASLt is as fast or faster
COLUMNS_OF_K = 8  # K is a multiple of it: TMA wants rows of whole 16 bytes
BLOCK_K = 128
FIRST_CAPABILITY = (9, 0)  # of cards with TMA; the tiles take up to 217 KiB of shared memory
_MOST_DEEP = 8192  # outputs whose tiles of 64 have a multiprocessor each
_LEAST_WIDE = 16384  # outputs that fill the device with tiles of 128
_CHECKED_ROWS = (1, 16, 17, 32, 33, 64, 65, 96, 128, 192, 256, 512, 1024, 2048)
_CHECKED_BYTES = 1 << 28  # of outputs


@dataclass(frozen=True, slots=True)
class Tile:
    """A program's part of y, and how far ahead it reads; none of it changes a bit."""

    rows: int
    columns: int
    num_stages: int
    num_warps: int = 4


def choose_tile(num_rows: int, out_size: int) -> Tile:
    """By the sizes alone. Programs that have a multiprocessor each read far ahead; where there are more, two share one.

    Of more outputs than that, tiles of 128 read weights in larger pieces.
    """
    rows = next(rows for rows in (16, 32, 64) if num_rows <= rows)
    if out_size >= _LEAST_WIDE:
        return Tile(rows, 128, 4)
    if out_size > _MOST_DEEP:
        return Tile(rows, 64, 4 if rows <= 32 else 3)
    return Tile(rows, 64, 9 if rows <= 32 else 6)


def hold_one_order() -> str | None:
    """Have this process's products of 16-bit matrices on CUDA by cuBLASLt, without splits of K; why not, if it cannot.

    A setting of torch, which all products of the process follow until `release_order`.
    """
    if torch.version.cuda is None:
        return "torch was not built for CUDA"
    try:
        _set_library("cublaslt", False)
    except (AttributeError, RuntimeError, TypeError) as error:
        release_order()
        return f"torch {torch.__version__} cannot keep cuBLASLt from splitting sums ({error})"
    return None


def release_order() -> None:
    """What `hold_one_order` set as torch has it by itself."""
    try:
        _set_library("default", True)
    except (AttributeError, RuntimeError, TypeError):  # of a torch that could not be held either
        return


def _set_library(library: str, may_split: bool) -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = (may_split, may_split)
    matmul.allow_fp16_reduced_precision_reduction = (may_split, may_split)
    torch.backends.cuda.preferred_blas_library(library)


def rows_that_differ(weight: torch.Tensor, counts: Sequence[int] = _CHECKED_ROWS) -> list[int]:
    """Of `counts`, those at which rows times `weight` [N, K] have other bits than in the smallest tiles."""
    return counts_that_differ(lambda x: linear_rows(x, weight), weight, weight.dtype, counts)


def counts_that_differ(
    product: Callable[[torch.Tensor], torch.Tensor],
    weight: torch.Tensor,
    dtype: torch.dtype,
    counts: Sequence[int] = _CHECKED_ROWS,
) -> list[int]:
    """Of `counts`, those at which `product` of rows in `dtype` has other bits than of at most 16 rows at once.

    A check of the device. What is rounded to 16 bits hides most differences, so all of a row's outputs are compared.
    `weight` [N, K], whatever its dtype, is what it multiplies by.
    """
    counts = [num for num in counts if num * weight.shape[0] * dtype.itemsize <= _CHECKED_BYTES] or [1]
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(max(counts), weight.shape[1], generator=generator, device=weight.device, dtype=dtype)
    smallest = torch.cat([product(rows) for rows in x.split(16)])
    return [num for num in counts if not torch.equal(product(x[:num]), smallest[:num])]  # sync: at start


def linear_rows(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y [T, N] in x's dtype. x [T, K] and weight [N, K] have contiguous rows, K a multiple of COLUMNS_OF_K."""
    (num_rows, in_size), out_size = x.shape, weight.shape[0]
    assert x.dtype == weight.dtype and x.dtype.itemsize == 2, (x.dtype, weight.dtype)
    assert in_size == weight.shape[1] and in_size % COLUMNS_OF_K == 0, (x.shape, weight.shape)
    if not 0 < num_rows <= MOST_TILED_ROWS:
        y = F.linear(x, weight)
        return y if bias is None else y.add_(bias)
    return launch_rows(x, weight, bias, choose_tile(num_rows, out_size))


def launch_rows(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, tile: Tile, scales: torch.Tensor | None = None
) -> torch.Tensor:
    """y [T, N] in x's dtype, by our kernel; T is not 0. With `scales` [N] fp32 sums are multiplied by them."""
    from triton import cdiv
    from triton.tools.tensor_descriptor import TensorDescriptor

    from .linear_rows_triton import linear_rows_kernel

    (num_rows, in_size), out_size = x.shape, weight.shape[0]
    y = x.new_empty(num_rows, out_size)
    # A launch carries descriptors by value, so a graph keeps those that it was captured with.
    linear_rows_kernel[(cdiv(num_rows, tile.rows), cdiv(out_size, tile.columns))](
        y,
        TensorDescriptor(x, [num_rows, in_size], [x.stride(0), 1], [tile.rows, BLOCK_K]),
        TensorDescriptor(weight, [out_size, in_size], [weight.stride(0), 1], [tile.columns, BLOCK_K]),
        y if scales is None else scales,
        y if bias is None else bias,
        num_rows,
        out_size,
        in_size,
        HAS_SCALES=scales is not None,
        HAS_BIAS=bias is not None,
        ROWS=tile.rows,
        COLUMNS=tile.columns,
        BLOCK_K=BLOCK_K,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **WRITTEN_ROUNDING,
        **dependent_launch(x.device),
    )
    return y


def linear_rows_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, one product after the other in float32; y [T, N] in x's dtype."""
    sums = torch.zeros(x.shape[0], weight.shape[0])
    for k in range(x.shape[1]):
        sums += x[:, k, None].float() * weight[None, :, k].float()
    y = sums.to(x.dtype)
    return y if bias is None else (y.float() + bias.float()).to(x.dtype)
