"""Weight matrices in the form that the native forward reads: panels of 64 columns, 32 to 4 bits.

The layout is described in kernels/cpu/matmul.h, what 8 and 4 bits mean in integers.py: whole numbers with one fp32
scale for each output, in 4 bits with a step and an offset for 16 inputs as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from .huge_pages import HugePages
from .integers import GROUP, MAX_INPUTS, IntegerWeights, quantize, rotate
from .native import PANEL, Matrix

WeightFormat = Literal["f32", "bf16", "int8", "int4"]
FORMATS: dict[str, int] = {"f32": 0, "bf16": 1, "int8": 2, "int4": 3}
_BITS = {"int8": 8, "int4": 4}
QUANTIZED = tuple(_BITS)
_VALUES_AT_ONCE = 1 << 20


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """y = x @ W^T + bias for W [n, k]; `data` is on the CPU in the layout of `format`."""

    data: torch.Tensor
    groups: torch.Tensor | None  # int4: [panels, kp / 16, 64, 2] uint8, steps and offsets
    scales: torch.Tensor | None  # int8 and int4: [panels, 64] fp32
    bias: torch.Tensor | None  # [n] fp32
    n: int
    k: int
    kp: int
    format: WeightFormat

    @property
    def num_panels(self) -> int:
        return -(-self.n // PANEL)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.groups, self.scales, self.bias) if t is not None)

    def struct(self) -> Matrix:
        """The C struct; it points into these tensors, which must stay alive."""
        return Matrix(
            _address(self.data),
            _address(self.groups),
            _address(self.scales),
            _address(self.bias),
            self.n,
            self.k,
            self.kp,
            FORMATS[self.format],
        )


def pack(
    weight: torch.Tensor, bias: torch.Tensor | None, weight_format: WeightFormat, memory: HugePages | None = None
) -> PackedMatrix:
    """Pack W [n, k] of any float dtype, some panels at a time: fp32 copies of a whole lm_head would be gigabytes.

    What is read in every step lies in `memory`, which matrices may share.
    """
    memory = memory or HugePages()
    n, k = weight.shape
    panels, kp = -(-n // PANEL), -(-k // PANEL) * PANEL
    if weight_format in _BITS and kp > MAX_INPUTS:
        raise ValueError(f"a matrix of {k} inputs cannot be multiplied in whole numbers; at most {MAX_INPUTS} can")
    whole: list[torch.Tensor] = []
    step = max(1, _VALUES_AT_ONCE // (PANEL * kp))
    for first in range(0, panels, step):
        rows = weight[first * PANEL : (first + step) * PANEL]
        num = -(-rows.shape[0] // PANEL)
        some = _pack_panels(F.pad(rows, (0, kp - k, 0, num * PANEL - rows.shape[0])), weight_format)
        if not whole:
            whole = [memory.empty((panels, *part.shape[1:]), part.dtype) for part in some]
        for target, part in zip(whole, some, strict=True):
            target[first : first + num] = part
    scales, groups = whole[1] if len(whole) > 1 else None, whole[2] if len(whole) > 2 else None
    bias = None if bias is None else bias.float().clone()
    return PackedMatrix(whole[0], groups, scales, bias, n, k, kp, weight_format)


def _pack_panels(padded: torch.Tensor, weight_format: WeightFormat) -> list[torch.Tensor]:
    """Data, and scales and groups where there are any, of W [panels * 64, kp]."""
    if weight_format == "f32":
        return [padded.float().view(-1, PANEL, padded.shape[1]).transpose(1, 2)]  # [panels, kp, 64]
    if weight_format == "bf16":
        return [_inputs_together(padded.to(torch.bfloat16), 2)]
    weights = quantize(padded, _BITS[weight_format])
    scales = weights.scales.view(-1, PANEL)
    if weight_format == "int8":
        return [_inputs_together((weights.values.to(torch.int16) + 128).to(torch.uint8), 4), scales]
    assert weights.codes is not None and weights.steps is not None and weights.offsets is not None
    groups = torch.stack((weights.steps, weights.offsets.view(torch.uint8)), -1)  # [N, kp / 16, 2]
    return [_nibbles(weights.codes), scales, groups.view(-1, PANEL, *groups.shape[1:]).transpose(1, 2)]


def integer_weights(matrix: PackedMatrix) -> IntegerWeights:
    """The whole numbers of an int8 or int4 matrix [panels * 64, kp] that the kernels multiply."""
    assert matrix.scales is not None
    scales, shape = matrix.scales.view(-1), (matrix.num_panels * PANEL, matrix.kp)
    if matrix.format == "int8":
        return IntegerWeights((matrix.data.transpose(1, 2).reshape(shape).to(torch.int16) - 128).to(torch.int8), scales)
    assert matrix.groups is not None
    both = torch.stack((matrix.data & 15, matrix.data >> 4), 3)  # [panels, kp / 4, 2, 2, 64]
    codes = both.view(-1, matrix.kp // 4, PANEL, 4).transpose(1, 2).reshape(shape)
    steps, offsets = matrix.groups.transpose(1, 2).reshape(shape[0], -1, 2).unbind(-1)
    offsets = offsets.contiguous().view(torch.int8)
    by_group = codes.view(shape[0], -1, GROUP).to(torch.int16)
    values = by_group * steps.unsqueeze(-1) + offsets.unsqueeze(-1)
    return IntegerWeights(values.to(torch.int8).view(shape), scales, codes, steps, offsets)


def unpack(matrix: PackedMatrix) -> torch.Tensor:
    """W [n, k] in fp32 as multiplied: for checks, and the reference that kernels are tested against."""
    if matrix.format in _BITS:
        weights = integer_weights(matrix)
        values = rotate(weights.values * weights.scales.unsqueeze(-1))
    else:
        values = matrix.data.transpose(1, 2).reshape(-1, matrix.kp).float()
    return values[: matrix.n, : matrix.k]


def _inputs_together(padded: torch.Tensor, num: int) -> torch.Tensor:
    """[panels * 64, kp] -> [panels, kp / num, 64, num]"""
    return padded.view(-1, PANEL, padded.shape[1] // num, num).transpose(1, 2)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes [panels * 64, kp] -> [panels, kp / 4, 2, 64]: of each 32 columns the second 16 in the upper halves."""
    parts = _inputs_together(codes, 4)  # [panels, kp / 4, 64, 4]
    parts = parts.reshape(*parts.shape[:2], 2, 2, PANEL)
    return parts[:, :, :, 0] | parts[:, :, :, 1] << 4


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
