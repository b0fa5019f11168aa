"""Graphs by key where there is no GPU: what is captured once, what a capture that fails leaves behind."""

import contextlib
import logging
from types import SimpleNamespace

import pytest
import torch

from specserve.compute.cuda.graph_cache import GraphCache


class Graph:
    def __init__(self, part):
        self.replay = part


class Cache(GraphCache):
    """Records without CUDA; `broken` holds the parts whose capture fails."""

    def __init__(self):
        super().__init__(torch.device("cuda"), True)
        self.broken: set[object] = set()
        self.pools: list[object] = []

    def _record(self, part):
        self.pools.append(self._pool)
        if part in self.broken:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Graph(part)


class Stream:
    def __init__(self, device=None):
        self.waited_for = []

    def wait_stream(self, other):
        self.waited_for.append(other)


class Cuda:
    """Which stream is the current one, as torch keeps it."""

    def __init__(self):
        self.current = self.steps = Stream()
        self.captured_on: list[Stream] = []

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.current = stream
        self.captured_on.append(stream)
        yield
        if graph.is_broken:
            raise RuntimeError("the capture was invalidated")  # torch then leaves the stream as it is
        self.current = self.steps


@pytest.fixture
def cuda(monkeypatch) -> Cuda:
    cuda, handles = Cuda(), iter(range(100))
    for name, stand_in in {
        "graph_pool_handle": lambda: next(handles), "memory_reserved": lambda device: 0, "Stream": Stream,
        "current_stream": lambda device: cuda.current, "stream": cuda.stream, "graph": cuda.graph,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, stand_in)
    return cuda


@pytest.fixture
def cache(cuda) -> Cache:
    return Cache()


def test_a_part_is_captured_once_and_replayed(cache):
    runs = []
    for _ in range(3):
        cache.launch("a", lambda: runs.append(1))
    assert cache.num_graphs == len(cache.pools) == 1 and len(runs) == 1 + 3  # warm-up, replays


def test_a_capture_that_fails_leaves_its_part_eager_and_the_others_with_another_pool(cache, caplog):
    runs = []

    def broken():
        runs.append("broken")

    cache.broken.add(broken)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            cache.launch("a", broken)
    assert runs == ["broken"] * (1 + 3) and len(cache.pools) == 1  # tried once
    cache.launch("b", lambda: runs.append("fine"))
    assert cache.num_graphs == 1 and runs[-1] == "fine" and cache.pools[0] != cache.pools[1]
    assert cache.num_eager == {"its capture failed": 3}
    assert "capturing a failed" in caplog.text and "without a CUDA graph" in caplog.text


def test_a_part_that_fails_by_itself_is_no_capture_that_failed(cache):
    def wrong():
        raise ValueError("a kernel")

    with pytest.raises(ValueError, match="a kernel"):
        cache.launch("a", wrong)
    assert not cache.pools and not cache.num_eager


def test_parts_are_captured_on_one_stream_and_a_broken_capture_leaves_the_steps_on_theirs(cuda, monkeypatch):
    graphs = iter([SimpleNamespace(is_broken=False, replay=lambda: None), SimpleNamespace(is_broken=True)])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: next(graphs))
    cache, streams = GraphCache(torch.device("cuda"), True), []
    for key in ("a", "b"):
        cache.launch(key, lambda: streams.append(cuda.current))
        assert cuda.current is cuda.steps
    warmed, captured, again, broken, eager = streams
    assert eager is cuda.steps and {warmed, captured, again, broken} == {*cuda.captured_on} != {cuda.steps}


def test_what_a_part_queued_before_it_raised_comes_before_the_next_step(cuda, cache):
    def wrong():
        raise ValueError("a kernel")

    with pytest.raises(ValueError, match="a kernel"):
        cache.launch("a", wrong)
    assert cuda.current is cuda.steps and len(cuda.steps.waited_for) == 1
