"""The stand-in device: whatever drafts, the engine says what the script says, and every step is on the clock."""

import queue
import threading
from collections.abc import Callable

import pytest
from lookahead_adapters import make_lookahead_adapter
from stand_in_engine import add, make_stand_in, make_stand_in_engine
from tiny_models import make_tiny_model

from bench.stand_in_device import DeviceTimes, StandIn
from specserve.compute.cuda import buckets
from specserve.engine.engine import Engine, Event
from specserve.engine.process import EngineProcess
from specserve.messages import Abort, Delta, GenerateRequest, SamplingParams, Shutdown, Speculation


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    return make_stand_in(monkeypatch)


@pytest.mark.parametrize("mode", ["off", "auto", "fixed"])
def test_the_script_is_what_is_said_and_all_steps_are_on_the_clock(model_dir, stand_in, tmp_path, mode):
    engine = make_stand_in_engine(model_dir, stand_in)
    stand_in.clock.times = DeviceTimes(step_s=3e-3, row_s=0.0, heads_s=1e-5)  # else a busy host never waits
    adapter = engine.load_adapter("a", make_lookahead_adapter(model_dir, tmp_path / "a", seed=1))
    said = {f"r{idx}": [(7 * idx + 3 * k) % 60 for k in range(17 + 5 * idx)] for idx in range(6)}
    for idx, (request_id, tokens) in enumerate(said.items()):
        key = adapter.content_hash if idx % 2 else None
        add(engine, stand_in, request_id, tokens, adapter_hash=key, speculation=Speculation(mode=mode))
    heard: dict[str, list[int]] = {request_id: [] for request_id in said}
    num_sent, held = 0, []

    def send() -> None:
        nonlocal num_sent
        num_sent += 1
        engine.write_events()
        for event in held:
            assert isinstance(event, Delta), event
            heard[event.request_id] += event.token_ids

    while engine.has_work():
        held = engine.step(send)
    send()
    assert heard == said
    stats = engine.stats()
    assert stats.integrity_error is None and stats.num_free_kv_blocks == stats.num_kv_blocks
    assert len(stand_in.clock.idle_s) == stats.num_steps - 1 and num_sent == stats.num_steps + 1
    assert all(idle >= 0 for idle in stand_in.clock.idle_s) and stand_in.clock.waited_s > 0
    accepted = stats.accepted_by_source.get("head", 0)
    assert (accepted == 0) if mode == "off" else (0 < accepted < stats.drafted_by_source["head"])


def test_drafts_leave_the_logits_within_the_device_s_own_buffers(model_dir, stand_in, monkeypatch, tmp_path):
    """Beyond them heads are not asked for the next step, whose drafts would be missing."""
    monkeypatch.setattr(buckets, "_LOGITS_BYTES", 16 * 320 * 4)
    engine = make_stand_in_engine(model_dir, stand_in)
    adapter = engine.load_adapter("a", make_lookahead_adapter(model_dir, tmp_path / "a", seed=1))
    for idx in range(4):
        said = [(7 * idx + 3 * k) % 60 for k in range(30)]
        add(engine, stand_in, str(idx), said, adapter_hash=adapter.content_hash, speculation=Speculation(mode="fixed"))
    rows, launch = [], engine.sampler.launch
    monkeypatch.setattr(
        engine.sampler, "launch", lambda logits, groups: rows.append(len(logits)) or launch(logits, groups)
    )
    while engine.has_work():
        engine.step()
    assert max(rows) == 16 and engine.stats().accepted_by_source["head"] > 20


def test_texts_that_are_written_while_the_next_step_runs_are_those_that_are_written_at_once(model_dir, stand_in):
    """With ends by length, by a stop token's like and by a stop string, whose text cannot wait."""
    words = [list(range(70 + 9 * idx, 95 + 9 * idx)) for idx in range(5)]
    stop = make_stand_in_engine(model_dir, stand_in).tokenizer.decode(words[2][10:12])
    texts = []
    for is_late in (False, True):
        engine = make_stand_in_engine(model_dir, stand_in)
        for idx, said in enumerate(words):
            add(engine, stand_in, str(idx), said, sampling={"stop": [stop] if idx == 2 else []})
        texts.append(texts_of(engine, is_late))
    assert texts[0] == texts[1] and all(texts[0].values()) and stop not in texts[0]["2"]


def texts_of(engine: Engine, is_late: bool) -> dict[str, str]:
    found: dict[str, str] = {}
    held: list[Event] = []

    def hear() -> None:
        engine.write_events()
        for delta in held:
            assert isinstance(delta, Delta)
            found[delta.request_id] = found.get(delta.request_id, "") + delta.text

    while engine.has_work():
        held = engine.step(hear) if is_late else engine.step()
        if not is_late:
            hear()
    if is_late:
        hear()
    return dict(found)


class Link:
    """The engine process's end of the socket, without a socket: `on_delta` is called with what is sent."""

    def __init__(self, messages: list, on_delta: Callable[[Delta], None]):
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.sent: list[Delta] = []
        self._on_delta = on_delta
        for message in messages:
            self.inbox.put(message)

    def start_heartbeat(self, load) -> None: ...

    def begin_turn(self) -> None: ...

    def send(self, messages: list) -> None:
        for message in messages:
            if isinstance(message, Delta):
                self.sent.append(message)
                self._on_delta(message)


def test_an_end_that_waits_for_a_step_is_told_when_no_step_follows(model_dir, stand_in):
    """One sequence ends in a step while another, which would have made the next step, is aborted."""
    engine = make_stand_in_engine(model_dir, stand_in)
    stand_in.script.tokens |= {"short": [70, 71], "long": [80] * 60}
    requests = [
        GenerateRequest(name, [1, 2, 3], SamplingParams(max_tokens=num, temperature=0.0, ignore_eos=True))
        for name, num in (("short", 2), ("long", 60))
    ]

    def on_delta(delta: Delta) -> None:
        if delta.request_id == "short" and delta.finish_reason is None:
            link.inbox.put(Abort("long"))
        elif delta.request_id == "short":
            link.inbox.put(Shutdown())

    link = Link(requests, on_delta)
    timer = threading.Timer(20.0, link.inbox.put, [Shutdown()])
    timer.start()
    EngineProcess(engine, link).serve()
    timer.cancel()
    (end,) = [delta for delta in link.sent if delta.finish_reason is not None]
    assert end.request_id == "short" and end.text and engine.stats().integrity_error is None
