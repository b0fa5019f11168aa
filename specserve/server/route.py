"""What a route is: a method of a path, its handler, bodies, statuses, and who may ask. Which there are: routes.py."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal

from aiohttp import web

from .access.caller import Caller

Access = Literal["open", "info", "metrics", "key", "admin"]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Answer = Callable[[Any, Caller], Awaitable[Any]]  # from a body's JSON value to its whole answer's; raises `UserError`


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    `body`, `answer` and `events` are types: of the request, of the JSON answer (None: text), and of a stream's events;
    several are alternatives. `query`: a type of text fields, the parameters.
    `media`: what else the answer may be, `body_media` what the body is. `statuses` are those of errors, and 304.
    `access`: open to everyone; with a key that may generate, where something is posted,
    or with any; with one for administration. `info` and `metrics` are open, or with any key and one for metrics, as
    --open-info says.
    `errors`: whose error shape it answers with.
    """

    method: Literal["GET", "POST", "DELETE"]
    path: str
    handler: str
    summary: str
    statuses: tuple[int, ...]
    body: Any = None
    answer: Any = None
    events: Any = None
    query: Any = None
    media: tuple[str, ...] = ()
    body_media: str = "application/json"
    access: Access = "key"
    errors: Literal["openai", "lorax"] = "openai"
    has_done: bool = True  # whether [DONE] ends a stream of OpenAI's
