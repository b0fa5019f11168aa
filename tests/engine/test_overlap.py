"""Steps that are queued before the tokens of the last one are known, on a device and a host that are late at random."""

from __future__ import annotations

import contextlib
import itertools
import random
import time
from dataclasses import dataclass

import pytest
from engine_fixture import check_baseline
from lookahead_adapters import make_lookahead_adapter
from stand_in_engine import add, make_stand_in, make_stand_in_engine
from tiny_models import make_tiny_model
from traces import check_trace

from bench.stand_in_device import DeviceClock, DeviceTimes
from specserve.engine.queued_step import QueuedStep
from specserve.messages import BACKGROUND_PRIORITY, Delta, GrammarSpec, Speculation, TokenTrace, Usage

NUM_REQUESTS = 40


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


class LateTimes(DeviceTimes):
    def layers(self, num_rows: int) -> float:
        return random.choice((1e-5, 2e-4, 2e-3))


def late(function):
    def called(*args, **kwargs):
        time.sleep(random.choice((0.0, 0.0, 1e-3)))
        return function(*args, **kwargs)

    return called


@dataclass
class Heard:
    tokens: list[int]
    text: str = ""
    finish: str | None = None
    usage: Usage | None = None
    trace: list[TokenTrace] | None = None


def expected(said: list[int], sampling: dict, eos: int) -> tuple[list[int], str]:
    whole = said * (1 + sampling["max_tokens"] // len(said))
    for idx, token in enumerate(whole[: sampling["max_tokens"]]):
        if token == eos or token in sampling["stop_token_ids"]:
            return whole[: idx + 1], "stop"
    return whole[: sampling["max_tokens"]], "length"


@pytest.fixture
def passed(monkeypatch) -> list[QueuedStep]:
    """The steps that another was queued behind before their tokens were known."""
    steps: list[QueuedStep] = []
    pass_by = QueuedStep.pass_by

    def noted(step, reports):
        steps.append(step)
        pass_by(step, reports)

    monkeypatch.setattr(QueuedStep, "pass_by", noted)
    return steps


class HostClock(DeviceClock):
    """The host takes what `host_s` is told; deterministic."""

    host_s = 0.0

    @property
    def now(self) -> float:
        return self.host_s + self.waited_s

    def standing_still(self):
        return contextlib.nullcontext()


def test_sources_that_were_switched_off_are_tried_again_while_steps_are_queued_ahead(model_dir, monkeypatch, passed):
    stand_in = make_stand_in(monkeypatch)
    stand_in.clock = HostClock(stand_in.clock.times)
    engine = make_stand_in_engine(model_dir, stand_in)
    add(engine, stand_in, "a", [70, 71, 72], sampling={"max_tokens": 120})
    switch = engine.scheduler.sequences()[0].owner.drafts.switch
    switch.is_on, switch._left, switch._load = False, 1000, 1
    while engine.has_work():
        engine.step()
    assert len(passed) >= 15 and engine.stats().drafted_by_source["ngram"] > 0


def test_drafts_are_left_out_where_they_cost_the_host_more_than_they_bring_and_taken_again_when_the_load_falls(
    model_dir, monkeypatch, passed
):
    stand_in = make_stand_in(monkeypatch)
    clock = stand_in.clock = HostClock(DeviceTimes(step_s=1.3e-3, row_s=2e-6, heads_s=0.0))
    engine = make_stand_in_engine(model_dir, stand_in, max_num_seqs=16)
    forward = engine.runner.forward

    def timed(items, adapters):
        drafts = [len(item.drafts) for item in items]
        clock.host_s += 2e-4 + 2e-5 * len(items) + (5e-4 * len(items) if any(drafts) else 0.0) + 1e-6 * sum(drafts)
        return forward(items, adapters)

    monkeypatch.setattr(engine.runner, "forward", timed)
    names = (f"r{number}" for number in itertools.count())
    random.seed(0)

    def run(num_seqs: int, num_steps: int, mode: str) -> tuple[float, float]:
        """Tokens a second, and the share of steps that were queued ahead; of a load that stays."""
        passed.clear()
        start, num_tokens = clock.now, 0
        for _ in range(num_steps):
            while len(engine.scheduler.sequences()) < num_seqs:
                name, max_tokens = next(names), random.randint(60, 100)  # not all at once
                add(engine, stand_in, name, [70, 71, 72, 73], sampling={"max_tokens": max_tokens},
                    speculation=Speculation(mode=mode, max_draft_tokens=3))  # fmt: skip
            num_tokens += sum(len(event.token_ids) for event in engine.step())
        share, seconds = len(passed) / num_steps, clock.now - start
        for seq in engine.scheduler.sequences():
            engine.abort(seq.request_id)
        while engine.has_work():
            engine.step()
        return num_tokens / seconds, share

    off, _ = run(16, 80, "off")
    run(16, 800, "auto")
    rate, share = run(16, 200, "auto")
    assert rate > 0.98 * off and share > 0.9
    off, _ = run(1, 300, "off")
    rate, share = run(1, 300, "auto")
    assert rate > 1.8 * off and share < 0.1
    rate, share = run(16, 100, "auto")
    assert share > 0.85
    check_baseline(engine)


@pytest.mark.parametrize(("seed", "in_halves"), [(1, 0.0), (5, 0.0), (2, 0.5), (3, 0.9)])
def test_every_request_says_its_own_whoever_is_late(model_dir, tmp_path, monkeypatch, passed, seed, in_halves):
    """Ends of all kinds, drafts or none, log-probabilities, stop strings, preemptions, background sequences, and
    clients that leave."""
    random.seed(seed)
    turns = random.Random(seed)
    stand_in = make_stand_in(monkeypatch)
    object.__setattr__(stand_in.clock, "times", LateTimes())
    token_bytes, num_blocks = 2 * 2 * 2 * 16 * 4, random.choice((7, 12)) if in_halves else 7
    engine = make_stand_in_engine(
        model_dir, stand_in, kv_cache_gib=num_blocks * 16 * token_bytes / 2**30, max_model_len=64
    )
    eos = min(engine.eos_token_ids)
    anything = GrammarSpec("regex", r"(?s:.*)")
    words = [token for token in range(3, 200) if engine.tokenizer.decode([token]).isascii() and token != eos]
    adapter = engine.load_adapter("a", make_lookahead_adapter(model_dir, tmp_path / "a", seed=1)).content_hash
    for owner, name in ((engine.scheduler, "schedule"), (engine.sampler, "collect"), (engine.reports, "write")):
        setattr(owner, name, late(getattr(owner, name)))
    wanted: dict[str, tuple[list[int], str]] = {}
    heard: dict[str, Heard] = {}
    left: set[str] = set()
    held: list = []

    def leave() -> None:
        if random.random() < 0.03 and (running := engine.scheduler.sequences()):
            name = random.choice(running).request_id
            engine.abort(name)
            left.add(name)

    def hear() -> None:
        engine.write_events()
        for event in held:
            assert isinstance(event, Delta), event
            one = heard.setdefault(event.request_id, Heard([]))
            assert one.finish is None, "something was said behind the end"
            one.tokens += event.token_ids
            one.text += event.text
            one.finish, one.usage = event.finish_reason, event.usage
            if event.trace is not None:
                one.trace = (one.trace or []) + event.trace
            assert (event.usage is not None) == (event.finish_reason is not None)
            if event.usage is not None:
                assert event.usage.completion_tokens == len(one.tokens)
        leave()

    def join(number: int) -> None:
        name = f"r{number}"
        said = [random.choice(words) for _ in range(random.choice((1, 3, 20)))]
        if random.random() < 0.3:
            said[random.randrange(len(said))] = eos
        is_plain = random.random() < (0.4 if in_halves else 0.85)  # else nothing is queued ahead while it runs
        sampling = {
            "max_tokens": random.choice((1, 7, 40, 40)),
            "ignore_eos": False,
            "stop_token_ids": random.choice(((), (random.choice(said),))),
            "logprobs": None if is_plain else random.choice((None, 2)),
            "temperature": random.choice((0.0, 0.7)),
            "stop": () if is_plain else random.choice(((), ("no such text",))),
        }
        add(
            engine, stand_in, name, said, sampling=sampling,
            adapter_hash=random.choice((None, adapter)),
            speculation=Speculation("off" if is_plain else random.choice(("auto", "fixed")), trace=number % 3 == 0),
            grammar=None if is_plain else random.choice((anything, None)),
            priority=turns.choice((0, 0, BACKGROUND_PRIORITY)) if seed == 5 else 0,
        )  # fmt: skip
        wanted[name] = expected(said, sampling, eos)

    num_joined = num_beside = 0
    queue_step = engine.steps.queue

    def queue(*args, beside=None, **kwargs):
        nonlocal num_beside
        step = queue_step(*args, beside=beside, **kwargs)
        num_beside += beside is not None and step is not None
        return step

    monkeypatch.setattr(engine.steps, "queue", queue)
    while num_joined < NUM_REQUESTS or engine.has_work():
        while num_joined < NUM_REQUESTS and len(engine.scheduler.sequences()) < random.randrange(9):
            join(num_joined)
            num_joined += 1
        leave()
        if turns.random() < 0.1:
            is_on = turns.random() < in_halves
            monkeypatch.setattr(engine.proposer, "in_halves", lambda num_running, is_on=is_on: is_on)
        if not engine.has_work():  # who left was the last
            hear()
            held = []
            continue
        events = engine.step(hear)
        held = events
        assert engine.stats().integrity_error is None
    hear()
    check_baseline(engine)
    assert in_halves or (len(passed) > 20 and engine.stats().num_preemptions > 0)
    assert (num_beside > 4) if in_halves else not num_beside, num_beside
    for name, (tokens, finish) in wanted.items():
        one = heard.get(name, Heard([]))
        if name in left:
            assert one.tokens == tokens[: len(one.tokens)]
        else:
            assert (one.tokens, one.finish) == (tokens, finish), name
            assert (one.trace is not None) == (int(name[1:]) % 3 == 0)
            if one.trace is not None:
                check_trace(one.trace, tokens, None, one.usage)
            spoken = [t for t in tokens if t != eos]
            if finish == "length":
                assert one.text == engine.tokenizer.decode(spoken)
