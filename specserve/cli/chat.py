"""`specserve chat`: a conversation on a terminal, or one message a line from a pipe, with what speculation did for it.

Owns the conversation, its commands and what is printed: answers on stdout, everything about them on stderr. Whom it
talks to is a backend's; how tokens are shaded, `shading`'s. A terminal is sent no control character of an answer.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import msgspec

from ..errors import UserError
from ..log_lines import one_line
from ..messages import TokenTrace
from ..strict_json import decode_json
from .chat_backends import Backend
from .chat_words import HELP, figures, stats_lines
from .line_reader import LineReader
from .shading import Shading, visible


@dataclass(slots=True)
class ChatOptions:
    """What a chat begins with."""

    adapter: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float = 0.0
    seed: int | None = None
    has_colour: bool = False
    shows_rejected: bool = False
    is_terminal: bool = False  # stdout


@dataclass(slots=True)
class _Answer:
    """One answer on its way."""

    shading: Shading
    text: str = ""  # of the conversation: without thoughts
    usage: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    is_traced: bool = False
    finish_reason: str | None = None


class Chat:
    """One conversation after the other with `backend`. Raises `UserError` when it cannot be reached."""

    def __init__(self, backend: Backend, options: ChatOptions, out: IO[str], err: IO[str]):
        self._backend, self._options, self._out, self._err = backend, options, out, err
        self._messages: list[dict[str, Any]] = []
        self._schema: Any = None
        self._drafts = True
        self._traces = True  # until a server says that it knows no traces
        self._base, *_ = [*backend.models(), "model"]
        self._adapter: str | None = None
        if options.adapter is not None:
            self._choose(options.adapter)

    def names(self, words: list[str]) -> list[str]:
        """What a line that begins with `words` may go on with: commands, adapters."""
        if not words:
            return [f"/{name}" for name in (*self._commands(), "quit")]
        return self._backend.models() if words == ["/adapter"] else []

    @property
    def prompt(self) -> str:
        return f"{one_line(self._adapter or self._base)}> "

    def greet(self) -> None:
        names = self._backend.models()[1:]
        adapters = f"adapters: {one_line(', '.join(names))}" if names else "no adapters"
        base = one_line(self._base)
        self._tell(f"{base} at {self._backend.place}; {adapters}. /help shows the commands, Ctrl-D leaves.")

    def run(self, reader: LineReader) -> int:
        """Read and answer until the end; 1 when something from a pipe could not be done."""
        num_failed = 0
        while True:
            try:
                line = reader.read(self.prompt)
                if line is None or line.split()[:1] in (["/quit"], ["/exit"]):
                    break
                self.take(line)
            except KeyboardInterrupt:  # at the prompt, in a command, or just as an answer ended
                print(file=self._out)
            except UserError as error:
                num_failed += 1
                self._tell(f"error: {one_line(str(error))}")
        if reader.is_terminal:
            print(file=self._out)
        return int(num_failed > 0 and not reader.is_terminal)

    def take(self, line: str) -> None:
        """Do what a line says. Raises `UserError`."""
        text = line.strip()
        if not text:
            return
        if text.startswith("//"):
            self._answer(text[1:])
        elif text.startswith("/"):
            name, _, rest = text[1:].partition(" ")
            command = self._commands().get(name)
            if command is None:
                raise UserError(f"there is no command /{name}; /help shows them, // begins a message with a slash")
            command(rest.strip())
        else:
            self._answer(text)

    # -- commands

    def _commands(self) -> dict[str, Callable[[str], None]]:
        return {
            "help": lambda rest: self._tell(HELP),
            "adapter": self._adapter_command,
            "system": self._system_command,
            "reset": lambda rest: self._reset(),
            "schema": self._schema_command,
            "off": lambda rest: self._draft(False),
            "on": lambda rest: self._draft(True),
            "rejected": lambda rest: self._toggle_rejected(),
            "stats": lambda rest: self._tell(stats_lines(self._backend.stats())),
        }

    def _adapter_command(self, name: str) -> None:
        if not name:
            now = self._adapter or self._base
            names = self._backend.models()
            self._tell("\n".join(f"{'*' if item == now else ' '} {one_line(item)}" for item in names))
        else:
            self._choose(name)
            self._tell(f"the next answers are of {one_line(self._adapter or self._base)}")

    def _choose(self, name: str) -> None:
        names = self._backend.models()
        if name in ("base", self._base):
            self._adapter = None
        elif name in names:
            self._adapter = name
        else:
            raise UserError(f"there is no adapter {name!r}; there are {', '.join(names[1:]) or 'none'}")

    def _system_command(self, text: str) -> None:
        self._options.system = text or None
        self._reset()

    def _reset(self) -> None:
        self._messages.clear()
        self._tell("a new conversation" + (" with that system message" if self._options.system else ""))

    def _schema_command(self, file: str) -> None:
        if not file:
            self._schema = None
            self._tell("answers are free text")
            return
        try:
            data = Path(file).expanduser().read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from None
        self._schema = decode_json(data, file)
        self._tell(f"answers are JSON of {file}")

    def _draft(self, drafts: bool) -> None:
        self._drafts = drafts
        self._tell("with drafts" if drafts else "without drafts")

    def _toggle_rejected(self) -> None:
        self._options.shows_rejected = not self._options.shows_rejected
        self._tell("wrong drafts are " + ("shown" if self._options.shows_rejected else "not shown"))

    # -- answers

    def _answer(self, text: str) -> None:
        """Ask, and print what comes. A message that fails leaves the conversation; an answer that is stopped stays."""
        message = {"role": "user", "content": text}
        answer = _Answer(Shading(self._options.has_colour, self._options.shows_rejected))
        try:
            with contextlib.suppress(KeyboardInterrupt):
                self._print(answer, [*self._messages, message])
        except UserError as error:
            if error.code == "context_length_exceeded":
                raise UserError(f"{error} (/reset begins anew)") from None
            raise
        finally:
            if answer.first_s is not None:
                print(file=self._out, flush=True)
        if answer.text:
            self._messages += [message, {"role": "assistant", "content": answer.text}]
        self._tell_figures(answer)

    def _print(self, answer: _Answer, messages: list[dict[str, Any]]) -> None:
        with closing(self._chunks(messages)) as chunks:
            for chunk in chunks:
                answer.usage = chunk.get("usage") or answer.usage
                for choice in chunk.get("choices", []):
                    self._print_choice(answer, choice)

    def _print_choice(self, answer: _Answer, choice: dict[str, Any]) -> None:
        delta = choice.get("delta") or {}
        content = delta.get("content") or ""
        answer.text += content
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        trace = choice.get("trace")
        if trace is not None:
            answer.is_traced = True
            shown = answer.shading.text(msgspec.convert(trace, list[TokenTrace]))
        else:
            shown = content or delta.get("reasoning_content") or ""
        if not shown:
            return
        if answer.first_s is None:
            answer.first_s = time.monotonic() - answer.began
        if self._options.is_terminal and not (trace is not None and self._options.has_colour):
            shown = visible(shown)
        print(shown, end="", file=self._out, flush=True)

    def _chunks(self, messages: list[dict[str, Any]]) -> Generator[dict[str, Any]]:
        """Those of the answer to a conversation; asked for once more where a server knows no traces."""
        while True:
            try:
                yield from self._backend.chunks(self._body(messages))
                return
            except UserError as error:
                if not self._traces or not (error.param or "").startswith("speculation.trace"):
                    raise
                self._traces = False

    def _body(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        options = self._options
        system = [{"role": "system", "content": options.system}] if options.system else []
        speculation: dict[str, Any] = {} if self._drafts else {"mode": "off"}
        if self._traces:
            speculation["trace"] = True
        body = {
            "model": self._adapter or self._base,
            "messages": [*system, *messages],
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_speculation_stats": True,
            "speculation": speculation or None,
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
            "seed": options.seed,
        }
        if self._schema is not None:
            schema = {"name": "answer", "schema": self._schema}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        return {name: value for name, value in body.items() if value is not None}

    def _tell_figures(self, answer: _Answer) -> None:
        self._tell(figures(answer.usage, time.monotonic() - answer.began, answer.first_s, answer.finish_reason))
        if answer.is_traced and self._options.has_colour:
            self._tell(answer.shading.legend(), is_styled=True)

    def _tell(self, text: str, is_styled: bool = False) -> None:
        if self._options.has_colour and not is_styled:
            text = "\n".join(f"\x1b[2m{line}\x1b[0m" for line in text.split("\n"))
        print(text, file=self._err, flush=True)
