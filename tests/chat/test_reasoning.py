"""Thinking: told from the answer however it streams, switched by what the template reads, given back the same way."""

import json
import random

import pytest
from server_fixture import ServerProcess, assert_error
from tiny_models import make_tiny_model, make_tokenizer
from tokenizers import AddedToken

from specserve.chat.reasoning import Thinking, ThinkingParser
from specserve.chat.thinking_marks import THINK, known_marks, thoughtless

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
CHAT = "/v1/chat/completions"
SPECIAL_MARKS = {"[THINK]": 320, "[/THINK]": 321}
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.reasoning_content %}"
    "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{{ mood or '' }}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{{ '<think>\n\n</think>\n\n' if enable_thinking is false else '<think>\n' }}{% endif %}"
)
CLOSED, OPEN, CALLS = Thinking((THINK,)), Thinking((THINK,), THINK), Thinking((THINK,), THINK, ("<tool_call>",))


def family(*parts):
    """Thinking as a template with `parts` in it knows it."""
    return Thinking(known_marks(" ".join(parts), []))


MISTRAL, SEED, KIMI = family("[THINK]", "[/THINK]"), family("<seed:think> </seed:think>"), family("◁think▷ ◁/think▷")
HARMONY = family("<|channel|>analysis<|message|>", "<|end|>", "<|channel|>final<|message|>")
SOLUTION = family("<|begin_of_thought|> <|end_of_thought|> <|begin_of_solution|> <|end_of_solution|>")
APRIEL = family("Here are my reasoning steps:\\n", "[BEGIN FINAL RESPONSE]")
GRANITE = family("between <think></think> and your response between <response></response>")
HUNYUAN = family("{% if '<answer>' in content and '</answer>' in content %}<think> </think>")
FINAL = "<|channel|>final<|message|>"
CASES = [
    (CLOSED, "<think>\nWell, a < b.\n</think>\n\nYes </think> so", "Well, a < b.", "Yes </think> so"),
    (CLOSED, "\n <think></think>Yes", "", "Yes"),
    (CLOSED, "<think>cut off </thin", "cut off </thin", ""),
    (CLOSED, "<thinking> is text", "", "<thinking> is text"),
    (CLOSED, "  plain ", "", "  plain "),
    (CLOSED, "<th", "", "<th"),
    (OPEN, "hm\n\n hm \n</think>\nYes\n", "hm\n\n hm", "Yes\n"),
    (OPEN, "\n<think>\nhm <think></think>Yes", "hm <think>", "Yes"),
    (OPEN, "<thin air</think>Yes", "<thin air", "Yes"),
    (OPEN, "<thi", "<thi", ""),
    (OPEN, "never ends \n", "never ends", ""),
    (OPEN, "a" + 70 * " " + "</think>Yes", "a" + 6 * " ", "Yes"),
    (OPEN, "a" + 140 * " ", "a" + 76 * " ", ""),
    (CLOSED, 64 * " " + "<think>a</think>Yes", "a", "Yes"),
    (CLOSED, 65 * " " + "<think>a</think>Yes", "", 65 * " " + "<think>a</think>Yes"),
    (CALLS, 'I call <tool_call>\n{"a": 1}', "I call", '<tool_call>\n{"a": 1}'),
    (CALLS, "done</think><tool_call>x", "done", "<tool_call>x"),
    (MISTRAL, "[THINK]a [b]\n[/THINK]\nYes [/THINK]", "a [b]", "Yes [/THINK]"),
    (MISTRAL, "[THINK]cut [/THIN", "cut [/THIN", ""),
    (MISTRAL, "[THIN air", "", "[THIN air"),
    (SEED, "<seed:think>a</think>b</seed:think>Yes", "a</think>b", "Yes"),
    (KIMI, "◁think▷a◁/think▷Yes", "a", "Yes"),
    (family("<thinking></thinking> <think></think>"), "<thinking>a</think>b</thinking>Yes", "a</think>b", "Yes"),
    (family("<reasoning> </reasoning>"), "<reasoning>\na\n</reasoning>\nYes", "a", "Yes"),
    (HARMONY, f"<|channel|>analysis<|message|>a<|end|><|start|>assistant{FINAL}Yes", "a", "Yes"),
    (HARMONY, f"<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b<|end|>"
     f"<|start|>assistant{FINAL} Yes", "a\nb", "Yes"),
    (HARMONY, f"{FINAL}Yes", "", "Yes"),
    (HARMONY, "<|channel|>analysis<|message|>a<|end|><|start|>ass", "a", "<|start|>ass"),
    (HARMONY, "Yes", "", "Yes"),
    (SOLUTION, "<|begin_of_thought|>\n\na\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\nYes\n\n<|end_of_solution|>",
     "a", "Yes"),
    (SOLUTION, "<|begin_of_thought|>a<|end_of_thought|> <|end_of_solution|>, he", "a", "<|end_of_solution|>, he"),
    (APRIEL, "Here are my reasoning steps:\na\n[BEGIN FINAL RESPONSE]\nYes\n[END FINAL RESPONSE]\n", "a", "Yes"),
    (GRANITE, "<think>a</think><response>Yes</response>", "a", "Yes"),
    (GRANITE, "<think>a</think>\n\nYes", "a", "Yes"),
    (HUNYUAN, "<think>\na\n</think>\n<answer>\nYes\n</answer>", "a", "Yes"),
    (HUNYUAN, "<answer>\nYes </answer> so\n</answer>", "", "Yes </answer> so"),
    (APRIEL, "Here are my reasons", "", "Here are my reasons"),
]  # fmt: skip


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
    assert known_marks(TEMPLATE, []) == known_marks(None, ["<think>", "</think>"]) == (THINK,)
    assert known_marks("{{ messages }}", ["<think>"]) == known_marks(None, []) == ()
    several = {"default": "{{ '[THINK]' }}", "tool_use": "{{ '[/THINK]' }}"}
    assert [marks.end for marks in known_marks(several, ["<think>", "</think>"])] == ["</think>", "[/THINK]"]


def test_an_answer_without_thoughts_begins_as_its_family_has_it():
    for thinking, prompt, want in (
        (OPEN, "assistant\n<think>\n", "\n</think>\n\n"),
        (OPEN, "assistant\n<think>\n\n", "</think>\n\n"),
        (OPEN, "assistant <think>", "</think>"),
        (OPEN, "assistant\n", ""),
        (MISTRAL, "[/INST][THINK]", "[/THINK]"),
        (HARMONY, "<|end|><|start|>assistant", FINAL),
        (HARMONY, f"<|start|>assistant{FINAL}", ""),
        (SOLUTION, "assistant\n<|begin_of_thought|>\n", "\n<|end_of_thought|>\n\n"),
    ):
        assert thoughtless(prompt, thinking.known) == want


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", vocab_size=322, max_position_embeddings=2048)
    tokenizer = make_tokenizer(317)  # and Mistral's marks, which are special tokens
    tokenizer.add_tokens([AddedToken(mark, special=True) for mark in SPECIAL_MARKS], special_tokens=True)
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 319}))
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


def test_marks_that_are_special_tokens_are_told_apart(server):
    begin, end = ({"logit_bias": {str(token): 100}} for token in SPECIAL_MARKS.values())
    off = {"chat_template_kwargs": {"enable_thinking": False}, "max_tokens": 6}
    tools = [{"type": "function", "function": {"name": "f", "parameters": NOTHING}}]
    for fields in ({}, {"tools": tools}):
        thoughts, body = ask(server, **begin, **off, **fields)
        assert (thoughts["content"], thoughts["reasoning_content"]) == (None, 5 * "[THINK]")  # cut by max_tokens
        assert streamed(server, body, "reasoning_content") == 5 * "[THINK]" and not streamed(server, body, "content")
        answer, body = ask(server, **end, **off, **fields)
        assert answer["content"] == 6 * "[/THINK]" == streamed(server, body, "content")
    choice = server.post(CHAT, body | begin | {"stop": 2 * "[THINK]"}).json()["choices"][0]
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == ""
    plain = ask(server, guided_choice=["yes", "no"], **off, **begin)[0]
    assert plain["content"] in ("yes", "no") and "reasoning_content" not in plain


def test_an_answer_that_goes_on_has_no_thoughts_before_it_and_no_marks_in_it(server):
    """The mark that ends it (Command's) is a special token; the one that would open it stands in the prompt."""
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Sure"}]
    for token in SPECIAL_MARKS.values():
        fields = {"messages": messages, "continue_final_message": True, "logit_bias": {str(token): 100}}
        answer, body = ask(server, **fields)
        assert answer["content"] == "" == streamed(server, body, "content") and "reasoning_content" not in answer
    messages[1]["content"] = "<think>"
    assert ask(server, **fields)[0]["reasoning_content"] == 24 * "[/THINK]"


def test_a_grammar_closes_the_block_that_the_prompt_has_opened(server):
    """As an answer without thoughts does in training rows, so that what was trained is asked for."""
    ids = prompt(server)[0] + server.post("/tokenize", {"prompt": "\n</think>\n\n"}).json()["tokens"]
    for fields in ({"guided_choice": ["yes", "no"]}, {"guided_regex": "[a-z]{3} [a-z]{3}"}):
        answer, body = ask(server, **fields)
        assert answer["content"] == server.complete(ids, max_tokens=24, ignore_eos=False, **fields)["text"]
        usage = server.post(CHAT, body).json()["usage"]
        assert usage["prompt_tokens"] == len(ids)


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
