"""Launches that begin before the one in front of them is done: programmatic dependent launch, from Hopper on.

A kernel takes IS_DEPENDENT and, if it is true, says `gdc_launch_dependents()` at once, so that the next launch may
begin, and `gdc_wait()` before it reads or writes what other launches write or read. Every program waits before it ends,
or the launch after next would not know that this one's predecessor is done. What is read before the wait was written
before a launch that did not begin early. A step of a small model is some hundred launches of a few microseconds, of
which about one is the way from one to the next (docs/performance.md#gpu, LoRA in a step).
"""

from __future__ import annotations

import functools
from typing import Any

import torch

FIRST_CAPABILITY = (9, 0)


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Keywords of a launch on `device`: early, where the device can."""
    if device.type == "cuda" and _can_overlap(device):
        return {"IS_DEPENDENT": True, "launch_pdl": True}
    return {"IS_DEPENDENT": False}


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
