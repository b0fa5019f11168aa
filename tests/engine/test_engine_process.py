"""The engine process over its socket: start, errors, loading beside decoding, heartbeats, leaving with the server."""

import contextlib
import ctypes
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import msgspec
import pytest
from engine_fixture import request, text
from lookahead_adapters import make_lookahead_adapter
from peft_adapters import make_peft_adapter
from pooling_adapters import make_pooling_adapter
from tiny_models import make_tiny_model
from waiting import wait_until

from specserve import frames
from specserve.adapter_files import content_hash
from specserve.adapter_messages import AdapterLoaded, AdaptersLeft, LoadAdapter, UnloadAdapter
from specserve.compute.interrupt import StepInterrupt
from specserve.config import EngineConfig
from specserve.engine import server_link
from specserve.engine.process import EngineProcess
from specserve.engine.server_link import ServerLink
from specserve.frames import encode_frame, from_engine_decoder, read_frame
from specserve.grammar.compiler import COMPILE_TIMEOUT_S
from specserve.messages import (
    BACKGROUND_PRIORITY,
    Abort,
    CallDone,
    CallFailed,
    Delta,
    EngineInfo,
    GetStats,
    GrammarSpec,
    Heartbeat,
    RequestFailed,
    Shutdown,
)
from specserve.pooling_messages import Pooled
from specserve.stats_messages import Stats


def receive(sock):
    """The messages of the next frame."""
    return from_engine_decoder.decode(read_frame(sock))


def test_messages_of_one_time_are_one_frame_unless_it_were_too_large(monkeypatch):
    ours, theirs = socket.socketpair()
    deltas = [Delta(str(idx), [idx], "text" * 25) for idx in range(5)]
    ServerLink(theirs).send(deltas)
    assert receive(ours) == deltas
    monkeypatch.setattr(frames, "MAX_FRAME_BYTES", 300)
    ServerLink(theirs).send(deltas)
    received = [receive(ours) for _ in range(3)]
    assert sum(received, []) == deltas and len(received[0]) == 2
    ours.close()
    theirs.close()


def test_grammar_that_takes_too_long_fails_its_request_and_names_the_limit(monkeypatch):
    never: Future = Future()
    ours, theirs = socket.socketpair()
    added = []
    engine = SimpleNamespace(
        adapters=None,
        grammars=SimpleNamespace(submit=lambda spec: never, began=None),
        add_request=lambda *args: added.append(args),
        abort=lambda request_id: None,
        path=SimpleNamespace(interrupt=StepInterrupt()),
    )
    process = EngineProcess(engine, ServerLink(theirs))
    slow = msgspec.structs.replace(request("slow", [1]), grammar=GrammarSpec("regex", "a"))
    process._handle(slow)
    process._handle(msgspec.structs.replace(slow, request_id="left"))
    process._handle(Abort("left"))
    process._compiling.give_up()
    assert set(process._compiling._waiting) == {"slow"}
    later = time.monotonic() + COMPILE_TIMEOUT_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    for began in (None, later - COMPILE_TIMEOUT_S / 2):  # the vocabulary is being indexed, or was until just now
        engine.grammars.began = began
        process._compiling.give_up()
        assert set(process._compiling._waiting) == {"slow"}
    engine.grammars.began = 0.0
    process._compiling.give_up()
    (failed,) = receive(ours)
    assert isinstance(failed, RequestFailed) and failed.request_id == "slow" and failed.error.status == 400
    assert f"{COMPILE_TIMEOUT_S:g} s" in failed.error.message
    engine.path.interrupt.is_heeded = True
    asked = ctypes.c_int32.from_address(engine.path.interrupt.address)
    for priority in (BACKGROUND_PRIORITY, 0):  # a request that comes ends a step of rows of batches, and no row does
        assert not asked.value
        process._link.has_come(msgspec.structs.replace(slow, priority=priority))
    assert asked.value
    process._drain_inbox(0)
    assert not asked.value
    never.set_result(object())  # too late for both
    assert asked.value
    process._drain_inbox(0)
    assert not added
    ours.close()
    theirs.close()


def test_heartbeat_comes_while_the_loop_is_held_up_and_waiting_for_the_server_is_no_part_of_a_turn(monkeypatch):
    monkeypatch.setattr(server_link, "HEARTBEAT_S", 0.05)
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    left = threading.Event()
    link = ServerLink(theirs, leave=lambda status: left.set())
    link.start_heartbeat(lambda: server_link.NewestStep(7, 0.25))
    beats = [receive(ours)[0] for _ in range(6)]  # of one turn: nothing begins another
    while beats[-1].turn_s < 0.15:  # time without a core is not counted
        beats.append(receive(ours)[0])
    assert all(beat == Heartbeat(beat.turn_s, 7, 0.25) for beat in beats)
    assert [beat.turn_s for beat in beats] == sorted(beat.turn_s for beat in beats)
    begun = time.monotonic()
    while receive(ours)[0].turn_s >= beats[-1].turn_s:  # some may be on their way
        begun = time.monotonic()
        link.begin_turn()
    # The server takes nothing: the loop waits in the middle of a frame, and no heartbeat may cut in, wait, or blame it.
    delta = Delta("a", [], "x" * 2**21)
    loop = threading.Thread(target=link.send, args=([delta],), daemon=True)
    loop.start()
    time.sleep(0.5)
    assert loop.is_alive()
    kinds = []
    while not kinds or kinds[-1] != delta:
        kinds += receive(ours)
    turn_s = receive(ours)[0].turn_s
    assert turn_s < time.monotonic() - begun - 0.25  # without the wait of 0.5 s, less what it took to begin
    loop.join()
    # And with the socket full to the brim the heartbeat passes over its turn.
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(b"x" * 1024)
    theirs.setblocking(True)
    time.sleep(0.2)
    wait_until(lambda: not link._sending.locked())
    assert not left.is_set()
    ours.close()
    assert left.wait(60)


class Peer:
    """The server's end of an engine process, which keeps what nobody has asked for yet."""

    def __init__(self, config):
        self.sock, theirs = socket.socketpair()
        self.received: list = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "specserve.engine.process", "--fd", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        self.sock.settimeout(300)
        self.send(config)

    def send(self, message):
        self.sock.sendall(encode_frame(message))

    def receive(self, kind, match=lambda message: True):
        num_seen = 0
        while True:
            for idx in range(num_seen, len(self.received)):
                if isinstance(self.received[idx], kind) and match(self.received[idx]):
                    return self.received.pop(idx)
            num_seen = len(self.received)
            payload = read_frame(self.sock)
            assert payload is not None, "the engine process went away"
            self.received += from_engine_decoder.decode(payload)

    def answer(self, call_id):
        return self.receive((AdapterLoaded, CallDone, CallFailed, Stats), lambda answer: answer.call_id == call_id)

    def close(self):
        self.sock.close()
        return self.process.wait(timeout=60)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def config(model_dir):
    return EngineConfig(model=str(model_dir), dtype="fp32", kv_cache_gib=0.02, num_threads=1)


@pytest.fixture(scope="module")
def peer(config):
    peer = Peer(config)
    info = peer.receive(EngineInfo)
    assert info.pid == peer.process.pid and info.vocab_size == 320
    yield peer
    peer.close()


def finish(peer, request_id):
    tokens = []
    while True:
        delta = peer.receive((Delta, RequestFailed), lambda m: m.request_id == request_id)
        assert isinstance(delta, Delta), delta
        tokens += delta.token_ids
        if delta.finish_reason:
            return tokens


def test_adapter_loads_and_serves_while_another_request_decodes(peer, model_dir, tmp_path):
    path = make_peft_adapter(model_dir, tmp_path / "a", r=4, std=0.3)
    peer.send(request("long", [1, 2, 3], max_tokens=400, ignore_eos=True, mode="off"))
    first = peer.receive(Delta, lambda m: m.request_id == "long")
    peer.send(LoadAdapter(1, "a", str(path)))
    loaded = peer.answer(1)
    adapter = loaded.adapter
    assert adapter.max_rank == 4 and "q_proj" in adapter.target_modules
    peer.send(request("short", [1, 2, 3], adapter=adapter.content_hash, max_tokens=3, ignore_eos=True))
    assert len(finish(peer, "short")) == 3
    assert len(first.token_ids) + len(finish(peer, "long")) <= 400
    peer.send(LoadAdapter(2, "a", str(path), adapter.content_hash, adapter.size_bytes))
    again = peer.answer(2)
    assert again.adapter == adapter and again.placement > loaded.placement
    peer.send(UnloadAdapter(3, adapter.content_hash, loaded.placement))  # it was sent before that answer came
    assert isinstance(peer.answer(3), CallDone)
    peer.send(UnloadAdapter(4, adapter.content_hash, again.placement))
    assert peer.receive(AdaptersLeft).placements == {adapter.content_hash: again.placement}
    assert isinstance(peer.answer(4), CallDone)


def test_an_adapter_that_is_rewritten_and_truncated_while_it_is_read_fails_alone(peer, model_dir, tmp_path):
    path = make_lookahead_adapter(model_dir, tmp_path / "moving", state_size=64, vocab_size=300)
    names = ("adapter_model.safetensors", "lookahead.safetensors", "lookahead_history.bin")
    texts = {name: (path / name).read_bytes() for name in names}
    stop = threading.Event()

    def rewrite():
        while not stop.is_set():
            for name, data in texts.items():
                with open(path / name, "r+b") as file:
                    file.truncate(len(data) // 3)
                    file.write(data)

    thread = threading.Thread(target=rewrite)
    thread.start()
    try:
        for idx in range(20):
            peer.send(LoadAdapter(100 + idx, "moving", str(path)))
        for idx in range(20):
            reply = peer.answer(100 + idx)
            assert isinstance(reply, AdapterLoaded) or reply.error.status in (400, 409), reply
    finally:
        stop.set()
        thread.join()
    peer.send(LoadAdapter(120, "moving", str(path)))
    assert peer.answer(120).adapter.content_hash == content_hash(path)


def test_bad_adapter_and_bad_request_are_answered_and_the_engine_goes_on(peer, tmp_path):
    peer.send(LoadAdapter(3, "missing", str(tmp_path / "missing")))
    failed = peer.answer(3)
    assert isinstance(failed, CallFailed) and failed.error.code == "invalid_adapter"
    peer.send(request("bad", [10**6]))
    assert peer.receive(RequestFailed, lambda m: m.request_id == "bad").error.param == "prompt"
    peer.send(request("good", [1], max_tokens=2, ignore_eos=True))
    assert len(finish(peer, "good")) == 2


def test_texts_are_pooled_beside_a_request_that_decodes(peer, model_dir, tmp_path):
    peer.send(LoadAdapter(5, "classifier", str(make_pooling_adapter(model_dir, tmp_path, "SEQ_CLS", num_labels=3))))
    adapter = peer.answer(5).adapter
    assert adapter.adapter_type == "classify" and adapter.pooling.num_outputs == 3
    peer.send(request("decodes", [1, 2, 3], max_tokens=400, ignore_eos=True, mode="off"))
    peer.receive(Delta, lambda m: m.request_id == "decodes")
    peer.send(text("base", [4, 5, 6]))
    peer.send(text("scores", [4, 5, 6], "score", adapter=adapter.content_hash))
    peer.send(text("wrong", [4, 5, 6], adapter=adapter.content_hash))
    answers = {}
    while len(answers) < 3:
        answer = peer.receive((Pooled, RequestFailed))
        answers[answer.request_id] = answer
    assert (answers["base"].num_values, answers["scores"].num_values) == (64, 3)
    assert len(answers["scores"].values) == 12 and answers["scores"].prompt_tokens == 3
    assert answers["wrong"].error.code == "wrong_adapter_type"
    peer.send(Abort("decodes"))


def test_abort_frees_everything_within_a_step(peer):
    peer.send(request("a", [1, 2, 3], max_tokens=450, ignore_eos=True, mode="off"))
    peer.receive(Delta, lambda m: m.request_id == "a")
    peer.send(Abort("a"))
    peer.send(GetStats(4))
    stats = peer.answer(4).stats
    assert stats.num_running == 0 and stats.num_free_kv_blocks == stats.num_kv_blocks
    assert stats.integrity_error is None


def test_heartbeats_come_while_idle(peer):
    peer.received.clear()
    for _ in range(2):
        peer.receive(Heartbeat)


def test_process_leaves_when_the_server_goes_away_in_the_middle_of_a_request(config):
    peer = Peer(config)
    peer.receive(EngineInfo)
    peer.send(request("a", [1, 2, 3], max_tokens=450, ignore_eos=True, mode="off"))
    peer.receive(Delta)
    assert peer.close() == 0


def test_shutdown_leaves_with_zero(config):
    peer = Peer(config)
    peer.receive(EngineInfo)
    peer.send(Shutdown())
    assert peer.process.wait(timeout=60) == 0
    peer.close()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        pytest.param({"model": "/nonexistent"}, "config.json", marks=pytest.mark.slow),
        pytest.param({"kv_cache_gib": 1e-9}, "kv_cache_gib", marks=pytest.mark.slow),
        ({"max_model_len": 10**6}, "max_model_len"),
    ],
    ids=str,
)
def test_unservable_settings_are_reported_in_one_sentence(config, change, word):
    peer = Peer(msgspec.structs.replace(config, **change))
    failed = peer.receive(CallFailed)
    assert failed.call_id == -1 and word in failed.error.message and "\n" not in failed.error.message
    assert peer.process.wait(timeout=60) == 1
    peer.close()
