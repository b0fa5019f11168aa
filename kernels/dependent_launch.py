"""Launches that begin before the one in front of them is done: programmatic dependent launch, from Hopper on.

A kernel takes IS_DEPENDENT and, if it is true, says `gdc_launch_dependents()` at once, so that the next launch may
begin, and `gdc_wait()` before it reads or writes what other launches write or read. Every program waits before it ends,
or the launch after next would not know that this one's predecessor is done. What is read before the wait was written
before a launch that did not begin early. A step of a small model is some hundred launches of a few microseconds, of
which about one is the way from one to the next (docs/performance.md#gpu, LoRA in a step).

Whether a card and its driver do so, and take it into a CUDA graph, is tried once: drivers before CUDA 12.3 cannot
capture such launches, and a capture of them has failed on cards that run them (sglang's pull request 18596).
SPECSERVE_DEPENDENT_LAUNCH=off in the environment has one launch after the other, until both ways were measured.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import Any

import torch

logger = logging.getLogger(__name__)

FIRST_CAPABILITY = (9, 0)
_LAUNCHES = 32  # of the trial, in a row and captured
_PROGRAMS, _BLOCK = 64, 128


def dependent_launch(device: torch.device) -> dict[str, Any]:
    """Keywords of a launch on `device`: early, where the device can."""
    if device.type == "cuda" and _can_overlap(device):
        return {"IS_DEPENDENT": True, "launch_pdl": True}
    return {"IS_DEPENDENT": False}


@functools.cache
def _can_overlap(device: torch.device) -> bool:
    if torch.version.cuda is None or torch.cuda.get_device_capability(device) < FIRST_CAPABILITY:
        return False
    if os.environ.get("SPECSERVE_DEPENDENT_LAUNCH") == "off":
        logger.info("launches do not begin early: SPECSERVE_DEPENDENT_LAUNCH=off")
        return False
    try:
        reason = None if _keeps_order(device) else "values of an earlier launch were not there"
    except Exception as error:  # a driver's, a compiler's: whichever it is, launches one after the other serve
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        logger.warning("launches do not begin early on %s, so steps of small models are slower: %s", device, reason)
    return reason is None


def _keeps_order(device: torch.device) -> bool:
    """Whether launches that begin early read what the ones before them wrote, in a row and as a CUDA graph."""
    from .dependent_launch_triton import pass_on

    words = torch.zeros(2, _PROGRAMS * _BLOCK, dtype=torch.int32, device=device)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)

    def launch() -> None:
        for idx in range(_LAUNCHES):
            pass_on[(_PROGRAMS,)](words[1 - idx % 2], words[idx % 2], BLOCK=_BLOCK, IS_DEPENDENT=True, launch_pdl=True)

    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):  # torch leaves a capture's stream the current one where that fails
        launch()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            launch()
        graph.replay()
        return bool((words[0] == 2 * _LAUNCHES).all())  # sync: once in a process
