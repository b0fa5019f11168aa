"""Who sends a request: what a key may do, and what keeps its work apart from that of others."""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from aiohttp import web

from ...errors import UserError
from ...messages import BACKGROUND_PRIORITY
from ..adapter_paths import unknown
from .key_file import Scope
from .limits import Allowance

ANONYMOUS = "anonymous"
_CALLER = "caller"


@dataclass(frozen=True, slots=True)
class Caller:
    """The holder of a key, or anybody where none is needed."""

    name: str  # fit for logs and metrics
    scopes: frozenset[Scope]
    adapters: tuple[str, ...] | None  # names and patterns; None: all
    may_prioritize: bool
    tenant: str | None  # who shares a prefix cache and learned drafts with it; None: everybody whose salt is the same
    allowance: Allowance
    is_background: bool = False  # nobody waits for its answers: they give way to all others

    @property
    def key(self) -> str | None:
        """The name of the key; None without one."""
        return None if self.name == ANONYMOUS else self.name

    def may_use(self, adapter: str) -> bool:
        return self.adapters is None or any(fnmatchcase(adapter, pattern) for pattern in self.adapters)

    def check_adapter(self, adapter: str | None) -> None:
        """An adapter that is not for this key does not exist for it. Raises `UserError`."""
        if adapter is not None and not self.may_use(adapter):
            raise unknown(adapter)

    def check_priority(self, priority: int | None) -> None:
        """Raises `UserError` when the key may not set one."""
        if priority and not self.may_prioritize:
            raise UserError(
                f"priority is {priority}, but key {self.name!r} may not set one (priority: true in the file of keys); "
                "leave it out",
                param="priority",
                status=403,
                code="priority_not_allowed",
            )

    def priority(self, asked: int) -> int:
        """Of a request that asks for `asked`."""
        return BACKGROUND_PRIORITY if self.is_background else asked

    def cache_salt(self, sent: str | None) -> str:
        """The salt of the request's caches: one that no other tenant can name, with what the client sent in it."""
        return sent or "" if self.tenant is None else f"{len(self.tenant)}:{self.tenant}:{sent or ''}"


def caller_of(request: web.Request) -> Caller:
    """Whom the access check has found."""
    caller = found_caller(request)
    assert caller is not None, f"{request.path} is open, so that nobody was asked for"
    return caller


def found_caller(request: web.Request) -> Caller | None:
    """None before the check, and on routes without one."""
    caller: Caller | None = request.get(_CALLER)
    return caller


def set_caller(request: web.Request, caller: Caller) -> None:
    request[_CALLER] = caller
