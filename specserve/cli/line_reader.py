"""Lines that a person types, with editing, history and completion where that is a terminal; else lines of a pipe.

Owns the history file (`$XDG_STATE_HOME/specserve/chat_history`), which only its user can read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO

MAX_HISTORY = 1000


class LineReader:
    """`complete` gives what the word at the cursor may become, of a line's words so far. Call `close` at the end."""

    def __init__(
        self,
        stdin: IO[str],
        stdout: IO[str],
        *,
        complete: Callable[[list[str]], list[str]] = lambda words: [],
        history: Path | None = None,
    ):
        self._stdin = stdin
        self.is_terminal = stdin.isatty() and stdout.isatty()
        self._readline = _readline() if self.is_terminal else None
        self._history = history if self._readline is not None else None
        if self._readline is not None:
            self._set_up(self._readline, complete)

    def read(self, prompt: str) -> str | None:
        """The next line without its end, further ones joined to it where it ends in a backslash; None at the end.

        Raises `KeyboardInterrupt` for Ctrl-C.
        """
        lines: list[str] = []
        while True:
            line = self._line(prompt if not lines else "... ")
            if line is None:
                return "\n".join(lines) if lines else None
            if not (self.is_terminal and line.endswith("\\")):
                return "\n".join([*lines, line])
            lines.append(line[:-1])

    def _line(self, prompt: str) -> str | None:
        if self.is_terminal:
            try:
                return input(prompt)
            except EOFError:
                return None
        line = self._stdin.readline()
        return line.removesuffix("\n") if line else None

    def close(self) -> None:
        """Keep the history."""
        if self._readline is None or self._history is None:
            return
        with contextlib.suppress(OSError):  # a chat is not worth an error over it
            self._history.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(self._history, os.O_CREAT | os.O_WRONLY, 0o600))
            self._readline.set_history_length(MAX_HISTORY)
            self._readline.write_history_file(str(self._history))

    def _set_up(self, readline: ModuleType, complete: Callable[[list[str]], list[str]]) -> None:
        def completed(text: str, state: int) -> str | None:
            words = readline.get_line_buffer()[: readline.get_begidx()].split()
            found = [item for item in complete(words) if item.startswith(text)]
            return found[state] if state < len(found) else None

        readline.set_completer(completed)
        readline.set_completer_delims(" ")
        readline.parse_and_bind("tab: complete")
        if self._history is not None:
            with contextlib.suppress(OSError):
                readline.read_history_file(str(self._history))


def history_file(environ: Mapping[str, str]) -> Path:
    base = environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "specserve" / "chat_history"


def _readline() -> ModuleType | None:
    """Some Pythons are built without it; then lines come as the terminal gives them."""
    try:
        import readline
    except ImportError:
        return None
    return readline
