"""Times device work by CUDA graphs, so that launches cost what they cost in a captured step; one call on the CPU.

Owns the clock only. What would sit in a cache while the bench repeats it and would not in use (KV, weights) must come
in several copies: give one call a copy.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch


def seconds_per_call(calls: Sequence[Callable[[], object]], device: torch.device, rounds: int = 10) -> float:
    """Median over `rounds` of the time of all calls in turn, divided by their number; compiled and warm before.

    The CPU runs them once: a dry run shows that they run.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    elapsed_ms = [a.elapsed_time(b) for a, b in zip(events, events[1:], strict=False)]
    return statistics.median(elapsed_ms) / 1e3 / len(calls)


def copy_bandwidth(device: torch.device, num_bytes: int = 1 << 30) -> float:
    """Bytes a second that a copy within the device's memory reads and writes together: the limit of the benches."""
    source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / seconds_per_call([lambda: target.copy_(source)], device)


def read_bandwidth(device: torch.device, num_bytes: int = 1 << 30) -> float:
    """Bytes a second that a sum over the device's memory reads."""
    source = torch.zeros(num_bytes // 4, dtype=torch.float32, device=device)
    return num_bytes / seconds_per_call([lambda: source.sum()], device)
