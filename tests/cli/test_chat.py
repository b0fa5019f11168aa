"""`specserve chat`: a conversation and its commands, what a terminal is sent, a real server, keys that are pressed."""

import contextlib
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
import time

import pytest
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess
from tiny_models import make_tiny_model

from specserve.cli import main as cli
from specserve.cli.chat import Chat, ChatOptions
from specserve.cli.chat_backends import ServerBackend
from specserve.cli.line_reader import LineReader
from specserve.errors import UserError

USAGE = {"completion_tokens": 6, "speculation": {"mean_accepted_length": 3.0}}


def chunk(text, **choice):
    return {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None, **choice}]}


def token(text, source="target", chance=None, forward=0):
    return {"token_id": 1, "text": text, "source": source, "chance": chance, "forward": forward}


class FakeBackend:
    """Answers with what `answers` holds, a list of chunks or an error for each request; keeps the bodies."""

    place = "nowhere"

    def __init__(self, *answers):
        self.answers = list(answers)
        self.bodies = []
        self.num_closed = 0

    def models(self):
        return ["base-model", "one", "two"]

    def stats(self):
        return {"model": "base-model", "speculation": {"by_adapter": [
            {"model": "one\x1b[2J", "generated": 30, "verifications": 10}]}}  # fmt: skip

    def chunks(self, body):
        self.bodies.append(json.loads(json.dumps(body)))
        answer = self.answers.pop(0)
        try:
            if isinstance(answer, UserError):
                raise answer
            for item in answer:
                if item is KeyboardInterrupt:
                    raise KeyboardInterrupt
                yield item
            yield {"choices": [], "usage": USAGE}
        finally:
            self.num_closed += 1


def talk(backend, *lines, **options):
    """(exit code, stdout, stderr) of a chat from a pipe."""
    out, err = io.StringIO(), io.StringIO()
    chat = Chat(backend, ChatOptions(**options), out, err)
    code = chat.run(LineReader(io.StringIO("".join(f"{line}\n" for line in lines)), out))
    return code, out.getvalue(), err.getvalue()


def test_a_conversation_is_sent_whole_and_its_answers_printed():
    backend = FakeBackend([chunk("Good "), chunk("day")], [chunk("Yes")])
    code, out, err = talk(backend, "hello", "", "really?", system="Be short", temperature=0.5, max_tokens=9)
    assert (code, out) == (0, "Good day\nYes\n")
    first, second = backend.bodies
    assert first["messages"] == [{"role": "system", "content": "Be short"}, {"role": "user", "content": "hello"}]
    assert second["messages"][2:] == [
        {"role": "assistant", "content": "Good day"},
        {"role": "user", "content": "really?"},
    ]
    assert (first["model"], first["temperature"], first["max_tokens"]) == ("base-model", 0.5, 9)
    assert re.fullmatch(r"(6 tokens, [\d.]+ tokens/s, 3.00 tokens a forward, the first after [\d.]+ s\n){2}", err)


def test_commands_change_what_is_asked(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    backend = FakeBackend(*[[chunk("x")]] * 6)
    code, _, err = talk(
        backend,
        *("a", "/adapter one", "b", "/off", "c", "/on", f"/schema {schema}", "d", "/schema", "/reset", "e"),
        *("/system Be kind", "/adapter base", "//f", "/adapter"),
    )
    a, b, c, d, e, f = backend.bodies
    assert code == 0
    assert [body["model"] for body in backend.bodies] == ["base-model", "one", "one", "one", "one", "base-model"]
    assert [body["speculation"].get("mode") for body in (a, b, c, d)] == [None, None, "off", None]
    assert d["response_format"]["json_schema"]["schema"] == {"type": "object"} and "response_format" not in e
    assert len(d["messages"]) == 7 and e["messages"] == [{"role": "user", "content": "e"}]
    assert f["messages"] == [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "/f"}]
    assert err.endswith("* base-model\n  one\n  two\n")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/adapter three", "there is no adapter 'three'; there are one, two"),
        ("/adaptor one", "there is no command /adaptor; /help shows them"),
        ("/schema /nowhere/at.all", "cannot read /nowhere/at.all"),
    ],
)
def test_a_mistake_is_one_line_and_the_chat_goes_on(line, words):
    code, out, err = talk(FakeBackend([chunk("still here")]), line, "hello")
    assert code == 1 and out == "still here\n" and f"error: {words}" in err


def test_a_schema_that_is_no_json_is_said_of_its_file(tmp_path):
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": }')
    _, _, err = talk(FakeBackend(), f"/schema {schema}")
    assert f"error: {schema} is not valid JSON" in err


def test_what_fails_is_no_part_of_the_conversation():
    full = UserError("the prompt has 9 tokens", code="context_length_exceeded")
    backend = FakeBackend(full, [chunk("ok")])
    code, _, err = talk(backend, "too long", "short")
    assert code == 1 and "error: the prompt has 9 tokens (/reset begins anew)" in err
    assert backend.bodies[1]["messages"] == [{"role": "user", "content": "short"}]


def test_an_answer_that_is_stopped_stays_as_far_as_it_came():
    backend = FakeBackend([chunk("half an "), KeyboardInterrupt], [KeyboardInterrupt], [chunk("ok")])
    code, out, err = talk(backend, "a", "b", "c")
    assert (code, out) == (0, "half an \nok\n") and backend.num_closed == 3
    assert [message["content"] for message in backend.bodies[2]["messages"]] == ["a", "half an ", "c"]
    assert err.count("stopped after") == 2


def test_ctrl_c_beside_an_answer_leaves_the_chat_and_the_conversation_as_they_are(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    backend = FakeBackend([chunk("one")], [chunk("two")])
    with monkeypatch.context() as patch:
        patch.setattr("specserve.cli.chat.figures", interrupted)
        patch.setattr(backend, "stats", interrupted)
        chat = Chat(backend, ChatOptions(), io.StringIO(), io.StringIO())
        assert chat.run(LineReader(io.StringIO("a\n/stats\n"), io.StringIO())) == 0
    assert chat.run(LineReader(io.StringIO("b\n"), io.StringIO())) == 0
    assert [message["content"] for message in backend.bodies[1]["messages"]] == ["a", "one", "b"]


def test_a_server_without_traces_is_asked_again_without():
    refusal = UserError("unknown field 'speculation.trace'", param="speculation.trace")
    backend = FakeBackend(refusal, [chunk("plain")], [chunk("again")])
    code, out, _ = talk(backend, "a", "b")
    assert (code, out) == (0, "plain\nagain\n")
    assert [body.get("speculation") for body in backend.bodies] == [{"trace": True}, None, None]


def test_a_terminal_gets_shades_and_no_control_characters():
    trace = [token("safe "), token("\x1b[2J", "head", 0.9, 1)]
    for options in ({"has_colour": True}, {}):
        backend = FakeBackend([chunk("safe \x1b[2J", trace=trace), chunk("\x1b]0;title\x07\u009b")])
        _, out, err = talk(backend, "a", "/stats", is_terminal=True, **options)
        assert "\u241b[2J" in out and "\u241b]0;title\u2407\ufffd" in out
        assert re.sub(r"\x1b\[[\d;]*m", "", out + err).isprintable() is False  # line feeds
        assert not re.search(r"[^\n\x20-\U0010ffff]", re.sub(r"\x1b\[[\d;]*m", "", out + err))
        assert ("\x1b[38;5;16;48;5;117m" in out) == options.get("has_colour", False)
        assert ("lookahead head" in err) == options.get("has_colour", False)
    _, out, _ = talk(FakeBackend([chunk("\x1b[2J")]), "a")
    assert out == "\x1b[2J\n"  # a file gets what the model wrote


def test_completion_knows_commands_and_adapters():
    chat = Chat(FakeBackend(), ChatOptions(), io.StringIO(), io.StringIO())
    assert {"/adapter", "/off", "/on", "/stats", "/quit"} <= set(chat.names([]))
    assert chat.names(["/adapter"]) == ["base-model", "one", "two"] and chat.names(["hello"]) == []


# -- a real server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("chat")
    model = make_tiny_model(root / "model", max_position_embeddings=8192)
    make_peft_adapter(model, root / "adapters" / "mine", r=4, std=0.3)
    server = ServerProcess(model, "--adapters-dir", str(root / "adapters"), "--api-key", "k3y").wait_ready()
    yield server
    assert server.stop() == 0


def run(capsys, monkeypatch, stdin, *argv):
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    code = cli.exit_code_of(["chat", *argv])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_chat_with_a_server_is_its_answers(capsys, monkeypatch, server):
    body = {"messages": [{"role": "user", "content": "hello"}], "model": "mine", "temperature": 0, "max_tokens": 12}
    theirs = server.post("/v1/chat/completions", body, headers={"Authorization": "Bearer k3y"}).json()
    flags = ("--url", f"{server.url}/v1", "--api-key", "k3y", "--max-tokens", "12")
    code, out, err = run(capsys, monkeypatch, "/adapter mine\nhello\n/stats\n", *flags)
    assert (code, out) == (0, theirs["choices"][0]["message"]["content"] + "\n")
    assert "tokens a forward" in err and "model (float32, cpu" in err


@pytest.mark.parametrize("url", ["ftp://x", "http://[::1", "http://[x]", "http://x:port", "http://x:0", "http://"])
def test_what_is_no_address_of_a_server_is_said(url):
    with pytest.raises(UserError, match="is no address of a server; give one such as"):
        ServerBackend(url, None)


def test_what_is_wrong_with_a_server_is_said(capsys, monkeypatch, server):
    code, _, err = run(capsys, monkeypatch, "", "--url", server.url)
    assert code == 2 and "(--api-key, or SPECSERVE_API_KEY)" in err
    code, _, err = run(capsys, monkeypatch, "", "--url", "http://127.0.0.1:9")
    assert code == 2 and "cannot reach http://127.0.0.1:9" in err and "specserve serve" in err
    code, _, err = run(capsys, monkeypatch, "", "--url", server.url, "--dtype", "fp32")
    assert code == 2 and "leave out --dtype" in err
    code, _, err = run(capsys, monkeypatch, "", "--url", server.url, "--api-key", "k3y", "--adapter", "none")
    assert code == 2 and "there is no adapter 'none'; there are mine" in err


def test_leaving_a_stream_ends_the_request_at_the_server(server):
    backend = ServerBackend(server.url, "k3y")
    body = {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True, "stream": True}
    chunks = backend.chunks(body)
    next(chunks)
    chunks.close()
    deadline = time.monotonic() + 60
    while backend.stats()["requests"]["running"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)


class Terminal:
    """A command on a pseudo-terminal."""

    def __init__(self, *argv, env):
        self._master, slave = pty.openpty()
        command = [sys.executable, "-m", "specserve.cli", *argv]
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env={**os.environ, "TERM": "xterm-256color", **env},
            start_new_session=True, preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        )  # fmt: skip
        os.close(slave)
        self.seen = ""

    def type(self, text):
        os.write(self._master, text.encode())

    def interrupt(self, pattern):
        """Press Ctrl-C until the pattern comes: readline sleeps through one that comes before it waits for keys."""
        for _ in range(60):
            self.type("\x03")
            with contextlib.suppress(AssertionError):
                return self.wait_for(pattern, timeout_s=2)
        return self.wait_for(pattern)

    def wait_for(self, pattern, timeout_s=120):
        """What was shown up to the pattern, which is taken."""
        deadline = time.monotonic() + timeout_s
        while not (match := re.search(pattern, self.seen)):
            ready, _, _ = select.select([self._master], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{pattern!r} did not come: {self.seen[-300:]!r}"
            try:
                self.seen += os.read(self._master, 65536).decode(errors="replace")
            except OSError:  # the other side has closed
                assert re.search(pattern, self.seen), self.seen
        shown, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return shown


def test_on_a_terminal_keys_stop_answers_and_leave(server, tmp_path, request):
    env = {"SPECSERVE_API_KEY": "k3y", "XDG_STATE_HOME": str(tmp_path)}
    terminal = Terminal("chat", "--url", server.url, "--max-tokens", "8000", "--color", "never", env=env)
    request.addfinalizer(terminal.process.kill)
    assert "adapters: mine" in terminal.wait_for("model> ")
    terminal.interrupt("model> ")  # at the prompt: another line
    terminal.type("/schema\n")
    terminal.wait_for("free text(.|\n)*model> ")
    schema = tmp_path / "endless.json"
    schema.write_text('{"type": "array", "items": {"enum": [1]}, "minItems": 3000}')
    terminal.type(f"/schema {schema}\n")
    terminal.wait_for("answers are JSON(.|\n)*model> ")
    terminal.type("count\n")
    terminal.wait_for(r"\[1")
    terminal.interrupt("stopped after(.|\n)*model> ")
    terminal.type("/adapter mine\n")
    terminal.wait_for("mine> ")
    terminal.type("\x04")
    assert terminal.process.wait(60) == 0
    history = tmp_path / "specserve" / "chat_history"
    assert "count" in history.read_text() and history.stat().st_mode & 0o777 == 0o600


def test_without_a_server_an_engine_is_started(capsys, monkeypatch, tmp_path):
    made = []

    class FakeLLM(FakeBackend):
        model_name = "own"

        def __init__(self, model, **options):
            super().__init__([chunk("hi")])
            made.append((self, model, options))

        def adapter_names(self):
            return ["mine"]

        def chat_chunks(self, body):
            return self.chunks(body)

        def __enter__(self):
            return self

        def __exit__(self, *exception):
            self.is_over = True

    monkeypatch.setattr("specserve.llm.llm.LLM", FakeLLM)
    flags = ("model", "--dtype", "fp32", "--adapters-dir", str(tmp_path), "--adapter", "mine")
    code, out, err = run(capsys, monkeypatch, "hello\n", *flags)
    ((llm, model, options),) = made
    assert (code, out) == (0, "hi\n") and "loading the model" in err and llm.is_over
    assert (model, options["dtype"], options["adapters_dir"]) == ("model", "fp32", tmp_path)
    assert llm.bodies[0]["model"] == "mine"


def test_names_of_a_server_do_not_steer_the_terminal():
    class Hostile(FakeBackend):
        def models(self):
            return ["base\x1b[2J", "one\x9b2J"]

    out, err = io.StringIO(), io.StringIO()
    chat = Chat(Hostile(), ChatOptions(), out, err)
    chat.greet()
    prompts = [chat.prompt]
    chat.take("/adapter one\x9b2J")
    prompts.append(chat.prompt)
    chat.take("/adapter")
    shown = "".join([*prompts, out.getvalue(), err.getvalue()])
    assert not set(shown) & {"\x1b", "\x9b"} and prompts == ["base\\x1b[2J> ", "one\\x9b2J> "]
