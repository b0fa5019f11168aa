"""Linear layers whose weights have 8 bits and one scale for each output, beside activations of 16 bits.

Semantics, for x [T, K] in bf16 or fp16, values [N, K] int8 or fp8 (e4m3), scales [N] fp32, bias [N] or none:
    y[t, n] = round(scales[n] * sum over k of x[t, k] * values[n, k]),   with a bias round(y[t, n] + bias[n])
Values are exact in x's dtype, and each sum is one fp32 accumulator that takes k in ascending order (linear_rows.py), so
nothing depends on T or on the row's place. What a step saves is half of the weights' bytes, where those are its time:
up to some 64 rows. Of more rows, as prompts have, products take at least as long as with 16 bits; a program decodes its
block of weights for 128 rows, so that nothing is ever held in 16 bits.
Integer activations and rotations are the CPU's (integers.py), whose products are faster in whole numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .linear_rows import BLOCK_K, Tile, launch_rows

DTYPES: dict[str, torch.dtype] = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_LARGEST = {"int8": 127.0, "fp8": 448.0}
COLUMNS_OF_K = 16  # K is a multiple of it: TMA wants rows of whole 16 bytes
_ROWS = (16, 32, 64, 128)  # of a tile
_STAGE_BYTES = 196 << 10  # of a multiprocessor's shared memory, for what is read ahead
_VALUES_AT_ONCE = 1 << 24  # 64 MiB of fp32


@dataclass(frozen=True, slots=True)
class ScaledWeights:
    """W [N, K] as `values` [N, K] int8 or float8_e4m3fn times `scales` [N] fp32."""

    values: torch.Tensor
    scales: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes


def quantize_outputs(weight: torch.Tensor, form: str) -> ScaledWeights:
    """W [N, K] with each output's largest weight at the largest value of `form`, a name in DTYPES.

    Some outputs at a time, so in little memory.
    """
    values = torch.empty(weight.shape, dtype=DTYPES[form], device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    num = max(1, _VALUES_AT_ONCE // weight.shape[1])
    for part, some_values, some_scales in zip(weight.split(num), values.split(num), scales.split(num), strict=True):
        tops = part.abs().amax(-1).float()
        scaled = part.float() * torch.where(tops > 0, _LARGEST[form] / tops, 0.0).unsqueeze(-1)
        some_values.copy_(scaled.round_() if form == "int8" else scaled.clamp_(-_LARGEST[form], _LARGEST[form]))
        some_scales.copy_(tops / _LARGEST[form])
    return ScaledWeights(values, scales)


class ScaledLinear:
    """y = x @ W^T + bias for x [T, in] of 16 bits, with W [out, in] held in `form`, a name in DTYPES."""

    __slots__ = ("_bias", "weights")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, form: str):
        self.weights, self._bias = quantize_outputs(weight, form), bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return scaled_linear(x, self.weights, self._bias)

    @property
    def in_size(self) -> int:
        return self.weights.values.shape[1]

    def parts(self) -> tuple[ScaledWeights, torch.Tensor | None]:
        """W and the bias."""
        return self.weights, self._bias

    def unpacked(self) -> torch.Tensor:
        """The weight [out, in] as multiplied, fp32, for checks and tests."""
        return self.weights.values.float() * self.weights.scales.unsqueeze(-1)


def choose_scaled_tile(num_rows: int, out_size: int) -> Tile:
    """By the sizes alone: enough programs for all multiprocessors if that can be, which read as far ahead as fits.

    Where there are somewhat more programs than multiprocessors, two share one.
    """
    rows = next((rows for rows in _ROWS if num_rows <= rows), _ROWS[-1])
    outputs = -(-num_rows // rows) * out_size  # of all tiles of rows
    columns = 128 if outputs >= 1 << 14 else 64
    room = _STAGE_BYTES // 2 if 1 << 13 < outputs < 1 << 14 else _STAGE_BYTES
    return Tile(rows, columns, room // ((2 * rows + columns) * BLOCK_K), 8 if rows == columns == 128 else 4)


def scaled_linear(x: torch.Tensor, weights: ScaledWeights, bias: torch.Tensor | None = None) -> torch.Tensor:
    """y [T, N] in x's dtype. x [T, K] has contiguous rows, K a multiple of COLUMNS_OF_K."""
    (num_rows, in_size), out_size = x.shape, weights.values.shape[0]
    assert x.dtype.itemsize == 2 and weights.values.dtype in DTYPES.values(), (x.dtype, weights.values.dtype)
    assert in_size == weights.values.shape[1] and in_size % COLUMNS_OF_K == 0, (x.shape, weights.values.shape)
    if not num_rows:
        return x.new_empty(0, out_size)
    return launch_rows(x, weights.values, bias, choose_scaled_tile(num_rows, out_size), weights.scales)


def scaled_linear_reference(x: torch.Tensor, weights: ScaledWeights, bias: torch.Tensor | None = None) -> torch.Tensor:
    """The definition, one product after the other in float32; y [T, N] in x's dtype."""
    values = weights.values.float()
    sums = torch.zeros(x.shape[0], values.shape[0])
    for k in range(x.shape[1]):
        sums += x[:, k, None].float() * values[None, :, k]
    y = (sums * weights.scales).to(x.dtype)
    return y if bias is None else (y.float() + bias.float()).to(x.dtype)
