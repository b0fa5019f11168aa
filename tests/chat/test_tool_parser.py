"""Tool calls in text: every cut of the text gives the same events, and no text is lost."""

import json
import random

import pytest

from specserve.chat.tools.call_object import ObjectScanner
from specserve.chat.tools.events import Arguments, CallStart, Content
from specserve.chat.tools.formats import FORMATS
from specserve.chat.tools.parser import CallParser

TOOLS = ["get_weather", "add", "get"]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "K\\u00f6ln \\"}</tool_call>", "n": [1, {"a": []}]}}'
HERMES = CALL + "\n</tool_call>"
ADD = '{"name": "add", "arguments": {}}'


def parse(text, format="hermes", *, cuts=(), **modes):
    """(content, [(name, arguments)]) of `text` fed in pieces."""
    parser = CallParser(FORMATS[format], TOOLS, **{"eager": False, **modes})
    events, start = [], 0
    for cut in [*cuts, len(text)]:
        events += parser.push(text[start:cut])
        start = cut
    events += parser.finish()
    content, calls = "", []
    for event in events:
        if isinstance(event, Content):
            content += event.text
        elif isinstance(event, CallStart):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        else:
            assert isinstance(event, Arguments) and event.index == len(calls) - 1
            calls[-1][1] += event.text
    return content, [tuple(call) for call in calls]


WEATHER = ("get_weather", '{"city": "K\\u00f6ln \\"}</tool_call>", "n": [1, {"a": []}]}')
CASES = {
    "text alone": ("hermes", "Nothing < to <tool_ call.\n", "Nothing < to <tool_ call.\n", []),
    "one call": ("hermes", HERMES, "", [WEATHER]),
    "two calls": ("hermes", f"{HERMES}\n<tool_call>\n{ADD}\n</tool_call>", "", [WEATHER, ("add", "{}")]),
    "text around": ("hermes", f"Let me look. {HERMES} Done.", "Let me look.  Done.", [WEATHER]),
    "white space around": ("hermes", f"\n {HERMES}\n\n", "", [WEATHER]),
    "no white space": ("hermes", f"<tool_call>{ADD}</tool_call>", "", [("add", "{}")]),
    "cut in the arguments": ("hermes", HERMES[:40], HERMES[:40], []),
    "cut in the end": ("hermes", HERMES[:-4], HERMES[:-4], []),
    "cut in the marker": ("hermes", "a <tool_c", "a <tool_c", []),
    "broken JSON": ("hermes", '<tool_call>\n{"name": "add", "arguments": {1}}\n</tool_call>', None, []),
    "no object": ("hermes", "<tool_call>\nadd(1)\n</tool_call>", None, []),
    "unknown tool": ("hermes", '<tool_call>\n{"name": "rm", "arguments": {}}\n</tool_call>', None, []),
    "name is a list": ("hermes", '<tool_call>\n{"name": ["add"], "arguments": {}}\n</tool_call>', None, []),
    "arguments as text": ("hermes", '<tool_call>\n{"name": "add", "arguments": "{}"}\n</tool_call>', None, []),
    "NaN": ("hermes", '<tool_call>\n{"name": "add", "arguments": {"a": NaN}}\n</tool_call>', None, []),
    "text in the frame": ("hermes", f"<tool_call>\n{ADD} and\n</tool_call>", None, []),
    "broken then whole": ("hermes", f"<tool_call>no{HERMES}", "<tool_call>no", [WEATHER]),
    "whole then broken": ("hermes", f"{HERMES}\n<tool_call>no", "\n<tool_call>no", [WEATHER]),
    "other order": (
        "hermes",
        '<tool_call>{"arguments": {"a": 1}, "name": "add"}</tool_call>',
        "",
        [("add", '{"a": 1}')],
    ),
    "list": (
        "mistral",
        f'Well: [TOOL_CALLS] [{ADD}, {{"name": "get", "arguments": {{"k": "]"}}}}]',
        "Well: ",
        [("add", "{}"), ("get", '{"k": "]"}')],
    ),
    "compact list": ("mistral", f"[TOOL_CALLS][{ADD},{ADD}]", "", [("add", "{}"), ("add", "{}")]),
    "list with ids": (
        "mistral",
        '[TOOL_CALLS][{"name": "add", "arguments": {}, "id": "a1B2c3D4e"}, '
        '{"name": "get", "arguments": {"k": 1}, "id": "000000000"}]',
        "",
        [("add", "{}"), ("get", '{"k": 1}')],
    ),
    "list that breaks": ("mistral", f"[TOOL_CALLS] [{ADD}, {{oops}}]", ", {oops}]", [("add", "{}")]),
    "list that is cut": ("mistral", f"[TOOL_CALLS] [{ADD}", f"[TOOL_CALLS] [{ADD}", []),
    "brackets in text": ("mistral", "a [TOOL] [1]", "a [TOOL] [1]", []),
    "bare object": ("llama3", '{"name": "get", "parameters": {"k": 1}}', "", [("get", '{"k": 1}')]),
    "tagged object": ("llama3", '<|python_tag|>{"name": "get", "parameters": {"k": 1}}', "", [("get", '{"k": 1}')]),
    "several objects": (
        "llama3",
        ' {"name": "get", "parameters": {}}; {"type": "function", "name": "add", "parameters": {"a": 1}}',
        "",
        [("get", "{}"), ("add", '{"a": 1}')],
    ),
    "object that is none": ("llama3", '{"a": {"name": "get", "parameters": {}}} x', None, []),
    "object behind text": ("llama3", 'So: {"name": "get", "parameters": {}}', None, []),
    "text behind object": ("llama3", '{"name": "get", "parameters": {}} ok', " ok", [("get", "{}")]),
    "tag and code": ("llama3", "<|python_tag|>print(1)", None, []),
    "white space only": ("llama3", " \n", None, []),
    "nothing": ("hermes", "", "", []),
}


@pytest.mark.parametrize("name", CASES)
def test_every_cut_gives_the_same_content_and_calls(name):
    format, text, content, calls = CASES[name]
    want = (text if content is None else content, calls)
    assert parse(text, format) == want
    assert parse(text, format, cuts=range(1, len(text))) == want
    for cut in range(len(text)):
        assert parse(text, format, cuts=[cut]) == want, cut
    rng = random.Random(0)
    for _ in range(50):
        cuts = sorted(rng.sample(range(len(text) + 1), min(4, len(text))))
        assert parse(text, format, cuts=cuts) == want, cuts


EXACT = ["one call", "two calls", "list", "list with ids", "bare object", "tagged object"]


@pytest.mark.parametrize("name", EXACT)
def test_eager_reads_whole_calls_the_same_way(name):
    format, text, content, calls = CASES[name]
    for cuts in [(), range(1, len(text)), *([cut] for cut in range(len(text)))]:
        assert parse(text, format, eager=True, cuts=cuts) == (content, calls)


def test_eager_announces_the_name_first_and_streams_arguments_as_they_come():
    parser = CallParser(FORMATS["hermes"], TOOLS, eager=True)
    head, body = HERMES.index('{"city'), 10
    assert parser.push(HERMES[:head]) == []
    assert parser.push(HERMES[head : head + 1]) == [CallStart(0, "get_weather"), Arguments(0, "{")]
    assert parser.push(HERMES[head + 1 : head + body]) == [Arguments(0, HERMES[head + 1 : head + body])]


@pytest.mark.parametrize("length", range(len(HERMES)))
def test_eager_text_that_ends_early_is_content_before_the_name_and_arguments_after_it(length):
    text = HERMES[:length]
    content, calls = parse(text, eager=True)
    if length <= HERMES.index('{"city'):
        assert (content, calls) == (text, [])
    else:
        assert content == "" and calls[0][0] == "get_weather"
        assert calls[0][1] == WEATHER[1][: len(calls[0][1])] and len(calls[0][1]) >= min(
            length - HERMES.index('{"city'), len(WEATHER[1])
        )


EITHER = {
    "an object that quotes a call": json.dumps({"a": HERMES}),
    "a call behind text": "Well: " + HERMES,
    "the start of a marker": "<tool_c",
    "a marker alone": "<tool_call>",
    "a broken call before one": "<tool_call>no" + HERMES,
    "space": " ",
    "nothing": "",
}


@pytest.mark.parametrize("name", EITHER)
def test_a_text_that_begins_as_no_call_holds_none_where_it_is_calls_or_text(name):
    text = EITHER[name]
    for cut in range(len(text) + 1):
        assert parse(text, eager=True, calls_or_text=True, cuts=[cut]) == (text, [])


@pytest.mark.parametrize("name", [name for name in EXACT if CASES[name][2] == ""])
def test_calls_or_text_reads_calls_as_without(name):
    format, text, content, calls = CASES[name]
    for cut in range(len(text)):
        assert parse(text, format, eager=True, calls_or_text=True, cuts=[cut]) == (content, calls)


def test_held_calls_come_only_when_their_frame_is_complete():
    parser = CallParser(FORMATS["hermes"], TOOLS, eager=False)
    assert parser.push(HERMES[:-1]) == []
    assert [type(event) for event in parser.push(HERMES[-1])] == [CallStart, Arguments]


def test_random_markers_and_brackets_lose_no_text():
    pieces = ["<tool_call>", "\n", '{"name": "', "add", '", "arguments": ', "{", "}", "</tool_call>", '"', "\\", " x "]
    rng = random.Random(1)
    for _ in range(2000):
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        content, calls = parse(text)
        if not calls:
            assert content == text
        cuts = sorted(rng.sample(range(len(text) + 1), min(3, len(text))))
        assert parse(text, cuts=cuts) == (content, calls), text
        for _, arguments in calls:
            assert isinstance(json.loads(arguments), dict)


def test_many_broken_markers_are_content_in_linear_time():
    text = '<tool_call>{"' * 20_000
    assert parse(text, cuts=range(0, len(text), 7)) == (text, [])


@pytest.mark.parametrize("text", ['{"a": "\\\\"}', '{"a": "}\\""}', "{[{}]}", '{"\\\\\\"}": {}}'])
def test_scanner_finds_the_end_however_the_text_is_cut(text):
    for cut in range(len(text)):
        scanner = ObjectScanner()
        first = scanner.feed(text[:cut])
        assert first is None and scanner.feed(text[cut:] + " }") == len(text) - cut, cut
