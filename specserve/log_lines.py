"""Lines of log that are what they seem: no name, path or error text from outside can begin a line or steer a terminal.

Owns the format of log lines in every process. Text that was sent or found in a file is escaped here, once, wherever it
comes into a message; a traceback's lines are indented, so that none looks like a line of its own.
"""

from __future__ import annotations

import logging
import re
from typing import Any

# Control characters, C1's included; line and paragraph separators; what changes the direction of text.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_UNSAFE_IN_TRACEBACK = re.compile(f"(?!\n){_UNSAFE.pattern}")


class LineFormatter(logging.Formatter):
    """`%(message)s` as one line."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        record.message = one_line(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: Any) -> str:  # noqa: N802
        return _UNSAFE_IN_TRACEBACK.sub(_escaped, super().formatException(ei)).replace("\n", "\n    ")


class OriginFormatter(LineFormatter):
    """The line with when, how bad and who: the process, and the module where it is not ours or something is wrong."""

    def __init__(self, process: str):
        super().__init__("%(asctime)s %(levelname)s %(origin)s: %(message)s")
        self._process = process

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  logging's name
        is_plain = record.levelno == logging.INFO and record.name.startswith("specserve.")
        record.origin = self._process if is_plain else f"{self._process} {record.name}"
        return super().formatMessage(record)


def one_line(text: str) -> str:
    return _UNSAFE.sub(_escaped, text)


def _escaped(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode()


def configure_logging(level: int, process: str = "server") -> None:
    """Log to standard error; `process` stands in each line."""
    logging.raiseExceptions = False  # a line that cannot be written is not worth a traceback that cannot be either
    handler = logging.StreamHandler()
    handler.setFormatter(OriginFormatter(process))
    logging.basicConfig(level=level, handlers=[handler])
