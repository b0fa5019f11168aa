"""Tools of a request: definitions, prompts of each model family, and the grammars that hold calls to their schemas."""

import dataclasses
import json
import random

import jsonschema
import msgspec
import numpy as np
import pytest
from tiny_models import CHAT_TEMPLATE, make_tokenizer
from tokenizers import AddedToken
from tool_templates import TEMPLATES, make_tool_tokenizer

from specserve.chat.messages import chat_messages
from specserve.chat.tools.definitions import tool_use
from specserve.chat.tools.formats import FORMATS, choose_format
from specserve.chat.tools.grammar import Marks
from specserve.chat.tools.plan import direct_adapter, make_plan, markers
from specserve.chat.tools.prompt import for_template
from specserve.chat.types import Message
from specserve.errors import UserError
from specserve.grammar.compiler import GrammarCompiler
from specserve.grammar.structured_output import schema_spec
from specserve.messages import GrammarSpec
from specserve.server.openai.request_types import ChatRequest
from specserve.text.tokenizer import TextTokenizer

CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "unit": {"enum": ["celsius", "kelvin"]},
        "days": {"type": "array", "items": {"$ref": "#/$defs/day"}, "maxItems": 3},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
    "$defs": {"day": {"type": "integer", "minimum": 0, "maximum": 365}},
}
ADD = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["a"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": CITY, "add": ADD}


def function(name, parameters=None, **fields):
    return {"type": "function", "function": {"name": name, "parameters": parameters or SCHEMAS[name], **fields}}


def request(**fields):
    fields = {"messages": [{"role": "user", "content": "hi"}], **fields}
    return msgspec.convert(fields, ChatRequest)


BOTH = [function("get_weather", description="the weather"), function("add")]


def plan_of(format="hermes", marks=None, own_adapter=None, answer=None, **fields):
    use = tool_use(request(**{"tools": BOTH, **fields}))
    return make_plan(use, FORMATS[format], marks or Marks(), own_adapter, answer)


# -- definitions


def test_no_tools_or_tool_choice_none_offer_nothing():
    assert tool_use(request()) is None
    assert tool_use(request(tools=[], tool_choice="auto")) is None
    assert tool_use(request(tools=BOTH, tool_choice="none")) is None


def test_tool_choice_says_which_tools_and_how():
    assert tool_use(request(tools=BOTH)).mode == "auto"
    use = tool_use(request(tools=BOTH, tool_choice="required", parallel_tool_calls=False))
    assert (use.mode, use.parallel, len(use.tools)) == ("required", False, 2)
    named = tool_use(request(tools=BOTH, tool_choice={"type": "function", "function": {"name": "add"}}))
    assert (named.mode, named.parallel, [tool.name for tool in named.tools]) == ("named", False, ["add"])


def test_allowed_tools_are_those_that_may_be_called():
    def allowed(mode, *names):
        tools = [{"type": "function", "function": {"name": name}} for name in names]
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}

    use = tool_use(request(tools=BOTH, tool_choice=allowed("required", "add"), parallel_tool_calls=True))
    assert (use.mode, use.parallel, [tool.name for tool in use.tools]) == ("required", True, ["add"])
    assert tool_use(request(tools=BOTH, tool_choice=allowed("auto", "add"))).mode == "auto"
    for wrong in (allowed("none", "add"), allowed("auto"), allowed("auto", "rm"), {"type": "allowed_tools"}):
        with pytest.raises(UserError, match="tool_choice"):
            tool_use(request(tools=BOTH, tool_choice=wrong))
    with pytest.raises(UserError, match="no tools"):
        tool_use(request(tool_choice=allowed("required", "add")))


BAD_TOOLS = {
    "too many": ([function(f"f{idx}", ADD) for idx in range(129)], "128"),
    "two of one name": ([function("add"), function("add")], "add"),
    "a name with a space": ([function("a b", ADD)], "a b"),
    "a long name": ([function("a" * 65, ADD)], "64"),
    "no function": ([{"type": "function"}], "function"),
    "another type": ([{"type": "retrieval"}], "function"),
    "text": (["add"], "function"),
    "an unknown field": ([{**function("add"), "name": "add"}], "name"),
    "a schema that is no object": ([function("add", {"type": "array"})], "object"),
    "a large schema": ([function("add", {"description": "x" * 70_000})], "65536"),
    "a deep schema": ([function("add", json.loads('{"items":' * 50 + "{}" + "}" * 50))], "deep"),
    "strict is text": ([function("add", strict="yes")], "strict"),
    "an adapter that is a number": ([{**function("add"), "x-adapter": 3}], "x-adapter"),
    "two adapters": ([{**function("add", **{"x-adapter": "a"}), "x-adapter": "b"}], "two adapters"),
}


@pytest.mark.parametrize("name", BAD_TOOLS)
def test_bad_tools_are_refused_by_place(name):
    tools, word = BAD_TOOLS[name]
    with pytest.raises(UserError, match=word) as caught:
        tool_use(request(tools=tools))
    assert caught.value.param.startswith("tools") and caught.value.status == 400


@pytest.mark.parametrize(
    "choice", ["any", 5, {"type": "function"}, {"type": "function", "function": {"name": "rm"}}, {"name": "add"}, []]
)
def test_unknown_tool_choice_is_refused(choice):
    with pytest.raises(UserError, match="tool_choice"):
        tool_use(request(tools=BOTH, tool_choice=choice))


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_without_tools_is_refused(choice):
    with pytest.raises(UserError, match="no tools"):
        tool_use(request(tool_choice=choice))


def test_adapter_is_read_from_either_place():
    tools = [{**function("add"), "x-adapter": "one"}, function("get_weather", **{"x-adapter": "two"})]
    use = tool_use(request(tools=tools))
    assert [tool.adapter for tool in use.tools] == ["one", "two"]
    assert all("x-adapter" not in json.dumps(tool.definition()) for tool in use.tools)


def test_adapters_of_tools_switch_unless_the_request_can_run_with_them():
    tools = [{**function("add"), "x-adapter": "one"}, function("get_weather")]
    named = {"type": "function", "function": {"name": "add"}}
    use = tool_use(request(tools=tools, tool_choice=named))
    assert direct_adapter(use, None) == "one" and direct_adapter(use, "two") == "two"
    assert not plan_of(tools=tools, tool_choice=named, own_adapter="one").switching
    assert plan_of(tools=tools, tool_choice=named, own_adapter="two").switching
    assert plan_of(tools=tools).switching and not plan_of(tools=BOTH, own_adapter="two").switching


# -- what cannot be enforced

UNSERVED = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"tools": [function("f", UNSERVED, strict=True)]},
    ],
    ids=["required", "named", "strict"],
)
def test_schema_that_cannot_be_enforced_is_refused_where_it_must_be(fields):
    with pytest.raises(UserError, match="'f'.*not") as caught:
        plan_of(**{"tools": [function("f", UNSERVED)], **fields})
    assert caught.value.code == "invalid_function_parameters"


def test_schema_that_cannot_be_enforced_allows_any_object_under_auto():
    plan = plan_of(tools=[function("f", UNSERVED), function("add")])
    assert [tool.schema for tool in plan.tools] == [{"type": "object"}, ADD]
    assert plan.grammar is not None


def test_tools_too_large_for_a_grammar_are_read_as_found_under_auto_only():
    large = {"type": "object", "properties": {f"p{idx}": {"enum": ["x" * 900]} for idx in range(60)}}
    tools = [function(f"f{idx}", large) for idx in range(6)]
    assert plan_of(tools=tools).grammar is None
    with pytest.raises(UserError, match="bytes"):
        plan_of(tools=tools, tool_choice="required")


# -- grammars


def tokenizers():
    for family in FORMATS:
        for added in (True, False):
            yield pytest.param(family, added, id=f"{family}-{'added' if added else 'plain'}")


@pytest.fixture(scope="module")
def compilers():
    made = {}

    def get(family, added):
        if (family, added) not in made:
            fast = make_tool_tokenizer(family, vocab_size=320, added=added)
            eos = fast.convert_tokens_to_ids("<|im_end|>")
            made[family, added] = fast, eos, GrammarCompiler(fast.backend_tokenizer, 320, [eos])
        return made[family, added]

    yield get
    for _, _, compiler in made.values():
        compiler.close()


def marks_of(fast, family):
    wanted = markers(FORMATS[family])
    return Marks({token.content: idx for idx, token in fast.added_tokens_decoder.items() if token.content in wanted})


def generate(compiled, eos, rng, max_tokens=400):
    """Random tokens that the grammar allows, until it ends; None when it does not within `max_tokens`."""
    grammar, ids = compiled.start(), []
    row = np.zeros(compiled.mask_words, np.int32)
    while len(ids) < max_tokens and not grammar.is_terminated:
        assert grammar.fill_mask(row), grammar.error
        allowed = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")[: compiled.vocab_size])
        token = int(rng.choice(list(allowed)))
        if token == eos:
            return ids
        assert grammar.commit([token]) == 1
        ids.append(token)
    return ids if grammar.is_terminated else None


def read(plan, text):
    parser = plan.parser()
    events = parser.push(text) + parser.finish()
    content = "".join(event.text for event in events if hasattr(event, "text") and not hasattr(event, "index"))
    names = [event.name for event in events if hasattr(event, "name")]
    arguments = [
        "".join(e.text for e in events if getattr(e, "index", -1) == i and hasattr(e, "text")) for i in range(99)
    ]
    return content, list(zip(names, arguments, strict=False))


@pytest.mark.parametrize(("family", "added"), tokenizers())
def test_whatever_a_required_grammar_allows_is_calls_with_valid_arguments(compilers, family, added):
    fast, eos, compiler = compilers(family, added)
    plan = plan_of(family, marks_of(fast, family), tool_choice="required")
    compiled, rng, counts = compiler.compile(plan.grammar), random.Random(0), []
    for _ in range(40):
        if (ids := generate(compiled, eos, rng)) is not None:
            content, calls = read(plan, fast.decode(ids))
            assert content == "" and calls
            for name, arguments in calls:
                jsonschema.validate(json.loads(arguments), SCHEMAS[name])
            counts.append(len(calls))
    assert len(counts) > 20 and (max(counts) > 1) == (family != "llama3")


@pytest.mark.parametrize(("family", "added"), tokenizers())
def test_parallel_tool_calls_false_and_a_named_tool_allow_exactly_one(compilers, family, added):
    fast, eos, compiler = compilers(family, added)
    named = {"type": "function", "function": {"name": "add"}}
    for fields in ({"tool_choice": "required", "parallel_tool_calls": False}, {"tool_choice": named}):
        plan = plan_of(family, marks_of(fast, family), **fields)
        compiled, rng = compiler.compile(plan.grammar), random.Random(1)
        texts = [fast.decode(ids) for _ in range(20) if (ids := generate(compiled, eos, rng)) is not None]
        assert texts and all(len(read(plan, text)[1]) == 1 for text in texts)
        if "tool_choice" in fields and fields["tool_choice"] is named:
            assert {read(plan, text)[1][0][0] for text in texts} == {"add"}


def num_allowed(compiled, fast, text):
    ids = fast.backend_tokenizer.encode(text, add_special_tokens=False).ids
    return compiled.start().num_allowed(ids), len(ids)


OPENINGS = {"hermes": "<tool_call>\n", "mistral": "[TOOL_CALLS] [", "llama3": ""}
CLOSINGS = {"hermes": "\n</tool_call>", "mistral": "]", "llama3": ""}


@pytest.mark.parametrize(("family", "added"), tokenizers())
def test_under_auto_text_is_free_until_a_call_and_forced_from_there(compilers, family, added):
    fast, _, compiler = compilers(family, added)
    plan = plan_of(family, marks_of(fast, family))
    compiled, key = compiler.compile(plan.grammar), FORMATS[family].arguments_key
    lead = "" if family == "llama3" else "Let me see. "
    opening, closing = lead + OPENINGS[family], CLOSINGS[family]
    good = f'{opening}{{"name": "add", "{key}": {{"a": 1}}}}{closing}'
    for text in ("", "Hello, {braces} and <tool_ or [TOOL and \u00e9.\n", '{"a": 1}', '{"name": 5}', good):
        num, total = num_allowed(compiled, fast, text)
        assert num == total, text
    for bad in ('{"name": "rm"', f'{{"name": "add", "{key}": {{"b"', f'{{"name": "add", "{key}": {{"a": 100'):
        num, total = num_allowed(compiled, fast, opening + bad)
        assert num < total, bad
    num, total = num_allowed(compiled, fast, good + " more")
    assert num < total
    assert read(plan, good) == (lead, [("add", '{"a": 1}')])


@pytest.mark.parametrize(("family", "added"), tokenizers())
@pytest.mark.parametrize("switching", [False, True], ids=["", "switching"])
def test_an_answer_in_a_format_is_that_or_calls(compilers, family, added, switching):
    fast, eos, compiler = compilers(family, added)
    note = {"type": "object", "properties": {"note": {"type": "string", "maxLength": 9}}, "required": ["note"]}
    answer = schema_spec({**note, "additionalProperties": False}, "response_format")
    tools = [{**function("add"), **({"x-adapter": "one"} if switching else {})}, function("get_weather")]
    plan = plan_of(family, marks_of(fast, family), answer=answer, tools=tools)
    compiled, rng, seen = compiler.compile(plan.grammar), random.Random(3), set()
    for _ in range(40):
        if (ids := generate(compiled, eos, rng)) is None:
            continue
        text = fast.decode(ids)
        while text is not None and (tool := plan.announced(text)) is not None:
            rest = generate(compiler.compile(plan.arguments_spec(tool)), eos, rng)
            text = None if rest is None else text + fast.decode(rest)
        if text is None:
            continue
        content, calls = read(plan, text)
        assert bool(content) != bool(calls)
        if content:
            assert set(json.loads(content, strict=False)) == {"note"}
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
        seen |= {"text"} if content else {name for name, _ in calls}
    assert seen == {"text", *SCHEMAS}
    for bad in ("Well: ", ' {"note": ""}', '{"note": ""}' + (OPENINGS[family] or ";")):
        assert num_allowed(compiled, fast, bad)[0] < num_allowed(compiled, fast, bad)[1], bad


def test_a_format_holds_for_answers_that_may_call_nothing_and_gives_way_to_calls_that_must_come():
    answer = GrammarSpec("json_object", "")
    assert plan_of(tool_choice="required", answer=answer) == plan_of(tool_choice="required")
    assert not plan_of(answer=answer).words.free_text
    large = {"type": "object", "properties": {f"p{idx}": {"enum": ["x" * 900]} for idx in range(60)}}
    with pytest.raises(UserError, match="bytes"):
        plan_of(tools=[function(f"f{idx}", large) for idx in range(6)], answer=answer)


NAMES = {"type": "object", "properties": {"name": {"type": "string"}, "parameters": {}}}
UNTOLD = {
    "properties like a call's": ("llama3", ("json_schema", json.dumps(NAMES)), "'add'"),
    "any object": ("llama3", ("json_object", ""), "'add'"),
    "a choice like a call": ("hermes", ("choice", json.dumps(['<tool_call>\n{"name": "add", "arguments":'])), "'add'"),
    "an expression": ("hermes", ("regex", "[a-z]+"), "expression"),
    "a grammar": ("hermes", ("lark", 'start: "a"'), "grammar"),
    "a schema that cannot be enforced": ("hermes", ("json_schema", '{"not": {}}'), "not"),
    "false": ("hermes", ("json_schema", "false"), "false"),
    "a schema that is elsewhere": ("hermes", ("json_schema", '{"$ref": "http://localhost/a"}'), "localhost"),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_a_format_that_cannot_stand_beside_calls_is_refused(name):
    format, spec, word = UNTOLD[name]
    with pytest.raises(UserError, match=word):
        plan_of(format, tools=[function("add")], answer=GrammarSpec(*spec))


@pytest.mark.parametrize("format", FORMATS)
def test_formats_that_calls_can_be_told_from_stand_beside_them(format):
    specs = [("choice", '["<tool_call>", "[TOOL_CALLS]"]'), ("json_schema", json.dumps(CITY))]
    if format != "llama3":  # whose calls are objects without a marker
        specs += [("json_object", ""), ("json_schema", "true"), ("json_schema", json.dumps(NAMES))]
    for spec in specs:
        assert plan_of(format, answer=GrammarSpec(*spec)).grammar is not None


@pytest.mark.parametrize(("family", "added"), tokenizers())
def test_free_text_may_hold_added_tokens_that_are_text(family, added):
    """A thinking model writes <think> as one token, which no regular expression of a grammar matches."""
    fast = make_tool_tokenizer(family, vocab_size=318, added=added)
    fast.add_tokens([AddedToken("<think>", special=False), AddedToken("</think>", special=False)])
    eos = fast.convert_tokens_to_ids("<|im_end|>")
    compiler = GrammarCompiler(fast.backend_tokenizer, 320, [eos])
    think = tuple(fast.convert_tokens_to_ids(["<think>", "</think>"]))
    plan = plan_of(family, dataclasses.replace(marks_of(fast, family), text_ids=think))
    compiled = compiler.compile(plan.grammar)
    key = FORMATS[family].arguments_key
    for text in ("<think>", "<think>\nHm.\n</think>", "<think>\nHm.</think> It <rains>."):
        num, total = num_allowed(compiled, fast, text)
        assert num == total, text
        if family != "llama3":
            call = f'{text}{OPENINGS[family]}{{"name": "add", "{key}": {{"a": 1}}}}{CLOSINGS[family]}'
            num, total = num_allowed(compiled, fast, call)
            assert num == total, call
            assert num_allowed(compiled, fast, call.replace("add", "rm"))[0] < total - 5
            assert read(plan, call) == (text, [("add", '{"a": 1}')])
    compiler.close()


@pytest.mark.parametrize(("family", "added"), tokenizers())
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_parts_of_a_switching_answer_join_to_one_that_the_whole_grammar_allows(compilers, family, added, choice):
    fast, eos, compiler = compilers(family, added)
    marks = marks_of(fast, family)
    whole = compiler.compile(plan_of(family, marks, tool_choice=choice).grammar)
    tools = [{**function("add"), "x-adapter": "one"}, function("get_weather")]
    plan, rng, num_calls = plan_of(family, marks, tools=tools, tool_choice=choice), random.Random(2), 0
    order = [tool.name for tool in plan.tools]
    for _ in range(30):
        if choice == "auto":
            text = "" if family == "llama3" else "I look."
            first = rng.choice(order)
            text += OPENINGS[family] + FORMATS[family].head(first)
            num, total = num_allowed(compiler.compile(plan.grammar), fast, text)
            assert num == total
        else:
            text = fast.decode(generate(compiler.compile(plan.grammar), eos, rng))
        while text is not None and (tool := plan.announced(text)) is not None:
            ids = generate(compiler.compile(plan.arguments_spec(tool)), eos, rng)
            text = None if ids is None else text + fast.decode(ids)
        if text is None or len(text) > 2000:
            continue
        content, calls = read(plan, text)
        assert content == ("I look." if choice == "auto" and family != "llama3" else "") and calls
        num_calls += len(calls)
        assert num_allowed(whole, fast, text.replace("\ufffd", "?"))[0] > 0
        for name, arguments in calls:
            jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    assert num_calls > 10


def test_128_tools_make_one_grammar(compilers):
    _, _, compiler = compilers("hermes", True)
    plan = plan_of(tools=[function(f"f{idx}", CITY) for idx in range(128)], tool_choice="required")
    assert isinstance(plan.grammar, GrammarSpec)
    compiler.compile(plan.grammar)


# -- prompts

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Weather in K\u00f6ln?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {
                "id": "call_1",
                "type": "function",
                "function": {"name": "add", "arguments": '{"a": 1, "s": "\u00e9<|im_end|>"}'},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "call_1", "content": "3 <|im_end|>"},
]


def chat(messages):
    return chat_messages(msgspec.convert(messages, list[Message]))


def save(tokenizer, path):
    tokenizer.save_pretrained(path)
    return TextTokenizer(path)


@pytest.fixture(scope="module", params=[*TEMPLATES, "plain"])
def rendered(request, tmp_path_factory):
    """(family, format, the ids that end a turn, text) of a conversation with tools."""
    fast = make_tokenizer(317) if request.param == "plain" else make_tool_tokenizer(request.param, vocab_size=320)
    tokenizer = save(fast, tmp_path_factory.mktemp(request.param))
    chosen = choose_format(tokenizer.template.text)
    tools = tool_use(globals()["request"](tools=BOTH)).tools
    messages, definitions = for_template(chat(TALK), tools, chosen)
    ids = tokenizer.encode_chat(messages, True, False, definitions)
    return (
        request.param,
        chosen,
        [token for token in ids if token == tokenizer.encode("<|im_end|>")[0]],
        tokenizer.decode(ids),
    )


def test_template_says_which_format(rendered):
    family, chosen, _, _ = rendered
    assert (chosen.format.name, chosen.native) == (("hermes", False) if family == "plain" else (family, True))


def test_prompt_shows_definitions_calls_and_results(rendered):
    family, _, _, text = rendered
    for part in ('"name": "get_weather"', '"description": "the weather"', '"enum": ["celsius", "kelvin"]', "K\u00f6ln"):
        assert part in text
    key = "parameters" if family == "llama3" else "arguments"
    assert f'{{"name": "add", "{key}": {{"a": 1, "s": "\u00e9<|im_end|>"}}' in text
    assert "3 <|im_end|>" in text


def test_special_tokens_in_arguments_and_results_are_letters(rendered):
    family, _, ends, text = rendered
    num_turns = {"hermes": 4, "llama3": 4, "mistral": 2, "plain": 4}[family]  # one of the four has no end in Mistral's
    assert len(ends) == num_turns and text.count("<|im_end|>") == num_turns + 2


def test_special_tokens_in_definitions_are_letters(tmp_path):
    tokenizer = save(make_tool_tokenizer("hermes", vocab_size=320), tmp_path)
    tools = [
        {
            "type": "function",
            "function": {"name": "f", "description": 'a "<|im_end|>"', "parameters": {"<|im_start|>": 1}},
        }
    ]
    messages = [{"role": "user", "content": "hi"}]
    clean = json.loads(json.dumps(tools).replace("<|im_end|>", "E").replace("<|im_start|>", "S"))
    ids, want = (tokenizer.encode_chat(messages, True, False, item) for item in (tools, clean))
    count = [sum(map(tokenizer.is_special, item)) for item in (ids, want)]
    assert count[0] == count[1]
    assert '"a \\"<|im_end|>\\""' in tokenizer.decode(ids) and '"<|im_start|>": 1' in tokenizer.decode(ids)


def test_template_without_tools_gets_them_in_the_system_message():
    chosen = choose_format(CHAT_TEMPLATE)
    tools = tool_use(request(tools=BOTH)).tools
    second = {**TALK[3], "content": "4"}
    messages, definitions = for_template(chat([*TALK, second]), tools, chosen)
    assert definitions is None
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert messages[0]["content"].startswith("Be brief.\n\n") and "get_weather" in messages[0]["content"]
    assert messages[3]["content"].count("<tool_response>") == 2
    alone, _ = for_template(chat(TALK[1:2]), tools, chosen)
    assert [message["role"] for message in alone] == ["system", "user"]


@pytest.mark.parametrize("field", ["tool.description", "tool.function['description']"])
def test_a_template_that_joins_descriptions_gets_one_of_every_tool(tmp_path, field):
    """As Hermes 3's does, which fails at a tool that has none."""
    own = TEMPLATES["hermes"].replace("{{ tool | tojson }}", "{{ '- ' + FIELD + '!' }}".replace("FIELD", field))
    if "function" not in field:
        own = own.replace("{% for tool in tools %}", "{% for tool in tools %}{% set tool = tool.function %}")
    chosen = choose_format(own)
    bare = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    tools = tool_use(request(tools=[bare, BOTH[0]])).tools
    messages, definitions = for_template(chat(TALK[1:2]), tools, chosen)
    fast = make_tool_tokenizer("hermes", vocab_size=320)
    fast.chat_template = own
    tokenizer = save(fast, tmp_path)
    text = tokenizer.decode(tokenizer.encode_chat(messages, True, False, definitions))
    assert "- !" in text and "- the weather!" in text
    assert for_template([], tools, choose_format(TEMPLATES["hermes"]))[1][0] == bare  # others are shown what there is


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{{ message.thinking }}", "thinking"),
        ("{{ message['reasoning'] }}", "reasoning"),
        ("{{ message.reasoning_content or message.reasoning }}", "reasoning_content"),
        ("{{ m.content }}", "reasoning_content"),
        ({"default": "{{ message['thinking'] }}", "tool_use": "{{ tools }}"}, "thinking"),
    ],
)
def test_what_was_thought_is_given_under_the_templates_name(template, name):
    """gpt-oss' and LFM's call it thinking; clients send it back as they got it."""
    thought = {"role": "assistant", "content": "Yes", "reasoning_content": "hm"}
    for tools in ((), tool_use(request(tools=BOTH)).tools):
        messages, _ = for_template([*chat(TALK[1:2]), thought], tools, choose_format(template))
        assert messages[-1] == {"role": "assistant", "content": "Yes", name: "hm"}


NO_SYSTEM = {
    "Gemma": "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}",
    "Mistral 0.1": "{% if messages[0].role != 'user' %}{{ raise_exception('roles must alternate') }}{% endif %}",
}
TAKES_SYSTEM = {
    "Gemma 3": "{% if m.role == 'system' %}{% endif %}{{ raise_exception('Conversation roles must alternate') }}",
    "Mistral 0.3": "{{ raise_exception('After the optional system message, conversation roles must alternate') }}",
}


def test_a_template_without_system_messages_gets_tools_in_the_users(tmp_path):
    tools = tool_use(request(tools=BOTH)).tools
    for template in NO_SYSTEM.values():
        messages, _ = for_template(chat(TALK[1:]), tools, choose_format(template + CHAT_TEMPLATE))
        assert [message["role"] for message in messages] == ["user", "assistant", "user"]
        assert "get_weather" in messages[0]["content"] and messages[0]["content"].endswith(f"\n\n{TALK[1]['content']}")
        mine, _ = for_template(chat(TALK), tools, choose_format(template + CHAT_TEMPLATE))
        assert mine[0]["role"] == "system"  # a client's own: the template says that it takes none
    for template in (*TAKES_SYSTEM.values(), ""):
        assert choose_format(template + CHAT_TEMPLATE).has_system


def test_override_is_taken_and_unknown_tool_templates_are_not_trusted():
    assert choose_format(CHAT_TEMPLATE, "mistral").format.name == "mistral"
    own = "{% for tool in tools %}{{ tool }}{% endfor %}<tool_call>\n<function=x>"
    assert (choose_format(own).format.name, choose_format(own).native) == ("hermes", False)
    newer = "{{ tools }}[TOOL_CALLS]name[ARGS]{}"
    assert not choose_format(newer).native


@pytest.mark.parametrize("space", ["", " "])
def test_mistrals_calls_are_forced_as_its_template_writes_them(compilers, space):
    """Trained to say an id behind the arguments, a model that may not begins another call there."""
    fast, eos, compiler = compilers("mistral", True)
    chosen = choose_format(TEMPLATES["mistral"].replace("[TOOL_CALLS] [", f"[TOOL_CALLS]{space}["))
    plan = make_plan(
        tool_use(request(tools=BOTH, tool_choice="required")), chosen.format, marks_of(fast, "mistral"), None
    )
    compiled = compiler.compile(plan.grammar)
    call = '{"name": "add", "arguments": {"a": 1}'
    for end in ("}]", ', "id": "aB3456789"}]', ', "id": "aB3456789"}, ' + call + "}]"):
        num, total = num_allowed(compiled, fast, f"[TOOL_CALLS]{space}[{call}{end}")
        assert num == total, end
    for bad in (', "id": "aB34567"}]', ', "ids": "'):
        num, total = num_allowed(compiled, fast, f"[TOOL_CALLS]{space}[{call}{bad}")
        assert num < total, bad
    for cut in range(len(', "id": "aB3456789"')):
        assert read(plan, f"[TOOL_CALLS]{space}[{call}" + ', "id": "aB3456789"'[:cut]) == ("", [("add", '{"a": 1}')])


CALLS_OF_OTHERS = {
    "GLM": "{{ tools }}<tool_call>{{ c.name }}\n<arg_key>{{ k }}</arg_key><arg_value>{{ v }}</arg_value></tool_call>",
    "Apriel": "{{ tools }}objects within <tool_call></tool_call> tags: <tool_calls>[{{ c | tojson }}]</tool_calls>",
    "MiniMax": "{{ tools }}{% set begin = '<tool_call>' %}{{ begin }}<invoke name=\"{{ c.name }}\">",
    "Functionary": "{{ tools }}{{ '\\nEnvironment: ipython' }}<function={{ c.name }}>{{ c.arguments }}</function>",
    "MiniMax-M1": "{% if m.role == 'ipython' or m.tool_calls %}{{ tools }}[{'name': {{ c.name }}}]{% endif %}",
}


SPELLED = "'<tool_call>\\n' + '{\"name\": \"' + c.name"
FILTERED = "'<tool_call>\\n' ~ (c.function | tojson)"


@pytest.mark.parametrize("call", [SPELLED, FILTERED])
def test_hermes_calls_may_be_spelled_or_written_by_a_filter(call):
    assert choose_format("{{ tools }}{% for c in m.tool_calls %}{{ " + call + " }}</tool_call>{% endfor %}").native


@pytest.mark.parametrize("family", CALLS_OF_OTHERS)
def test_a_word_of_a_format_does_not_make_calls_of_another_its_own(family):
    """Their calls would be shown to the model in one way, and forced and read in another."""
    assert (choose_format(CALLS_OF_OTHERS[family]).format.name, choose_format(CALLS_OF_OTHERS[family]).native) == (
        "hermes",
        False,
    )


def test_a_template_of_its_own_for_tools_is_read_where_tools_are_offered(tmp_path):
    fast = make_tool_tokenizer("hermes", vocab_size=320)
    fast.chat_template = {"default": CHAT_TEMPLATE, "tool_use": TEMPLATES["hermes"]}
    tokenizer = save(fast, tmp_path)
    chosen = choose_format(tokenizer.template.text)
    assert (chosen.format.name, chosen.native) == ("hermes", True)
    offered = tool_use(request(tools=BOTH)).tools
    for tools, num_signs in ((offered, 1), ((), 0)):  # <tools> is that template's alone, beside our own instructions
        messages, definitions = for_template(chat(TALK), tools, chosen)
        text = tokenizer.decode(tokenizer.encode_chat(messages, True, False, definitions))
        assert text.count("<tools>") == num_signs
        assert '<tool_call>\n{"name": "add"' in text and "<tool_response>" in text


BAD_TALK = {
    "result without call": ([*TALK[:2], TALK[3]], "answers no tool call"),
    "result of another call": ([*TALK[:3], {**TALK[3], "tool_call_id": "call_2"}], "call_2"),
    "result without id": ([*TALK[:3], {"role": "tool", "content": "x"}], "tool_call_id"),
    "arguments that are no JSON": (
        [{"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{"}}]}],
        "arguments",
    ),
    "arguments that are a list": (
        [{"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "[]"}}]}],
        "arguments",
    ),
    "call without id": ([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}], "id"),
    "call that is text": ([{"role": "assistant", "tool_calls": ["f"]}], "tool_calls"),
    "calls of the user": ([{"role": "user", "content": "x", "tool_calls": [{}]}], "assistant"),
    "very many calls": ([{"role": "assistant", "tool_calls": [{}] * 1000}], "128"),
}


@pytest.mark.parametrize("name", BAD_TALK)
def test_bad_calls_and_results_in_messages_are_refused_by_place(name):
    messages, word = BAD_TALK[name]
    with pytest.raises(UserError, match=word) as caught:
        chat(messages)
    assert caught.value.param.startswith("messages[")
