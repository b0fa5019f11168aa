"""Output under a grammar: always what the grammar says, equal with and without drafts, ended where it is complete."""

import json
import random

import jsonschema
import numpy as np
import pytest
from engine_fixture import make_engine, request, run, tokens_of
from oracle_drafter import SAMPLERS, Oracle
from tiny_models import make_tiny_model

from specserve.drafters.grammar_source import GrammarSource
from specserve.errors import UserError
from specserve.messages import GrammarSpec

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["fox", "dog", "jug"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
        "owner": {"anyOf": [{"type": "null"}, {"type": "object", "properties": {"id": {"type": "boolean"}},
                                               "required": ["id"], "additionalProperties": False}]},
    },
    "required": ["name", "kind", "count", "tags", "owner"],
    "additionalProperties": False,
}  # fmt: skip
SPECS = {
    "json_schema": GrammarSpec("json_schema", json.dumps(SCHEMA)),
    "regex": GrammarSpec("regex", r"(fox|dog)( [a-z]{1,4}){2,5}\."),
    "choice": GrammarSpec("choice", '["the quick", "the quick brown fox", "a \\"jug\\"\\n\\u00e9"]'),
    "lark": GrammarSpec("lark", 'start: item ("," item){2,6}\nitem: /[0-9]{1,3}/ | "(" item ")"\n'),
}


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    return make_engine(make_tiny_model(tmp_path_factory.mktemp("model")))


def constrained(request_id, prompt, spec, **fields):
    item = request(request_id, prompt, **fields)
    return type(item)(**{name: getattr(item, name) for name in item.__struct_fields__} | {"grammar": spec})


def satisfies(kind, text):
    if kind == "json_schema":
        jsonschema.validate(json.loads(text), SCHEMA)
        return True
    if kind == "choice":
        return text in json.loads(SPECS["choice"].text)
    import re

    patterns = {"regex": r"(fox|dog)( [a-z]{1,4}){2,5}\.", "lark": r"[0-9(][0-9,()]*"}
    return re.fullmatch(patterns[kind], text) is not None


def requests_for(sampler, mode, num=8):
    rng = random.Random(5)
    kinds = list(SPECS)
    return [
        constrained(
            i,
            [rng.randrange(320) for _ in range(rng.randrange(2, 20))],
            SPECS[kinds[i % len(kinds)]],
            mode=mode,
            max_tokens=150,
            seed=i,
            **{**SAMPLERS[sampler], "min_tokens": 0},
        )
        for i in range(num)
    ]


@pytest.fixture(scope="module", params=list(SAMPLERS))
def plain(request, engine):
    results = run(engine, requests_for(request.param, "off"))
    return request.param, results


def test_finished_output_satisfies_its_grammar_and_ends_with_stop(plain):
    _, results = plain
    kinds = list(SPECS)
    num_finished = 0
    for name, result in results.items():
        assert result.error is None
        if result.finish_reason == "stop":
            num_finished += 1
            assert satisfies(kinds[int(name) % len(kinds)], result.text), result.text
        else:
            assert result.finish_reason == "length" and len(result.tokens) == 150
    assert num_finished >= len(results) - 2


@pytest.mark.parametrize("mode", ["fixed", "ngram", "auto"])
def test_drafts_change_no_token_under_a_grammar(engine, plain, mode):
    sampler, want = plain
    results = run(engine, requests_for(sampler, mode), stagger=2)
    assert tokens_of(results) == tokens_of(want)
    assert [r.finish_reason for r in results.values()] == [want[name].finish_reason for name in results]
    if mode == "fixed":
        assert sum(r.usage.accepted_by_source.get("grammar", 0) for r in results.values()) > 20


@pytest.mark.parametrize("kind", ["always right", "always wrong", "mostly right", "random"])
def test_adversarial_drafters_change_no_token_under_a_grammar(engine, plain, kind, monkeypatch):
    sampler, want = plain
    monkeypatch.setattr(
        engine.proposer.sources,
        "of",
        lambda req: [Oracle(len(req.prompt_token_ids), want[req.request_id].tokens, kind, 320, req.request_id)],
    )
    assert tokens_of(run(engine, requests_for(sampler, "fixed"), stagger=1)) == tokens_of(want)


def test_no_forbidden_draft_is_given_a_row(engine, monkeypatch):
    spec = SPECS["json_schema"]
    monkeypatch.setattr(
        engine.proposer.sources, "of", lambda req: [Oracle(len(req.prompt_token_ids), [0] * 500, "random", 320, 1)]
    )
    monkeypatch.setattr(GrammarSource, "peek", lambda self: None)
    engine.add_request(constrained("a", [1, 2, 3], spec, mode="fixed", max_tokens=60))
    reserve, seen = engine.scheduler.reserve_drafts, []

    def checked(item, num):
        grammar = engine.requests._by_id["a"].seq.grammar
        grammar.rewind()
        seen.append(num)
        assert grammar.num_allowed(engine.requests._by_id["a"].drafts.chooser.tokens[:num]) == num
        return reserve(item, num)

    monkeypatch.setattr(engine.scheduler, "reserve_drafts", checked)
    while engine.has_work():
        engine.step()
    assert seen


def test_mixed_batch_leaves_unconstrained_requests_alone(engine):
    free = [request(f"free-{i}", [5, 6, 7, i], temperature=i % 2, seed=i, max_tokens=30) for i in range(4)]
    alone = tokens_of(run(engine, free))
    mixed = run(engine, [*free, *requests_for("temperature", "auto", 4), *requests_for_greedy("auto")])
    assert {name: tokens for name, tokens in tokens_of(mixed).items() if name in alone} == alone


def requests_for_greedy(mode):
    return [constrained(f"g{i}", [i, 2], spec, mode=mode) for i, spec in enumerate(SPECS.values())]


def test_sequence_ends_with_its_grammar_without_an_end_token(engine):
    result = run(engine, [constrained("a", [1, 2], GrammarSpec("choice", '["print"]'), max_tokens=50)])["a"]
    assert (result.text, result.finish_reason) == ("print", "stop")
    assert result.tokens[-1] not in engine.eos_token_ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_complete_output_may_end_or_go_on_and_ignore_eos_makes_it_go_on(engine, temperature):
    spec = GrammarSpec("regex", "a{1,40}")
    eos = next(iter(engine.eos_token_ids))
    wanted = {"logit_bias": {eos: 100.0}, "max_tokens": 60, "temperature": temperature}
    ended = run(engine, [constrained("a", [1, 2], spec, **wanted)])["a"]
    assert ended.finish_reason == "stop" and len(ended.text) < 40 and ended.tokens[-1] == eos
    went_on = run(engine, [constrained("a", [1, 2], spec, ignore_eos=True, **wanted)])["a"]
    assert went_on.text == "a" * 40 and went_on.finish_reason == "stop" and eos not in went_on.tokens


def test_min_tokens_forbids_an_early_end_but_not_the_grammars_own(engine):
    eos = next(iter(engine.eos_token_ids))
    fields = {"logit_bias": {eos: 100.0}, "min_tokens": 12, "max_tokens": 60}
    result = run(engine, [constrained("a", [1, 2], GrammarSpec("regex", "[a-z]{1,40}"), **fields)])["a"]
    assert len(result.tokens) == 13 and result.tokens[-1] == eos
    result = run(engine, [constrained("a", [1, 2], GrammarSpec("choice", '["ab"]'), **fields)])["a"]
    assert result.text == "ab" and result.finish_reason == "stop"


def test_unbounded_string_ends_at_max_tokens_with_length(engine):
    spec = GrammarSpec("json_schema", '{"type": "string", "pattern": "^[a-z]+$"}')
    bias = {engine.tokenizer.token_to_id('"'): -100.0}
    result = run(engine, [constrained("a", [1, 2], spec, max_tokens=25, logit_bias=bias)])["a"]
    assert result.finish_reason == "length" and len(result.tokens) == 25


def test_stop_string_ends_constrained_output_where_it_occurs(engine):
    result = run(engine, [constrained("a", [1, 2], SPECS["json_schema"], max_tokens=99, stop=('"kind"',))])["a"]
    assert result.finish_reason == "stop" and result.stop_reason == '"kind"' and '"kind"' not in result.text


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("mode", ["off", "fixed"])
def test_dead_end_fails_the_request_alone_with_a_clear_error(engine, temperature, mode):
    dead = GrammarSpec("lark", 'start: "x" b\nb: "z" X\nX: /a/ & /b/\n')
    fields = {"mode": mode, "temperature": temperature}
    results = run(engine, [constrained("dead", [1], dead, **fields), request("free", [1, 2], **fields)])
    assert results["dead"].error is not None and results["dead"].text in ("", "x", "xz")
    assert results["dead"].error.error.code == "grammar_dead_end"
    assert results["free"].error is None and results["free"].finish_reason is not None


def test_drafts_into_a_dead_end_spoil_nothing(engine):
    compiled = engine.grammars.compile(GrammarSpec("lark", 'start: "x" b | "y" /[a-c]+/\nb: "z" X\nX: /a/ & /b/\n'))
    x, z, y, a = (engine.tokenizer.token_to_id(letter) for letter in "xzya")
    grammar = compiled.start()
    rows = np.ones((3, compiled.mask_words), dtype=np.int32)
    grammar.fill_masks([x, z], rows)
    assert rows[0].any() and rows[1].any() and not rows[2].any()
    assert not grammar.error and grammar.commit([y]) == 1 and grammar.allows(a) and not grammar.allows(x)


def test_token_ids_outside_the_vocabulary_poison_nothing(engine):
    grammar = engine.grammars.compile(SPECS["regex"]).start()
    for token in (-1, 320, 10**9):
        assert not grammar.allows(token) and not grammar.advance((token,))
    assert grammar.num_allowed([engine.tokenizer.token_to_id("f"), 10**9]) == 1
    assert grammar.commit([10**9]) == 0 and grammar.error
    row = np.ones(grammar.compiled.mask_words, dtype=np.int32)
    assert not grammar.fill_mask(row) and not row.any()


def test_preempted_constrained_sequences_give_the_same_tokens(engine, tmp_path):
    spec = GrammarSpec("regex", "([0-9][a-z]){60}")
    items = [constrained(i, [i + 1], spec, temperature=1.0, seed=i, max_tokens=140, ignore_eos=True) for i in range(6)]
    small = make_engine(make_tiny_model(tmp_path / "m"), kv_cache_gib=0.00012, max_num_seqs=8)
    got = tokens_of(run(small, items))
    assert small.stats().num_preemptions > 0
    assert got == tokens_of(run(engine, items))


def test_one_grammar_is_compiled_once_for_all_its_sequences(engine):
    before = engine.stats()
    spec = GrammarSpec("regex", "compiled once: [ab]{3}")
    run(engine, [constrained(i, [i + 1], spec) for i in range(5)])
    after = engine.stats()
    assert after.num_grammars_compiled == before.num_grammars_compiled + 1
    assert after.num_grammar_cache_hits == before.num_grammar_cache_hits + 4
    assert after.grammar_compile_seconds > before.grammar_compile_seconds
    assert after.grammar_mask_seconds > before.grammar_mask_seconds


def test_bad_grammar_is_refused_before_it_is_queued(engine):
    with pytest.raises(UserError, match="look-around"):
        engine.add_request(constrained("a", [1], GrammarSpec("regex", "(?=a)b")))
    assert not engine.has_work()
