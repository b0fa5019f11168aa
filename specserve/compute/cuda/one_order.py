"""Whether a model's products keep one order of sums on the device, so that a row's bits do not follow the step's size.

Decided once, at start, by `--exact`: `auto` keeps it where device and weights allow it and logs why not, `on` takes no
other answer, `off` leaves the products to cuBLAS as it is. That our kernel and cuBLASLt sum alike is nobody's promise:
it is checked on the model's own matrices before it is relied on, at every number of rows that a step is padded to, as
libraries choose by it. Weights of 8 bits have our kernel at every number of rows; that all of its tiles sum alike is
checked as well.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence as Seq

import torch

from ...config import Exact
from ...errors import ModelError
from ...kernels.device_limits import MOST_SHARED, shared_bytes
from ...kernels.linear import Linear
from ...kernels.linear_rows import (
    COLUMNS_OF_K,
    FIRST_CAPABILITY,
    counts_that_differ,
    hold_one_order,
    linear_rows,
    release_order,
    rows_that_differ,
)
from ...kernels.scaled_weights import ScaledLinear
from ...model.config import ModelConfig
from ..decoder_weights import GROUPS, Layer
from .attention_order import tiles_that_differ
from .buckets import ROW_BUCKETS

logger = logging.getLogger(__name__)


def cannot_scale(device: torch.device) -> str | None:
    """Why `device` cannot multiply weights of 8 bits; None if it can."""
    return _device_lacks(device) if device.type == "cuda" else None


def keep_scaled_order(
    exact: Exact, config: ModelConfig, layers: Seq[Layer], lm_head: ScaledLinear, dtype: torch.dtype
) -> bool:
    """Whether linears of 8 bits and attention keep one order for rows of `dtype`; `ModelError` for on, if not."""
    device = lm_head.weights.values.device
    if not _is_asked(exact, device):
        return False
    reason = None
    if device.type == "cuda":
        some: list[ScaledLinear] = [lm_head, *(getattr(layers[0], group) for group in GROUPS)]
        for linear in some:
            values = linear.weights.values
            differing = counts_that_differ(linear, values, dtype, ROW_BUCKETS)
            if differing:
                reason = f"tiles of our kernel sum a {list(values.shape)} matrix differently at {differing} rows"
        reason = reason or _attention_differs(config, dtype, device)
    return _settled(exact, reason)


def keep_one_order(exact: Exact, config: ModelConfig, layers: Seq[Layer], lm_head: Linear) -> bool:
    """Have all linears multiply in one order if `exact` and the device say so. Raises `ModelError` for on, if not."""
    linears: list[Linear] = [lm_head, *(getattr(layer, group) for layer in layers for group in GROUPS)]
    device = lm_head.unpacked().device
    if not _is_asked(exact, device):
        return False
    some = [linear.unpacked() for linear in linears[: 1 + len(GROUPS)]]  # all shapes are in the first layer
    reason = cannot_be(some)
    if reason is None and device.type == "cuda":
        reason = _attention_differs(config, some[0].dtype, device)
        if reason is not None:
            release_order()
    if reason is None:
        for linear in linears:
            linear.multiply_by(linear_rows)
    return _settled(exact, reason)


def _attention_differs(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    differing = tiles_that_differ(config, dtype, device)
    return f"attention sums differently in tiles of {differing} rows than of one" if differing else None


def _is_asked(exact: Exact, device: torch.device) -> bool:
    return exact == "on" or (exact == "auto" and device.type == "cuda")  # of CPUs it is for Triton's interpreter


def _settled(exact: Exact, reason: str | None) -> bool:
    """Whether one order is kept, where `reason` says why it cannot be."""
    if reason is None:
        logger.info("exact: a row's bits do not follow the step's size")
        return True
    if exact == "on":
        raise ModelError(f"exact=on cannot be kept: {reason}; set exact to auto or off")
    logger.warning("exact is off, so drafts may change bits of logits: %s", reason)
    return False


def cannot_be(weights: Seq[torch.Tensor]) -> str | None:
    """Why products with `weights` cannot keep one order, or None, and then cuBLASLt is set to it."""
    dtype = weights[0].dtype
    if dtype.itemsize != 2:
        return f"weights are {str(dtype).removeprefix('torch.')}, not of 16 bits (--dtype bf16 or fp16)"
    for weight in weights:
        if weight.shape[1] % COLUMNS_OF_K:
            return f"a matrix has {weight.shape[1]} inputs, not a multiple of {COLUMNS_OF_K}"
    if not weights[0].is_cuda:
        return None
    reason = _device_lacks(weights[0].device) or hold_one_order()
    if reason is not None:
        return reason
    return sums_differ(weights)


def _device_lacks(device: torch.device) -> str | None:
    capability, shared = torch.cuda.get_device_capability(device), shared_bytes(device)
    if capability < FIRST_CAPABILITY:
        have, first = (".".join(map(str, version)) for version in (capability, FIRST_CAPABILITY))
        return f"the device has compute capability {have}, before {first}"
    if shared < MOST_SHARED:
        return f"the device has {shared >> 10} KiB of shared memory for a program"
    return None


def sums_differ(weights: Seq[torch.Tensor]) -> str | None:
    """How the device's sums turn out to differ; then cuBLAS is as it was."""
    for weight in weights:
        try:
            differing = rows_that_differ(weight, ROW_BUCKETS)
        except Exception as error:  # of a compiler or driver that nobody tried: cuBLAS alone serves
            reason = f"our kernel does not run on a {list(weight.shape)} matrix here ({type(error).__name__}: {error})"
        else:
            if not differing:
                continue
            reason = f"cuBLASLt and our kernel sum a {list(weight.shape)} matrix differently at {differing} rows"
        release_order()
        return reason
    return None
