"""What a schema or expression lets through, as texts; compilation's limits and cache."""

import datetime
import json
import random
import threading

import jsonschema
import numpy as np
import pytest
from tiny_models import make_tokenizer

from specserve.errors import GrammarError, UserError
from specserve.grammar import compiler as grammar_compiler
from specserve.grammar.compiler import GrammarCompiler
from specserve.grammar.ecma_regex import to_rust
from specserve.grammar.json_schema import prepare
from specserve.messages import GrammarSpec

VOCAB = 320


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(VOCAB - 3).backend_tokenizer


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return GrammarCompiler(tokenizer, VOCAB, [tokenizer.token_to_id("<|im_end|>")])


def accepts(compiler, tokenizer, spec, text):
    grammar = compiler.compile(spec).start()
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    done = grammar.commit(ids) == len(ids)
    return done and (grammar.is_terminated or grammar.allows(tokenizer.token_to_id("<|im_end|>")))


@pytest.fixture(scope="module")
def takes(compiler, tokenizer):
    return lambda schema, text: accepts(compiler, tokenizer, GrammarSpec("json_schema", json.dumps(schema)), text)


def closed(properties, required=None):
    return {"type": "object", "properties": properties, "additionalProperties": False,
            "required": list(properties) if required is None else required}  # fmt: skip


# -- what comes out satisfies the schema

SCHEMAS = {
    "numbers": closed({"a": {"type": "integer", "minimum": -5, "maximum": 120}, "b": {"type": "number", "minimum": 0,
                       "exclusiveMaximum": 1}, "c": {"type": "integer", "multipleOf": 7, "minimum": 0}}),
    "strings": closed({"a": {"type": "string", "minLength": 2, "maxLength": 5}, "b": {"pattern": "^[a-c]+[0-9]{2}$",
                       "type": "string"}, "c": {"type": "string", "format": "date"}, "d": {"type": "string",
                       "format": "uuid"}, "e": {"type": "string", "format": "date-time"}}),
    "optional": {"type": "object", "properties": {c: {"enum": [1, None, "x", [2], {"y": 3}]} for c in "abcd"},
                 "required": ["b"], "additionalProperties": False},
    "open": {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "maxProperties": 3,
             "additionalProperties": {"enum": ["v"]}},
    "pattern properties": {"type": "object", "patternProperties": {"^x[0-9]$": {"type": "boolean"}},
                           "additionalProperties": False, "maxProperties": 4},
    "arrays": closed({"a": {"type": "array", "prefixItems": [{"type": "boolean"}], "items": {"enum": [1, 2]},
                      "minItems": 2, "maxItems": 5}}),
    "allOf": {"allOf": [closed({"a": {"type": "integer", "minimum": 3}}), {"properties": {"a": {"maximum": 12}}}]},
    "oneOf": {"oneOf": [closed({"kind": {"const": "p"}, "x": {"type": "boolean"}}),
                        closed({"kind": {"const": "q"}, "y": {"type": "null"}})]},
    "recursive": {"$ref": "#/$defs/tree", "$defs": {"tree": closed({"v": {"type": "boolean"}, "next": {"anyOf": [
                  {"type": "null"}, {"$ref": "#/$defs/tree"}]}})}},
    "types": {"type": ["boolean", "null", "integer"]},
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_random_walk_through_a_schema_satisfies_it(compiler, tokenizer, name):
    rng, schema = random.Random(name), SCHEMAS[name]
    compiled = compiler.compile(GrammarSpec("json_schema", json.dumps(schema)))
    eos, outputs = tokenizer.token_to_id("<|im_end|>"), set()
    checker = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    row = np.zeros(compiled.mask_words, dtype=np.int32)
    for _ in range(60):
        grammar, tokens = compiled.start(), []
        while not grammar.is_terminated and len(tokens) < 300:
            assert grammar.fill_mask(row), grammar.error
            allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()
            assert all(grammar.allows(token) for token in rng.sample(allowed, min(3, len(allowed))))
            token = rng.choice(allowed)
            if token == eos:
                break
            assert grammar.commit([token]) == 1
            tokens.append(token)
        if len(tokens) < 300:
            output = tokenizer.decode(tokens)
            checker.validate(json.loads(output))
            outputs.add(output)
    assert len(outputs) >= 3


def test_mask_allows_exactly_the_tokens_that_can_be_committed(compiler):
    compiled = compiler.compile(GrammarSpec("regex", '"[a-z ]{2,9}"|[0-9]+'))
    grammar, row, rng = compiled.start(), np.zeros(10, dtype=np.int32), random.Random(0)
    for _ in range(5):
        assert grammar.fill_mask(row)
        bits = np.unpackbits(row.view(np.uint8), bitorder="little")
        assert [grammar.allows(token) for token in range(VOCAB)] == bits.astype(bool).tolist()
        grammar.commit([rng.choice(np.flatnonzero(bits).tolist())])
        if grammar.is_terminated:
            break


# -- white space, escapes, order


def test_white_space_has_the_form_of_pythons_json_or_the_compact_one(takes):
    value = {"a": [1, 2], "b": {"c": "x y"}}
    schema = closed({"a": {"type": "array", "items": {"type": "integer"}}, "b": closed({"c": {"type": "string"}})})
    compact = {**schema, "x-guidance": {"item_separator": ",", "key_separator": ":"}}
    assert takes(schema, json.dumps(value)) and not takes(schema, json.dumps(value, separators=(",", ":")))
    assert takes(compact, json.dumps(value, separators=(",", ":"))) and not takes(compact, json.dumps(value))
    for text in (json.dumps(value, indent=1), " " + json.dumps(value), json.dumps(value) + "\n"):
        assert not takes(schema, text) and not takes(compact, text)


@pytest.mark.parametrize("options", [{"lenient": True}, {"whitespace_pattern": " *"}, {"item_separator": " *,"}, 5])
def test_options_that_would_loosen_a_schema_are_refused(takes, options):
    with pytest.raises(GrammarError, match="x-guidance"):
        takes({"type": "object", "x-guidance": options}, "{}")
    with pytest.raises(GrammarError, match="x-guidance"):
        takes({"items": {"x-guidance": options}}, "[]")


def test_escaped_key_does_not_pass_for_another(takes):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    assert takes(schema, '{"a": 1, "b": "x"}') and not takes(schema, '{"\\u0061": "x"}')
    assert not takes(schema, '{"a": 1, "\\u0061": "x"}') and not takes(schema, '{"a": "x"}')


def test_unicode_escapes_are_text_where_keys_are_fixed(takes):
    schema = closed({"a": {"type": "string", "maxLength": 3}})
    assert takes(schema, '{"a": "\\u00e9é\\n"}') and not takes(schema, '{"a": "\\u00e9\\u00e9\\u00e9\\u00e9"}')
    assert not takes(schema, '{"a": "\\ud800"}')  # half a pair is no text


def test_a_key_written_twice_does_not_count_twice(takes):
    assert takes({"type": "object", "minProperties": 1}, '{"a": 1}')
    assert takes({"type": "object", "minProperties": 2, "required": ["a"]}, '{"a": 1, "b": 2}')
    with pytest.raises(GrammarError, match="minProperties"):
        takes({"type": "object", "minProperties": 2}, '{"a": 1, "a": 2}')


# -- expressions

ECMA = [
    (r"^\s$", "\ufeff", True), (r"^\S$", "\ufeff", False), (r"^[\s]$", "\u2003", True), (r"^[^\S]$", "\u00a0", True),
    (r"^a.b$", "a\u2028b", False), (r"^a.b$", "axb", True), (r"^[.]$", "x", False), (r"^[[a]$", "[", True),
    (r"^[a&&b]+$", "a&b", True), (r"^[~~a]$", "~", True), (r"^\/$", "/", True), (r"^\d$", "٣", False),
    (r"^\w$", "é", False), (r"a|b", "xbx", True), (r"^\\s$", "\\s", True), (r"^[\]]$", "]", True),
    (r"^[^]a]$", "b", None),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "text", "matches"), ECMA)
def test_pattern_means_what_ecma_says(takes, pattern, text, matches):
    if matches is None:
        with pytest.raises(UserError, match="empty class"):
            to_rust(pattern)
    else:
        assert takes({"type": "string", "pattern": pattern}, json.dumps(text, ensure_ascii=False)) is matches


def test_dates_are_those_of_the_calendar(takes):
    days = [datetime.date(year, 1, 1) + datetime.timedelta(n) for year in (1999, 2000) for n in range(0, 366, 9)]
    for day in days:
        assert takes({"type": "string", "format": "date"}, f'"{day.isoformat()}"')
    for text in ("2021-02-29", "1900-02-29", "2021-04-31", "2021-00-10", "2021-13-01", "2021-1-1", "2021-06-00"):
        assert not takes({"type": "string", "format": "date"}, f'"{text}"')
        assert not takes({"type": "string", "format": "date-time"}, f'"{text}T00:00:00Z"')
    assert takes({"type": "string", "format": "date"}, '"2000-02-29"')
    assert not takes({"type": "string", "format": "time"}, '"22:59:60Z"')


def test_choices_may_hold_anything(compiler, tokenizer):
    choices = ['say "x"', "back\\slash", "two\nlines", "é ü 漢", "a", "ab", "/re*/", "<|im_end|>"]
    spec = GrammarSpec("choice", json.dumps(choices))
    for choice in choices[:-1]:
        assert accepts(compiler, tokenizer, spec, choice)
    assert not accepts(compiler, tokenizer, spec, "abc")


def test_schemas_inside_a_grammar_obey_the_same_rules(compiler, tokenizer):
    text = 'start: "<tool>" call "</tool>"\ncall: %json {"type": "array", "items": {"enum": ["}", 2]}}\n'
    spec = GrammarSpec("lark", text)
    assert accepts(compiler, tokenizer, spec, '<tool>["}", 2]</tool>')
    assert not accepts(compiler, tokenizer, spec, '<tool>["}",2]</tool>')
    described = {"type": "null", "description": "x ::= [max_tokens=1] a{100000} %json {"}
    text = f'start: "n" v | "m" v\nv: %json {json.dumps(described)}\n'
    assert accepts(compiler, tokenizer, GrammarSpec("lark", text), "nnull")  # words about a schema are only words
    with pytest.raises(GrammarError, match="'not'"):
        compiler.compile(GrammarSpec("lark", 'start: %json {"not": {}}'))
    with pytest.raises(GrammarError, match="max_tokens"):
        compiler.compile(GrammarSpec("lark", "start: text\ntext[max_tokens=5]: /.*/"))


# -- limits and cache


def test_limits_are_named(compiler):
    deep = {"type": "string"}
    for _ in range(80):
        deep = {"items": deep}
    for spec, words in (
        (GrammarSpec("json_schema", json.dumps(deep)), "deeper than 64"),
        (GrammarSpec("json_schema", json.dumps({"anyOf": [{}] * 20_000})), "more than 10000"),
        (GrammarSpec("regex", "a" * 300_000), "262144"),
        (GrammarSpec("json_schema", "[" * 5000 + "]" * 5000), "cannot be read"),
        (GrammarSpec("json_schema", '{"type": "integer", "multipleOf": 0.00123457}'), "10000"),
    ):
        with pytest.raises(GrammarError, match=words):
            compiler.compile(spec)


def test_neutral_values_of_refused_keywords_ask_for_nothing():
    assert "uniqueItems" not in prepare({"type": "array", "uniqueItems": False})
    with pytest.raises(UserError, match="'uniqueItems' at #/items"):
        prepare({"items": {"uniqueItems": True}})


def test_cache_is_bounded_by_number_and_bytes(tokenizer, monkeypatch):
    compiler = GrammarCompiler(tokenizer, VOCAB, [1])
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED", 5)
    monkeypatch.setattr(grammar_compiler, "MAX_CACHED_BYTES", 200)
    first = compiler.compile(GrammarSpec("regex", "first"))
    for i in range(20):
        compiler.compile(GrammarSpec("regex", f"x{i}"))
        assert compiler.compile(GrammarSpec("regex", "first")) is first  # used, so it stays
    assert compiler.num_cached == 5
    compiler.compile(GrammarSpec("regex", "y" * 180))
    assert compiler.num_cached <= 5 and compiler.num_compiled == 22
    for i in range(5):
        compiler.compile(GrammarSpec("regex", f"{i}" * 60))
    assert compiler.num_cached == 3


def test_equal_specs_under_way_share_one_compilation(tokenizer, monkeypatch):
    compiler, go = GrammarCompiler(tokenizer, VOCAB, [1]), threading.Event()
    compile_ = compiler._compile
    monkeypatch.setattr(compiler, "_compile", lambda spec: go.wait(10) and compile_(spec))
    futures = [compiler.submit(GrammarSpec("regex", "[a-z]{3}")) for _ in range(4)]
    go.set()
    assert len({id(future.result(10)) for future in futures}) == 1
    assert (compiler.num_compiled, compiler.num_cache_hits) == (1, 3)
    assert compiler.submit(GrammarSpec("regex", "[a-z]{3}")).result(0) is futures[0].result()


def test_refusals_reach_whoever_waits(compiler):
    with pytest.raises(GrammarError, match="look-around"):
        compiler.submit(GrammarSpec("regex", "(?!a)b")).result(10)


def test_special_tokens_are_no_text(compiler, tokenizer):
    grammar = compiler.compile(GrammarSpec("json_schema", '{"type": "string"}')).start()
    grammar.commit(tokenizer.encode('"', add_special_tokens=False).ids)
    assert not any(grammar.allows(tokenizer.token_to_id(token)) for token in ("<|im_start|>", "<|im_end|>"))
