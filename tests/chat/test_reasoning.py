"""Thinking: told from the answer however it streams, switched by what the template reads, given back the same way."""

import json
import random

import pytest
from server_fixture import ServerProcess, assert_error
from tiny_models import make_tiny_model

from specserve.chat.reasoning import Thinking, ThinkingParser, may_think

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ mood or '' }}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n\n</think>\n\n' if enable_thinking is false else '<think>\n' }}{% endif %}"
)
CLOSED, OPEN, CALLS = Thinking(False), Thinking(True), Thinking(True, ("<tool_call>",))
CASES = [
    (CLOSED, "<think>\nWell, a < b.\n</think>\n\nYes </think> so", "Well, a < b.", "Yes </think> so"),
    (CLOSED, "\n <think></think>Yes", "", "Yes"),
    (CLOSED, "<think>cut off </thin", "cut off </thin", ""),
    (CLOSED, "<thinking> is text", "", "<thinking> is text"),
    (CLOSED, "  plain ", "", "  plain "),
    (CLOSED, "<th", "", "<th"),
    (OPEN, "hm\n\n hm \n</think>\nYes\n", "hm\n\n hm", "Yes\n"),
    (OPEN, "never ends \n", "never ends", ""),
    (CALLS, 'I call <tool_call>\n{"a": 1}', "I call", '<tool_call>\n{"a": 1}'),
    (CALLS, "done</think><tool_call>x", "done", "<tool_call>x"),
]


@pytest.mark.parametrize("thinking, text, reasoning, content", CASES, ids=[repr(case[1]) for case in CASES])
def test_however_a_text_is_cut_its_parts_are_the_same(thinking, text, reasoning, content):
    rng = random.Random(1)
    for num_cuts in (0, 1, 2, 3, len(text)):
        for _ in range(20):
            cuts = [0, *sorted(rng.randint(0, len(text)) for _ in range(num_cuts)), len(text)]
            parser = ThinkingParser(thinking)
            parts = [parser.feed(text[a:b], b == len(text)) for a, b in zip(cuts, cuts[1:], strict=False)]
            assert ("".join(p[0] for p in parts), "".join(p[1] for p in parts)) == (reasoning, content), cuts


def test_who_may_think():
    assert may_think(TEMPLATE, []) and may_think(None, ["<think>", "</think>"])
    assert not may_think("{{ messages }}", ["<think>"]) and not may_think(None, [])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=2048)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    server = ServerProcess(path).wait_ready()
    yield server
    assert server.stop() == 0


def ask(server, content="Hi", **fields):
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": 24, "temperature": 0, **fields}
    response = server.post(CHAT, body)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"], body


def prompt(server, messages=None, **fields):
    messages = messages or [{"role": "user", "content": "Hi"}]
    ids = server.post("/tokenize", {"messages": messages, **fields}).json()["tokens"]
    return ids, server.post("/detokenize", {"tokens": ids}).json()["prompt"]


def streamed(server, body, name):
    deltas = [event["choices"][0]["delta"] for event in server.stream(CHAT, body) if event["choices"]]
    return "".join(delta.get(name) or "" for delta in deltas)


def test_thinking_is_switched_by_what_the_template_reads(server):
    thoughts, body = ask(server)
    ids, text = prompt(server)
    assert text.endswith("<|im_start|>assistant\n<think>\n")
    want = server.complete(ids, max_tokens=24, ignore_eos=False)["text"]
    assert thoughts["content"] is None and thoughts["reasoning_content"] == thoughts["reasoning"] == want.strip()
    assert streamed(server, body, "reasoning_content") == want.strip() and streamed(server, body, "content") == ""
    assert "reasoning_content" not in ask(server, include_reasoning=False)[0]

    ids, text = prompt(server, chat_template_kwargs={"enable_thinking": False})
    assert text.endswith("</think>\n\n")
    want = server.complete(ids, max_tokens=24, ignore_eos=False)["text"]
    for fields in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
        answer, body = ask(server, **fields)
        assert answer["content"] == want and "reasoning_content" not in answer
        assert streamed(server, body, "content") == want
    assert ask(server, reasoning_effort="high", chat_template_kwargs={"no_such_name": 1})[0] == thoughts


def test_grammars_and_calls_hold_where_the_prompt_has_opened_a_block(server):
    answer, body = ask(server, guided_choice=["yes", "no"])
    assert answer["content"] in ("yes", "no") and "reasoning_content" not in answer
    tools = [{"type": "function", "function": {"name": "f", "parameters": NOTHING}}]
    for choice in ("required", "auto"):
        answer, body = ask(server, tools=tools, tool_choice=choice, max_tokens=100)
        calls = answer.get("tool_calls") or []
        assert all(json.loads(call["function"]["arguments"]) is not None for call in calls)
        assert bool(calls) or choice == "auto" and answer["reasoning_content"]
        assert streamed(server, body, "reasoning_content") == answer.get("reasoning_content", "")


def test_reasoning_in_history_reaches_the_template(server):
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes"},
        {"role": "user", "content": "So?"},
    ]
    for name in ("reasoning_content", "reasoning"):
        with_thoughts = [messages[0], {**messages[1], name: "Hm <|im_end|>"}, messages[2]]
        assert "<think>Hm <|im_end|></think>Yes" in prompt(server, with_thoughts)[1]
        assert len(prompt(server, with_thoughts)[0]) > len(prompt(server, messages)[0]) + 15  # spelled, not the token
    assert_error(server.post(CHAT, {"messages": [{**messages[0], "reasoning_content": "x"}]}), 400, "only assistant")


@pytest.mark.parametrize(
    "kwargs",
    [{"messages": "x"}, {"tools": None}, {"add_generation_prompt": False}, {"chat_template": "x"}, {"tokenize": True},
     {"eos_token": "x"}, {"enable_thinking": [False]}, {"mood": {"a": 1}}, {str(n): n for n in range(65)}],
    ids=str,
)  # fmt: skip
def test_variables_that_would_replace_what_the_server_gives_or_are_no_scalars_are_refused(server, kwargs):
    messages = [{"role": "user", "content": "Hi"}]
    for path in (CHAT, "/tokenize"):
        response = server.post(path, {"messages": messages, "chat_template_kwargs": kwargs})
        assert_error(response, 400, "chat_template_kwargs", param="chat_template_kwargs")


def test_special_tokens_in_variables_are_letters(server):
    ids, text = prompt(server, chat_template_kwargs={"mood": "<|im_start|>"})
    assert "<|im_start|><|im_start|>assistant" in text
    assert len(ids) > len(prompt(server)[0]) + 5
