"""What the README and docs/ tell readers to type works: requests are sent, the rest is parsed by what it names.

Commands that take long, or need what is not here, are run by a make target or by the test that `RUN_BY` names; flags
and names in them are checked here all the same.
"""

import ast
import json
import re
import shlex
import shutil
import subprocess

import click
import pytest
from doc_blocks import PAGES, blocks, commands
from peft_adapters import make_peft_adapter
from places import ROOT
from served_poolers import make_poolers
from server_fixture import ServerProcess
from tiny_models import make_tiny_model

from specserve.cli.main import cli

BASE = "http://127.0.0.1:8000"
ADAPTERS = ("my-adapter", "mine-v2", "random-1", "control2json", "debtags", "summary", "tickets")
POOLERS = {"embedder": "search", "ranker": "rerank", "tagger": "tags"}
OTHER_PROGRAMS = {"guidellm", "pip"}  # not ours
# Python that is run elsewhere.
RUN_BY = {
    "lorax.Client": "tests/conformance/test_clients.py",
    "cohere.": "tests/conformance/test_clients.py",
    "langchain_": "tests/conformance/test_clients.py",
    "huggingface_hub": "tests/conformance/test_clients.py",  # asks nobody at all where it is set to be offline
    "AutoModelForSequenceClassification": "tests/training/pooling/test_pooling_run.py",
}
PAGES_RUN_BY = {"python.md": "tests/llm/test_async_llm.py"}  # one program each


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("docs")
    model = make_tiny_model(root / "model", max_position_embeddings=2048)
    first = make_peft_adapter(model, root / "adapters" / ADAPTERS[0])
    for name in ADAPTERS[1:]:
        shutil.copytree(first, root / "adapters" / name)
    make_poolers(model, root / "adapters")
    for name, documented in POOLERS.items():
        (root / "adapters" / name).rename(root / "adapters" / documented)
    flags = ("--adapters-dir", str(root / "adapters"), "--batch-dir", str(root / "batches"))
    server = ServerProcess(model, *flags).wait_ready()
    yield server
    assert server.stop() == 0


def here(text: str, server) -> str:
    """With the address of this server, a token of its small vocabulary, and an end for answers of random weights."""
    text = text.replace("$BASE", server.url).replace(BASE, server.url).replace("19556", "65")
    return text.replace("tools=tools)", "tools=tools, max_tokens=32)")


@pytest.mark.parametrize("block", blocks("sh"), ids=str)
def test_commands(block, request):
    for command in commands(block.text):
        words = [word for word in shlex.split(command, comments=True) if word != "&"]
        program = words[0].removeprefix(".venv/bin/")
        if program == "curl":
            send(command, request.getfixturevalue("server"))
        elif program == "make":
            assert subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True).returncode == 0, command
        elif program == "specserve":
            parse(words[1:])
        elif program == "python":
            check_module(command)
        else:
            assert program in OTHER_PROGRAMS, f"{command!r}: nothing checks this"


def send(command: str, server) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    script = f'curl() {{ command curl -sS --fail-with-body "$@"; }}; set -e; {here(command, server)}'
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (command, done.stdout, done.stderr)


def parse(words: list[str]) -> None:
    """As the command line would, without running anything; a bare command is only looked up."""
    words = words[: words.index(";")] if ";" in words else words
    context = click.Context(cli, info_name="specserve")
    command: click.Command = cli
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None, name
        command, context = found, click.Context(found, context, info_name=name)
        if not words:
            return
    options = {name for param in command.params for name in (*param.opts, *param.secondary_opts)}
    given = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert {word for word in given if word.startswith("--")} <= options, words
    needed = [param.opts for param in command.params if isinstance(param, click.Option) and param.required]
    assert "--help" in given or all(given.intersection(names) for names in needed), (words, needed)


def check_module(command: str) -> None:
    """A bench or script of the repository, whose text names every flag that is given."""
    words = shlex.split(command, comments=True)
    if words[1] == "-m":
        path = ROOT / words[2].replace(".", "/")
        files = [*path.glob("*.py")] if path.is_dir() else [path.with_suffix(".py"), ROOT / "bench" / "options.py"]
    else:
        files = [ROOT / words[1]]
    text = "".join(file.read_text() for file in files)
    for flag in (word.partition("=")[0] for word in words[2:] if word.startswith("--")):
        name = flag.removeprefix("--").removeprefix("no-")
        assert re.search(rf'"--{name}"|\b{name.replace("-", "_")}\b', text), f"{command}: {flag} is unknown"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_benches_in_the_text_exist_with_their_flags(page):
    for command in re.findall(r"`((?:[A-Z]=\S+ )*(?:[^`;]*; )?python -m [^`]+)`", page.read_text()):
        check_module(command[command.index("python") :].replace("\n", " "))


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python(block, request):
    ast.parse(block.text)
    if block.page.name in PAGES_RUN_BY:
        assert "docs/python.md" in (ROOT / PAGES_RUN_BY[block.page.name]).read_text()
        return
    if any(name in block.text for name in RUN_BY):
        assert all((ROOT / path).exists() for path in RUN_BY.values())
        return
    run_python(block.text, request.getfixturevalue("server"))


def run_python(text: str, server) -> None:
    import openai
    import pydantic
    import requests

    names = {
        **{"openai": openai, "pydantic": pydantic, "requests": requests, "json": json},
        "client": openai.OpenAI(base_url=f"{server.url}/v1", api_key="none"),
        "BASE": server.url,
        "admin": {},
        "model": server.get("/v1/models").json()["data"][0]["id"],
        "messages": [{"role": "user", "content": "Hello"}],
        "tools": [{"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}],
        "run": lambda name, arguments: {"name": name, **arguments},
        "ticket": {},
        "tags": {},
    }
    exec(compile(here(text, server), "documentation", "exec"), names)
