"""The engine on its Triton path against plain torch on the CPU; test_cuda_path.py runs it as a process.

With TRITON_INTERPRET=1 every kernel, buffer, seat and adapter table of the GPU path is used as on a GPU; only CUDA
graphs are not there. Otherwise it runs on CUDA.
"""

from __future__ import annotations

import dataclasses
import json
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import msgspec
import pytest
import torch
from engine_fixture import make_engine, request, run, text, tokens_of
from lookahead_adapters import make_base_head, make_lookahead_adapter
from peft_adapters import make_peft_adapter
from pooling_adapters import make_pooling_adapter
from tiny_models import make_tiny_model
from traces import check_trace, drafts_of
from triton_interpreter import IS_INTERPRETED, row_uniform_dot  # noqa: F401  (before anything imports triton)

from specserve.adapters.pooling_config import PoolingConfig
from specserve.compute.cuda import buckets, drafts
from specserve.compute.cuda.build import make_path
from specserve.compute.cuda.decoder import TritonDecoder
from specserve.compute.cuda.runner import DeviceRunner
from specserve.compute.path import ComputePath, PathInputs
from specserve.drafting.cost_model import CostModel
from specserve.engine.step_profile import StepProfile
from specserve.messages import GrammarSpec

torch.set_num_threads(1)


def as_on_a_gpu(decoder: TritonDecoder, inputs: PathInputs) -> ComputePath:
    """Steps are queued before the last one's tokens are known."""
    return dataclasses.replace(make_path(decoder, inputs), is_asynchronous=True)


def make_pair(model_dir, **settings):
    """The engine on the Triton path, at random all sequences at once or in two halves, and on plain torch."""
    settings = {"max_num_seqs": 4, "max_batched_tokens": 48, **settings}
    device = "cpu" if IS_INTERPRETED else "cuda"
    engine = make_engine(model_dir, as_on_a_gpu, kernels="triton", device=device, **settings)
    assert isinstance(engine.runner, DeviceRunner)
    turns = random.Random(0)
    engine.proposer.in_halves = lambda num_running: num_running > 1 and turns.random() < 0.7
    return engine, make_engine(model_dir, kernels="torch", **settings)


@pytest.fixture(autouse=True, scope="module")
def known_costs():
    """Measuring them takes half a minute in the interpreter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("specserve.engine.engine.measured_costs", lambda *_: CostModel({1: 0.01, 64: 0.02}))
        yield


@pytest.fixture(autouse=True, scope="module")
def small_heads():
    """The loop looks at as many tokens as the largest head may have, most of which the interpreter finds absent."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drafts, "DeviceHeads", partial(drafts.DeviceHeads, max_vocab=128, max_state_size=32))
        yield


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def pair(model_dir):
    return make_pair(model_dir)


@pytest.fixture(scope="module")
def shallow_dir(tmp_path_factory):
    """One layer, where others would only do the same: the interpreter takes most of a step for each."""
    return make_tiny_model(tmp_path_factory.mktemp("shallow"), num_hidden_layers=1)


@pytest.fixture(scope="module")
def shallow_pair(shallow_dir):
    return make_pair(shallow_dir)


@pytest.fixture(scope="module")
def adapter_dirs(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    shapes = [{"r": 4}, {"r": 1, "target_modules": ["q_proj", "down_proj"]}, {"r": 24, "lora_alpha": 64}]
    return [make_peft_adapter(model_dir, root / str(i), seed=i, std=0.3, **kw) for i, kw in enumerate(shapes)]


def mixed_requests(hashes, **sampling):
    prompts = [[7, 8, 9] * 4, list(range(30, 70)), [5], [11, 12, 11, 12, 11, 12, 11, 12]]
    return [
        request(i, prompt, adapter=hashes[i % len(hashes)], max_tokens=5 + i, seed=i, **sampling)
        for i, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("mode", ["fixed", pytest.param("off", marks=pytest.mark.slow)])
def test_mixed_adapters_equal_the_torch_path(pair, adapter_dirs, mode):
    results = []
    for engine in pair:
        hashes = [None, *(engine.load_adapter(str(i), path).content_hash for i, path in enumerate(adapter_dirs))]
        results.append(run(engine, mixed_requests(hashes, mode=mode), stagger=1))
    assert tokens_of(results[0]) == tokens_of(results[1])
    if mode == "fixed":
        assert sum(result.usage.draft_tokens for result in results[0].values()) > 0


@pytest.mark.parametrize(
    "architecture",
    [
        "qwen3",
        "gemma2",
        "gemma3",
        "olmo3",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("qwen2", "mistral", "ministral3", "smollm3", "phi3", "granite", "olmo2")
        ),
    ],
)
def test_other_architectures_equal_the_torch_path(architecture, tmp_path):
    pair = make_pair(make_tiny_model(tmp_path, architecture))
    requests = [request("a", range(40, 64), max_tokens=6), request("b", [9, 8, 9, 8, 9, 8], max_tokens=6, mode="fixed")]
    triton, plain = (tokens_of(run(engine, requests)) for engine in pair)
    assert triton == plain


def test_sampled_tokens_penalties_and_log_probabilities_equal_the_torch_path(shallow_pair):
    sampling = {"temperature": 0.9, "top_p": 0.8, "top_k": 30, "presence_penalty": 0.5, "logprobs": 2}
    requests = [
        request("hot", [3, 4, 5, 3, 4, 5, 3, 4], max_tokens=10, mode="fixed", seed=5, **sampling),
        request("scored", range(20, 34), max_tokens=4, prompt_logprobs=1),
        request(
            "edited", [3, 4, 5, 3, 4, 5, 3, 4], max_tokens=8, mode="fixed", repetition_penalty=1.4, min_tokens=5,
            frequency_penalty=0.2, logit_bias={7: 1.5, 4: -100.0}, logprobs=2,
        ),
    ]  # fmt: skip
    triton, plain = (run(engine, requests) for engine in shallow_pair)
    assert tokens_of(triton) == tokens_of(plain)
    for name in ("hot", "edited"):
        for a, b in zip(triton[name].logprobs, plain[name].logprobs, strict=True):
            assert a.logprob == pytest.approx(b.logprob, abs=1e-4) and [t for t, _ in a.top] == [t for t, _ in b.top]
    scores = [[s.logprob for s in r["scored"].prompt_logprobs[1:]] for r in (triton, plain)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_steps_with_more_logits_than_have_a_buffer_equal_the_torch_path(shallow_dir, monkeypatch):
    monkeypatch.setattr(buckets, "_LOGITS_BYTES", 8 * 320 * 4)
    requests = [
        request("scored", range(20, 50), max_tokens=3, prompt_logprobs=1),
        request("beside", [3, 4, 5, 3, 4, 5, 3, 4], max_tokens=8, mode="fixed", frequency_penalty=0.5),
        request("hot", range(60, 80), max_tokens=3, temperature=1.0, seed=2),
    ]
    triton, plain = (run(engine, requests) for engine in make_pair(shallow_dir))
    assert tokens_of(triton) == tokens_of(plain)
    scores = [[s.logprob for s in r["scored"].prompt_logprobs[1:]] for r in (triton, plain)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)


def test_preempted_sequences_and_reused_seats_read_their_own_blocks(shallow_dir):
    token_bytes = 2 * 2 * 16 * 4
    tight = {"kv_cache_gib": 5 * 16 * token_bytes / 2**30, "max_model_len": 64, "max_num_seqs": 3}
    pair = make_pair(shallow_dir, **tight)
    requests = [request(i, [40 + i] * (9 + i), max_tokens=20, ignore_eos=True) for i in range(4)]
    triton, plain = (tokens_of(run(engine, requests, stagger=3)) for engine in pair)
    assert triton == plain
    assert pair[0].stats().num_preemptions > 0


def test_pooled_texts_equal_the_torch_path_beside_decodes_and_in_chunks(model_dir, tmp_path):
    shapes = [("FEATURE_EXTRACTION", PoolingConfig("embed", pooling="mean")), ("SEQ_CLS", None)]
    paths = [
        make_pooling_adapter(model_dir, tmp_path / str(idx), task, config=config, seed=idx)
        for idx, (task, config) in enumerate(shapes)
    ]
    results = []
    for engine in make_pair(model_dir, max_batched_tokens=16, max_prefill_rows=7):
        mean, scored = (engine.load_adapter(str(idx), path).content_hash for idx, path in enumerate(paths))
        requests = [
            request("decode", [7, 8, 9], max_tokens=7, mode="fixed"),
            text("mean", range(20, 36), adapter=mean),
            text("scores", range(50, 61), "score", adapter=scored),
            text("again", range(20, 36), adapter=mean, pooling="weighted_mean"),
            text("base", range(90, 99), normalize=False),
            text("one", [5], adapter=mean),
        ]
        results.append(run(engine, requests, stagger=1))
    triton, plain = results
    assert tokens_of({"decode": triton["decode"]}) == tokens_of({"decode": plain["decode"]})
    for name in ("mean", "scores", "again", "base", "one"):
        assert triton[name].values.tolist() == pytest.approx(plain[name].values.tolist(), abs=1e-5, rel=1e-5), name


def test_blocks_of_a_step_whose_layers_could_not_be_queued_are_read_by_the_next(shallow_pair, monkeypatch):
    engine, plain = shallow_pair
    layers, num_steps = engine.runner._parts.layers, 0
    queue = layers.queue

    def failing(bucket):
        nonlocal num_steps
        num_steps += 1
        if num_steps == 1:
            raise RuntimeError("no memory")
        queue(bucket)

    monkeypatch.setattr(layers, "queue", failing)
    requests = [request(i, range(20 * i + 5, 20 * i + 24), max_tokens=3) for i in range(2)]
    assert tokens_of(run(engine, requests)) == tokens_of(run(plain, requests))


def test_more_adapters_than_places_are_served_one_after_the_other(model_dir, adapter_dirs):
    pair = make_pair(model_dir, max_adapters=2)
    tokens = []
    for engine in pair:
        got = {}
        for turn in range(4):
            path = adapter_dirs[turn % 3]
            key = engine.load_adapter(str(turn), path).content_hash
            got |= tokens_of(run(engine, [request(turn, [6, 7, 8, 9], adapter=key, max_tokens=2)]))
        tokens.append(got)
    assert tokens[0] == tokens[1]


def test_heads_draft_on_the_device_what_they_draft_on_the_host(model_dir, tmp_path):
    shapes = [{}, {"window": 8, "state_size": 24}, {"draft_len": 3}]
    paths = [
        make_lookahead_adapter(model_dir, tmp_path / str(i), seed=i, tap_layer=1, history=False, **shape)
        for i, shape in enumerate(shapes)
    ]
    prompts = [[i * 7 % 320 for i in range(3, 12 + n)] for n in range(4)]
    drafted, tokens = [], []
    base_head = make_base_head(model_dir, tmp_path / "base", seed=5, tap_layer=1, history=False)
    for engine in make_pair(model_dir, max_draft_tokens=4, base_head=str(base_head)):
        hashes = [engine.load_adapter(str(i), path).content_hash for i, path in enumerate(paths)] + [None]
        first: dict[str, list[int]] = {}
        propose = engine.proposer.propose

        def recording(items, *args, propose=propose, first=first):
            propose(items, *args)
            for item in items:
                if item.drafts and item.draft_sources[0] == "head":
                    own = [t for t, source in zip(item.drafts, item.draft_sources, strict=True) if source == "head"]
                    first.setdefault(item.seq.request_id, own)

        engine.proposer.propose = recording
        requests = [
            request(
                i,
                prompt,
                adapter=hashes[i],
                mode="fixed",
                max_draft_tokens=4,
                max_tokens=6,
                ignore_eos=True,
                trace=True,
            )
            for i, prompt in enumerate(prompts)
        ]
        results = run(engine, requests)
        tokens.append(tokens_of(results))
        for result in results.values():
            check_trace(result.trace, result.tokens, None, result.usage)
            assert "head" in {draft.source for draft in drafts_of(result.trace)}
        drafted.append(dict(first))
        # A head of another layer than the device keeps is refused there, and its LoRA serves without it.
        other = make_lookahead_adapter(model_dir, tmp_path / "other", seed=9, tap_layer=0, history=False)
        key = engine.load_adapter("other", other).content_hash
        alone = run(engine, [request("x", prompts[0], adapter=key, mode="fixed", max_draft_tokens=2, max_tokens=3)])
        tokens.append(tokens_of(alone))
    assert tokens[0] == tokens[2] and tokens[1] == tokens[3]
    assert len(drafted[0]) == 4 and drafted[0] == drafted[1]


def test_heads_that_fail_on_the_device_change_nothing(model_dir, tmp_path, caplog):
    engine, plain = make_pair(model_dir, max_draft_tokens=4)
    path = make_lookahead_adapter(model_dir, tmp_path / "a", tap_layer=1, history=False)
    tokens = []
    for one in (engine, plain):
        key = one.load_adapter("a", path).content_hash
        if one is engine:
            one.sampler.drafts._queue = None  # calling it raises
        requests = [request(i, range(5, 12 + i), adapter=key, mode="fixed", max_tokens=5) for i in range(2)]
        tokens.append(tokens_of(run(one, requests)))
    assert tokens[0] == tokens[1]
    assert "lookahead heads are off from now on" in caplog.text
    assert engine.stats().drafted_by_source.get("head", 0) == 0


def test_heads_that_cannot_be_captured_at_start_are_off_and_end_no_start(shallow_dir, tmp_path, caplog):
    def launch(key, part):
        raise RuntimeError("out of resource: shared memory")

    engine, _ = make_pair(shallow_dir, max_draft_tokens=4)
    device_drafts = engine.sampler.drafts
    graphs = SimpleNamespace(is_enabled=True, launch=launch)
    device_drafts._parts = dataclasses.replace(device_drafts._parts, graphs=graphs)
    device_drafts.capture()
    assert "lookahead heads are off from now on" in caplog.text and "shared memory" in caplog.text
    path = make_lookahead_adapter(shallow_dir, tmp_path / "a", tap_layer=0, history=False)
    key = engine.load_adapter("a", path).content_hash
    results = run(engine, [request("a", range(5, 9), adapter=key, mode="fixed", max_tokens=3)])
    assert len(results["a"].tokens) == 3 and engine.stats().drafted_by_source.get("head", 0) == 0


def test_a_sequence_whose_logits_are_nan_fails_alone_while_its_head_drafts(
    shallow_pair, shallow_dir, tmp_path, monkeypatch
):
    engine, plain = shallow_pair
    path = make_lookahead_adapter(shallow_dir, tmp_path / "a", tap_layer=0, history=False)
    forward, num_steps = engine.runner.forward, 0

    def poisoned(items, adapters):
        nonlocal num_steps
        output, num_steps = forward(items, adapters), num_steps + 1
        if num_steps == 2:  # both decode
            group = next(group for group in output.groups if group.seq.request_id == "bad")
            output.logits[group.first_row] = torch.nan
        return output

    monkeypatch.setattr(engine.runner, "forward", poisoned)
    results = []
    for one in (engine, plain):
        key = one.load_adapter("a", path).content_hash
        options = {"adapter": key, "mode": "fixed", "max_draft_tokens": 4, "max_tokens": 3}
        results.append(run(one, [request("bad", range(5, 12), **options), request("good", range(5, 13), **options)]))
    assert "NaN" in results[0]["bad"].error.error.message
    assert results[0]["good"].tokens == results[1]["good"].tokens and results[0]["good"].error is None


def test_constrained_requests_equal_the_torch_path(shallow_pair):
    schema = (
        '{"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": false}'
    )
    requests = [
        constrained("cold", schema, mode="fixed"),
        constrained("hot", schema, mode="fixed", temperature=1.0, seed=3),
        *(constrained(f"dead-{t}", DEAD_END, "lark", mode="fixed", temperature=t) for t in (0.0, 1.0)),
        request("free", [5, 6, 5, 6, 5, 6], mode="fixed", max_tokens=6),
    ]
    triton, plain = (run(engine, requests) for engine in shallow_pair)
    for name in ("dead-0.0", "dead-1.0"):
        dead, want = triton.pop(name), plain.pop(name)
        assert dead.tokens == want.tokens and dead.error.error == want.error.error
        assert dead.error.error.code == "grammar_dead_end"
    assert tokens_of(triton) == tokens_of(plain)
    assert json.loads(triton["cold"].text).keys() == json.loads(triton["hot"].text).keys() == {"a"}


DEAD_END = 'start: "x" b\nb: "z" X\nX: /a/ & /b/\n'


def constrained(request_id, grammar, kind="json_schema", **options):
    plain = request(request_id, [9, 8, 7], max_tokens=40, **options)
    return msgspec.structs.replace(plain, grammar=GrammarSpec(kind, grammar))


def test_a_profile_has_the_phases_of_this_path_and_says_what_is_not_to_be_seen(model_dir):
    engine, _ = make_pair(model_dir)
    profile = StepProfile(engine)
    run(engine, [request("a", [5, 6, 7], max_tokens=2)])
    summary = profile.summary()
    assert {"queue the forward", "queue sampling", "wait for the device"} <= set(summary["ms_per_step"])
    assert summary["steps"] == 2 and summary["model_share"] is None
    assert "not to be seen: what layers, lm_head, sampling and heads take on the device" in profile.table()


@pytest.mark.skipif(IS_INTERPRETED, reason="CUDA graphs need CUDA")
def test_graphs_change_nothing_and_are_captured_once(model_dir, adapter_dirs):
    graphed, _ = make_pair(model_dir)
    eager, _ = make_pair(model_dir, cuda_graphs=False)
    tokens = []
    for engine in (graphed, eager):
        hashes = [None, *(engine.load_adapter(str(i), path).content_hash for i, path in enumerate(adapter_dirs))]
        tokens.append([tokens_of(run(engine, mixed_requests(hashes, mode="fixed"), stagger=1)) for _ in range(2)])
        if engine is graphed:
            num_graphs = engine.runner.graphs.num_graphs
            tokens[0].append(tokens_of(run(engine, mixed_requests(hashes[::-1], mode="off"))))
    assert tokens[0][:2] == tokens[1] and tokens[0][0] == tokens[0][1]
    assert num_graphs > 0 and eager.runner.graphs.num_graphs == 0
    assert not graphed.runner.graphs.num_eager


@pytest.mark.skipif(IS_INTERPRETED, reason="streams need CUDA")
def test_an_adapter_that_is_read_while_steps_run_is_whole(model_dir, adapter_dirs):
    engine, plain = make_pair(model_dir)
    want_key = plain.load_adapter("late", adapter_dirs[2]).content_hash
    late = request("late", [5, 6, 7, 8], adapter=want_key, max_tokens=8)
    want = tokens_of(run(plain, [late]))
    engine.add_request(request("long", range(20, 40), max_tokens=40, ignore_eos=True))
    with ThreadPoolExecutor(1) as readers:
        reading = readers.submit(engine.adapters.read, "late", adapter_dirs[2])
        while not reading.done():
            engine.step()
    engine.adapters.register(reading.result())
    assert tokens_of({key: r for key, r in run(engine, [late]).items() if key == "late"}) == want
