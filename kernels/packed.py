"""Weight matrices in the form that the native forward reads: panels of 64 columns, pairs of inputs, 32 to 4 bits.

The layout is described in kernels/cpu/matmul.h. Quantization is weight-only and symmetric, with one fp32 scale for
`group` inputs of each output: int8 rounds to 127 steps of the group's largest weight; int4 has the 16 levels of
`INT4_LEVELS`, and of several scales the one with the least squared error is kept. Activations are never quantized.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from .huge_pages import HugePages
from .native import PANEL, Matrix

WeightFormat = Literal["f32", "bf16", "int8", "int4"]
FORMATS: dict[str, int] = {"f32": 0, "bf16": 1, "int8": 2, "int4": 3}
GROUPS = {"f32": 0, "bf16": 0, "int8": 64, "int4": 32}

# The quantiles of a normal distribution that NF4 uses (Dettmers et al. 2023, "QLoRA"), rounded to bf16.
INT4_LEVELS = (
    -1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
)  # fmt: skip
_VALUES_AT_ONCE = 1 << 20
_INT4_SCALES = (1.0, 0.97, 0.94, 0.91, 0.88, 0.85, 0.8)


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """y = x @ W^T + bias for W [n, k]; `data` is on the CPU in the layout of `format`."""

    data: torch.Tensor
    scales: torch.Tensor | None  # [panels, k / group, 64] fp32
    bias: torch.Tensor | None  # [n] fp32
    levels: torch.Tensor | None  # [32] bf16
    n: int
    k: int
    kp: int
    format: WeightFormat

    @property
    def num_panels(self) -> int:
        return -(-self.n // PANEL)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.data, self.scales, self.bias) if t is not None)

    def struct(self) -> Matrix:
        """The C struct; it points into these tensors, which must stay alive."""
        return Matrix(
            _address(self.data),
            _address(self.scales),
            _address(self.bias),
            _address(self.levels),
            self.n,
            self.k,
            self.kp,
            FORMATS[self.format],
            GROUPS[self.format],
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
    levels = torch.tensor(INT4_LEVELS * 2).to(torch.bfloat16) if weight_format == "int4" else None
    data = scales = None
    step = max(1, _VALUES_AT_ONCE // (PANEL * kp))
    for first in range(0, panels, step):
        rows = weight[first * PANEL : (first + step) * PANEL]
        num = -(-rows.shape[0] // PANEL)
        padded = F.pad(rows, (0, kp - k, 0, num * PANEL - rows.shape[0])).view(num, PANEL, kp)
        some_data, some_scales = _pack_panels(padded, weight_format, levels)
        if data is None:
            data = memory.empty((panels, *some_data.shape[1:]), some_data.dtype)
            scales = None if some_scales is None else memory.empty((panels, *some_scales.shape[1:]), some_scales.dtype)
        data[first : first + num] = some_data
        if scales is not None and some_scales is not None:
            scales[first : first + num] = some_scales
    assert data is not None
    return PackedMatrix(data, scales, None if bias is None else bias.float().clone(), levels, n, k, kp, weight_format)


def _pack_panels(
    padded: torch.Tensor, weight_format: WeightFormat, levels: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Data and scales of W [panels, 64, kp]."""
    panels, _, kp = padded.shape
    if weight_format == "f32":
        return padded.float().transpose(1, 2), None  # [panels, kp, 64]
    if weight_format == "bf16":
        return _pairs(padded.to(torch.bfloat16)), None
    groups = padded.float().view(panels, PANEL, -1, GROUPS[weight_format])
    if weight_format == "int8":
        scales = groups.abs().amax(-1) / 127.0  # [panels, 64, groups]
        codes = (groups / scales.clamp(min=1e-30).unsqueeze(-1)).round().to(torch.int8)
        data = _pairs(codes.view(panels, PANEL, kp))
    else:
        assert levels is not None
        codes, scales = _best_int4(groups, levels[:16].float())
        data = _nibbles(codes.view(panels, PANEL, kp))
    return data, scales.transpose(1, 2)  # scales [panels, groups, 64]


def unpack(matrix: PackedMatrix) -> torch.Tensor:
    """W [n, k] in fp32 as multiplied: for checks, and the reference that kernels are tested against."""
    panels, kp = matrix.num_panels, matrix.kp
    if matrix.format == "f32":
        values = matrix.data.transpose(1, 2)
    elif matrix.format == "int4":
        assert matrix.levels is not None
        shifts = torch.arange(0, 16, 4).view(1, 1, 4, 1)
        codes = (matrix.data.to(torch.int32).view(panels, kp // 2, 1, 32) >> shifts) & 15  # [panels, pairs, 4, 32]
        values = matrix.levels.float()[codes].view(panels, kp // 2, PANEL, 2).permute(0, 2, 1, 3)
    else:
        values = matrix.data.float().view(panels, kp // 2, PANEL, 2).permute(0, 2, 1, 3)
    values = values.reshape(panels * PANEL, kp)
    if matrix.scales is not None:
        groups = matrix.scales.transpose(1, 2).reshape(panels * PANEL, -1)  # [N, groups]
        values = values * groups.repeat_interleave(GROUPS[matrix.format], dim=1)
    return values[: matrix.n, : matrix.k]


def _pairs(padded: torch.Tensor) -> torch.Tensor:
    """[panels, 64, kp] -> [panels, kp / 2, 64, 2]"""
    panels, _, kp = padded.shape
    return padded.view(panels, PANEL, kp // 2, 2).permute(0, 2, 1, 3)


def _nibbles(codes: torch.Tensor) -> torch.Tensor:
    """Codes [panels, 64, kp] -> words [panels, kp / 2, 32]: nibble c of word 2j + i is column 16c + j, element i."""
    panels, _, kp = codes.shape
    parts = codes.to(torch.int32).view(panels, 4, 16, kp // 2, 2).permute(0, 3, 1, 2, 4).reshape(panels, kp // 2, 4, 32)
    words = parts[:, :, 0] | parts[:, :, 1] << 4 | parts[:, :, 2] << 8 | parts[:, :, 3] << 12
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def _best_int4(groups: torch.Tensor, levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes uint8, scales) of groups [panels, 64, G, group], with the scale of the least squared error."""
    middles = (levels[1:] + levels[:-1]) / 2
    largest = groups.abs().amax(-1)
    best_error = torch.full_like(largest, torch.inf)
    best_scale, best_codes = torch.zeros_like(largest), torch.zeros_like(groups, dtype=torch.uint8)
    for factor in _INT4_SCALES:
        scale = largest * factor
        codes = torch.bucketize(groups / scale.clamp(min=1e-30).unsqueeze(-1), middles)
        error = (levels[codes] * scale.unsqueeze(-1) - groups).square().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_codes = torch.where(better.unsqueeze(-1), codes.to(torch.uint8), best_codes)
    return best_codes, best_scale


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
