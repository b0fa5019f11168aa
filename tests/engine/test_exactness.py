"""Tokens with drafts equal tokens without, all of them: every sampler, any drafter, mixed adapters, ragged lengths."""

import random

import pytest
from engine_fixture import make_engine, request, run, tokens_of
from oracle_drafter import SAMPLERS, Oracle
from peft_adapters import make_peft_adapter
from tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def setup(model_dir, tmp_path_factory):
    engine = make_engine(model_dir)
    root = tmp_path_factory.mktemp("adapters")
    shapes = [{"r": 4}, {"r": 1, "target_modules": ["q_proj", "down_proj"]}, {"r": 16, "lora_alpha": 64}]
    adapters = [None] + [
        engine.load_adapter(str(i), make_peft_adapter(model_dir, root / str(i), seed=i, std=0.3, **shape)).content_hash
        for i, shape in enumerate(shapes)
    ]
    return engine, adapters


def requests_for(engine, adapters, sampler, mode):
    rng = random.Random(3)
    requests = []
    for i in range(8):
        period = [rng.randrange(engine.info.vocab_size) for _ in range(rng.randrange(2, 6))]
        noise = [rng.randrange(engine.info.vocab_size) for _ in range(rng.randrange(1, 30))]
        requests.append(
            request(
                i,
                noise + period * 4,
                adapter=adapters[i % len(adapters)],
                mode=mode,
                max_tokens=rng.randrange(20, 48),
                ignore_eos=i % 2 == 0,
                seed=i,
                **SAMPLERS[sampler],
            )
        )
    return requests


@pytest.fixture(scope="module", params=list(SAMPLERS))
def plain(request, setup):
    """Tokens without any draft."""
    engine, adapters = setup
    results = run(engine, requests_for(engine, adapters, request.param, "off"))
    assert all(result.usage.draft_tokens == 0 for result in results.values())
    return request.param, tokens_of(results)


@pytest.mark.parametrize("mode", ["fixed", "ngram", "auto"])
def test_ngram_drafts_change_no_token(setup, plain, mode):
    engine, adapters = setup
    sampler, want = plain
    results = run(engine, requests_for(engine, adapters, sampler, mode), stagger=2)
    assert tokens_of(results) == want
    if mode == "fixed":  # the other modes draft when it pays, which is a matter of the clock
        assert sum(result.usage.draft_tokens for result in results.values()) > 0


@pytest.mark.parametrize("kind", ["always right", "always wrong", "mostly right", "random"])
def test_adversarial_drafters_change_no_token(setup, plain, kind, monkeypatch):
    engine, adapters = setup
    sampler, want = plain
    vocab_size = engine.info.vocab_size
    monkeypatch.setattr(
        engine.proposer.sources,
        "of",
        lambda req: [Oracle(len(req.prompt_token_ids), want[req.request_id], kind, vocab_size, req.request_id)],
    )
    results = run(engine, requests_for(engine, adapters, sampler, "fixed"), stagger=1)
    assert tokens_of(results) == want
    usages = [result.usage for result in results.values()]
    drafted, accepted = sum(u.draft_tokens for u in usages), sum(u.accepted_draft_tokens for u in usages)
    assert drafted > 0
    if kind == "always right":
        assert accepted == drafted
        assert sum(u.num_forwards for u in usages) < 0.5 * sum(u.completion_tokens for u in usages)
    if kind == "always wrong":
        assert accepted == 0


@pytest.mark.parametrize("spoil", [False, True])
def test_prediction_changes_no_token_and_is_accounted(setup, plain, spoil):
    engine, adapters = setup
    sampler, want = plain
    requests = []
    for item in requests_for(engine, adapters, sampler, "fixed"):
        prediction = list(want[item.request_id])
        if spoil:
            prediction[3:5] = [0, 1, 2]
        kwargs = {name: getattr(item, name) for name in item.__struct_fields__}
        requests.append(type(item)(**{**kwargs, "prediction_token_ids": prediction}))
    results = run(engine, requests)
    assert tokens_of(results) == want
    for result in results.values():
        usage = result.usage
        assert usage.accepted_prediction_tokens == usage.accepted_by_source.get("prediction", 0)
        assert usage.accepted_draft_tokens <= usage.draft_tokens
    assert sum(result.usage.accepted_prediction_tokens for result in results.values()) > 20


def test_text_and_logprobs_are_equal_too(setup):
    engine, _ = setup
    prompt = [9, 8, 7, 9, 8, 7, 9, 8]
    off, on = (
        run(engine, [request("a", prompt, mode=mode, max_tokens=40, logprobs=3, ignore_eos=True)])["a"]
        for mode in ("off", "fixed")
    )
    assert (off.tokens, off.text) == (on.tokens, on.text)
    assert len(off.logprobs) == len(on.logprobs) == 40
    for a, b in zip(off.logprobs, on.logprobs, strict=True):
        assert a.logprob == pytest.approx(b.logprob, abs=1e-4) and a.rank == b.rank


def test_drafter_that_raises_mid_run_changes_nothing(setup, plain, monkeypatch):
    engine, adapters = setup
    sampler, want = plain

    class Broken(Oracle):
        def begin(self, tokens):
            if len(tokens) > self.prompt_len + 5:
                raise RuntimeError("drafter bug")
            super().begin(tokens)

    monkeypatch.setattr(
        engine.proposer.sources,
        "of",
        lambda req: [Broken(len(req.prompt_token_ids), want[req.request_id], "random", engine.info.vocab_size, 0)],
    )
    assert tokens_of(run(engine, requests_for(engine, adapters, sampler, "fixed"))) == want
