"""Reads YAML files of `key: value` lines, and refuses what YAML parsers silently accept or take for something else.

Owns the syntax only; what the keys are is the reader's matter. yaml itself is imported when there is a file to read.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .errors import UserError


def read_yaml(path: Path, what: str) -> dict[str, Any]:
    """The mapping in `path`, `what` in errors; empty for an empty file. Raises `UserError`."""
    import yaml

    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=strict_loader())  # derived from SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {what} {path}: {reason}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}{where} is not valid YAML: {getattr(error, 'problem', None) or error}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold `key: value` lines, not {type(content).__name__}")
    return content


def strict_loader() -> type:
    """A YAML loader in which only true and false are booleans (`speculation: off` is text), 1e-3 is a number as in YAML
    1.2, and keys are unique."""
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    if key.value in seen:
                        problem = f"key {key.value!r} stands twice"
                        raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                    seen.add(key.value)
            return super().construct_mapping(node, deep=deep)

    exponent = re.compile(r"^[-+]?\d+(?:\.\d*)?[eE][-+]?\d+$")
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", exponent, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
    return Loader
