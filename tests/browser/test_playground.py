"""The playground against a real server: answers as the API gives them, shaded, stopped, compared and raced."""

import json
import shlex
import subprocess
import sys

import requests
from page_driver import figure_of, merged, shades_of, text_of

PROMPT = "The quick brown fox"


def chat(server, prompt=PROMPT, **fields):
    """The API's own answer to the same prompt."""
    body = {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "seed": 1, "max_tokens": 40, **fields}
    return server.post("/v1/chat/completions", body).json()["choices"][0]


def test_an_answer_streams_and_is_the_apis(play, server):
    (answer,) = play.ask(PROMPT, max_tokens=40)
    assert text_of(answer) == chat(server)["message"]["content"]
    assert figure_of(answer, "tokens") == "40" and answer.get_attribute("aria-busy") == "false"
    assert "40 tokens" in play.page.locator("#spoken").text_content()
    assert answer.locator("header .badge:visible").text_content() == "ended at max tokens"
    with play.set(max_tokens=3500).held_answer(server):  # so that its tokens come at two times, at least
        pass
    (answer,) = play.wait_done().answers()
    assert float(figure_of(answer, "rate").replace(",", "")) > 0


def test_each_token_is_shaded_by_the_source_that_the_api_names(play, server):
    text = chat(server)["message"]["content"]
    expected = text[: len(text) // 2] + "and something else"
    speculation = {"mode": "fixed", "trace": True}
    trace = chat(server, speculation=speculation, prediction={"type": "content", "content": expected})["trace"]
    (answer,) = play.ask(PROMPT, max_tokens=40, seed=1, mode="fixed", prediction=expected)
    shades = shades_of(answer)
    assert shades == merged((entry["source"], entry["text"]) for entry in trace)
    assert {"target", "prediction"} <= {source for source, _ in shades} and text_of(answer) == text
    drafted = sum(entry["source"] != "target" for entry in trace)
    assert drafted >= 3 and f"prediction {drafted}" in answer.locator(".share").text_content()
    forwards = len({entry["forward"] for entry in trace})
    assert figure_of(answer, "length") == f"{40 / forwards:.2f}"


def test_rejected_drafts_are_shown_to_the_pointer_to_touch_and_to_the_keyboard(play, server):
    text = chat(server)["message"]["content"]
    expected = text[: len(text) // 2] + "and something else"
    (answer,) = play.ask(PROMPT, max_tokens=40, mode="fixed", prediction=expected)
    card, page = play.page.locator("#card"), play.page
    struck = answer.locator(".struck").first
    struck.hover()
    card.locator("del").first.wait_for()
    assert "Rejected here" in card.text_content() and "%" in card.locator(".figure").first.text_content()
    page.mouse.move(0, 0)
    card.wait_for(state="hidden")
    answer.locator(".run").first.focus()
    page.keyboard.press("Shift+ArrowRight")
    card.locator("del").first.wait_for()
    assert page.evaluate("document.activeElement.classList.contains('struck')")
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "card"
    page.keyboard.press("Escape")
    card.wait_for(state="hidden")
    struck.click()
    card.locator("del").first.wait_for()
    page.locator("#legend").click()
    card.wait_for(state="hidden")


def test_a_stopped_answer_keeps_what_came_and_ends_in_the_engine(play, server):
    with play.set(max_tokens=3500, model="alpha").held_answer(server, PROMPT) as answer:
        play.page.locator("#stop").click()
        play.wait_done()
    assert answer.locator("header .badge:visible").text_content() == "stopped"
    assert 0 < int(figure_of(answer, "tokens").replace(",", "")) < 3500 and text_of(answer)
    server.wait_baseline()
    (again,) = play.ask("More", max_tokens=5)  # the conversation goes on
    assert figure_of(again, "tokens") == "5"


def test_another_adapter_answers_when_it_is_chosen_and_brings_its_examples(play, server):
    own = chat(server, "The quick <i>brown</i>", model="alpha")["message"]["content"]
    play.set(model="alpha", max_tokens=40, seed=1)
    example = play.page.locator("#examples button").first
    example.wait_for()
    play.page.get_by_role("button", name="<b>bold</b> title").click()
    assert play.page.locator("#prompt").input_value() == "The quick <i>brown</i>"
    play.page.locator("#prompt").press("Enter")
    play.page.locator(".turn .answer").wait_for()
    (answer,) = play.wait_done().answers()
    assert text_of(answer) == own != chat(server, "The quick <i>brown</i>")["message"]["content"]
    assert answer.locator("h2").text_content() == "alpha"
    play.page.get_by_role("button", name="a text").click()
    assert play.page.locator("#prompt").input_value() == "Pack my box"
    assert play.page.locator("[name=kind][value=completion]").is_checked()


def test_two_models_answer_one_prompt_beside_each_other(play, server):
    first, second = play.ask(PROMPT, max_tokens=40, seed=1, model="alpha", beside="beta")
    assert text_of(first) == chat(server, model="alpha")["message"]["content"]
    assert text_of(second) == chat(server, model="beta")["message"]["content"] != text_of(first)


def test_a_race_is_the_same_request_without_drafts_and_the_same_text(play, server):
    text = chat(server, temperature=1, seed=7)["message"]["content"]
    bodies = play.bodies()
    drafted, plain = play.ask(PROMPT, max_tokens=40, temperature=1, mode="fixed", prediction=text, beside=" race")
    assert bodies[1]["speculation"] == {"mode": "off", "trace": True}
    assert {**bodies[0], "speculation": 0} == {**bodies[1], "speculation": 0} and "seed" in bodies[0]
    verdict = play.page.locator(".verdict")
    assert verdict.get_attribute("data-same") == "true" and "Both wrote the same text" in verdict.text_content()
    assert text_of(drafted) == text_of(plain) and {source for source, _ in shades_of(plain)} <= {"target"}
    assert figure_of(drafted, "tokens") == figure_of(plain, "tokens")  # which the page's own seed decides
    (single,) = play.ask("Again", beside="", seed=3)
    single.get_by_role("button", name="Race without drafts").click()
    play.page.locator(".turn:last-child .verdict").wait_for()
    assert len(play.wait_done().answers()) == 2


def test_a_conversation_has_its_turns_and_a_completion_has_none(play, server):
    bodies = play.bodies()
    (answer,) = play.ask("One", max_tokens=6, system="Be short.")
    first = text_of(answer)  # a locator means the last turn's answer
    play.ask("Two")
    said = [(message["role"], message["content"]) for message in bodies[1]["messages"]]
    assert said == [("system", "Be short."), ("user", "One"), ("assistant", first), ("user", "Two")]
    play.page.locator("#new").click()
    play.ask("Three")
    assert [message["content"] for message in bodies[2]["messages"]] == ["Be short.", "Three"]
    (answer,) = play.ask(PROMPT, kind="completion", max_tokens=12, seed=1)
    assert bodies[3]["prompt"] == PROMPT and "messages" not in bodies[3]
    assert text_of(answer) == server.complete(PROMPT, ignore_eos=False)["text"]
    assert answer.locator(".prefix").text_content() == PROMPT


def test_a_schema_and_tools_are_sent_and_calls_are_answered(play, server):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    (answer,) = play.ask(PROMPT, schema=json.dumps(schema), max_tokens=60)
    assert json.loads(text_of(answer))["a"] in (1, 2)
    assert "grammar" in {source for source, _ in shades_of(answer)}
    play.page.locator("#new").click()
    tools = [{"type": "function", "function": {"name": "look", "parameters": schema}}]
    bodies = play.bodies()
    (answer,) = play.ask(PROMPT, schema="", tools=json.dumps(tools), tool_choice="required", max_tokens=200)
    call = answer.locator(".call").first
    assert call.locator("code").text_content().startswith("look({")
    call.locator("textarea").fill("<p>seen</p>")
    play.ask("", tool_choice="none", max_tokens=5)
    messages = bodies[1]["messages"]
    assert messages[1]["tool_calls"][0]["function"]["name"] == "look"
    assert messages[2] == {"role": "tool", "tool_call_id": messages[1]["tool_calls"][0]["id"], "content": "<p>seen</p>"}


def test_what_is_wrong_is_said_in_the_servers_words_or_before_it_is_asked(play, server, errors):
    (answer,) = play.ask(PROMPT, temperature=3)
    message = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "temperature": 3})
    shown = answer.locator("[role=alert]").text_content()
    assert message.json()["error"]["message"] in shown and "400" in shown
    bodies = play.bodies()
    play.set(temperature=0, schema="{").send(PROMPT)
    wrong = play.page.locator("#composer-error")
    wrong.wait_for()
    assert "JSON schema is not valid JSON" in wrong.text_content() and bodies == []
    assert play.page.locator("#prompt").input_value() == PROMPT
    (answer,) = play.ask(PROMPT, schema="", max_tokens=5)
    assert figure_of(answer, "tokens") == "5" and wrong.is_hidden()
    assert len(bodies[0]["messages"]) == 1  # the failed turn is no part of the conversation
    (said,) = errors
    assert "400" in said  # the browser's own line for the first one
    errors.clear()


def test_the_same_request_as_curl_and_as_python_gives_the_same_text(play, server):
    prompt = """It's "quick" \\ and $HOME `x`"""
    (answer,) = play.ask(prompt, max_tokens=20, seed=5, temperature=1, stop="qq", top_k=50)
    codes = {}
    for kind in ("curl", "Python"):
        answer.get_by_role("button", name=kind).click()
        codes[kind] = play.page.locator("#code-text").text_content()
        play.page.locator("#code-close").click()
    assert "trace" not in codes["curl"] + codes["Python"]
    words = shlex.split(codes["curl"].replace("\\\n", " "))
    headers = {"Content-Type": "application/json"}
    reply = requests.post(words[1], data=words[words.index("-d") + 1].encode(), headers=headers)
    assert reply.json()["choices"][0]["message"]["content"] == text_of(answer)
    ran = subprocess.run([sys.executable, "-c", codes["Python"]], capture_output=True, text=True, check=False)
    assert ran.stdout.removesuffix("\n") == text_of(answer), ran.stderr
