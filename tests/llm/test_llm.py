"""The Python API on a tiny model: the server's tokens in vLLM's shapes, adapters, streams, and errors with names."""

import json
import shutil
import types

import jsonschema
import pytest
from peft_adapters import make_peft_adapter

from specserve import LoRARequest, SamplingParams, StructuredOutputsParams, UserError
from specserve.errors import AdapterError, GrammarError
from specserve.llm.service import MAX_AT_ONCE

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = ["The quick brown", "Pack my box with", "A server answers"]
ASK = [{"role": "user", "content": "What does a server answer?"}]
SAMPLED = {"temperature": 0.8, "top_p": 0.9, "top_k": 50, "seed": 7, "max_tokens": 10, "ignore_eos": True}


def texts(outputs):
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize("adapter", [None, "alpha"])
@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0, "max_tokens": 12, "ignore_eos": True},
        SAMPLED,
        {**SAMPLED, "n": 3, "presence_penalty": 0.5, "min_tokens": 3, "stop": ["x", "zz"]},
        {"temperature": 0, "max_tokens": 24, "structured_outputs": {"regex": "[a-c]{4,8}"}},
    ],
)
def test_a_completion_is_the_servers(llm, server, adapter, fields):
    body = {"prompt": PROMPTS[0], "logprobs": 2, "model": adapter, **fields}
    theirs = server.post("/v1/completions", body).json()
    (ours,) = llm.generate(PROMPTS[0], SamplingParams(logprobs=2, **fields), adapter=adapter)
    assert ours.finished and ours.prompt == PROMPTS[0] and ours.lora_request == adapter
    assert len(ours.prompt_token_ids) == theirs["usage"]["prompt_tokens"]
    assert len(ours.outputs) == len(theirs["choices"])
    for output, choice in zip(ours.outputs, theirs["choices"], strict=True):
        assert output.text == choice["text"] and output.text
        assert (output.finish_reason, output.stop_reason) == (choice["finish_reason"], choice["stop_reason"])
        sampled = [place[token] for place, token in zip(output.logprobs, output.token_ids, strict=True)]
        assert [item.logprob for item in sampled] == choice["logprobs"]["token_logprobs"]
        assert [item.decoded_token for item in sampled] == choice["logprobs"]["tokens"]
        assert output.cumulative_logprob == pytest.approx(sum(item.logprob for item in sampled))
        assert all(2 <= len(place) <= 3 for place in output.logprobs)


@pytest.mark.parametrize("adapter", [None, "alpha"])
def test_a_chat_is_the_servers(llm, server, adapter):
    theirs = server.post("/v1/chat/completions", {"messages": ASK, "model": adapter, **SAMPLED}).json()
    (ours,) = llm.chat(ASK, SamplingParams(**SAMPLED), adapter=adapter)
    assert ours.outputs[0].text == ours.outputs[0].message["content"] == theirs["choices"][0]["message"]["content"]
    assert ours.outputs[0].usage.completion_tokens == theirs["usage"]["completion_tokens"]


def test_speculation_changes_nothing_but_the_forwards(llm):
    prompt = "one two three one two three one two three one two"
    plain, drafted = (
        llm.generate(prompt, SamplingParams(temperature=0, max_tokens=48, ignore_eos=True, **fields))[0].outputs[0]
        for fields in ({"speculation": "off"}, {"speculation": "fixed", "prediction": "one two three"})
    )
    assert plain.token_ids == drafted.token_ids
    assert plain.usage.draft_tokens == 0 and plain.mean_accepted_length == 1.0
    assert drafted.usage.draft_tokens > 0


def test_a_trace_says_who_guessed_each_token(llm):
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, speculation="fixed", trace=True)
    prompt = "one two three one two three one two three one two"
    *steps, _ = streamed = list(llm.generate_stream(prompt, params))
    (whole,) = llm.generate(prompt, params)
    trace = whole.outputs[0].trace
    joined = streamed[-1].outputs[0].trace  # chances and drafts are learned from one run to the next
    assert [(entry.token_id, entry.text) for entry in joined] == [(entry.token_id, entry.text) for entry in trace]
    assert len(steps[0].outputs[0].trace) < len(trace)
    assert [entry.token_id for entry in trace] == list(whole.outputs[0].token_ids)
    assert "".join(entry.text for entry in trace) == whole.outputs[0].text
    assert "ngram" in {entry.source for entry in trace} | {r.source for entry in trace for r in entry.rejected}
    assert llm.generate(prompt, GREEDY)[0].outputs[0].trace is None


def test_prompts_come_back_in_order_each_with_its_own_parameters_and_adapter(llm):
    params = [SamplingParams(temperature=0, max_tokens=num, ignore_eos=True) for num in (3, 9, 5)]
    together = llm.generate(PROMPTS, params, adapter=[None, "alpha", "alpha"])
    alone = [
        llm.generate(prompt, one, adapter=which)[0]
        for prompt, one, which in zip(PROMPTS, params, (None, "alpha", "alpha"), strict=True)
    ]
    assert [output.outputs[0].token_ids for output in together] == [output.outputs[0].token_ids for output in alone]
    assert [len(output.outputs[0].token_ids) for output in together] == [3, 9, 5]
    assert [output.lora_request for output in together] == [None, "alpha", "alpha"]


def test_prompts_are_texts_ids_and_dicts(llm):
    ids = llm.get_tokenizer().encode(PROMPTS[0])
    mixed = [PROMPTS[0], {"prompt": PROMPTS[0]}, {"prompt_token_ids": ids, "cache_salt": "mine"}, ids]
    (text,) = set(texts(llm.generate(mixed, GREEDY)))
    assert texts(llm.generate(ids, GREEDY)) == [text]  # ids alone are one prompt
    assert llm.generate([], GREEDY) == []
    assert texts(llm.chat([ASK, ASK], GREEDY)) == texts(llm.chat(ASK, GREEDY)) * 2


def test_more_prompts_than_the_engine_is_given_at_once(llm):
    outputs = llm.generate([f"{idx}" for idx in range(MAX_AT_ONCE + 40)], SamplingParams(temperature=0, max_tokens=1))
    assert [output.prompt for output in outputs] == [f"{idx}" for idx in range(MAX_AT_ONCE + 40)]
    assert all(output.finished for output in outputs)


def test_no_limit_of_tokens_is_the_room_in_the_context(llm):
    params = SamplingParams(max_tokens=None, min_tokens=20, temperature=0, ignore_eos=True)
    (output,) = llm.generate([[7] * 960], params)
    assert len(output.outputs[0].token_ids) == llm.engine_info.max_model_len - 960
    assert output.outputs[0].finish_reason == "length"
    assert len(llm.generate(PROMPTS[0], SamplingParams(ignore_eos=True))[0].outputs[0].token_ids) == 16


def test_logprobs_of_the_prompt(llm, server):
    (output,) = llm.generate(PROMPTS[0], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2))
    theirs = server.complete(PROMPTS[0], max_tokens=0, echo=True, logprobs=2)["logprobs"]["token_logprobs"]
    ours = [
        None if place is None else place[token].logprob
        for place, token in zip(output.prompt_logprobs, output.prompt_token_ids, strict=True)
    ]
    assert ours == theirs and ours[0] is None
    with pytest.raises(UserError, match="prompt_logprobs is 21; 0 to 20"):
        llm.generate("x", SamplingParams(prompt_logprobs=21))


def test_structured_output_by_each_of_its_names(llm):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    model = types.SimpleNamespace(model_json_schema=lambda: schema)  # what pydantic's classes have
    wanted = [StructuredOutputsParams(json=schema), StructuredOutputsParams(json=model), {"json": schema}]
    params = [SamplingParams(max_tokens=64, seed=1, structured_outputs=one) for one in wanted]
    params.append(SamplingParams(max_tokens=64, seed=1, response_format={"type": "json_schema", "json_schema": {
        "name": "a", "schema": schema}}))  # fmt: skip
    (text,) = set(texts(llm.generate(["{}"] * 4, params)))
    jsonschema.validate(json.loads(text), schema)
    choice = SamplingParams(structured_outputs=StructuredOutputsParams(choice=["yes", "no"]))
    assert texts(llm.generate("?", choice))[0] in ("yes", "no")
    with pytest.raises(GrammarError):
        llm.generate("?", SamplingParams(structured_outputs={"regex": "("}))


def test_tools_are_called(llm, server):
    letter = {"type": "object", "properties": {"letter": {"enum": ["a", "b"]}}, "required": ["letter"]}
    function = {"name": "pick", "parameters": {**letter, "additionalProperties": False}}
    fields = {"tools": [{"type": "function", "function": function}], "parallel_tool_calls": False}
    fields["tool_choice"] = {"type": "function", "function": {"name": "pick"}}
    (output,) = llm.chat(ASK, SamplingParams(max_tokens=100, seed=3), **fields)
    (call,) = output.outputs[0].message["tool_calls"]
    jsonschema.validate(json.loads(call["function"]["arguments"]), letter)
    assert output.outputs[0].finish_reason == "tool_calls" and "pick" in output.outputs[0].text
    body = {"messages": ASK, "max_tokens": 100, "seed": 3, **fields}
    theirs = server.post("/v1/chat/completions", body).json()["choices"][0]
    assert theirs["message"]["tool_calls"][0]["function"] == call["function"]


def test_a_stream_joins_to_the_whole_and_never_changes_what_it_gave(llm):
    params = SamplingParams(**SAMPLED, n=2, logprobs=1)
    (whole,) = llm.generate(PROMPTS[0], params)
    steps = list(llm.generate_stream(PROMPTS[0], params))
    assert len(steps) > 2 and steps[-1].finished and not steps[0].finished
    for idx in range(2):
        final = whole.outputs[idx]
        assert "".join(step.outputs[idx].delta for step in steps) == final.text == steps[-1].outputs[idx].text
        assert steps[-1].outputs[idx].token_ids == final.token_ids
        assert steps[-1].outputs[idx].logprobs == final.logprobs
        lens = [len(step.outputs[idx].token_ids) for step in steps]
        assert lens == sorted(lens) and lens[0] <= 1  # those given first did not grow
    (chat,) = llm.chat(ASK, SamplingParams(**SAMPLED), adapter="alpha")
    *_, last = llm.chat_stream(ASK, SamplingParams(**SAMPLED), adapter="alpha")
    assert last.outputs[0].message == chat.outputs[0].message


def test_a_chats_body_gives_the_servers_chunks(llm, server):
    body = {"messages": ASK, "model": "alpha", "stream_options": {"include_usage": True}, **SAMPLED}
    ours, theirs = list(llm.chat_chunks(body)), server.stream("/v1/chat/completions", body)
    assert ours[-1]["usage"]["completion_tokens"] == theirs[-1]["usage"]["completion_tokens"] > 0
    contents = [
        "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])
        for chunks in (ours, theirs)
    ]
    assert contents[0] == contents[1] != "" and set(ours[0]) == set(theirs[0])
    with pytest.raises(UserError, match="unknown field 'colour'"):
        next(llm.chat_chunks({**body, "colour": "red"}))


def test_leaving_a_stream_ends_its_request(llm, wait_idle):
    stream = llm.generate_stream("The", SamplingParams(max_tokens=400, temperature=0, ignore_eos=True))
    next(stream)
    stream.close()
    wait_idle(llm)


# -- adapters


def test_an_adapter_by_name_path_and_request_is_one(llm, beta_dir):
    theirs = types.SimpleNamespace(lora_name="beta", lora_int_id=1, lora_path=str(beta_dir))  # as vLLM's class is
    before = llm.adapter_names()
    outputs = [
        llm.generate(PROMPTS[0], GREEDY, adapter=beta_dir)[0],
        llm.generate(PROMPTS[0], GREEDY, adapter=str(beta_dir))[0],
        llm.generate(PROMPTS[0], GREEDY, lora_request=LoRARequest("beta", 1, str(beta_dir)))[0],
        llm.generate(PROMPTS[0], GREEDY, adapter="beta")[0],  # the name that these gave it
        llm.generate(PROMPTS[0], GREEDY, lora_request=theirs)[0],
    ]
    assert len({output.outputs[0].token_ids for output in outputs}) == 1
    assert {output.lora_request for output in outputs} == {"beta"}
    assert outputs[0].outputs[0].token_ids != llm.generate(PROMPTS[0], GREEDY)[0].outputs[0].token_ids
    assert llm.adapter_names() == sorted([*before, "beta"]) and "alpha" in before
    llm.unload_adapter("beta")
    assert llm.adapter_names() == before
    with pytest.raises(UserError, match="'beta' does not exist") as raised:
        llm.generate("x", adapter="beta")
    assert raised.value.code == "model_not_found"


def test_a_name_is_not_given_to_another_directory_unasked(llm, beta_dir, copy_of_beta):
    info = llm.load_adapter("mine", copy_of_beta)
    try:
        assert info.max_rank == 2
        with pytest.raises(UserError, match="'mine' is taken"):
            llm.generate("x", lora_request=LoRARequest("mine", 1, str(beta_dir)))
        with pytest.raises(UserError, match="'alpha' is taken"):
            llm.load_adapter("alpha", beta_dir)
        llm.generate("x", GREEDY, lora_request=LoRARequest("mine", 1, str(beta_dir), load_inplace=True))
    finally:
        llm.unload_adapter("mine")


def test_an_adapter_whose_files_change_is_another_one(llm, model_dir, copy_of_beta):
    llm.load_adapter("changing", copy_of_beta)
    try:
        before = llm.generate(PROMPTS[0], GREEDY, adapter="changing")
        shutil.rmtree(copy_of_beta)
        make_peft_adapter(model_dir, copy_of_beta, r=2, std=0.5, seed=9)
        assert texts(llm.generate(PROMPTS[0], GREEDY, adapter=LoRARequest("changing"))) != texts(before)
    finally:
        llm.unload_adapter("changing")


# -- mistakes


def test_a_bad_adapter_is_named(llm, copy_of_beta, tmp_path):
    before = llm.adapter_names()
    (copy_of_beta / "adapter_model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(AdapterError, match="adapter_model.safetensors"):
        llm.generate("x", adapter=copy_of_beta)
    with pytest.raises(UserError, match="is not a directory"):
        llm.generate("x", adapter=tmp_path / "nothing")
    assert llm.adapter_names() == before


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda llm: llm.generate("x", SamplingParams(temperature=-1)), "temperature is -1; 0 to 2"),
        (lambda llm: llm.generate("x", SamplingParams(n=65)), "n is 65; 1 to 64"),
        (lambda llm: llm.generate("x", SamplingParams(stop=["a"] * 17)), "stop has 17 strings"),
        (lambda llm: llm.generate("x", SamplingParams(speculation="fast")), "speculation.mode"),
        (lambda llm: llm.generate("x", SamplingParams(max_tokens=None, min_tokens=10_000)), "min_tokens is 10000"),
        (lambda llm: llm.generate(""), "prompt is empty"),
        (lambda llm: llm.generate({"text": "x"}), "a prompt has no key 'text'"),
        (lambda llm: llm.generate([[0, 99999]]), "token id 99999 is outside"),
        (lambda llm: llm.generate(3), "a prompt is a text"),
        (lambda llm: llm.generate(["a", "b"], [SamplingParams()]), "sampling_params has 1 entries for 2 prompts"),
        (lambda llm: llm.generate("a", {"n": 1}), "expected SamplingParams, got dict"),
        (lambda llm: llm.generate("a", adapter=7), "expected a name, a path, a LoRARequest or None, got int"),
        (lambda llm: llm.generate("a", adapter="alpha", lora_request="alpha"), "two names of one argument"),
        (lambda llm: llm.chat("hello"), "messages is no list"),
        (lambda llm: llm.chat([{"role": "user"}]), "content"),
        (lambda llm: llm.chat(ASK, colour="red"), "unknown field 'colour'"),
        (lambda llm: llm.generate("\ud800"), "prompt holds half of a surrogate pair"),
        (lambda llm: llm.chat([{"role": "user", "content": "\udfff"}]), "messages holds half of a surrogate pair"),
        (lambda llm: llm.generate("a", SamplingParams(stop=["\ud800"])), "stop holds half of a surrogate pair"),
        (lambda llm: list(llm.chat_chunks({"messages": [{"role": "user", "content": "\ud800"}]})), "messages holds"),
        (lambda llm: llm.generate_stream(["a", "b"]), "2 prompts cannot be streamed as one"),
    ],
)
def test_a_mistake_is_an_error_that_names_it(llm, call, words):
    with pytest.raises(UserError) as raised:
        call(llm)
    assert words in str(raised.value)


def test_a_prompt_that_fails_ends_the_others(llm, wait_idle):
    long = SamplingParams(max_tokens=400, temperature=0, ignore_eos=True)
    with pytest.raises(UserError, match="n is 0") as raised:
        llm.generate(["a", "b", "c"], [long, long, SamplingParams(n=0)])
    assert raised.value.__notes__ == ["this was prompt 2 of 3, counted from 0"]
    wait_idle(llm)
