"""Which grammar a request asks for: every dialect of structured output as one `GrammarSpec`.

Owns the shapes of OpenAI's `response_format`, LoRAX's `schema` in it, vLLM's `structured_outputs` and its older
`guided_*` fields, and that at most one of them is used. What a grammar means, and whether it can be served, is the
engine's to say (`compiler`): a refusal there still reaches the client as a 400, before any token.
"""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from ..errors import UserError
from ..messages import MAX_GRAMMAR_BYTES, GrammarSpec
from ..strict_json import decode_json

MAX_CHOICES = 1024
_FORMATS = "text, json_object and json_schema"
_KINDS = ("json", "regex", "choice", "grammar", "json_object")
_GUIDED = {"guided_json": "json", "guided_regex": "regex", "guided_choice": "choice", "guided_grammar": "grammar"}


class GrammarFields(Protocol):
    """The fields of a request that ask for a grammar."""

    @property
    def response_format(self) -> Any: ...
    @property
    def structured_outputs(self) -> Any: ...
    @property
    def guided_json(self) -> Any: ...
    @property
    def guided_regex(self) -> Any: ...
    @property
    def guided_choice(self) -> Any: ...
    @property
    def guided_grammar(self) -> Any: ...


def asks_for_grammar(request: GrammarFields) -> bool:
    """Whether `grammar_spec` has anything to read, which for a large schema is worth a thread."""
    return any(getattr(request, name) is not None for name in ("response_format", "structured_outputs", *_GUIDED))


def grammar_spec(request: GrammarFields) -> GrammarSpec | None:
    """The grammar that `request` asks for, None for free text. Raises `UserError`, also when it asks for several."""
    found: dict[str, GrammarSpec] = {}
    if (spec := _response_format(request.response_format)) is not None:
        found["response_format"] = spec
    if (spec := _structured_outputs(request.structured_outputs)) is not None:
        found["structured_outputs"] = spec
    for name, kind in _GUIDED.items():
        if (value := getattr(request, name)) is not None:
            found[name] = make_spec(kind, value, name)
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} ask for one grammar each; send one of them", param=next(iter(found)))
    return next(iter(found.values()), None)


def make_spec(kind: str, value: Any, param: str) -> GrammarSpec:
    """The spec of one of vLLM's kinds (json, regex, choice, grammar, json_object) with `value`, sent as `param`."""
    if kind == "json":
        return schema_spec(value, param)
    if kind == "json_object":
        return GrammarSpec("json_object", "")
    if kind == "choice":
        return _choice_spec(value, param)
    if not isinstance(value, str) or not value:
        raise UserError(f"{param} must be a text that is not empty", param=param)
    return _sized(GrammarSpec("regex" if kind == "regex" else "lark", value), param)


def schema_spec(schema: Any, param: str) -> GrammarSpec:
    """The spec of a JSON Schema, given as an object, a boolean or JSON text of one. The order of properties is kept."""
    if isinstance(schema, str):
        _check_size(len(schema.encode()), param)
        try:
            schema = decode_json(schema.encode(), param)
        except UserError as error:
            raise UserError(str(error), param=param, code="invalid_grammar") from None
    if not isinstance(schema, dict | bool):
        raise UserError(
            f"{param} is {type(schema).__name__}; send a JSON Schema, an object or the JSON text of one", param=param
        )
    return _sized(GrammarSpec("json_schema", msgspec.json.encode(schema).decode()), param)


def _response_format(value: Any) -> GrammarSpec | None:
    if value is None:
        return None
    fields = _object(value, "response_format")
    kind = fields.pop("type", None)
    schema = fields.pop("schema", None)  # LoRAX's form
    if schema is None:
        schema = fields.pop("value", None)  # text-generation-inference's
    nested = fields.pop("json_schema", None)  # OpenAI's form
    _no_more(fields, "response_format")
    if kind == "json_schema" and nested is not None and schema is None:
        inner = _object(nested, "response_format.json_schema")
        schema = inner.pop("schema", None)
        for name in ("name", "description"):
            if not isinstance(inner.pop(name, ""), str | None):
                raise UserError(f"response_format.json_schema.{name} must be text", param="response_format")
        if not isinstance(inner.pop("strict", None), bool | None):
            raise UserError("response_format.json_schema.strict must be true or false", param="response_format")
        _no_more(inner, "response_format.json_schema")
        nested = None
        if schema is None:
            raise UserError("the field 'response_format.json_schema.schema' is required", param="response_format")
        return schema_spec(schema, "response_format.json_schema.schema")
    if nested is not None:
        raise UserError("response_format.json_schema goes with type json_schema only", param="response_format")
    if kind in ("json_object", "json_schema") and schema is not None:
        return schema_spec(schema, "response_format.schema")
    if kind == "json_schema":
        raise UserError("the field 'response_format.json_schema' is required", param="response_format")
    if kind == "json_object":
        return GrammarSpec("json_object", "")
    if kind == "text" and schema is None:
        return None
    raise UserError(f"response_format.type is {str(kind)[:64]!r}; served are {_FORMATS}", param="response_format")


def _structured_outputs(value: Any) -> GrammarSpec | None:
    """vLLM's object: exactly one of its kinds; its switches may say what is done anyway."""
    if value is None:
        return None
    fields = {name: item for name, item in _object(value, "structured_outputs").items() if item is not None}
    for name in ("disable_fallback", "disable_any_whitespace"):  # nothing falls back, and whitespace has one form
        if not isinstance(fields.pop(name, False), bool):
            raise UserError(f"structured_outputs.{name} must be true or false", param="structured_outputs")
    if fields.get("json_object") is False:
        del fields["json_object"]
    kinds = [name for name in _KINDS if name in fields]
    _no_more({name: item for name, item in fields.items() if name not in _KINDS}, "structured_outputs")
    if len(kinds) != 1:
        raise UserError(
            f"structured_outputs has {len(kinds)} of {', '.join(_KINDS)}; send exactly one", param="structured_outputs"
        )
    if kinds == ["json_object"] and fields["json_object"] is not True:
        raise UserError("structured_outputs.json_object must be true or false", param="structured_outputs")
    return make_spec(kinds[0], fields[kinds[0]], f"structured_outputs.{kinds[0]}")


def _choice_spec(value: Any, param: str) -> GrammarSpec:
    if not isinstance(value, list) or not all(isinstance(item, str) and item for item in value):
        raise UserError(f"{param} must be a list of texts that are not empty", param=param)
    if not 1 <= len(value) <= MAX_CHOICES:
        raise UserError(f"{param} has {len(value)} choices; 1 to {MAX_CHOICES} are allowed", param=param)
    return _sized(GrammarSpec("choice", msgspec.json.encode(value).decode()), param)


def _sized(spec: GrammarSpec, param: str) -> GrammarSpec:
    _check_size(len(spec.text.encode()), param)
    return spec


def _check_size(num_bytes: int, param: str) -> None:
    if num_bytes > MAX_GRAMMAR_BYTES:
        raise UserError(
            f"{param} has {num_bytes} bytes; at most {MAX_GRAMMAR_BYTES} are allowed", param=param,
            code="invalid_grammar",
        )  # fmt: skip


def _object(value: Any, param: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{param} must be an object", param=param)
    return dict(value)


def _no_more(fields: dict[str, Any], param: str) -> None:
    for name, value in fields.items():
        if value is not None:
            raise UserError(f"unknown or unsupported field {f'{param}.{name[:64]}'!r}", param=param)
