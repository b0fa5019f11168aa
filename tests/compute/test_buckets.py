"""Which graphs serve which steps, where there is no GPU: stand-ins at start, a bucket's own when it is missed."""

from collections import Counter

import pytest
import torch
from tiny_models import make_tiny_model

from specserve.compute.cuda import buckets as buckets_module
from specserve.compute.cuda.buckets import ROW_BUCKETS, Bucket, Buckets, most_logits, padded
from specserve.compute.cuda.graph_cache import GraphCache
from specserve.compute.cuda.layers import LayersPart
from specserve.model.config import ModelConfig


class Slots:
    targeted_groups = frozenset({"qkv", "o", "gate_up", "down"})


@pytest.fixture(scope="module")
def buckets(tmp_path_factory) -> Buckets:
    config = ModelConfig.from_dir(make_tiny_model(tmp_path_factory.mktemp("model")))
    return Buckets(config, torch.device("cpu"), Slots(), 64)


class Graphs(GraphCache):
    """Of which a capture takes no time."""

    def __init__(self):
        super().__init__(torch.device("cpu"), False)
        self.is_enabled = True

    has_room = True

    def launch(self, key, part, eager_reason=None):
        self._graphs.setdefault(key, object())


class Rows:
    def upload_padding(self, num_rows): ...


class Layers(LayersPart):
    """Its choice of buckets alone."""

    def __init__(self, buckets: Buckets):
        self._buckets, self._graphs, self._rows = buckets, Graphs(), Rows()
        self._stand_ins, self._missed, self._refused, self._rest_until = {}, Counter(), set(), 0.0


def test_padding_is_at_most_a_third_of_larger_steps():
    assert all(num_rows <= padded(num_rows) <= 1.5 * num_rows for num_rows in range(16, ROW_BUCKETS[-1] + 1))


def test_logits_have_a_buffer_of_half_a_gibibyte_at_most():
    assert most_logits(2048, 49152) == 2048 and most_logits(2048, 128256) == 1024 and most_logits(8, 128256) == 8


def test_the_first_graphs_serve_every_step_and_a_bucket_that_is_missed_gets_its_own(buckets, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("specserve.compute.cuda.layers.time.perf_counter", lambda: clock[0])
    layers, max_rows = Layers(buckets), 512
    for bucket in buckets.first(max_rows):
        layers.capture(bucket)
    num_first = len(layers._graphs._graphs)
    for num_rows in range(1, max_rows + 1):
        for widest in {1, min(3, num_rows), num_rows}:
            for num_active in (0, 1, 8):
                served = layers.bucket_of(num_rows, widest, min(num_active, num_rows))
                assert served in layers._graphs and served.num_rows <= max(4 * num_rows, 1)
                assert served.serves(buckets.of(num_rows, widest, min(num_active, num_rows)))
    assert len(layers._graphs._graphs) == num_first
    layers._missed.clear()
    own = buckets.of(40, 1, 2)
    assert own.num_rows == 48
    for _ in range(8):
        assert layers.bucket_of(40, 1, 2) == Bucket(64, 1, 8, own.lora_groups)
        assert own not in layers._graphs
        layers.capture_missed()
    assert own in layers._graphs and layers.bucket_of(40, 1, 2) == own


def test_more_adapters_than_any_graph_has_places_for_are_captured_at_once(buckets):
    layers = Layers(buckets)
    for bucket in buckets.first(64):
        layers.capture(bucket)
    assert layers.bucket_of(64, 1, 20) not in layers._graphs
    assert buckets_module._segment_places(20, 64) == 64


@pytest.mark.parametrize("raises", [True, False], ids=["in the run before", "while it is captured"])
def test_a_graph_that_cannot_be_captured_leaves_its_stand_in_and_the_engine(buckets, raises, monkeypatch, caplog):
    layers, tried = Layers(buckets), []
    for bucket in buckets.first(64):
        layers.capture(bucket)

    def launch(key, part, eager_reason=None):
        tried.append(key)
        if raises:
            raise torch.OutOfMemoryError("CUDA out of memory")
        layers._graphs._graphs[key] = None

    monkeypatch.setattr(layers._graphs, "launch", launch)
    own = buckets.of(40, 1, 2)
    for _ in range(40):
        assert layers.bucket_of(40, 1, 2) == Bucket(64, 1, 8, own.lora_groups)
        layers._rest_until = 0.0
        layers.capture_missed()
    assert tried == [own] and ("out of memory" in caplog.text) == raises


def test_captures_take_a_tenth_of_the_time_at_most(buckets, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("specserve.compute.cuda.layers.time.perf_counter", lambda: clock[0])
    layers = Layers(buckets)
    captured = []

    def capture(bucket):
        captured.append(bucket)
        clock[0] += 0.05

    layers.capture(Bucket(64, 1, 0, frozenset()))
    monkeypatch.setattr(layers, "capture", capture)
    while clock[0] < 10.0:
        for num_rows in (3, 9, 20, 30, 40):
            layers.bucket_of(num_rows, 1, 0)
        layers.capture_missed()
        clock[0] += 0.001
    assert len(captured) <= 20 and len(set(captured)) == 5
