"""CUDA graphs of the parts of a step, by bucket: captured once, replayed from then on.

What is captured reads static buffers only, so that neither other lengths nor other adapters ask for another capture.
All graphs share one memory pool: they are replayed one after the other and none keeps anything there between replays.
They are captured on one stream, as are the runs before: a library keeps working memory for each stream that it met.
On a CPU, and where graphs are off, the same functions simply run. A part that runs eagerly on CUDA is counted and
logged with its reason, once each.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator

import torch

logger = logging.getLogger(__name__)
_WARM_UPS = 1  # runs before a capture: kernels are compiled and library handles made outside of it
_SPARE_BYTES = 1 << 29  # that are left to adapters and to what runs without a graph; a graph takes some 16 MiB


class GraphCache:
    """Graphs by key; `is_enabled` is false on CPUs and with --cuda-graphs off."""

    def __init__(self, device: torch.device, is_enabled: bool):
        self._device = device
        self.is_enabled = is_enabled and device.type == "cuda"
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}  # None: it cannot be captured
        self._pool = torch.cuda.graph_pool_handle() if self.is_enabled else None
        self._stream = torch.cuda.Stream(device) if self.is_enabled else None
        self._logged: set[str] = set()
        self.capture_s = 0.0
        self.capture_bytes = 0
        self.num_eager: Counter[str] = Counter()  # by reason

    @property
    def num_graphs(self) -> int:
        return sum(graph is not None for graph in self._graphs.values())

    def __contains__(self, key: Hashable) -> bool:
        """Whether its capture was tried."""
        return key in self._graphs

    def has(self, key: Hashable) -> bool:
        """Whether there is a graph of it."""
        return self._graphs.get(key) is not None

    def captured(self) -> Iterator[Hashable]:
        """The keys of all graphs."""
        return (key for key, graph in self._graphs.items() if graph is not None)

    @property
    def has_room(self) -> bool:
        """Whether the device has memory to spare for graphs that only make steps faster."""
        return torch.cuda.mem_get_info(self._device)[0] > _SPARE_BYTES

    def launch(self, key: Hashable, part: Callable[[], None], eager_reason: str | None = None) -> None:
        """Run `part`, by its graph where there is one or may be one; `eager_reason` says why this step has none."""
        if not self.is_enabled or eager_reason is not None:
            if eager_reason is not None and self.is_enabled:
                self._note(eager_reason)
            part()
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(key, part)
        graph = self._graphs[key]
        if graph is None:
            self._note("its capture failed")
            part()
        else:
            graph.replay()

    def _capture(self, key: Hashable, part: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """None when it fails, which is not tried again: what cannot be captured runs as it is."""
        start, before = time.perf_counter(), torch.cuda.memory_reserved(self._device)
        stream, steps = self._stream, torch.cuda.current_stream(self._device)
        assert stream is not None
        stream.wait_stream(steps)
        try:
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UPS):
                    part()
        finally:  # also of one that raises, what it queued comes before what follows
            steps.wait_stream(stream)
        try:
            graph = self._record(part)
        except Exception:
            logger.exception("capturing %s failed", key)
            self._pool = torch.cuda.graph_pool_handle()  # the old one may believe that it is being recorded to
            return None
        seconds = time.perf_counter() - start
        self.capture_s += seconds
        self.capture_bytes += max(0, torch.cuda.memory_reserved(self._device) - before)
        logger.debug("captured %s in %.2f s", key, seconds)
        return graph

    def _record(self, part: Callable[[], None]) -> torch.cuda.CUDAGraph:
        """Threads that read adapters copy to the device meanwhile, which only a capture of this thread's own allows.

        torch leaves its stream the current one where a capture cannot be ended: hence the outer `stream`.
        """
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local")
        with torch.cuda.stream(self._stream), recording:
            part()
        return graph

    def _note(self, reason: str) -> None:
        self.num_eager[reason] += 1
        if reason not in self._logged:
            self._logged.add(reason)
            logger.warning("a step runs without a CUDA graph, slower: %s", reason)
