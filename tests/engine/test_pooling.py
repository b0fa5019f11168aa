"""Texts that are pooled: what transformers and peft make of them, the same bits whatever runs beside, nothing kept."""

import time

import numpy as np
import pytest
import torch
from adapter_edits import tensors_of
from engine_fixture import check_baseline, collect, make_engine, request, run, text, tokens_of
from peft_adapters import make_peft_adapter
from pooling_adapters import make_pooling_adapter, peft_hidden, peft_outputs
from tiny_models import make_tiny_model

from specserve.adapters.pooling_config import SCORE, PoolingConfig
from specserve.errors import UserError
from specserve.messages import Abort

CONFIGS = {
    "last": ("FEATURE_EXTRACTION", 0, None),
    "mean": ("FEATURE_EXTRACTION", 0, PoolingConfig("embed", pooling="mean", dimensions=(16, 32))),
    "weighted": ("FEATURE_EXTRACTION", 0, PoolingConfig("embed", pooling="weighted_mean", normalize=False)),
    "classify": ("SEQ_CLS", 5, None),
    "rerank": ("SEQ_CLS", 1, None),
}
TASKS = {"classify": "score", "rerank": "score"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def adapter_dirs(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    return {
        kind: make_pooling_adapter(model_dir, root / kind, task, num_labels=num, config=config, seed=seed)
        for seed, (kind, (task, num, config)) in enumerate(CONFIGS.items())
    }


def with_adapters(engine, adapter_dirs):
    """The engine and the hashes of all adapters, None for the base."""
    hashes = {kind: engine.load_adapter(kind, path).content_hash for kind, path in adapter_dirs.items()}
    return engine, {**hashes, "base": None}


@pytest.fixture(scope="module", params=["auto", "torch"])
def loaded(request, model_dir, adapter_dirs):
    return with_adapters(make_engine(model_dir, kernels=request.param), adapter_dirs)


@pytest.fixture(scope="module")
def native(model_dir, adapter_dirs):
    return with_adapters(make_engine(model_dir), adapter_dirs)


def prompt_of(seed, length):
    return np.random.default_rng(seed).integers(3, 300, size=length).tolist()


def texts(hashes, lengths=(1, 2, 17, 50), salt=""):
    """A text of each length for the base and each adapter, by a name of both."""
    found = {}
    for kind, adapter in hashes.items():
        for length in lengths:
            name = f"{kind} {length}"
            prompt = prompt_of(length, length)
            found[name] = text(name, prompt, TASKS.get(kind, "embed"), adapter=adapter, salt=salt)
    return found


def expected(model_dir, adapter_dirs, kind, prompt, dtype=torch.float32):
    """By transformers and peft."""
    if kind in TASKS:
        return peft_outputs(model_dir, adapter_dirs[kind], prompt, CONFIGS[kind][1], dtype).numpy()
    hidden = peft_hidden(model_dir, adapter_dirs.get(kind), prompt, dtype).double().numpy()
    weights = np.arange(1.0, len(hidden) + 1) if kind == "weighted" else np.ones(len(hidden))
    pooled = (weights[:, None] * hidden).sum(axis=0) / weights.sum() if kind in ("mean", "weighted") else hidden[-1]
    return pooled if kind == "weighted" else pooled / np.linalg.norm(pooled)


def test_all_kinds_in_one_batch_equal_peft(loaded, model_dir, adapter_dirs):
    engine, hashes = loaded
    asked = texts(hashes)
    beside = [request("beside", [5, 6, 7], max_tokens=12), request("too", [8, 9], max_tokens=12)]
    results = run(engine, [beside[0], *asked.values(), beside[1]], stagger=2)
    for name, own in asked.items():
        want = expected(model_dir, adapter_dirs, name.split()[0], own.prompt_token_ids)
        np.testing.assert_allclose(results[name].values, want, atol=1e-5, rtol=1e-5, err_msg=name)
    assert tokens_of({"beside": results["beside"]}) == tokens_of(run(engine, beside[:1]))
    assert engine.stats().finished["pooled"] >= len(asked)


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "granite", "gemma3", "mistral"])
def test_the_base_of_other_architectures_embeds_as_transformers_has_it(architecture, tmp_path):
    model_dir = make_tiny_model(tmp_path, architecture)
    engine = make_engine(model_dir)
    prompt = prompt_of(0, 40)
    got = run(engine, [text(pooling, prompt, pooling=pooling, normalize=False) for pooling in ("last", "mean")])
    hidden = peft_hidden(model_dir, None, prompt).numpy()
    np.testing.assert_allclose(got["last"].values, hidden[-1], atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(got["mean"].values, hidden.mean(axis=0), atol=1e-5, rtol=1e-5)


def test_in_bf16_embeddings_are_as_near_to_those_in_float32_as_pefts(model_dir, adapter_dirs):
    """Tiny weights of 1.5 times the usual deviation amplify rounding, of both."""
    engine, hashes = with_adapters(make_engine(model_dir, dtype="bf16"), adapter_dirs)
    asked = texts({kind: hashes[kind] for kind in ("last", "mean", "base")}, lengths=(17, 50))
    results = run(engine, [*asked.values()])
    for name, own in asked.items():
        exact, theirs = (
            expected(model_dir, adapter_dirs, name.split()[0], own.prompt_token_ids, dtype)
            for dtype in (torch.float32, torch.bfloat16)
        )
        ours = results[name].values
        assert np.linalg.norm(ours - exact) <= 1.2 * np.linalg.norm(theirs - exact), name


def test_a_text_has_the_same_bits_alone_in_chunks_and_beside_others(native, model_dir, adapter_dirs):
    engine, hashes = native
    asked = texts(hashes)
    alone = {name: run(engine, [own])[name].values.tobytes() for name, own in asked.items()}
    beside = [request(f"r{idx}", prompt_of(idx, 9), max_tokens=9, salt="x") for idx in range(3)]
    mixed = run(engine, [*beside, *reversed(texts(hashes, salt="2").values())], stagger=1)
    assert {name: mixed[name].values.tobytes() for name in asked} == alone
    small, hashes = with_adapters(make_engine(model_dir, max_batched_tokens=16, prefix_caching=False), adapter_dirs)
    chunked = run(small, [*texts(hashes).values()])
    assert {name: result.values.tobytes() for name, result in chunked.items()} == alone


def test_the_prefix_cache_serves_the_last_token_alone_and_changes_nothing(native):
    engine, hashes = native
    size, prompt = engine.blocks.block_size, prompt_of(7, 50)
    for kind, num_cached in (("last", 3 * size), ("classify", 3 * size), ("mean", 0), ("weighted", 0)):
        own = [text(f"{kind} {turn}", prompt, TASKS.get(kind, "embed"), adapter=hashes[kind]) for turn in range(2)]
        first, again = (run(engine, [each])[each.request_id] for each in own)
        assert (first.pooled.cached_tokens, again.pooled.cached_tokens) == (0, num_cached)
        assert first.values.tobytes() == again.values.tobytes()
        salted = run(engine, [text("salted", prompt, TASKS.get(kind, "embed"), adapter=hashes[kind], salt="other")])
        assert salted["salted"].pooled.cached_tokens == 0 and salted["salted"].pooled.prompt_tokens == 50


def test_requests_say_pooling_length_and_dimensions(native, model_dir, adapter_dirs):
    engine, hashes = native
    prompt = prompt_of(3, 20)
    params = {
        "raw": {"normalize": False},
        "first 16": {"dimensions": 16},
        "raw 32": {"normalize": False, "dimensions": 32},
        "all": {"dimensions": 64},
        "last": {"pooling": "last"},
    }
    got = run(engine, [text(name, prompt, adapter=hashes["mean"], **own) for name, own in params.items()])
    hidden = peft_hidden(model_dir, adapter_dirs["mean"], prompt).numpy()
    raw = hidden.mean(axis=0)
    want = {
        "raw": raw,
        "first 16": raw[:16] / np.linalg.norm(raw[:16]),
        "raw 32": raw[:32],
        "all": raw / np.linalg.norm(raw),
        "last": hidden[-1] / np.linalg.norm(hidden[-1]),
    }
    for name, values in want.items():
        np.testing.assert_allclose(got[name].values, values, atol=1e-5, err_msg=name)


def test_rows_that_are_pooled_cost_no_logits(native, monkeypatch):
    engine, hashes = native
    step, rows = engine.decoder.step, []

    def counted(batch, *args):
        hidden, logits = step(batch, *args)
        if len(logits):
            rows.append((len(logits), batch.num_rows))
        return hidden, logits

    monkeypatch.setattr(engine.decoder, "step", counted)
    decode = request("decode", [5, 6, 7], max_tokens=8, mode="off")
    run(engine, [decode, text("mean", prompt_of(1, 40), adapter=hashes["mean"])], stagger=1)
    assert {num for num, _ in rows} == {1} and max(num_rows for _, num_rows in rows) > 20
    rows.clear()
    run(engine, [text("alone", prompt_of(2, 40), adapter=hashes["mean"])])
    assert not rows


REFUSED = {
    "an embedding of a classifier": (("classify", "embed", {}), "classifies texts", "model"),
    "scores of an embedder": (("last", "score", {}), "gives embeddings", "model"),
    "scores of the base": (("base", "score", {}), "no score head", "model"),
    "dimensions nobody trained": (("mean", "embed", {"dimensions": 17}), "16, 32 or 64", "dimensions"),
    "dimensions of the base": (("base", "embed", {"dimensions": 32}), "embeddings of 64", "dimensions"),
    "a length for scores": (("classify", "score", {"normalize": True}), "leave them out", "pooling"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_adapter_does_not_give_is_refused_with_a_hint(case, native):
    engine, hashes = native
    (kind, task, params), wanted, param = REFUSED[case]
    with pytest.raises(UserError, match=wanted) as caught:
        engine.add_request(text("x", [1, 2], task, adapter=hashes[kind], **params))
    assert caught.value.param == param and caught.value.status == 400
    check_baseline(engine)


@pytest.mark.parametrize("wanted", [{"task": "score"}, {"task": "embed", "dimensions": 16}])
def test_a_text_whose_adapter_has_left_is_sent_again_with_it_and_not_taken_for_one_of_the_base(wanted, native):
    with pytest.raises(UserError) as error:
        native[0].add_request(text("gone", [5], adapter="0" * 64, **wanted))
    assert error.value.code == "adapter_not_resident"


def test_generation_with_an_adapter_that_pools_is_refused(native):
    engine, hashes = native
    with pytest.raises(UserError, match="/v1/embeddings"):
        engine.add_request(request("x", [1, 2], adapter=hashes["last"]))
    with pytest.raises(UserError, match="/classify"):
        engine.add_request(request("x", [1, 2], adapter=hashes["classify"]))
    check_baseline(engine)


@pytest.mark.parametrize(
    ("prompt", "wanted"), [([], "empty"), ([1] * 513, "513 tokens"), ([3, 320], "token id 320"), ([-1], "token id -1")]
)
def test_texts_that_cannot_be_pooled_are_refused_by_their_field(prompt, wanted, native):
    engine, _ = native
    with pytest.raises(UserError, match=wanted) as caught:
        engine.add_request(text("x", prompt))
    assert caught.value.param == "input"


def test_a_text_may_be_as_long_as_the_context(native):
    engine, hashes = native
    results = run(engine, [text("long", prompt_of(0, 512), adapter=hashes["mean"])])
    assert results["long"].pooled.prompt_tokens == 512


def test_values_that_are_not_finite_fail_their_text_alone(model_dir, adapter_dirs, tmp_path):
    engine, hashes = with_adapters(make_engine(model_dir), adapter_dirs)
    path = make_pooling_adapter(model_dir, tmp_path, "SEQ_CLS", num_labels=2)
    tensors_of(lambda tensors: {**tensors, SCORE: torch.full_like(tensors[SCORE], 3e38)})(path)
    huge = engine.load_adapter("huge", path).content_hash
    prompt = prompt_of(5, 12)
    asked = [text("bad", prompt, "score", adapter=huge), text("good", prompt, adapter=hashes["last"])]
    results = run(engine, [*asked, request("beside", prompt)])
    assert "not finite" in results["bad"].error.error.message and results["bad"].error.error.status == 500
    assert results["good"].pooled and results["beside"].finish_reason


def test_aborted_and_late_texts_give_everything_back(native, monkeypatch):
    engine, hashes = native
    results = {}
    for idx in range(20):
        engine.add_request(text(idx, prompt_of(idx, 60), adapter=hashes["mean"]))
    collect(results, engine.step())
    for idx in range(20):
        engine.abort(Abort(str(idx)).request_id)
    assert not engine.has_work()
    check_baseline(engine)
    engine.add_request(request("decode", [4, 5], max_tokens=4))
    now = time.monotonic()
    engine.add_request(text("late", [4, 5], deadline=now + 600))
    monkeypatch.setattr(engine.scheduler, "clock", lambda: now + 601)
    assert [event.request_id for event in engine.requests.drop_late()] == ["late"]
    while engine.has_work():
        engine.step()
    check_baseline(engine)


def test_preempted_texts_begin_anew_and_have_the_same_bits(native, model_dir, adapter_dirs):
    engine, hashes = native
    asked = [text(idx, prompt_of(idx, 50), adapter=hashes["mean"]) for idx in range(4)]
    alone = {own.request_id: run(engine, [own])[own.request_id].values.tobytes() for own in asked}
    block_bytes = 16 * 2 * 2 * 2 * 16 * 4
    settings = {"kv_cache_gib": 8 * block_bytes / 2**30, "max_model_len": 96, "max_prefill_rows": 2, "max_num_seqs": 5}
    tight, hashes = with_adapters(make_engine(model_dir, **settings), adapter_dirs)
    decodes = [request(f"decode {idx}", [idx + 5] * 10, max_tokens=40, ignore_eos=True) for idx in range(3)]
    asked = [text(idx, prompt_of(idx, 50), adapter=hashes["mean"]) for idx in range(4)]
    mixed = run(tight, [*decodes, *asked], stagger=1)
    assert tight.stats().num_preemptions > 0
    assert {own.request_id: mixed[own.request_id].values.tobytes() for own in asked} == alone
    assert all(len(mixed[decode.request_id].tokens) == 40 for decode in decodes)


def test_a_step_that_fails_is_run_text_by_text_and_counts_no_row_twice(native, monkeypatch):
    engine, hashes = native
    prompt = prompt_of(9, 120)
    want = run(engine, [text("x", prompt, adapter=hashes["mean"])])["x"].values.tobytes()
    forward, num_calls = engine.runner.forward, 0

    def failing(items, adapters):
        nonlocal num_calls
        num_calls += 1
        if any(item.seq.request_id == "poison" for item in items):
            raise RuntimeError("no memory")
        return forward(items, adapters)

    monkeypatch.setattr(engine.runner, "forward", failing)
    results = run(engine, [text("x", prompt, adapter=hashes["mean"], salt="2"), text("poison", prompt_of(1, 90))])
    assert results["poison"].error is not None and results["x"].values.tobytes() == want and num_calls > 3


def test_decodes_go_on_beside_a_crowd_of_texts(native):
    engine, hashes = native
    engine.add_request(request("decode", [4, 5], max_tokens=10, ignore_eos=True, mode="off"))
    for idx in range(40):
        engine.add_request(text(idx, prompt_of(idx, 50), adapter=hashes["mean"]))
    results, num_steps = {}, 0
    while "decode" not in results or results["decode"].finish_reason is None:
        collect(results, engine.step())
        num_steps += 1
    assert num_steps == 10  # one step a token, as alone
    while engine.has_work():
        collect(results, engine.step())
    assert sum(result.pooled is not None for result in results.values()) == 40
    check_baseline(engine)


def test_texts_of_a_better_priority_come_first(native):
    engine, hashes = native
    for idx in range(30):
        engine.add_request(text(idx, prompt_of(idx, 60), adapter=hashes["mean"], priority=1))
    engine.step()
    engine.add_request(text("urgent", prompt_of(99, 60), adapter=hashes["last"], priority=-1))
    done = []
    while engine.has_work():
        done += [event.request_id for event in engine.step()]
    assert done.index("urgent") <= 16  # behind those that had their seats


def test_outputs_of_other_requests_are_still_expected_to_be_as_long_as_they_were(native):
    engine, _ = native
    run(engine, [request(idx, [4, 5], max_tokens=30, ignore_eos=True) for idx in range(20)])
    before = engine.scheduler.waiting.expected_output("", None, 0, 1000)
    run(engine, [text(idx, [4, 5, idx + 6]) for idx in range(50)])
    assert engine.scheduler.waiting.expected_output("", None, 0, 1000) == pytest.approx(before)


def test_a_plain_adapter_still_generates_beside_those_that_pool(native, model_dir, tmp_path):
    engine, hashes = native
    plain = engine.load_adapter("plain", make_peft_adapter(model_dir, tmp_path)).content_hash
    alone = tokens_of(run(engine, [request("a", [4, 5, 6], adapter=plain)]))
    mixed = run(engine, [request("a", [4, 5, 6], adapter=plain, salt="2"), *texts(hashes).values()])
    assert tokens_of({"a": mixed["a"]}) == alone
