"""The errors a user can cause, and how they cross process edges.

Every error that a request, a flag or a file can provoke is a `UserError`: its message names the field, the value, the
limit and the fix. Anything else that escapes is a bug of ours and is reported as such.
"""

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as it crosses from the engine process to the server; `status` is the HTTP status it maps to."""

    message: str
    status: int = 400
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: float | None = None  # where trying again may help: when


class UserError(Exception):
    """A mistake the user can fix. `status` is the HTTP status the server answers with."""

    status = 400
    type = "invalid_request_error"
    code: str | None = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
    ):
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.param = param
        self.code = code if code is not None else type(self).code
        self.status = status if status is not None else type(self).status

    def info(self) -> ErrorInfo:
        return ErrorInfo(str(self), self.status, self.type, self.param, self.code, self.retry_after_s)


class AdapterError(UserError):
    """An adapter directory that cannot be served: format, shapes, dtypes, values or unsupported PEFT features."""

    code = "invalid_adapter"


class ModelError(UserError):
    """A base model that cannot be served: architecture, missing or mis-shaped tensors, unreadable files."""

    code = "invalid_model"


class GrammarError(UserError):
    """A grammar that cannot be served: syntax, what cannot be enforced, or a limit."""

    code = "invalid_grammar"


NO_IDLE_ROOM = "no_idle_room"  # code: a load that nobody waits for, for which no adapter in use makes room


class OverloadedError(UserError):
    """The server is full; the client should retry after a short while."""

    status = 429
    type = "overloaded_error"
    code = "overloaded"


class RateLimitedError(UserError):
    """A key has used up what it may; it is not the server that is full. `limit`: requests, tokens or concurrent."""

    status = 429
    code = "rate_limit_exceeded"

    def __init__(self, message: str, *, limit: str, retry_after_s: float):
        super().__init__(message, retry_after_s=retry_after_s)
        self.type = "tokens" if limit == "tokens" else "requests"  # as OpenAI says it
        self.limit = limit


class DeadlineError(UserError):
    """The request's own deadline passed before its answer was there."""

    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class ShuttingDownError(UserError):
    """The server takes no more requests; another one may."""

    status = 503
    type = "server_error"
    code = "shutting_down"


class EngineDeadError(UserError):
    """There is no engine process that could serve the request now."""

    status = 503
    type = "server_error"
    code = "engine_unavailable"


class EngineLostError(EngineDeadError):
    """The engine process ended while the request was in it."""


def shortened(text: object, max_len: int = 400) -> str:
    """One line of it: libraries quote what they could not read, however long that is."""
    line = " ".join(str(text).split())
    return line if len(line) <= max_len else f"{line[: max_len // 2]} ... {line[-max_len // 4 :]}"


def from_info(info: ErrorInfo) -> UserError:
    """Rebuild the exception that `ErrorInfo` describes, on the other side of the process edge, with its class."""
    kind = next((kind for kind in _CROSSING if kind.code == info.code), UserError)
    error = kind(info.message, param=info.param, code=info.code, status=info.status, retry_after_s=info.retry_after_s)
    error.type = info.type
    return error


_CROSSING = (AdapterError, ModelError, GrammarError, OverloadedError, DeadlineError, EngineDeadError)
