"""Rows of an input file: what a line may be, all that is wrong with a file's lines, and lines of output.

A line is a request: custom_id, method, url, body. Of a body only the JSON syntax is looked at here; the rest is the
matter of the route that answers it. Line numbers count from 1, blank lines included, which are no rows.
"""

from __future__ import annotations

import uuid
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal

import msgspec

from ...errors import ErrorInfo, shortened
from ..error_bodies import openai_error
from .types import BatchError, OutputLine, RowError, RowResponse

MAX_CUSTOM_ID_LEN = 512
MAX_ERRORS = 100  # that are told of one file
SLICE_LINES = 512  # of a file that are read between two chances for others


class _Line(msgspec.Struct, forbid_unknown_fields=True):
    custom_id: str
    url: str
    body: msgspec.Raw
    method: Literal["POST"] = "POST"


_BYTE_ORDER_MARKS = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")
_DECODER = msgspec.json.Decoder(_Line)


@dataclass(frozen=True, slots=True)
class Row:
    line: int
    custom_id: str
    url: str
    body: bytes  # a JSON object


class BadRowError(Exception):
    """A line that is no request."""

    def __init__(self, code: str, message: str, line: int, param: str | None = None):
        super().__init__(message)
        self.error = BatchError(code, message, line, param)


class NoMoreRowsError(Exception):
    """No more rows of a batch can be answered, which ends it with the answers that it has."""

    def __init__(self, code: str, message: str, line: int | None = None):
        super().__init__(message)
        self.error = BatchError(code, message, line)


class InputLostError(NoMoreRowsError):
    """The file of a batch is not there any more, or is another one: somebody changed the folder by hand."""


class BatchTooLargeError(NoMoreRowsError):
    """There could never be room for the end of a batch with one more answer."""


def parse_row(raw: bytes, line: int, max_bytes: int) -> Row:
    """The request of a line. Raises `BadRowError`."""
    if len(raw) > max_bytes:
        raise BadRowError(
            "line_too_large", f"the line has {len(raw)} bytes; at most {max_bytes} are allowed (--max-body-mib)", line
        )
    if raw.startswith(_BYTE_ORDER_MARKS):
        raise BadRowError("invalid_json_line", "the line starts with a byte order mark; write plain UTF-8", line)
    try:
        found = _DECODER.decode(raw)
    except msgspec.ValidationError as error:
        raise BadRowError("invalid_request", shortened(error), line) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRowError("invalid_json_line", f"the line is not valid JSON: {shortened(error)}", line) from None
    except RecursionError:
        raise BadRowError("invalid_json_line", "the line is nested too deeply", line) from None
    body = bytes(found.body)
    if not body.startswith(b"{"):
        raise BadRowError("invalid_request", "body is no JSON object; send the request's fields", line, "body")
    if not 1 <= len(found.custom_id) <= MAX_CUSTOM_ID_LEN:
        raise BadRowError(
            "invalid_request",
            f"custom_id has {len(found.custom_id)} characters; 1 to {MAX_CUSTOM_ID_LEN} are allowed",
            line,
            "custom_id",
        )
    return Row(line, found.custom_id, found.url, body)


def read_rows(path: Path, max_bytes: int) -> Iterator[Row]:
    """The rows of a file that was checked. Raises `InputLostError`."""
    with _opened(path) as file:
        for line, raw in enumerate(file, 1):
            if raw := raw.strip():
                try:
                    yield parse_row(raw, line, max_bytes)
                except BadRowError as bad:
                    text = f"the input file was changed while the batch ran: {bad}"
                    raise InputLostError("input_file_changed", text, line) from None


def _opened(path: Path) -> BinaryIO:
    """Raises `InputLostError` where it is gone, though the folder that it lay in is there."""
    try:
        return path.open("rb")
    except FileNotFoundError:
        if not path.parent.is_dir():  # a disk that is away comes back
            raise
        raise InputLostError("input_file_missing", "the input file was removed from the server's folder") from None


@dataclass(slots=True)
class FileCheck:
    """Looks at every line of an input file, a slice at a time: `while check.more(): ...`, then `errors`.

    `endpoint`: the one that all rows must be for; None: whatever the first is for. `endpoints`: those that there are,
    none for any.
    """

    path: Path
    endpoint: str | None
    endpoints: Collection[str]
    max_rows: int
    max_bytes: int
    num_rows: int = 0
    errors: list[BatchError] = field(default_factory=list)
    _ids: set[str] = field(default_factory=set)
    _line: int = 0
    _offset: int = 0

    def more(self) -> bool:
        """Look at the next slice; False: that was all. Raises `InputLostError`."""
        with _opened(self.path) as file:
            file.seek(self._offset)
            for _ in range(SLICE_LINES):
                raw = file.readline()
                if not raw:
                    self._end()
                    return False
                self._line += 1
                try:
                    if raw := raw.strip():
                        self._look(parse_row(raw, self._line, self.max_bytes))
                except BadRowError as bad:
                    self.errors.append(bad.error)
                if len(self.errors) >= MAX_ERRORS or self.num_rows > self.max_rows:
                    self._end()
                    return False
            self._offset = file.tell()
        return True

    def _look(self, row: Row) -> None:
        self.num_rows += 1
        self.endpoint = self.endpoint or row.url
        if self.endpoints and row.url not in self.endpoints:
            raise BadRowError(
                "url_mismatch", f"url is {row.url[:100]!r}; there are {', '.join(self.endpoints)}", row.line, "url"
            )
        if row.url != self.endpoint:
            raise BadRowError(
                "url_mismatch",
                f"url is {row.url!r} and the batch is for {self.endpoint!r}; make a batch for each",
                row.line,
                "url",
            )
        if row.custom_id in self._ids:
            raise BadRowError(
                "duplicate_custom_id",
                f"custom_id {row.custom_id[:100]!r} was used on an earlier line; give each row its own",
                row.line,
                "custom_id",
            )
        self._ids.add(row.custom_id)

    def _end(self) -> None:
        self._ids.clear()
        if self.num_rows > self.max_rows:
            text = f"the file has more than {self.max_rows} rows (--batch-max-rows); split it"
            self.errors.append(BatchError("too_many_tasks", text))
        elif not self.num_rows and not self.errors:
            self.errors.append(BatchError("empty_file", "the file has no rows; write one JSON object a line"))


def answered_line(custom_id: str, status: int, body: Any) -> bytes:
    """The line of a row whose request was answered."""
    return _encoded(OutputLine(_new_id(), custom_id, RowResponse(status, uuid.uuid4().hex, body), None))


def failed_line(custom_id: str, info: ErrorInfo) -> bytes:
    """The line of a row whose request was refused, or failed."""
    return answered_line(custom_id, info.status, openai_error(info))


def unanswered_line(custom_id: str, error: RowError) -> bytes:
    return _encoded(OutputLine(_new_id(), custom_id, None, error))


def _new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def _encoded(line: OutputLine) -> bytes:
    return msgspec.json.encode(line) + b"\n"
