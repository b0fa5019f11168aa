"""Bodies of /v1/responses as chat requests: items as messages, and every refusal in the words of the body."""

from __future__ import annotations

import msgspec
import pytest

from specserve.errors import UserError
from specserve.server.http_body import convert
from specserve.server.responses.conversion import chat_request, in_these_words, input_items
from specserve.server.responses.input_items import messages_of
from specserve.server.responses.request_types import ResponsesRequest


def user(text):
    return {"role": "user", "content": text}


def said(text, **fields):
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": None}]
    return {"type": "message", "id": "msg_1", "role": "assistant", "status": "completed", "content": content, **fields}


def thought(text):
    return {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def call(call_id, arguments='{"a": 1}'):
    return {"type": "function_call", "id": "fc_1", "call_id": call_id, "name": "add", "arguments": arguments}


def output(call_id, text="2"):
    return {"type": "function_call_output", "call_id": call_id, "output": text}


def text_part(text, kind="input_text"):
    return {"type": kind, "text": text}


SUMMARY = [text_part("Adds.", "summary_text"), text_part("Ends.", "summary_text")]


def chat_call(call_id):
    return {"id": call_id, "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}


CONVERSATIONS = {
    "texts and parts": (
        [
            {"role": "developer", "content": [text_part("Be"), text_part(" brief")]},
            user("Hi"),
            said("Hello", phase=None),
            {"type": "message", "role": "assistant", "content": "there", "phase": "final_answer"},
            user([]),
        ],
        [("developer", "Be brief"), ("user", "Hi"), ("assistant", "Hello"), ("assistant", "there"), ("user", "")],
    ),
    "one turn is one message": (
        [user("Hi"), thought("hm"), said("Let me see."), call("a"), call("b"), output("b"), output("a", [
            {"type": "input_text", "text": "3"}])],
        [
            ("user", "Hi"),
            ("assistant", "Let me see.", "hm", ["a", "b"]),
            ("tool", "2", "b"),
            ("tool", "3", "a"),
        ],
    ),
    "turn after turn": (
        [user("Hi"), call("a"), output("a"), thought("so"), call("b"), output("b"), thought("well"), said("Done")],
        [
            ("user", "Hi"),
            ("assistant", None, None, ["a"]),
            ("tool", "2", "a"),
            ("assistant", None, "so", ["b"]),
            ("tool", "2", "b"),
            ("assistant", "Done", "well"),
        ],
    ),
    "text behind calls": (
        [call("a"), said("and"), output("a")],
        [("assistant", "and", None, ["a"]), ("tool", "2", "a")],
    ),
    "thoughts of a turn that said something are the next one's": (
        [said("One"), thought("hm"), said("Two")],
        [("assistant", "One"), ("assistant", "Two", "hm")],
    ),
    "a summary where there is nothing else, and nothing": (
        [
            {"type": "reasoning", "summary": SUMMARY, "content": None, "encrypted_content": "x"},
            {"type": "reasoning", "summary": []},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        ],
        [("assistant", "No.", "Adds.\nEnds.")],
    ),
}  # fmt: skip


def brief(message):
    if message.role == "tool":
        return (message.role, message.content, message.tool_call_id)
    calls = None if message.tool_calls is None else [item["id"] for item in message.tool_calls]
    found = (message.role, message.content, message.reasoning_content, calls)
    while found[-1] is None and len(found) > 2:
        found = found[:-1]
    return found


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_items_are_the_messages_of_their_turns(name):
    items, want = CONVERSATIONS[name]
    messages = messages_of(items)
    assert [brief(message) for message in messages] == want
    for message in messages:
        for item in message.tool_calls or []:
            assert item == chat_call(item["id"])


BAD_INPUT = {
    "no item": ([], "input", "empty"),
    "an unknown type": ([user("a"), {"type": "web_search_call"}], "input[1].type", "'web_search_call'"),
    "a reference": ([{"type": "item_reference", "id": "msg_1"}], "input[0].type", "item_reference"),
    "no type and no role": ([{"content": "a"}], "input[0].type", "has no type"),
    "an unknown role": ([{"role": "tool", "content": "a"}], "input[0].role", "input[0]"),
    "no content": ([{"role": "user"}], "input[0].content", "content"),
    "an unknown field": ([{**user("a"), "name": "x"}], "input[0].name", "name"),
    "an image": ([user([{"type": "input_image", "image_url": "x"}])], "input[0].content[0].type", "input_image"),
    "a part's field": ([user([{"type": "input_text", "text": "a", "x": 1}])], "input[0].content[0].x", "unknown"),
    "a part without text": ([user([{"type": "input_text"}])], "input[0].content[0].text", "text"),
    "arguments that are no object": ([call("a", "[1]")], "input[0].arguments", "object"),
    "arguments that are no JSON": ([call("a", "{")], "input[0].arguments", "object"),
    "a call without an id": ([call("")], "input[0].call_id", "256"),
    "an output of nothing": ([user("a"), output("x")], "input[1].call_id", "'x'"),
    "an output of an earlier turn": ([call("a"), user("a"), output("a")], "input[2].call_id", "'a'"),
    "too many calls": ([call(f"c{idx}") for idx in range(129)], "input[128]", "128"),
    "too many items": ([user("a")] * 8193, "input", "8193"),
    "thoughts of another server": (
        [{"type": "reasoning", "summary": [], "encrypted_content": "x"}], "input[0].encrypted_content", "leave"
    ),
}  # fmt: skip


def refusal(**body) -> UserError:
    with pytest.raises(UserError) as caught:
        request = convert(body, ResponsesRequest)
        chat_request(request, input_items(request), 0)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_items_are_refused_by_place(name):
    items, param, word = BAD_INPUT[name]
    error = refusal(input=items)
    assert error.param == param and word in str(error)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": [{}]}, "input[0].type"),
        ({"input": [user([{"text": "a"}])]}, "input[0].content[0].type"),
        ({"input": "a", "tools": [{"name": "add"}]}, "tools[0].type"),
    ],
)
def test_a_type_that_is_missing_is_said_to_be(fields, param):
    error = refusal(**fields)
    assert error.param == param and "has no type" in str(error) and "None" not in str(error)


def test_an_item_that_was_kept_is_not_counted_as_the_clients():
    with pytest.raises(UserError, match=r"input\[0\]\.call_id"):
        messages_of([user("a"), output("x")], 1)


ADD = {"type": "function", "name": "add", "parameters": {"type": "object"}}
BAD_FIELDS = {
    "background": (True, "background", "'background'"),
    "truncation": ("auto", "truncation", "'truncation'"),
    "conversation": ("conv_1", "conversation", "'conversation'"),
    "prompt": ({"id": "p"}, "prompt", "'prompt'"),
    "context_management": ([{"type": "compaction"}], "context_management", "context_management"),
    "moderation": ({"model": "x"}, "moderation", "moderation"),
    "reasoning": ({"summary": "detailed"}, "reasoning.summary", "auto"),
    "include": (["file_search_call.results"], "include", "message.output_text.logprobs"),
    "top_logprobs": (3, "top_logprobs", "include"),
    "stream_options": ({"include_obfuscation": False}, "stream_options", "stream=true"),
    "text": ({"format": {"type": "json_schema", "name": "x"}}, "text.format.schema", "required"),
    "text ": ({"format": {"type": "json_schema", "schema": {}}}, "text.format.name", "required"),
    "text  ": ({"format": {"type": "json_object", "schema": {}}}, "text.format.schema", "json_schema"),
    "tools": ([{"type": "web_search"}], "tools[0].type", "'web_search'"),
    "tools ": ([{"type": "function", "function": {"name": "add"}}], "tools[0].function", "beside"),
    "tools  ": ([ADD, {**ADD, "made_up": 1}], "tools[1].made_up", "made_up"),
    "tools   ": ([{**ADD, "defer_loading": True}], "tools[0].defer_loading", "defer_loading"),
    "tools    ": ([{**ADD, "async": True}], "tools[0].async", "tools[0].async"),
    "tool_choice": ({"type": "function", "function": {"name": "add"}}, "tool_choice", "'name'"),
    "tool_choice ": ({"type": "web_search_preview"}, "tool_choice", "web_search"),
    "tool_choice  ": ({"type": "allowed_tools", "mode": "auto", "tools": [{"type": "mcp"}]}, "tool_choice", "mcp"),
    "speculation ": ({"trace": True}, "speculation.trace", "chat"),
    "max_tokens": (3, "max_tokens", "unknown"),
    "speculation": ({"mode": "warp"}, "speculation.mode", "speculation.mode"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_what_is_not_served_is_refused_by_name(name):
    value, param, word = BAD_FIELDS[name]
    error = refusal(input="Hi", **{name.strip(): value})
    assert error.param == param and word in str(error)


def test_fields_that_ask_for_nothing_are_taken():
    body = {
        "input": "Hi", "background": False, "truncation": "disabled", "context_management": [], "include": [],
        "reasoning": {"effort": None, "summary": "auto"}, "text": {"verbosity": "medium"}, "tools": [],
        "tool_choice": "none", "top_logprobs": 0, "prompt_cache_key": "k", "service_tier": "auto", "user": "u",
        "store": False, "metadata": {"a": "b"}, "max_tool_calls": 3, "safety_identifier": "s",
        "prompt_cache_options": {"mode": "implicit"},
    }  # fmt: skip
    request = convert(body, ResponsesRequest)
    chat = chat_request(request, input_items(request), 0)
    plain = convert({"input": "Hi"}, ResponsesRequest)
    changed = {"verbosity": None, "tool_choice": None}  # as they are by default
    assert msgspec.structs.replace(chat, **changed) == chat_request(plain, input_items(plain), 0)


def test_every_field_becomes_the_chat_field_that_means_the_same():
    schema = {"type": "object"}
    named = {"type": "function", "name": "add"}
    request = convert(
        {
            "input": [user("Hi")], "instructions": "Be brief", "model": "alpha", "max_output_tokens": 7, "seed": 3,
            "temperature": 0.5, "top_p": 0.9, "top_k": 4, "reasoning": {"effort": "none"}, "top_logprobs": 2,
            "include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "parallel_tool_calls": False,
            "text": {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}},
            "tools": [{**ADD, "strict": True, "x-adapter": "beta", "description": None}],
            "tool_choice": {"type": "allowed_tools", "mode": "required", "tools": [named]},
            "speculation": {"mode": "off"}, "priority": 2, "deadline_ms": 9.0, "cache_salt": "s", "stop": "x",
        },
        ResponsesRequest,
    )  # fmt: skip
    chat = chat_request(request, input_items(request), 0)
    assert [(message.role, message.content) for message in chat.messages] == [("system", "Be brief"), ("user", "Hi")]
    assert (chat.model, chat.max_completion_tokens, chat.seed, chat.temperature, chat.top_p) == (
        "alpha",
        7,
        3,
        0.5,
        0.9,
    )
    assert (chat.top_k, chat.reasoning_effort, chat.logprobs, chat.top_logprobs) == (4, "none", True, 2)
    assert chat.response_format["json_schema"]["schema"] == schema and chat.parallel_tool_calls is False
    function = chat.tools[0]["function"]
    assert (function["name"], function["strict"], function["x-adapter"]) == ("add", True, "beta")
    allowed = {"mode": "required", "tools": [{"type": "function", "function": {"name": "add"}}]}
    assert chat.tool_choice == {"type": "allowed_tools", "allowed_tools": allowed}
    assert (chat.speculation.mode, chat.priority, chat.deadline_ms, chat.cache_salt, chat.stop) == (
        "off",
        2,
        9.0,
        "s",
        "x",
    )


@pytest.mark.parametrize(
    ("param", "message", "want_param", "want"),
    [
        ("max_completion_tokens", "max_completion_tokens is 0", "max_output_tokens", "max_output_tokens is 0"),
        ("messages", "messages has 9 entries", "input", "input has 9 entries"),
        ("model", "no adapter 'messages'", "model", "no adapter 'messages'"),
        ("prompt", "the prompt has 9 tokens", "input", "the prompt has 9 tokens"),
        ("tools[1].function.name", "tools[1].function.name is 'a b'", "tools[1].name", "tools[1].name is 'a b'"),
        ("response_format.json_schema", "response_format.json_schema is", "text.format", "text.format is"),
        ("tools", "leave out response_format, or", "tools", "leave out text.format, or"),
        ("verbosity", "'verbosity' is not", "text.verbosity", "'text.verbosity' is not"),
        (None, "it is late", None, "it is late"),
    ],
)  # fmt: skip
def test_errors_of_the_chat_request_have_the_names_of_the_body(param, message, want_param, want):
    error = in_these_words(UserError(message, param=param, status=429, retry_after_s=3.0, code="c"))
    assert (error.param, str(error), error.status, error.retry_after_s, error.code) == (want_param, want, 429, 3.0, "c")
