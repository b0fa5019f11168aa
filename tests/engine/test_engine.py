"""The engine on a tiny model: batching, caching, preemption, cancellation, stops, and isolation of faults."""

import random
import threading
import time

import msgspec
import pytest
import torch
from engine_fixture import check_baseline, collect, make_engine, request, run, text, tokens_of
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model

from specserve.compute.loader import make_path
from specserve.config import EngineConfig
from specserve.drafters.protocol import Guess
from specserve.drafting import cost_checks
from specserve.drafting.cost_model import MEASURED_ROWS, MEASURED_SHAPES, MeasuredCosts
from specserve.engine.engine import Engine
from specserve.errors import DeadlineError, OverloadedError, UserError
from specserve.messages import BACKGROUND_PRIORITY, GrammarSpec, Together


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model_dir):
    return make_engine(model_dir)


@pytest.fixture(scope="module")
def adapter(engine, model_dir, tmp_path_factory):
    path = make_peft_adapter(model_dir, tmp_path_factory.mktemp("adapters") / "a", r=4, seed=1, std=0.3)
    return engine.load_adapter("a", path).content_hash


def prompts(num, vocab_size, seed=0, longest=60, shortest=1):
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randrange(shortest, longest))] for _ in range(num)]


def test_mixed_batch_gives_the_tokens_of_each_request_alone(engine, adapter):
    texts = prompts(10, engine.info.vocab_size)
    requests = [
        request(i, p, adapter=adapter if i % 3 == 1 else None, ignore_eos=True, salt=f"m{i}")
        for i, p in enumerate(texts)
    ]
    mixed = tokens_of(run(engine, requests, stagger=1))
    for item in requests:
        alone = tokens_of(run(engine, [item]))
        assert alone[item.request_id] == mixed[item.request_id]


def test_prefix_cache_changes_no_token_and_is_counted(engine):
    prompt = prompts(1, engine.info.vocab_size, seed=5, longest=60)[0] * 3
    prompt = (prompt * 50)[:100]
    first = run(engine, [request("a", prompt, salt="pc", ignore_eos=True)])["a"]
    second = run(engine, [request("b", prompt, salt="pc", ignore_eos=True)])["b"]
    other = run(engine, [request("c", prompt, salt="other", ignore_eos=True)])["c"]
    assert first.tokens == second.tokens == other.tokens
    assert first.usage.cached_tokens == 0 and other.usage.cached_tokens == 0
    assert second.usage.cached_tokens == 96


def test_adapter_and_base_share_no_cache(engine, adapter):
    prompt = [(7 * i) % engine.info.vocab_size for i in range(70)]
    base = run(engine, [request("a", prompt, ignore_eos=True)])["a"]
    with_adapter = run(engine, [request("b", prompt, adapter=adapter, ignore_eos=True)])["b"]
    assert with_adapter.usage.cached_tokens == 0
    assert base.tokens != with_adapter.tokens


def test_preemption_loses_nothing(model_dir):
    roomy = make_engine(model_dir)
    texts = prompts(6, roomy.info.vocab_size, seed=2, longest=30)
    requests = [
        request(i, p, max_tokens=40, ignore_eos=True, temperature=t, seed=i)
        for i, (p, t) in enumerate(zip(texts, [0.0, 1.0] * 3, strict=True))
    ]
    want = tokens_of(run(roomy, requests))
    model = roomy.decoder.config
    token_bytes = 2 * model.num_layers * model.num_kv_heads * model.head_dim * 4
    tight = make_engine(model_dir, kv_cache_gib=9 * 16 * token_bytes / 2**30, max_model_len=100)
    assert tight.blocks.num_blocks == 9
    assert tokens_of(run(tight, requests)) == want
    assert tight.stats().num_preemptions > 0


def test_prompts_are_scored_whole_though_a_preemption_cuts_them_elsewhere(engine, model_dir):
    """A prompt that begins anew is read in other chunks, which may hold rows that were scored before and new ones."""
    scored = [
        request(i, p, max_tokens=2, prompt_logprobs=1)
        for i, p in enumerate(prompts(3, engine.info.vocab_size, seed=4, shortest=70, longest=80))
    ]
    want = run(engine, scored)
    block_bytes = 16 * 2 * 2 * 2 * 16 * 4
    settings = {"kv_cache_gib": 8 * block_bytes / 2**30, "max_model_len": 96, "max_prefill_rows": 7, "max_num_seqs": 4}
    tight = make_engine(model_dir, **settings)
    decodes = [request(f"decode {i}", [i + 5] * 10, max_tokens=40, ignore_eos=True) for i in range(2)]
    mixed = run(tight, [*decodes, *scored], stagger=1)
    assert tight.stats().num_preemptions > 0
    for one in scored:
        known, found = want[one.request_id].prompt_logprobs, mixed[one.request_id].prompt_logprobs
        assert len(found) == len(one.prompt_token_ids) and found[0] is None
        assert [each.logprob for each in found[1:]] == pytest.approx([each.logprob for each in known[1:]], abs=1e-4)


def test_abort_frees_blocks_at_once(engine, adapter):
    before = engine.stats()
    for i in range(3):
        engine.add_request(request(i, [1, 2, 3] * 10, adapter=adapter, max_tokens=50, ignore_eos=True))
    engine.step()
    assert engine.stats().num_free_kv_blocks < before.num_free_kv_blocks
    for i in range(3):
        engine.abort(str(i))
    engine.abort("unknown")
    check_baseline(engine)
    assert not engine.has_work()


def test_stop_token_eos_and_length(engine):
    prompt = [5, 6, 7]
    full = run(engine, [request("a", prompt, max_tokens=12, ignore_eos=True)])["a"]
    assert full.finish_reason == "length" and len(full.tokens) == 12
    stop = full.tokens[4]
    first = full.tokens.index(stop)
    cut = run(engine, [request("b", prompt, max_tokens=12, ignore_eos=True, stop_token_ids=(stop,))])["b"]
    assert cut.tokens == full.tokens[: first + 1]
    assert cut.finish_reason == "stop" and cut.stop_reason == stop
    assert cut.usage.completion_tokens == first + 1


def test_an_end_that_the_model_cannot_draw_is_none(model_dir, tmp_path, caplog):
    """As in a generation_config.json that was made for another model; a mask with it would be out of bounds."""
    for file in model_dir.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "generation_config.json").unlink()
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [319, 320, 99999]}')
    engine = make_engine(tmp_path)
    assert engine.info.eos_token_ids == [319] and "eos_token_id [320, 99999]: the model has 320 tokens" in caplog.text
    choice = GrammarSpec("choice", '["yes", "no"]')
    forced = msgspec.structs.replace(request("choice", [1, 2]), grammar=choice)
    results = run(engine, [request("least", [1, 2], min_tokens=3, max_tokens=4), forced])
    assert len(tokens_of(results)["least"]) >= 3 and results["choice"].text in ("yes", "no")


def test_stop_string_ends_the_text_before_it_with_and_without_drafts(engine):
    prompt = [5, 6, 7, 8]
    full = run(engine, [request("a", prompt, max_tokens=20, ignore_eos=True)])["a"]
    middle = len(full.text) // 2
    stop = full.text[middle : middle + 3]
    assert len(stop) == 3
    for mode in ("off", "fixed"):
        cut = run(engine, [request("b", prompt, max_tokens=20, ignore_eos=True, stop=(stop,), mode=mode)])["b"]
        assert cut.text == full.text[: full.text.index(stop)]
        assert cut.finish_reason == "stop" and cut.stop_reason == stop
    kept = run(
        engine, [request("c", prompt, max_tokens=20, ignore_eos=True, stop=(stop,), include_stop_str_in_output=True)]
    )["c"]
    assert kept.text == full.text[: full.text.index(stop) + 3]


def test_prompt_logprobs_equal_the_model_and_max_tokens_zero_only_scores(engine):
    prompt = prompts(1, engine.info.vocab_size, seed=9, longest=59)[0] * 4
    prompt = (prompt * 20)[:90]
    result = run(engine, [request("a", prompt, max_tokens=0, prompt_logprobs=2)])["a"]
    assert result.tokens == [] and result.finish_reason == "length"
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == 90
    short = run(engine, [request("b", prompt[:40], max_tokens=1, logprobs=0)])["b"]
    again = run(engine, [request("c", [*prompt[:40], short.tokens[0]], max_tokens=0, prompt_logprobs=0)])["c"]
    assert again.prompt_logprobs[-1].logprob == pytest.approx(short.logprobs[0].logprob, abs=1e-4)
    assert again.prompt_logprobs[5].logprob == pytest.approx(result.prompt_logprobs[5].logprob, abs=1e-4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"prompt": []}, "empty"),
        ({"prompt": [1, -1]}, "-1"),
        ({"prompt": [2**31]}, "outside"),
        ({"logit_bias": {10**9: 1.0}}, "logit_bias"),
        ({"stop_token_ids": (-5,)}, "stop_token_ids"),
        ({"max_tokens": 10**9}, "context"),
        ({"adapter": "0" * 64}, "not loaded"),
    ],
    ids=str,
)
def test_requests_that_can_never_run_are_refused(engine, change, word):
    change = dict(change)
    with pytest.raises(UserError, match=word):
        engine.add_request(request("x", change.pop("prompt", [1]), **change))
    check_baseline(engine)


def test_waiting_queue_is_bounded(model_dir):
    small = make_engine(model_dir, max_waiting=2, max_num_seqs=1)
    for i in range(3):
        small.add_request(request(i, [1]))
    with pytest.raises(OverloadedError):
        small.add_request(request("x", [1]))


def test_all_sequences_of_an_answer_are_admitted_or_refused(model_dir):
    small = make_engine(model_dir, max_waiting=0, max_num_seqs=1)
    admitted, refused = (
        [
            msgspec.structs.replace(request(f"{name}{idx}", [1]), together=Together(name, 3, 3), is_first=idx == 0)
            for idx in range(3)
        ]
        for name in "ab"
    )
    small.add_request(admitted[0])
    with pytest.raises(OverloadedError, match="this one has 3 sequences"):
        small.add_request(refused[0])
    for sequence in admitted[1:]:
        small.add_request(sequence)
    for sequence in admitted:
        small.abort(sequence.request_id)
    assert not small.has_work()
    with pytest.raises(OverloadedError, match="this one has 3 sequences"):
        small.add_request(refused[1])
    check_baseline(small)


def test_a_request_that_is_late_before_it_runs_is_answered_and_not_run(model_dir):
    small = make_engine(model_dir, max_num_seqs=1)
    now = 100.0
    small.scheduler.clock = lambda: now
    small.add_request(request("runs", [1, 2], ignore_eos=True))
    small.step()
    late = msgspec.structs.replace(request("late", [1, 2], max_tokens=1), deadline=105.0)
    small.add_request(late)
    assert small.requests.drop_late() == []
    now = 105.0
    (failed,) = small.requests.drop_late()
    assert (failed.request_id, failed.error.status, failed.error.code) == ("late", 504, "deadline_exceeded")
    with pytest.raises(DeadlineError):
        small.add_request(late)
    cannot = msgspec.structs.replace(late, request_id="cannot", deadline=105.0 + 1e-6)
    with pytest.raises(OverloadedError, match="deadline_ms leaves") as error:
        small.add_request(cannot)
    assert error.value.retry_after_s is not None
    while small.has_work():
        small.step()
    check_baseline(small)


def test_a_request_that_raises_in_the_forward_fails_alone(engine, monkeypatch):
    want = tokens_of(run(engine, [request("good", [1, 2, 3], ignore_eos=True)]))
    step = engine.decoder.step

    def poisoned(batch, *args):
        if 11 in batch.token_ids:
            raise RuntimeError("poisoned row")
        return step(batch, *args)

    monkeypatch.setattr(engine.decoder, "step", poisoned)
    results = run(
        engine, [request("good", [1, 2, 3], ignore_eos=True, mode="off"), request("bad", [1, 11, 3], mode="off")]
    )
    assert results["good"].tokens == want["good"]
    assert results["bad"].error is not None and "poisoned row" in results["bad"].error.error.message


def test_nan_logits_fail_that_request_alone(engine, monkeypatch):
    step = engine.decoder.step

    def poisoned(*args):
        hidden, logits = step(*args)
        logits = logits.clone()  # the path may have looked at those that it made
        logits[0] = float("nan")
        return hidden, logits

    monkeypatch.setattr(engine.decoder, "step", poisoned)
    results = run(engine, [request("bad", [1, 2]), request("good", [1, 2, 3])])
    assert sum(result.error is not None for result in results.values()) >= 1
    assert all(result.error is None or "NaN" in result.error.error.message for result in results.values())


def test_a_path_is_made_for_as_many_rows_as_the_scheduler_gives_a_step(model_dir):
    limits = []

    def watched(decoder, inputs):
        limits.append(inputs.limits)
        return make_path(decoder, inputs)

    settings = {"device": "cpu", "kv_cache_gib": 0.02, "max_num_seqs": 200, "max_batched_tokens": 16}
    engine = Engine(EngineConfig(model=str(model_dir), **settings), model_dir, watched)
    assert limits[0].max_rows >= engine.scheduler.max_batched_tokens == 200


def test_unloading_waits_for_the_requests_that_use_the_adapter(engine, model_dir, tmp_path):
    path = make_peft_adapter(model_dir, tmp_path / "b", r=3, seed=2, std=0.3)
    content_hash = engine.load_adapter("b", path).content_hash
    want = tokens_of(run(engine, [request("a", [4, 5, 6], adapter=content_hash, ignore_eos=True)]))
    engine.add_request(request("a", [4, 5, 6], adapter=content_hash, ignore_eos=True))
    results = {}
    collect(results, engine.step())
    engine.adapters.unload(content_hash)
    with pytest.raises(UserError, match="not loaded"):
        engine.add_request(request("late", [4], adapter=content_hash))
    while engine.has_work():
        collect(results, engine.step())
    assert tokens_of(results) == want
    assert content_hash not in engine.registry.adapters
    check_baseline(engine)


def test_idle_adapters_make_room_and_busy_ones_do_not(model_dir, tmp_path):
    small = make_engine(model_dir, max_adapters=2)
    hashes = [
        small.load_adapter(str(i), make_peft_adapter(model_dir, tmp_path / str(i), r=2, seed=i)).content_hash
        for i in range(3)
    ]
    assert list(small.registry.adapters) == hashes[1:]
    for i, content_hash in enumerate(hashes[1:]):
        small.add_request(request(i, [1, 2], adapter=content_hash))
    with pytest.raises(OverloadedError):
        small.load_adapter("x", tmp_path / "0")
    while small.has_work():
        small.step()
    check_baseline(small)


def test_rows_of_a_batch_leave_with_their_adapter_where_a_request_needs_its_place(model_dir, tmp_path):
    small = make_engine(model_dir, max_adapters=2)
    paths = [make_peft_adapter(model_dir, tmp_path / f"{idx}", r=2, seed=idx) for idx in range(3)]
    row, busy = (small.load_adapter(path.name, path).content_hash for path in paths[:2])
    for idx in range(2):
        sent = request(f"row {idx}", [1, 2, idx], adapter=row, ignore_eos=True)
        small.add_request(msgspec.structs.replace(sent, priority=BACKGROUND_PRIORITY))
    small.add_request(request("busy", [1, 2], adapter=busy, ignore_eos=True))
    results = {}
    collect(results, small.step())
    assert small.requests.drop_displaced() == []
    room = small.registry.ask(1)
    small.registry.grant()
    failed = small.requests.drop_displaced()
    assert {(one.request_id, one.error.status) for one in failed} == {("row 0", 503), ("row 1", 503)}
    small.registry.grant()
    assert room.is_granted and list(small.registry.adapters) == [busy]
    small.registry.give_back(room)
    while small.has_work():
        collect(results, small.step())
    assert len(results["busy"].tokens) == 16
    check_baseline(small)


def rows(num):
    sent = [request(f"row {idx}", [1, 2, 3 + idx] * 9, ignore_eos=True) for idx in range(num)]
    sent += [text(f"text {idx}", [5 + idx] * 40) for idx in range(num)]
    return [msgspec.structs.replace(one, priority=BACKGROUND_PRIORITY) for one in sent]


def outputs(results):
    return {name: one.tokens if one.pooled is None else one.pooled.values for name, one in results.items()}


@pytest.mark.parametrize("is_busy", [False, True])
def test_spare_steps_find_costs_that_no_longer_hold_and_change_nothing_else(model_dir, tmp_path, monkeypatch, is_busy):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cost_checks, "FIRST_S", 0.0)
    monkeypatch.setattr(cost_checks, "MOST_S", 0.0)
    config = EngineConfig(model=str(model_dir), device="cpu", dtype="fp32", kernels="native", kv_cache_gib=0.02)
    engine = Engine(config, model_dir, keeps_costs=True)
    table, (file,) = engine.proposer.cost_model, (tmp_path / "specserve" / "step_costs").iterdir()
    asked = [request(name, range(3, 60), ignore_eos=True) for name in "ab"]
    want = tokens_of(run(engine, asked[:1]))["a"]
    num_free, kept = engine.blocks.num_free, file.read_bytes()
    tilted = {rows: 1e-6 * rows**2 for rows in MEASURED_ROWS}
    table.replace(MeasuredCosts(tilted, 0.0, 0.0, 0.0))
    engine.path.interrupt.ask()
    if not is_busy:
        for _ in range(20):
            engine.take_idle_turn()
        assert table.seconds(64) == pytest.approx(tilted[64]), "a request had come each time"
        engine.path.interrupt.clear()
    results = {}
    if is_busy:
        engine.add_request(asked[1])
        collect(results, engine.step())
    for idx in range(6 + 5 * len(MEASURED_SHAPES) + 3):
        engine.measure_load() if is_busy else engine.take_idle_turn()
        if idx % 10 == 5 and is_busy:  # its prompt, and tokens in between
            collect(results, engine.step())
    assert table.seconds(64) / table.seconds(1) < 200 and file.read_bytes() != kept
    assert not engine.path.interrupt.is_heeded
    results |= run(engine, asked[1:]) if not is_busy else {}
    while engine.has_work():
        collect(results, engine.step())
    assert results["b"].tokens == want and engine.blocks.num_free == num_free
    check_baseline(engine)


def test_a_step_of_rows_of_batches_ends_when_a_request_has_come_and_is_done_again_later(model_dir):
    engine = make_engine(model_dir, kernels="native")
    want = outputs(run(engine, rows(3)))
    interrupt, was_asked, ended = engine.path.interrupt, 0, False

    def ask():  # at any moment of a step
        while not ended:
            time.sleep(random.random() * 0.003)
            interrupt.ask()

    asking = threading.Thread(target=ask)
    for attempt in range(50):  # until a step was met on its way, and one that had not begun in any case
        results = {}
        for one in rows(3):
            engine.add_request(one)
        if not attempt:
            interrupt.ask()
            assert engine.step() == [] and engine.step() == []
            asking.start()
        while engine.has_work():
            interrupt.clear()
            events = engine.step()
            was_asked += not events
            collect(results, events)
        assert outputs(results) == want
        if was_asked:
            break
    ended = True
    asking.join()
    assert was_asked
    check_baseline(engine)
    interrupt.ask()
    engine.add_request(request("somebody waits", [1, 2], ignore_eos=True))
    engine.add_request(rows(1)[0])
    assert engine.step()  # it is in it
    interrupt.clear()
    while engine.has_work():
        engine.step()


def test_fp16_and_bf16_generate(model_dir):
    for dtype in ("bf16", "fp16"):
        engine = make_engine(model_dir, dtype=dtype)
        result = run(engine, [request("a", [1, 2, 3], ignore_eos=True)])["a"]
        assert len(result.tokens) == 16
    assert torch.get_default_dtype() is torch.float32


def test_a_source_that_costs_more_than_it_brings_is_hardly_asked(model_dir, monkeypatch):
    class Slow:
        source, prior, num_asked = "slow", (0.9,), 0

        def begin(self, tokens):
            pass

        def peek(self):
            Slow.num_asked += 1
            time.sleep(0.003)
            return Guess(1, 0)

        def follow(self, token):
            pass

    engine = make_engine(model_dir)
    monkeypatch.setattr(engine.proposer.sources, "of", lambda req: [Slow()])
    result = run(engine, [request("a", [5, 6, 7], max_tokens=150, ignore_eos=True, logit_bias={1: -100.0})])["a"]
    assert result.usage.num_forwards == 150
    # Eight steps until the first verdict, up to eight guesses in each; then a probe now and then.
    assert 0 < Slow.num_asked < 100
    assert engine.stats().num_undrafted_steps > 100
    (drafts,) = engine.stats().drafts_by_adapter
    assert drafts.name is None and drafts.num_verifications == 150 and drafts.accepted_draft_tokens == 0
