"""A tokenizer and a model of different sizes: what is common is served, what cannot be is said by name and limit."""

import json
import shutil

import pytest
from server_fixture import ServerProcess, assert_error
from tiny_models import make_tiny_model, make_tokenizer
from tokenizers import AddedToken, processors

from specserve.errors import ModelError
from specserve.text.known_tokens import check_tokenizer
from specserve.text.tokenizer import TextTokenizer

CHAT = "/v1/chat/completions"
TEMPLATE = "{{ '<|new|>' if extra else '' }}{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizers of 322 tokens, the last two of which are added ones: by where they stand in prompts."""
    root = tmp_path_factory.mktemp("tokenizers")
    for name in ("nowhere", "chat", "text", "both"):
        fast = make_tokenizer(317)
        fast.add_tokens([AddedToken("<|new|>", special=True), AddedToken("<new>")])
        fast.chat_template = TEMPLATE.replace("if extra", "if true") if name in ("chat", "both") else TEMPLATE
        if name in ("text", "both"):
            fast.backend_tokenizer.post_processor = processors.TemplateProcessing(
                single="<|new|> $A", special_tokens=[("<|new|>", 320)]
            )
        fast.save_pretrained(root / name)
    return root


@pytest.mark.parametrize(
    "name, logged", [("nowhere", None), ("chat", "every conversation"), ("text", "every text with")]
)
def test_a_tokenizer_is_served_while_some_prompt_can_be(folders, caplog, name, logged):
    caplog.set_level("INFO")
    check_tokenizer(TextTokenizer(folders / name), 320)
    assert "2 more tokens" in caplog.text
    assert logged is None or f"{logged}" in caplog.text and "'<|new|>' is number 320" in caplog.text
    caplog.clear()
    for vocab_size in (322, 400):  # rows of weights without a token are common
        check_tokenizer(TextTokenizer(folders / name), vocab_size)
    assert not caplog.text


def test_where_no_prompt_can_be_served_the_start_is_refused(folders):
    with pytest.raises(
        ModelError, match=r"no prompt can be served.*'<\|new\|>' is number 320 .*weights of 320 tokens; take"
    ):
        check_tokenizer(TextTokenizer(folders / "both"), 320)


@pytest.mark.parametrize(
    "content", ["{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}", "{{ m.content }}"]
)
def test_a_template_that_loses_what_a_user_says_is_told_at_start(tmp_path, caplog, content):
    """Llava's goes through parts, which a text has none of."""
    fast = make_tokenizer(317)
    fast.chat_template = TEMPLATE.replace("{{ m.content }}", content)
    fast.save_pretrained(tmp_path)
    check_tokenizer(TextTokenizer(tmp_path), 320)
    assert ("leaves out what a user says" in caplog.text) == ("for p in" in content)


@pytest.fixture(scope="module")
def server(folders, tmp_path_factory):
    path = make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")
    shutil.copytree(folders / "nowhere", path, dirs_exist_ok=True)
    server = ServerProcess(path).wait_ready()
    yield server
    assert server.stop() == 0


def test_a_prompt_with_a_token_that_the_model_lacks_is_refused_by_name(server):
    says = ["'<new>' is number 321 of the tokenizer", "weights of 320 tokens", "leave the token out"]
    ask = {"max_tokens": 4}
    for path, body in (
        ("/v1/completions", {"prompt": "a <new> b"}),
        ("/v1/completions", {"prompt": [65, 321]}),
        (CHAT, {"messages": [{"role": "user", "content": "a <new> b"}]}),
        ("/generate", {"inputs": "a <new>"}),
    ):
        response = server.post(path, {**ask, **body} if path != "/generate" else body)
        assert response.status_code == (422 if path == "/generate" else 400), response.text
        assert all(text in json.dumps(response.json()) for text in says), response.text
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"extra": True}, **ask}
    assert_error(server.post(CHAT, body), 400, "'<|new|>' is number 320")
    assert_error(server.post("/v1/completions", {"prompt": [322], **ask}), 400, "token id 322 is outside 0..319")
    assert_error(server.post("/v1/embeddings", {"input": "a <new>"}), 400, "'<new>' is number 321")
    # Special tokens that a message spells are letters, and everything else is served.
    body = {"messages": [{"role": "user", "content": "a <|new|> b"}], **ask}
    assert server.post(CHAT, body).status_code == 200
