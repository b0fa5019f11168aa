"""The stand-in device: whatever drafts, the engine says what the script says, and every step is on the clock."""

import pytest
from lookahead_adapters import make_lookahead_adapter
from tiny_models import make_tiny_model

from bench.stand_in_device import DeviceTimes, Script, StandIn
from specserve.config import EngineConfig
from specserve.engine.engine import Engine
from specserve.messages import Delta, GenerateRequest, SamplingParams, Speculation


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def stand_in(monkeypatch) -> StandIn:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return StandIn(DeviceTimes(step_s=1e-4, row_s=0.0, heads_s=1e-5), Script(head_rate=0.7, vocab_size=60))


@pytest.mark.parametrize("mode", ["off", "auto", "fixed"])
def test_the_script_is_what_is_said_and_all_steps_are_on_the_clock(model_dir, stand_in, tmp_path, mode):
    config = EngineConfig(
        model=str(model_dir), device="cpu", kernels="triton", max_num_seqs=4, kv_cache_gib=0.01, max_model_len=128,
        num_threads=1,
    )  # fmt: skip
    engine = Engine(config, model_dir, stand_in.make_path)
    adapter = engine.load_adapter("a", make_lookahead_adapter(model_dir, tmp_path / "a", seed=1))
    said = {}
    for idx in range(6):
        request_id, num = f"r{idx}", 17 + 5 * idx
        stand_in.script.tokens[request_id] = said[request_id] = [(7 * idx + 3 * k) % 60 for k in range(num)]
        engine.add_request(
            GenerateRequest(
                request_id, [1, 2, 3, 4 + idx], SamplingParams(max_tokens=num, temperature=0.0, ignore_eos=True),
                adapter_hash=adapter.content_hash if idx % 2 else None, speculation=Speculation(mode=mode),
            )
        )  # fmt: skip
    heard: dict[str, list[int]] = {request_id: [] for request_id in said}
    num_sent = 0

    def send() -> None:
        nonlocal num_sent
        num_sent += 1

    while engine.has_work():
        for event in engine.step(send):
            assert isinstance(event, Delta), event
            heard[event.request_id] += event.token_ids
    assert heard == said
    stats = engine.stats()
    assert stats.integrity_error is None and stats.num_free_kv_blocks == stats.num_kv_blocks
    assert len(stand_in.clock.idle_s) == stats.num_steps - 1 and num_sent == stats.num_steps
    assert all(idle >= 0 for idle in stand_in.clock.idle_s) and stand_in.clock.waited_s > 0
    accepted = stats.accepted_by_source.get("head", 0)
    assert (accepted == 0) if mode == "off" else (0 < accepted < stats.drafted_by_source["head"])
