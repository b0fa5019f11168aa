"""Deltas as items and events of a response: however the tokens come, the same items, in the words of the chat route."""

from __future__ import annotations

import random

import msgspec
import pytest
from response_events import rebuilt

from specserve.chat.answer import ChatAnswer
from specserve.chat.reasoning import Thinking
from specserve.chat.thinking_marks import THINK
from specserve.chat.tools.definitions import tool_use
from specserve.chat.tools.formats import FORMATS
from specserve.chat.tools.grammar import Marks
from specserve.chat.tools.plan import make_plan
from specserve.errors import ErrorInfo
from specserve.messages import Delta, GenerateRequest, SamplingParams, TokenLogprobs, Usage
from specserve.server.generation.job import Job
from specserve.server.openai.request_types import ChatRequest
from specserve.server.responses.answer import ResponseBuilder
from specserve.server.responses.request_types import ResponsesRequest
from specserve.text.detokenizer import Detokenizer, TokenTexts
from specserve.text.tokenizer import TextTokenizer

ADD = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"], "additionalProperties": False}
CHAT = ChatRequest(messages=[], tools=[{"type": "function", "function": {"name": "add", "parameters": ADD}}])
CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 12}}\n</tool_call>'
THINKING = Thinking((THINK,), other_ends=("<tool_call>",))
# text -> (thinking, kinds of items, tokens of thoughts: what they are the text of)
TEXTS = {
    "Hello, lazy dog": (None, ["message"], ""),
    "Größe 10 €": (None, ["message"], ""),
    "": (None, ["message"], ""),
    "<think>plan a bit</think>\n\nHello dog": (THINKING, ["reasoning", "message"], "<think>plan a bit</think>\n\n"),
    "no thoughts, dog": (THINKING, ["message"], ""),
    "<think>without an end": (THINKING, ["reasoning"], "<think>without an end"),
    f"Let me see. {CALL}": (None, ["message", "function_call"], ""),
    f"<think>add them</think>{CALL}\n{CALL}": (
        THINKING,
        ["reasoning", "function_call", "function_call"],
        "<think>add them</think>",
    ),
}


@pytest.fixture(scope="module")
def tokenizer(model_dir):
    return TextTokenizer(model_dir)


@pytest.fixture(scope="module")
def plan():
    return make_plan(tool_use(CHAT), FORMATS["hermes"], Marks(), None)


def make_job(tokenizer, plan, thinking, **sampling):
    sampling = SamplingParams(max_tokens=100, detokenize=False, skip_special_tokens=False, **sampling)
    request = GenerateRequest("r", tokenizer.encode("Hi"), sampling)
    prompts = [(None, request.prompt_token_ids)]
    return Job(
        "resp_1", "tiny", None, None, None, CHAT, tokenizer, prompts, 1, 1, [request], False, None, plan, thinking
    )


def deltas_of(job, text, cut, finish="stop"):
    """The answer `text` in deltas of `cut()` tokens, up to the first of the job's stop strings."""
    ids = job.tokenizer.encode_literal(text)
    prompt, stop = job.requests[0].prompt_token_ids, job.requests[0].sampling.stop
    if stop:
        walk = Detokenizer(TokenTexts(job.tokenizer._backend), prompt, stop, skip_special_tokens=False)
        ids = ids[: next(idx for idx, token in enumerate(ids, 1) if walk.push(token)[1] is not None)]
    write = Detokenizer(TokenTexts(job.tokenizer._backend), prompt, stop, skip_special_tokens=False).write
    place, deltas = 0, []
    while place < len(ids) or not deltas:
        tokens = ids[place : place + cut()]
        place += len(tokens)
        is_last = place == len(ids)
        usage = Usage(2, len(ids), 0, 1, 0, 0, 0, 0) if is_last else None
        scored = [TokenLogprobs(-0.5, [(token, -0.5)], 1) for token in tokens]
        fields = {"logprobs": scored, "finish_reason": finish if is_last else None, "usage": usage}
        deltas.append(Delta("r", tokens, write(tokens, 0, is_last), **fields))
    return deltas


def answered(job, deltas, **fields):
    """(the response that the events build, all events)."""
    builder = ResponseBuilder(job, ResponsesRequest(input="Hi", **fields), False, lambda response: None)
    events = [event for delta in deltas for event in builder.events(0, delta)] + builder.closing()
    events = msgspec.json.decode(msgspec.json.encode(events))
    return rebuilt(events), events


@pytest.mark.parametrize("text", TEXTS)
def test_items_are_the_same_however_the_tokens_come_and_say_what_chat_says(tokenizer, plan, text):
    thinking, kinds, thoughts = TEXTS[text]
    job = make_job(tokenizer, plan, thinking, logprobs=1)
    chat = ChatAnswer(plan, thinking, True)
    chat.feed(text, final=True)
    message = chat.message()
    rng = random.Random(1)
    for cut in (lambda: 1, lambda: rng.randint(1, 4), lambda: 100):
        response, _ = answered(job, deltas_of(job, text, cut), include=["message.output_text.logprobs"])
        output = response["output"]
        assert [item["type"] for item in output] == kinds and response["status"] == "completed"
        assert all(item["status"] == "completed" for item in output)
        said = "".join(item["content"][0]["text"] for item in output if item["type"] == "message")
        assert said == (message["content"] or "")
        thought = "".join(item["content"][0]["text"] for item in output if item["type"] == "reasoning")
        assert thought == message.get("reasoning", "")
        calls = [item["arguments"] for item in output if item["type"] == "function_call"]
        assert calls == [call["function"]["arguments"] for call in message.get("tool_calls", [])]
        details = response["usage"]["output_tokens_details"]
        assert details["reasoning_tokens"] == len(tokenizer.encode_literal(thoughts))
        for item in output:
            if item["type"] == "message" and "function_call" not in kinds:
                scored = b"".join(bytes(entry["bytes"]) for entry in item["content"][0]["logprobs"])
                assert scored.decode() == said  # every token of the text, and none of thoughts


@pytest.mark.parametrize(
    ("text", "stop", "said", "num_scored", "num_thoughts"),
    [
        ("Hello, lazy dog", ",", "Hello", None, 0),
        ("Hello, lazy dog", "lazy do", "Hello, ", None, 0),
        ("Hello, lazy dog", "H", "", 0, 0),
        ("<think>so</think>Hello dog", "dog", "Hello ", None, "<think>so</think>"),
        ("<think>so</think>Hello dog", "so", "", 0, "<think>so"),
    ],
)
def test_what_a_stop_string_leaves_has_the_same_scores_however_the_tokens_come(
    tokenizer, text, stop, said, num_scored, num_thoughts
):
    """Others than those of tokens that it cut off whole."""
    job = make_job(tokenizer, None, THINKING, logprobs=1, stop=(stop,))
    seen = set()
    for cut in (lambda: 1, lambda: 2, lambda: 3, lambda: 5, lambda: 100):
        response, _ = answered(job, deltas_of(job, text, cut), include=["message.output_text.logprobs"])
        messages = [item["content"][0] for item in response["output"] if item["type"] == "message"]
        assert "".join(part["text"] for part in messages) == said
        scored = [entry["token"] for part in messages for entry in part["logprobs"]]
        seen.add((*scored, response["usage"]["output_tokens_details"]["reasoning_tokens"]))
        assert "".join(scored[:-1]) <= said if num_scored is None else len(scored) == num_scored
    assert len(seen) == 1
    if num_thoughts:
        assert seen.pop()[-1] == len(tokenizer.encode_literal(num_thoughts))


def test_a_limit_leaves_the_last_item_incomplete_and_a_whole_call_whole(tokenizer, plan):
    for text, last in (("Hello do", "incomplete"), ("<think>I thi", "incomplete"), (CALL[:-15], "incomplete")):
        job = make_job(tokenizer, plan, THINKING)
        response, events = answered(job, deltas_of(job, text, lambda: 2, "length"))
        assert response["status"] == "incomplete" and events[-1]["type"] == "response.incomplete"
        assert response["incomplete_details"] == {"reason": "max_output_tokens"}
        assert response["output"][-1]["status"] == last
    job = make_job(tokenizer, plan, None)
    response, _ = answered(job, deltas_of(job, CALL, lambda: 3, "length"))
    assert response["status"] == "incomplete" and response["output"][-1]["status"] == "completed"


def test_a_whole_answer_and_its_stream_are_the_same_but_for_ids_and_times(tokenizer, plan):
    job = make_job(tokenizer, plan, THINKING)
    text = f"<think>so</think>Well. {CALL}"
    streamed, _ = answered(job, deltas_of(job, text, lambda: 3))
    builder = ResponseBuilder(job, ResponsesRequest(input="Hi"), False, lambda response: None)
    for delta in deltas_of(job, text, lambda: 3):
        builder.add(delta)
    whole = msgspec.to_builtins(builder.whole())
    for response in (whole, streamed):
        response["completed_at"] = None
        for item in response["output"]:
            assert item.pop("id").startswith({"reasoning": "rs_", "message": "msg_"}.get(item["type"], "fc_"))
            item.pop("call_id", None)
    assert whole == streamed


def test_reasoning_that_is_left_out_is_counted(tokenizer, plan):
    job = make_job(tokenizer, plan, THINKING)
    response, _ = answered(
        job, deltas_of(job, "<think>plan</think>Hello", lambda: 2), include_reasoning=False
    )  # fmt: skip
    assert [item["type"] for item in response["output"]] == ["message"]
    assert response["usage"]["output_tokens_details"]["reasoning_tokens"] > 0


@pytest.mark.parametrize(
    ("status", "code"), [(503, "server_error"), (429, "rate_limit_exceeded"), (400, "invalid_prompt")]
)
def test_a_stream_that_fails_ends_with_what_came_and_the_error(tokenizer, plan, status, code):
    job = make_job(tokenizer, plan, None)
    builder = ResponseBuilder(job, ResponsesRequest(input="Hi"), False, lambda response: None)
    events = builder.events(0, deltas_of(job, "Hello, lazy dog", lambda: 2)[0])
    events = [*events, builder.error(ErrorInfo("it broke", status, "server_error", "input"))]
    response = rebuilt(msgspec.json.decode(msgspec.json.encode(events)))
    assert response["status"] == "failed" and response["error"]["code"] == code
    assert response["error"]["message"] == "it broke" and response["usage"] is None
    assert response["output"][0]["status"] == "incomplete" and response["output"][0]["content"][0]["text"]
