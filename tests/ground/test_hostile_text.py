"""Text made to be slow to read: whatever reads a request's text takes time in proportion to its length."""

import itertools
import json
import random
import time

import pytest

from specserve.chat.thinking_marks import known_marks
from specserve.chat.tools.formats import FORMATS, choose_format
from specserve.chat.tools.parser import CallParser
from specserve.errors import UserError
from specserve.grammar import matcher_source
from specserve.grammar.ecma_regex import to_rust
from specserve.messages import MAX_GRAMMAR_BYTES
from specserve.server.http_body import convert
from specserve.server.openai.request_types import ChatRequest
from specserve.strict_json import MAX_NESTING, decode_json

LIMIT_S = 2.0  # of CPU for a megabyte, which takes 0.1 s at most on a fast core; a quadratic reader takes minutes
LEN = 2**20
OPEN = b"[" * (MAX_NESTING + 1)  # so many that the depth is counted
PIECES = [
    b"[",
    b"]",
    b"{",
    b"}",
    b'"',
    b"\\",
    b'\\"',
    b"\\\\",
    b":",
    b",",
    b"a",
    b"1",
    b" ",
    b"\n",
    b"\\u0041",
    b"\xc3\xa9",
]
PIECES += [b'"[', b'"a":', b"1,", b"1.5,", b"1e3,", b"[[],", b"{},", b'"",', b"1" * 400, b"\\ud83d"]


def seconds(read, text):
    """Of this thread alone: other processes may have the cores meanwhile."""
    start = time.thread_time()
    try:
        read(text)
    except UserError:
        pass
    return time.thread_time() - start


@pytest.mark.parametrize("start", [OPEN, OPEN + b'"', b"[", b'["'], ids=repr)
def test_bodies_of_one_piece_repeated_are_read_in_linear_time(start):
    for piece in PIECES:
        body = start + piece * (LEN // len(piece))
        assert min(seconds(decode_json, body) for _ in range(2)) < LIMIT_S, piece


def test_random_bodies_are_read_in_linear_time_and_counted_right():
    rng = random.Random(3)
    for _ in range(40):
        few = rng.choices(PIECES, k=rng.randint(2, 4))
        body = OPEN * rng.randint(0, 1) + b"".join(rng.choices(few, k=20_000))
        assert seconds(decode_json, body) < LIMIT_S, few
    for _ in range(3000):
        value = json.dumps({"a": [rng.choice(['"', "\\", "[[{", '\\"', "}", "é", 1]) for _ in range(9)]}).encode()
        depth = rng.choice([1, MAX_NESTING - 2, MAX_NESTING - 1, MAX_NESTING + 5])
        body = b"[" * depth + value + b"]" * depth
        if depth + 2 <= MAX_NESTING:
            assert decode_json(body) == json.loads(body)
        else:
            with pytest.raises(UserError, match="nested deeper"):
                decode_json(body)


def test_grammars_expressions_and_unknown_names_are_read_in_linear_time():
    pieces = [
        "[",
        "]",
        "\n",
        " ",
        "a",
        "{",
        "1",
        "{1",
        "{1,",
        "max_tokens ",
        "a\n",
        "a ::",
        '%json {"a":1}',
        "%json ",
        "\\",
    ]
    length = MAX_GRAMMAR_BYTES
    for first, second in itertools.product(pieces, ["", "["]):
        text = (first + second) * (length // len(first + second))
        for read in (matcher_source._with_prepared_schemas, matcher_source._GBNF.search, to_rust):
            assert seconds(read, text) < LIMIT_S, (read, first, second)
    for piece in (" - at `", "`", "Object contains unknown field `", "$."):
        name = piece * (LEN // len(piece))
        assert seconds(lambda name: convert({"messages": [], name: 1}, ChatRequest), name) < LIMIT_S
        assert seconds(lambda name: convert({"messages": [{name: 1}]}, ChatRequest), name) < LIMIT_S


@pytest.mark.parametrize("start", ["tools ", "tools <tool_call>", "raise_exception( ", "raise_exception( " * 2**12])
def test_templates_of_adapters_are_read_in_linear_time(start):
    """Which the server itself does; it renders them elsewhere."""
    pieces = (
        "<tool_call>",
        ".",
        " ",
        "a",
        "a |",
        "\\n",
        "raise_exception( ",
        " system",
        "system not ",
        "message['thinking",
        "<think>",
    )
    for piece in pieces:
        text = start + piece * (LEN // 8 // len(piece))
        for read in (choose_format, lambda template: known_marks(template, ())):
            assert seconds(read, text) < LIMIT_S, piece


@pytest.mark.parametrize("name", FORMATS)
def test_generated_text_is_parsed_in_linear_time(name):
    for piece in ("{", '{"name": ', '{"name": "f", "arguments": {', "<tool_call>", "[TOOL_CALLS] [{", " ", "\\", '"'):
        parser = CallParser(FORMATS[name], ["f"], eager=False)
        text = FORMATS[name].marker + FORMATS[name].opening + piece * (2**16 // len(piece))

        def read(text, parser=parser):
            for idx in range(0, len(text), 4):
                parser.push(text[idx : idx + 4])
            parser.finish()

        assert seconds(read, text) < LIMIT_S, piece
