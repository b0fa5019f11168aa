"""The file of --api-keys-file: names, hashes of keys, and what each may do. Keys themselves are in no file.

A key is 256 random bits, so its plain SHA-256 gives nothing away: there is no dictionary to try, and a slow hash would
only make every wrong key cost the server as much as a right one. That holds for keys of `new_key` alone, so there is
no way here to hash a key that somebody has thought up.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ...errors import UserError
from ...strict_yaml import read_yaml
from ..adapter_paths import NAME
from .limits import Limits

Scope = Literal["generate", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = ("generate", "admin", "metrics")

DEFAULTS = "defaults"  # no key's name: the limits of entries that do not say theirs
KEY_PREFIX = "sk-specserve-"  # for people and for programs that look for secrets in what is published
MAX_KEYS = 1024  # each is compared with at every request
SETTLE_S = 0.5  # without a change a file is complete: half of one can be a valid file with fewer keys
_MAX_SETTLE_S = 10.0
_HASH = re.compile(r"[0-9a-f]{64}")
_WORD = re.compile(r"[a-z_]{1,16}")  # shorter than any key
_MAY_BE = {
    "sha256": "64 hexadecimal digits in lower case, or a list of such",
    "scopes": f"a list of {', '.join(SCOPES)}",
    "adapters": "a list of names, or of patterns with * and ?; null for all",
    "priority": "true or false",
}
_LIMIT_MAY_BE = "a whole number, 1 or more, or null for no limit"

_Limit = Annotated[int, Meta(ge=1)] | None | UnsetType


class LimitFields(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """null is no limit."""

    requests_per_minute: _Limit = UNSET
    tokens_per_minute: _Limit = UNSET
    max_concurrent: _Limit = UNSET

    def over(self, defaults: Limits) -> Limits:
        """`defaults` where nothing is said."""
        said = {name: getattr(self, name) for name in Limits.__struct_fields__}
        return msgspec.structs.replace(defaults, **{name: value for name, value in said.items() if value is not UNSET})


class KeyFields(LimitFields, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One entry, as it is written."""

    sha256: str | list[str]  # several while a key is replaced by another
    scopes: tuple[Scope, ...] = ("generate",)
    adapters: list[str] | None = None  # names, or patterns with * and ?; None: all
    priority: bool = False


class KeyEntry(msgspec.Struct, frozen=True):
    """One entry, checked."""

    name: str
    digests: tuple[bytes, ...]
    scopes: frozenset[Scope]
    adapters: tuple[str, ...] | None
    priority: bool
    limits: Limits


def read_keys(path: Path) -> list[KeyEntry]:
    """The entries of the file. Raises `UserError` that names the entry; never shows a value that might be a key."""
    content = read_yaml(path, "the file of API keys")
    defaults = _convert(path, DEFAULTS, content.pop(DEFAULTS, {}), LimitFields).over(Limits())
    entries = [_entry(path, name, value, defaults) for name, value in content.items()]
    owners: dict[bytes, str] = {}
    for entry in entries:
        for digest in entry.digests:
            if owners.setdefault(digest, entry.name) != entry.name:
                raise UserError(f"{path}: {owners[digest]!r} and {entry.name!r} have the same key; give each its own")
    if len(owners) > MAX_KEYS:
        raise UserError(f"{path} has {len(owners)} keys; at most {MAX_KEYS} are served")
    return entries


def read_settled_keys(path: Path) -> list[KeyEntry]:
    """As `read_keys`, of a file that others may be writing: as it was when nothing changed for `SETTLE_S`."""
    deadline = time.monotonic() + _MAX_SETTLE_S
    while True:
        before = _status(path)
        if time.time() - before.st_ctime < SETTLE_S:
            time.sleep(SETTLE_S)
        if _stamp(before) == _stamp(_status(path)):
            entries = read_keys(path)
            if _stamp(before) == _stamp(_status(path)):
                return entries
        if time.monotonic() > deadline:
            raise UserError(
                f"{path} changes all the time, for {_MAX_SETTLE_S:g} s now; send SIGHUP again when it is complete"
            )


def _status(path: Path) -> os.stat_result:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read the file of API keys {path}: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for without end
        raise UserError(f"the file of API keys {path} is not a regular file; write one, or link to it")
    return status


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _entry(path: Path, name: Any, value: Any, defaults: Limits) -> KeyEntry:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        shown = repr(name)[:80]
        raise UserError(f"{path}: {shown} is no name; use letters, digits, '.', '-' and '_' (at most 128)")
    fields = _convert(path, name, value, KeyFields)
    hashes = [fields.sha256] if isinstance(fields.sha256, str) else fields.sha256
    if not hashes or not all(_HASH.fullmatch(text) for text in hashes):
        raise UserError(
            f"{path}: {name!r}: sha256 must be 64 hexadecimal digits in lower case, or a list of such; "
            f"`specserve keys new {name}` makes a key and its hash"
        )
    if "admin" in fields.scopes and fields.adapters is not None:
        raise UserError(
            f"{path}: {name!r}: whoever has the scope admin may load any adapter under any name, so that adapters "
            "would hold nobody back; leave out one of both"
        )
    return KeyEntry(
        name,
        tuple(bytes.fromhex(text) for text in hashes),
        frozenset(fields.scopes),
        None if fields.adapters is None else tuple(fields.adapters),
        fields.priority,
        fields.over(defaults),
    )


def _convert(path: Path, name: str, value: Any, kind: type[msgspec.Struct]) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise UserError(f"{path}: {name!r} {_problem(name, value, kind) or error}") from None


def _problem(name: str, value: Any, kind: type[msgspec.Struct]) -> str | None:
    """The first thing that is wrong with an entry, what it may be, and what to do."""
    if not isinstance(value, dict):
        example = "max_concurrent: 8" if name == DEFAULTS else "sha256: HASH"
        return f"is {_shown(value)}; write its fields under it, such as {example}"
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for key, item in value.items():
        if key not in fields:
            return f"has an unknown field {str(key)[:80]!r}; there are {', '.join(fields)}"
        try:
            msgspec.convert(item, fields[key].type)
        except msgspec.ValidationError:
            return f"has {key}: {_shown(item, key)}; it may be {_MAY_BE.get(key, _LIMIT_MAY_BE)}"
    if missing := [field.name for field in fields.values() if field.required and field.name not in value]:
        return f"has no {missing[0]}; `specserve keys new {name}` makes a key and its hash"
    return None


def _shown(value: Any, field: str = "") -> str:
    """A value in an error, by its kind alone where it might be a key."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, int | float):
        return str(value)[:40]
    if field == "scopes" and isinstance(value, list):
        unknown = [item for item in value if item not in SCOPES]
        return unknown[0] if isinstance(unknown[0], str) and _WORD.fullmatch(unknown[0]) else "a list of something else"
    kinds = {"str": "text", "list": "a list", "dict": "a mapping"}
    return kinds.get(type(value).__name__, type(value).__name__)


def new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(32)


def digest_of(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def entry_text(name: str, key: str, fields: dict[str, Any]) -> str:
    """The entry of `key` as lines for the file; `fields` beside its hash."""
    import yaml

    entry = {name: {"sha256": digest_of(key.encode()).hex(), **fields}}
    return yaml.safe_dump(entry, sort_keys=False)
