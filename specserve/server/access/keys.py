"""Whose key a request has: the keys of the settings and of --api-keys-file, and callers for them.

Owns the keys that are valid now. Reading the file again changes all of them at once or none; a key that stays keeps
what it has used of its limits, and requests of one that goes are finished. No key is kept, logged or shown.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import time
from collections.abc import Iterable
from pathlib import Path

from ...config import ServeConfig
from ...errors import UserError
from ...token_bucket import Clock
from .caller import ANONYMOUS, Caller
from .key_file import SCOPES, KeyEntry, digest_of, read_settled_keys
from .limits import Allowance, Limits

logger = logging.getLogger(__name__)

API_KEY, ADMIN_API_KEY = "api-key", "admin-api-key"  # names of the settings' own keys


def needs_key(config: ServeConfig) -> bool:
    """Whether a client must send one to generate."""
    return config.api_key is not None or config.api_keys_file is not None


class KeyRing:
    """Callers by key. `await reload()` before the first request when there is a file."""

    def __init__(self, config: ServeConfig, clock: Clock = time.monotonic):
        self._clock = clock
        self._file = None if config.api_keys_file is None else Path(config.api_keys_file)
        self._isolated = config.isolate_keys if config.isolate_keys is not None else self._file is not None
        self._fixed = list(_settings_keys(config))
        self._allowances: dict[str, Allowance] = {}
        self._callers: list[tuple[bytes, Caller]] = []
        self._reading = asyncio.Lock()
        self.num_reads = 0  # of the file: callers that were found before the latest are not known to be any more
        # With a key for admins alone, everybody may generate. Without any, admins are those on this machine.
        scopes = set() if needs_key(config) else set(SCOPES)
        if config.admin_api_key is not None:
            scopes -= {"admin"}
        self.anonymous = self._caller(KeyEntry(ANONYMOUS, (), frozenset(scopes), None, True, Limits()))
        self._replace([])

    async def reload(self) -> None:
        """Read the file again, if there is one. Raises `UserError` and changes nothing when it cannot be used."""
        if self._file is None:
            return
        async with self._reading:  # the last to ask sees the newest file
            entries = await asyncio.to_thread(read_settled_keys, self._file)
            taken = [entry.name for entry in entries if entry.name in (API_KEY, ADMIN_API_KEY, ANONYMOUS)]
            if taken:
                raise UserError(f"{self._file}: the name {taken[0]!r} is the server's own; choose another")
            self._replace(entries)
            self.num_reads += 1
        logger.info("%d names have keys in %s", len(entries), self._file)

    def authenticate(self, authorization: str) -> Caller | None:
        """Who sends this header; None where a key is needed and this is none. Compares with every key, in constant time
        each."""
        found = self.anonymous if self.anonymous.scopes else None
        scheme, _, sent = authorization.partition(" ")
        if scheme.lower() == "bearer":
            digest = digest_of(sent.strip().encode("utf-8", "surrogateescape"))
            for known, caller in self._callers:
                if hmac.compare_digest(known, digest):
                    found = caller
        return found

    def named(self, name: str) -> Caller | None:
        """Whoever has that name now; None where nobody has it any more."""
        if name == ANONYMOUS:
            return self.anonymous
        return next((caller for _, caller in self._callers if caller.name == name), None)

    def _replace(self, entries: Iterable[KeyEntry]) -> None:
        entries = [*self._fixed, *entries]
        self._callers = [
            (digest, caller) for entry in entries for caller in [self._caller(entry)] for digest in entry.digests
        ]
        names = {entry.name for entry in entries} | {ANONYMOUS}
        self._allowances = {name: item for name, item in self._allowances.items() if name in names}

    def _caller(self, entry: KeyEntry) -> Caller:
        allowance = self._allowances.get(entry.name)
        if allowance is None:
            allowance = self._allowances[entry.name] = Allowance(entry.name, entry.limits, self._clock)
        else:
            allowance.set_limits(entry.limits)
        tenant = entry.name if self._isolated else None
        return Caller(entry.name, entry.scopes, entry.adapters, entry.priority, tenant, allowance)


def _settings_keys(config: ServeConfig) -> Iterable[KeyEntry]:
    """--admin-api-key is for administration alone; --api-key is for everything else, and for that too without one."""
    key, admin_key = config.api_key, config.admin_api_key
    if key is not None:
        scopes = frozenset(SCOPES) - ({"admin"} if admin_key not in (None, key) else set())
        yield KeyEntry(API_KEY, (digest_of(key.encode()),), scopes, None, True, Limits())
    if admin_key not in (None, key):
        yield KeyEntry(
            ADMIN_API_KEY, (digest_of(admin_key.encode()),), frozenset({"admin", "metrics"}), None, True, Limits()
        )
