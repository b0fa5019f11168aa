"""Every setting of a run as a Markdown table, from the structs alone: `python -m specserve.training.settings_table`.

docs/training.md holds what this prints; a test compares them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from msgspec import inspect

from .run_config import RunConfig


def settings_table() -> str:
    """A row for each dotted key: default, and what it means with its limits."""
    rows = [
        f"| `{key}` | {default} | {meaning} |" for key, default, meaning in _settings(inspect.type_info(RunConfig), "")
    ]
    return "\n".join(["| setting | default | meaning |", "|---|---|---|", *rows])


def _settings(struct: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    for field in struct.fields:
        if isinstance(field.type, inspect.StructType):
            yield from _settings(field.type, f"{prefix}{field.name}.")
            continue
        meta = field.type if isinstance(field.type, inspect.Metadata) else None
        members = _members(meta.type if meta is not None else field.type)
        for member in members:
            if isinstance(member, inspect.Metadata):
                meta = member
        assert meta is not None, f"{prefix}{field.name} has no description"
        meaning = (meta.extra_json_schema or {})["description"]
        parts = [part for member in members if (part := _limits(member))]
        yield f"{prefix}{field.name}", _default(field.default), f"{meaning} ({'; '.join(parts)})" if parts else meaning


def _members(kind: Any) -> list[Any]:
    return list(kind.types) if isinstance(kind, inspect.UnionType) else [kind]


def _limits(kind: Any) -> str:
    if isinstance(kind, inspect.Metadata):
        kind = kind.type
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(f"`{value}`" for value in kind.values)
    if not isinstance(kind, inspect.IntType | inspect.FloatType):
        return ""
    words = {"at least": kind.ge, "more than": kind.gt, "at most": kind.le, "less than": kind.lt}
    return ", ".join(f"{word} {limit:g}" for word, limit in words.items() if limit is not None)


def _default(value: Any) -> str:
    if value in (None, "", ()):
        return ""
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    print(settings_table())
