"""Linear layers in whole numbers: rotation, rounding of rows and weights, and the product that kernels must equal.

y = x W^T is (x H)(W H)^T / n, where H is a Hadamard matrix of 1 and -1 on blocks of n columns. Rotated rows have no
columns that stand out, so one step a row is enough, and one an output of 8-bit weights: SmolLM2-135M's perplexity rises
by 0.2% in the mean of six (bench/quantization.py), unrotated by 5%. Rotations against outliers: Ashkboos et al. 2024,
"QuaRot"; we rotate in blocks, in front of every matrix, and merge nothing into others. Owns no layout (packed.py).
Invariant: sums are exact, and all else is one rounding in fp32 after the other, in the order of kernels/cpu/quantize.h.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

MAX_ROTATION = 512
MAX_INPUTS = 1 << 17  # 127 * 127 of each fit 32 bits
GROUP = 16  # inputs that share a step and an offset in 4 bits
MAX_STEP = 16  # so that step * code fits a byte
_RANGES = (1.0, 0.92, 0.84, 0.76, 0.68)  # of a group's values that its 16 codes span
_GROUPS_AT_ONCE = 1 << 13  # half a megabyte of fp32


@dataclass(frozen=True, slots=True)
class IntegerWeights:
    """W [N, k] as `values` [N, k] int8 within -127 to 127 times `scales` [N] fp32, rotated.

    4-bit weights are `steps` * `codes` + `offsets`: codes [N, k] uint8 below 16, the others [N, k / GROUP].
    """

    values: torch.Tensor
    scales: torch.Tensor
    codes: torch.Tensor | None = None
    steps: torch.Tensor | None = None
    offsets: torch.Tensor | None = None


def rotation_size(k: int) -> int:
    """Columns of a block: the largest power of two that divides k, a multiple of 64, but at most 512."""
    return min(k & -k, MAX_ROTATION)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """x H for x [..., k], fp32; H is symmetric, and H H is n times the identity."""
    size, distance = rotation_size(x.shape[-1]), 1
    x = x.float()
    while distance < size:
        pairs = x.reshape(-1, 2, distance)
        x = torch.stack((pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]), 1).view(x.shape)
        distance *= 2
    return x


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes [T, k] int8, scales [T] fp32) of rows x [T, k]; the scale of a row that is not finite is NaN."""
    x = rotate(x)
    finite = x.isfinite().all(-1)
    x = torch.where(finite.unsqueeze(-1), x, 0.0)
    tops = x.abs().amax(-1)
    tops = torch.where(tops < 1e-30, 0.0, tops)
    per_step = torch.where(tops > 0, 127.0 / tops, 0.0)
    codes = (x * per_step.unsqueeze(-1)).round().to(torch.int8)
    return codes, torch.where(finite, tops / 127.0, torch.nan)


def multiply(x: torch.Tensor, values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """y [T, N] fp32 of rows x [T, k] and integer weights: the reference of the native kernels."""
    codes, row_scales = quantize_rows(x)
    sums = codes.double() @ values.double().t()  # exact
    return sums.float() * row_scales.unsqueeze(-1) * scales


def quantize(weight: torch.Tensor, bits: int) -> IntegerWeights:
    """Weights of `bits`, 8 or 4, for W [N, k] with k a multiple of 64."""
    rotated = rotate(weight)
    tops = rotated.abs().amax(-1)
    scaled = rotated * torch.where(tops > 0, 127.0 / tops, 0.0).unsqueeze(-1)  # within -127 to 127
    scales = tops / (127.0 * rotation_size(weight.shape[-1]))
    if bits == 8:
        return IntegerWeights(scaled.round_().to(torch.int8), scales)
    codes, steps, offsets = _fit_groups(scaled.view(-1, GROUP))
    values = (codes * steps.unsqueeze(-1)).to(torch.int16) + offsets.unsqueeze(-1)
    by_row = (weight.shape[0], -1)
    return IntegerWeights(
        values.to(torch.int8).view(by_row), scales, codes.view(by_row), steps.view(by_row), offsets.view(by_row)
    )


def _fit_groups(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes [G, GROUP] uint8, steps [G] uint8, offsets [G] int8) of `groups` [G, GROUP] within -127 to 127."""
    parts = [_fit(part.t().contiguous()) for part in groups.split(_GROUPS_AT_ONCE)]
    codes, steps, offsets = zip(*parts, strict=True)
    return torch.cat(codes), torch.cat(steps), torch.cat(offsets)


def _fit(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same for `values` [GROUP, G]: of several ranges the one with the least squared error, its offset adjusted."""
    low, high = values.amin(0), values.amax(0)
    best_error = torch.full_like(low, torch.inf)
    best_codes, best_steps, best_offsets = torch.zeros_like(values), torch.ones_like(low), torch.zeros_like(low)
    for part in _RANGES:
        steps = ((high - low) * (part / 15)).round_().clamp_(1, MAX_STEP)
        offsets = ((low + high) / 2 - 7.5 * steps).round_()
        codes = ((values - offsets) / steps).round_().clamp_(0, 15)
        offsets = (values - codes * steps).mean(0).round_().clamp_(-127, 127)
        least = ((-127 - offsets) / steps).ceil_().clamp_(min=0)
        most = ((127 - offsets) / steps).floor_().clamp_(max=15)
        codes = ((values - offsets) / steps).round_().clamp_(least, most)
        error = (codes * steps + offsets - values).square_().sum(0)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_steps = torch.where(better, steps, best_steps)
        best_offsets = torch.where(better, offsets, best_offsets)
        best_codes = torch.where(better, codes, best_codes)
    return best_codes.t().to(torch.uint8), best_steps.to(torch.uint8), best_offsets.to(torch.int8)
