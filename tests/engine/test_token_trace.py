"""Traces say of every token where it came from, however it was drafted, ended or held up; tokens stay the same."""

from __future__ import annotations

import random

import msgspec
import pytest
from engine_fixture import collect, make_engine, request, run, tokens_of
from lookahead_adapters import make_lookahead_adapter
from oracle_drafter import SAMPLERS, Oracle
from tiny_models import make_tiny_model
from traces import check_trace, drafts_of

from specserve.drafting.growth import DraftGrowth
from specserve.messages import TARGET, Delta, GenerateRequest, GrammarSpec
from specserve.text.tokenizer import TextTokenizer
from specserve.text.traced_text import TracedText

STOPS = ((), (), ("e",), ("the", "\n", "1"), ("\ufffd",))
GRAMMARS = (
    None,
    None,
    GrammarSpec("regex", r"(yes|no), because [a-z ]{5,30}\."),
    GrammarSpec("json_schema", '{"type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, '
                               '"long_named_flag": {"type": "boolean"}}, "required": ["name", "long_named_flag"]}'),
)  # fmt: skip


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return TextTokenizer(model_dir)


@pytest.fixture(scope="module")
def setup(model_dir, tmp_path_factory):
    """An engine whose cache is too small for what it is asked, and its adapters with heads and histories."""
    token_bytes = 2 * 2 * 2 * 16 * 4
    engine = make_engine(model_dir, kv_cache_gib=9 * 16 * token_bytes / 2**30, max_model_len=100)
    root = tmp_path_factory.mktemp("adapters")
    paths = [make_lookahead_adapter(model_dir, root / str(seed), seed=seed) for seed in range(2)]
    return engine, [None, *(engine.load_adapter(path.name, path).content_hash for path in paths)]


def sampled_requests(
    seed: int, adapters: list[str | None], answers: dict[str, list[int]] | None = None
) -> list[GenerateRequest]:
    """Of any setting; with what they answer, they are traced, and predict some of that."""
    rng = random.Random(seed)
    requests = []
    for number in range(6):
        period = [rng.randrange(3, 300) for _ in range(rng.randrange(1, 6))]
        prompt = [rng.randrange(3, 300) for _ in range(rng.randrange(1, 9))] + period * 3
        grammar, sampling = rng.choice(GRAMMARS), rng.choice(list(SAMPLERS.values()))
        made = request(
            number,
            prompt,
            adapter=rng.choice(adapters),
            mode=rng.choice(("auto", "fixed", "fixed", "ngram", "off")),
            max_draft_tokens=rng.choice((1, 3, 8)),
            prediction=_spoiled(answers[str(number)]) if answers is not None and number % 2 else (),
            trace=answers is not None,
            **{
                **sampling,
                "min_tokens": 0 if grammar else sampling.get("min_tokens", 0),
                "max_tokens": rng.choice((15, 40, 70 - len(prompt))),
                "ignore_eos": grammar is None and rng.random() < 0.7,
                "stop": rng.choice(STOPS),
                "stop_token_ids": rng.choice(((), tuple(rng.sample(range(3, 300), 20)))),
                "include_stop_str_in_output": rng.random() < 0.3,
                "skip_special_tokens": rng.random() < 0.5,
                "logprobs": rng.choice((None, 2)),
                "seed": rng.randrange(2**32),
                "detokenize": True,
            },
        )
        requests.append(msgspec.structs.replace(made, grammar=grammar))
    return requests


def _spoiled(answer: list[int]) -> list[int]:
    rng = random.Random(len(answer))
    return [token if rng.random() < 0.8 else rng.randrange(300) for token in answer]


def told(engine, tokenizer, requests):
    """Traces with their texts, checked delta by delta, and the results beside them."""
    readers = {}
    for item in requests:
        reader = tokenizer.detokenizer(item.prompt_token_ids, item.sampling.skip_special_tokens)
        readers[item.request_id] = TracedText(reader)
        engine.add_request(item)
    traces, results, said = {}, {}, {}
    while engine.has_work():
        events = engine.step()
        collect(results, events)
        for event in events:
            assert isinstance(event, Delta) and event.trace is not None
            trace = traces.setdefault(event.request_id, [])
            trace += readers[event.request_id].told(event).trace
            said[event.request_id] = said.get(event.request_id, "") + event.text
            assert said[event.request_id].startswith("".join([entry.text for entry in trace]))
    return traces, results


def test_a_trace_tells_of_all_tokens_and_changes_none(setup, tokenizer):
    engine, adapters = setup
    sources, rejecting, ends, num_cut = set(), set(), set(), 0
    for seed in range(10):
        want = run(engine, sampled_requests(seed, adapters))
        assert not any(result.trace for result in want.values())
        requests = sampled_requests(seed, adapters, {name: result.tokens for name, result in want.items()})
        traces, results = told(engine, tokenizer, requests)
        assert tokens_of(results) == tokens_of(want)
        for name, result in results.items():
            trace = traces[name]
            assert result.text == want[name].text and result.finish_reason == want[name].finish_reason
            assert [item.rank for item in result.logprobs] == [item.rank for item in want[name].logprobs]
            check_trace(trace, result.tokens, result.text, result.usage)
            sources |= {entry.source for entry in trace}
            rejecting |= {draft.source for entry in trace for draft in entry.rejected}
            ends.add((result.finish_reason, type(result.stop_reason)))
            num_cut += isinstance(result.stop_reason, str) and trace[-1].source != TARGET
    # The settings have met what matters.
    assert sources >= {TARGET, "ngram", "grammar", "prediction"}
    assert rejecting >= {"ngram", "head", "history", "prediction"}
    assert ends == {("length", type(None)), ("stop", type(None)), ("stop", str), ("stop", int)}
    assert num_cut and engine.stats().num_preemptions > 0


def test_both_ways_to_grow_give_equal_traces(setup, tokenizer, model_dir, monkeypatch):
    monkeypatch.setattr("specserve.drafting.proposer.make_growth", lambda heads, clock=None: DraftGrowth(heads))
    python = make_engine(model_dir)
    monkeypatch.undo()
    native = make_engine(model_dir)
    assert isinstance(python.proposer.growth, DraftGrowth) != isinstance(native.proposer.growth, DraftGrowth)
    prompts = [[5, 6, 7] * 6, [9, 8, 7, 9, 8, 30, 31] * 4]
    found = [
        {
            name: result.trace
            for name, result in run(
                engine,
                [
                    request(i, prompt, mode="fixed", max_tokens=40, prediction=prompt, trace=True, ignore_eos=True)
                    for i, prompt in enumerate(prompts)
                ],
            ).items()
        }
        for engine in (python, native)
    ]
    assert found[0] == found[1]
    assert drafts_of(found[0]["0"]) and drafts_of(found[0]["1"])


def test_chances_come_true(model_dir, monkeypatch):
    """A drafter that is right four times of five is expected to be: on the average of what was tried."""
    engine = make_engine(model_dir)
    plain = tokens_of(run(engine, [request(0, [5, 6, 7], mode="off", max_tokens=200, ignore_eos=True)]))["0"]
    vocab_size = engine.info.vocab_size
    chances, rights = [], []
    for seed in range(8):
        oracle = Oracle(3, plain, "mostly right", vocab_size, seed)
        monkeypatch.setattr(engine.proposer.sources, "of", lambda req, oracle=oracle: [oracle])
        made = request(0, [5, 6, 7], mode="fixed", max_tokens=200, trace=True, ignore_eos=True)
        for entry in run(engine, [made])["0"].trace:
            tried = [(entry.chance, True)] if entry.source == "oracle" else []
            tried += [(draft.chance, False) for draft in entry.rejected[:1]]  # those behind it were not tried
            chances += [chance for chance, _ in tried]
            rights += [is_right for _, is_right in tried]
    assert len(rights) > 500
    assert sum(chances) / len(chances) == pytest.approx(sum(rights) / len(rights), abs=0.06)


def test_beside_others_only_those_who_ask_are_traced(setup):
    engine, _ = setup
    requests = [request(number, [5, 6, 7] * 4, mode="fixed", trace=number % 2 == 0) for number in range(4)]
    results = run(engine, requests)
    assert [bool(results[str(number)].trace) for number in range(4)] == [True, False, True, False]


def test_a_forward_of_drafts_alone_has_none_that_was_rejected(setup):
    """Where the grammar lets nothing follow the last draft, no token of the target's is behind it."""
    engine, _ = setup
    made = request("a", [5, 6, 7], mode="fixed", max_tokens=60, trace=True, ignore_eos=True)
    text = "The quick brown fox jumps over"
    result = run(engine, [msgspec.structs.replace(made, grammar=GrammarSpec("regex", text))])["a"]
    assert engine.tokenizer.decode(result.tokens) == text and result.finish_reason == "stop"
    usage = result.usage
    assert usage.draft_tokens == usage.accepted_draft_tokens == usage.accepted_by_source["grammar"] > 0
    assert result.trace[-1].source == "grammar"
    check_trace(result.trace, result.tokens, None, usage)
