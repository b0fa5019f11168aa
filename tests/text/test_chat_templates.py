"""Chat templates that came with adapters: the text that transformers makes, and no way to hold or fill the server."""

import asyncio
import json
import tempfile
import time

import pytest
import requests
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess
from tiny_models import CHAT_TEMPLATE, make_tiny_model
from transformers import AutoTokenizer

from specserve.errors import AdapterError, OverloadedError, UserError
from specserve.text.template_checks import may_render_here
from specserve.text.template_renderer import TemplateRenderer
from specserve.text.tokenizer import TextTokenizer

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": {"x": [1, None, 10**30]}}}
MESSAGES = [
    {"role": "system", "content": "Be brief. é"},
    {"role": "user", "content": "Hi <|im_end|> there"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3", "tool_call_id": "a", "name": "f"},
]  # fmt: skip
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
RICH = (
    "{{ bos_token }}{% if tools %}{{ tools | tojson(indent=1) }}{% endif %}{% set ns = namespace(n=0) %}"
    "{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.n = ns.n + 1 %}"
    "[{{ m['role'] }}]{{ m.content | trim }}{{ m.tool_calls | tojson if m.tool_calls is defined }}{% endfor %}"
    "{% for i in range(ns.n) %}.{% endfor %}{{ eos_token if add_generation_prompt }}{{ missing }}"
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def of_adapter(model_dir, tmp_path_factory):
    """The tokenizer of an adapter that brings a template."""
    base, root = TextTokenizer(model_dir), tmp_path_factory.mktemp("adapters")

    def make(template, name="mine"):
        (root / name).mkdir(exist_ok=True)
        (root / name / "chat_template.jinja").write_text(template)
        return base.for_adapter_in(root / name)

    return make


@pytest.fixture
def with_config(model_dir, tmp_path):
    """The tokenizer of an adapter whose tokenizer_config.json has this chat_template, and no tokenizer.json."""

    def make(template):
        (tmp_path / "mine").mkdir(exist_ok=True)
        (tmp_path / "mine" / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
        return TextTokenizer(model_dir).for_adapter_in(tmp_path / "mine")

    return make


@pytest.mark.parametrize("as_list", [True, False])
def test_an_adapters_several_templates_are_its_own(with_config, as_list):
    texts = {"default": "plain {{ messages[0].content }}", "tool_use": "tools {{ tools | length }}", "rag": "never"}
    tokenizer = with_config([{"name": name, "template": text} for name, text in texts.items()] if as_list else texts)
    chat = tokenizer.template.hidden_chat(MESSAGES[:1]), tokenizer.template.hidden_chat(MESSAGES[:1], tools=TOOLS)
    assert [tokenizer.template.render_chat(one) for one in chat] == ["plain Be brief. é", "tools 1"]
    assert [tokenizer.template.job(one, 1.0).template for one in chat] == [texts["default"], texts["tool_use"]]
    assert not tokenizer.template.is_trusted and "adapter 'mine'" in tokenizer.template.name
    for empty in (None, [], ""):
        assert with_config(empty).template.text == CHAT_TEMPLATE


@pytest.mark.parametrize("template", [7, ["x"], [{"name": "default"}], {"default": None}, [{"template": "x"}]])
def test_an_adapters_template_that_is_none_is_refused(with_config, template):
    with pytest.raises(
        AdapterError, match="adapter 'mine': its chat template cannot be read: chat_template is neither"
    ):
        with_config(template)


def test_several_templates_without_a_default_are_refused_by_their_names(with_config):
    tokenizer = with_config([{"name": "rag", "template": "x"}, {"name": "chat", "template": "x"}])
    with pytest.raises(UserError, match="adapter 'mine' cannot be used: of chat, rag none is named 'default'"):
        tokenizer.encode_chat(MESSAGES[:1])


def run(work):
    """`work(renderer)` to its end, and the renderer's."""

    async def main():
        renderer = TemplateRenderer()
        try:
            return await work(renderer)
        finally:
            await renderer.close()

    return asyncio.run(main())


def test_a_process_renders_what_transformers_renders(model_dir, of_adapter):
    reference = AutoTokenizer.from_pretrained(model_dir)

    async def both(renderer):
        for template in (RICH, CHAT_TEMPLATE.replace("user", "User")):
            tokenizer = of_adapter(template)
            for tools in (None, TOOLS):
                for opens in (True, False):
                    chat = tokenizer.template.hidden_chat(MESSAGES, opens, False, tools)
                    text = await renderer.render(tokenizer.template.job(chat, 60), "it")
                    plain = [dict(m, content=m["content"].replace("<|im_end|>", "END")) for m in MESSAGES]
                    want = reference.apply_chat_template(
                        plain, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=opens
                    )
                    assert (
                        tokenizer.decode(tokenizer.chat_ids(chat, text)).replace("<|im_end|> there", "END there")
                        == want
                    )

    run(both)


def test_only_the_models_own_template_is_rendered_in_the_server_and_only_when_it_cannot_loop(model_dir, of_adapter):
    assert TextTokenizer(model_dir).template.is_trusted
    assert of_adapter(CHAT_TEMPLATE).template.is_trusted
    assert not of_adapter(CHAT_TEMPLATE + " ").template.is_trusted
    for template in (LOOPS, "{{ 'a' * 9 }}", "{{ 9 ** 9 }}", "{% macro f(n) %}{{ f(n) }}{% endmacro %}", "{% if %}"):
        assert not may_render_here(template)


DOUBLE = "{% set ns.x = ns.x ~ ns.x %}"
BAD = {
    "endless": (LOOPS, "longer than 0.5 s"),
    "endless in one operation": ("{{ 10 ** (10 ** 8) }}", "longer than 0.5 s"),
    "memory": (f"{{% set ns = namespace(x='aaaaaaaa') %}}{{% for i in range(60) %}}{DOUBLE}{{% endfor %}}", "memory"),
    "text": ("{{ 'a' * 40000000 }}", "at most 33554432"),
    "recursion": ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
    "division": ("{{ 1 // 0 }}", "division"),
    "syntax": ("{% for %}", "template"),
    "escape": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "its own words": ("{{ raise_exception('only the user may speak') }}", "only the user may speak"),
}  # fmt: skip


def test_bad_templates_are_refused_by_name_and_good_ones_go_on(of_adapter):
    async def all_of_them(renderer):
        good = of_adapter("{{ messages[0].content }}", "good")

        async def render(tokenizer, timeout_s=60.0):
            return await renderer.render(
                tokenizer.template.job(tokenizer.template.hidden_chat(MESSAGES[:1]), timeout_s), tokenizer.template.name
            )

        async def fails(template, words):
            with pytest.raises(UserError) as caught:
                await render(of_adapter(template, "bad"), 0.5 if "longer" in words else 60.0)
            assert "adapter 'bad'" in str(caught.value) and words in str(caught.value)

        for template, words in BAD.values():
            bad = asyncio.create_task(fails(template, words))
            assert await render(good) == MESSAGES[0]["content"]
            await bad
        slow = asyncio.create_task(render(of_adapter(LOOPS, "slow")))
        await asyncio.sleep(0.2)
        slow.cancel()  # a client that leaves
        assert await render(good) == MESSAGES[0]["content"]
        with pytest.raises(asyncio.CancelledError):
            await slow

    run(all_of_them)


def test_processes_that_do_not_start_or_end_by_themselves_are_no_templates_fault(of_adapter, monkeypatch):
    good = of_adapter("{{ messages[0].content }}", "good")
    job = good.template.job(good.template.hidden_chat(MESSAGES[:1]), 60.0)

    async def work(renderer):
        for executable in ("/bin/false", "/no/such/python"):
            with monkeypatch.context() as patch:
                patch.setattr("sys.executable", executable)
                with pytest.raises(UserError, match="retry shortly") as refused:
                    await renderer.render(job, good.template.name)
                assert refused.value.status == 503
        assert await renderer.render(job, good.template.name) == MESSAGES[0]["content"]
        (worker,) = renderer._idle
        worker.kill()
        await worker.wait()
        assert await renderer.render(job, good.template.name) == MESSAGES[0]["content"]

    run(work)


def test_a_template_that_breaks_marks_gets_letters(of_adapter):
    broken = of_adapter("{{ messages[0].content[:-8] }}ffffffff", "broken")
    chat = broken.template.hidden_chat([{"role": "user", "content": "Hi <|im_end|>"}])
    assert broken.decode(broken.chat_ids(chat, broken.template.render_chat(chat))).endswith("ffffffff")


def test_marks_in_the_place_of_texts_do_not_hide_how_long_the_text_becomes(of_adapter):
    many = of_adapter("{% for i in range(100000) %}{{ messages[0].content }}{% endfor %}", "many")
    chat = many.template.hidden_chat([{"role": "user", "content": "a" * 100_000 + "<|im_end|>"}])
    start = time.monotonic()
    with pytest.raises(UserError, match=r"adapter 'many'.*10001000000 characters"):
        many.chat_ids(chat, many.template.render_chat(chat), 2048)
    assert time.monotonic() - start < 20  # 10 GB take half a minute, and a longer message hours


def test_a_slow_template_of_an_adapter_holds_up_nobody(model_dir, tmp_path):
    for name, template, std in (("slow", LOOPS, 0.2), ("good", "{{ messages[0].content }}", 0.3)):
        make_peft_adapter(model_dir, tmp_path / name, r=4, std=std)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    server = ServerProcess(model_dir, "--adapters-dir", str(tmp_path)).wait_ready()
    try:
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
        assert server.post("/v1/chat/completions", {**chat, "model": "good"}).status_code == 200
        for _ in range(3):  # as many as would take all threads if each burned on
            with pytest.raises(requests.exceptions.ReadTimeout):
                requests.post(server.url + "/v1/chat/completions", json={**chat, "model": "slow"}, timeout=(60, 0.1))
        start = time.monotonic()
        assert server.post("/v1/chat/completions", {**chat, "model": "good"}).status_code == 200
        assert time.monotonic() - start < 60
        generate = {"inputs": "Hi", "parameters": {"adapter_id": "slow", "apply_chat_template": True}}
        for path, body in (("/generate", generate), ("/tokenize", {"messages": chat["messages"], "model": "slow"})):
            with pytest.raises(requests.exceptions.ReadTimeout):
                requests.post(server.url + path, json=body, timeout=(60, 0.1))
    finally:
        start = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - start < 60


def test_a_tokenizer_that_finds_no_room_among_temporary_files_is_a_fault_of_the_disk(model_dir, tmp_path, monkeypatch):
    base = TextTokenizer(model_dir)
    files = {name: (model_dir / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    monkeypatch.setattr(tempfile, "tempdir", "/dev/full")
    with pytest.raises(OverloadedError, match="adapter 'mine': there is no room .* TMPDIR") as told:
        base.for_adapter("mine", files)
    assert told.value.status == 503
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert base.for_adapter("mine", files).encode("a fox") == base.encode("a fox")
    assert not list(tmp_path.iterdir())
