"""A linear layer's weights, held in whatever form the device multiplies fastest; the choice is made once, at load.

On CUDA and on CPUs with bf16 instructions: plain matrices in the model's dtype. On other CPUs, where bf16 products are
emulated (132 ms for the linears of SmolLM2-135M at 8 rows on two AVX2 cores, against 43 ms packed): weights stay at 16
bits, packed as fp16 for FBGEMM, and are multiplied with fp32 activations and accumulation. Every bf16 value in fp16's
normal range survives that unchanged, smaller ones lose less than 2^-25; a tensor with larger values stays fp32.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

logger = logging.getLogger(__name__)

FP16_MAX = 65504.0

Product: TypeAlias = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]  # as F.linear


def compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations for weights of `dtype` on `device`."""
    return torch.float32 if packs_weights(dtype, device) else dtype


def packs_weights(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether 16-bit weights are packed: on CPUs that do not multiply them natively."""
    return device.type == "cpu" and dtype != torch.float32 and not (dtype == torch.bfloat16 and has_native_bf16())


def has_native_bf16() -> bool:
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


class Linear:
    """y = x @ weight^T + bias for x [T, in] in `compute_dtype`; `weight` is [out, in] in the model's dtype."""

    __slots__ = ("_bias", "_packed", "_product", "_weight")

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        self._packed: Any = None
        self._product: Product = F.linear
        self._weight: torch.Tensor | None = weight
        self._bias = bias
        if packs_weights(weight.dtype, weight.device):
            self._bias = None if bias is None else bias.float()
            self._weight = weight.float()
            if float(self._weight.abs().max()) <= FP16_MAX:
                self._packed = torch.ops.quantized.linear_prepack_fp16(self._weight, self._bias)
                self._weight = None
            else:
                logger.warning("a %s weight exceeds fp16's range and is held in fp32", list(weight.shape))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self._weight is not None:
            return self._product(x, self._weight, self._bias)
        return torch.ops.quantized.linear_dynamic_fp16(x, self._packed)

    @property
    def in_size(self) -> int:
        return self.unpacked().shape[1]

    def parts(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The weight [out, in] and the bias, for weights that are not packed."""
        assert self._weight is not None
        return self._weight, self._bias

    def multiply_by(self, product: Product) -> None:
        """Have `product` take the place of F.linear; for weights that are not packed."""
        assert self._weight is not None
        self._product = product

    def unpacked(self) -> torch.Tensor:
        """The weight [out, in] as multiplied, for checks and tests."""
        if self._weight is not None:
            return self._weight
        return torch.ops.quantized.linear_unpack_fp16(self._packed)[0]
