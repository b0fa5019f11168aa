"""A client's JSON Schema as the schema that the matcher enforces, or the name of what cannot be enforced.

The matcher (llguidance) refuses most keywords that it does not know, and a few it reads too generously: those are
refused or rewritten here, so that whatever is accepted satisfies the client's schema. The other way round it may be
stricter: properties come in the schema's order, there is one form of white space (that of Python's `json.dumps`, or
compact), formats are asserted, and integers have no decimal point. Nothing is fetched.
"""

from __future__ import annotations

import math
from decimal import Decimal
from typing import Any

from ..errors import UserError
from .ecma_regex import to_rust

MAX_DEPTH = 64  # of schemas in schemas; the matcher's own reader stops at 128 brackets
MAX_SUBSCHEMAS = 10_000
MAX_PROPERTIES = 1_000  # of one object: its optional ones are all alternatives at once
MAX_MULTIPLE = 10_000  # an automaton of remainders has that many states
DEFAULT_SEPARATORS = {"item_separator": ", ", "key_separator": ": "}
_SEPARATORS = {"item_separator": (",", ", "), "key_separator": (":", ": ")}

_REFUSED = {
    "not", "if", "then", "else", "contains", "minContains", "maxContains", "uniqueItems", "propertyNames",
    "dependentRequired", "dependentSchemas", "dependencies", "unevaluatedProperties", "unevaluatedItems",
    "$dynamicRef", "$dynamicAnchor", "$recursiveRef", "$recursiveAnchor", "contentEncoding", "contentMediaType",
    "contentSchema", "nullable", "divisibleBy", "disallow", "extends",
}  # fmt: skip
_NEUTRAL = {"uniqueItems": False, "nullable": False}  # values that ask for nothing
_SCHEMA = ("additionalProperties", "additionalItems")
_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_COUNTS = ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties")

_DAYS = (
    r"\d{4}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|02-(?:0[1-9]|1\d|2[0-8]))"
)
_LEAP_DAYS = r"(?:\d\d(?:0[48]|[2468][048]|[13579][26])|(?:[02468][048]|[13579][26])00)-02-29"
_DATE = f"(?:{_DAYS}|{_LEAP_DAYS})"
_TIME = r"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
# The matcher's own take no notice of leap years and take a leap second in any minute.
_FORMATS = {"date": f"^{_DATE}$", "time": f"^{_TIME}$", "date-time": f"^{_DATE}T{_TIME}$"}


def prepare(schema: Any) -> dict[str, Any]:
    """The schema to compile. Raises `UserError` that names the keyword and its place."""
    if schema is False:
        raise UserError("the JSON Schema is false: no output satisfies it")
    walk = _Walk(schema)
    options = walk.options(schema)
    result = walk.schema(schema, "#", 0)
    if walk.combines and math.lcm(*walk.multiples) > MAX_MULTIPLE:
        raise UserError(
            f"the JSON Schema combines multipleOf whose common multiple is over {MAX_MULTIPLE}; that is the limit"
        )
    result = {} if result is True else result
    if walk.has_open_keys:
        # A key spelled with \u escapes would pass for one that `properties` does not name.
        options |= {"json_allowed_escapes": '"\\bfnrt'}
    else:
        options |= {"json_allow_general_unicode_escapes": True}
    result["x-guidance"] = {"whitespace_flexible": False, "lenient": False, **options}
    return result


class _Walk:
    """One pass over a schema: refuses, rewrites, and notes what concerns the whole."""

    def __init__(self, root: Any) -> None:
        draft = str(root.get("$schema", "")) if isinstance(root, dict) else ""
        # Up to draft 7 an $id beside a $ref is ignored, later it counts; the matcher lets it count.
        self._id_beside_ref = "2019-09" in draft or "2020-12" in draft
        self.num_schemas = 0
        self.has_open_keys = False
        self.combines = False
        self.multiples: set[int] = {1}

    def options(self, schema: Any) -> dict[str, Any]:
        given = schema.get("x-guidance", {}) if isinstance(schema, dict) else {}
        if not isinstance(given, dict) or any(given[key] not in _SEPARATORS.get(key, ()) for key in given):
            raise UserError(
                "the JSON Schema's x-guidance may hold item_separator (',' or ', ') and key_separator (':' or ': ')"
            )
        return {**DEFAULT_SEPARATORS, **given}

    def schema(self, schema: Any, path: str, depth: int) -> Any:
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise UserError(f"the JSON Schema has {type(schema).__name__} at {path} where a schema should be")
        self.num_schemas += 1
        if depth > MAX_DEPTH:
            raise UserError(f"the JSON Schema is nested deeper than {MAX_DEPTH} levels at {path[:200]}")
        if self.num_schemas > MAX_SUBSCHEMAS:
            raise UserError(f"the JSON Schema holds more than {MAX_SUBSCHEMAS} schemas")
        self._check(schema, path, depth)
        result: dict[str, Any] = {}
        for key, value in schema.items():
            where = f"{path}/{key}"
            if key in _NEUTRAL or key == "x-guidance":
                continue
            if key in _SCHEMA or (key == "items" and not isinstance(value, list)):
                result[key] = self.schema(value, where, depth + 1)
            elif key in _SCHEMAS or key == "items":
                if not isinstance(value, list):
                    raise UserError(f"the JSON Schema's {where} must be a list of schemas")
                result[key] = [self.schema(item, f"{where}/{idx}", depth + 1) for idx, item in enumerate(value)]
            elif key in _NAMED:
                if not isinstance(value, dict):
                    raise UserError(f"the JSON Schema's {where} must be an object")
                named = {name: self.schema(item, f"{where}/{name}", depth + 1) for name, item in value.items()}
                if key == "patternProperties":
                    named = {self._pattern(name, where): item for name, item in named.items()}
                result[key] = named
            elif key == "pattern":
                result[key] = self._pattern(value, where)
            elif key in _COUNTS and isinstance(value, float) and value.is_integer():
                result[key] = int(value)
            else:
                result[key] = value
        return self._with_format(result)

    def _check(self, schema: dict[str, Any], path: str, depth: int) -> None:
        for key in schema:
            if key in _REFUSED and not (key in _NEUTRAL and schema[key] is _NEUTRAL[key]):
                raise UserError(f"the JSON Schema keyword {key!r} at {path} is not supported")
        if "x-guidance" in schema and depth:
            raise UserError(f"x-guidance at {path} is not supported; only the whole JSON Schema may have it")
        if "$ref" in schema and len(schema) > 1:
            self.combines = True
            if not self._id_beside_ref and ("$id" in schema or "id" in schema):
                raise UserError(
                    f"the JSON Schema keyword '$id' beside '$ref' at {path} is not supported without a \"$schema\" of "
                    "draft 2019-09 or 2020-12"
                )
        self.combines |= "allOf" in schema
        if (multiple := schema.get("multipleOf")) is not None:
            self._check_multiple(multiple, path)
        properties = schema.get("properties")
        if isinstance(properties, dict) and len(properties) > MAX_PROPERTIES:
            raise UserError(
                f"the JSON Schema has {len(properties)} properties at {path}; at most {MAX_PROPERTIES} are allowed"
            )
        is_open = schema.get("additionalProperties") is not False
        self.has_open_keys |= is_open and bool(properties or schema.get("patternProperties"))
        least, required = schema.get("minProperties"), schema.get("required")
        num_required = len(set(required)) if isinstance(required, list) and all(map(_is_text, required)) else 0
        if isinstance(least, int | float) and least > num_required + 1 and (is_open or "patternProperties" in schema):
            # A key that is written twice would count twice.
            raise UserError(
                f"the JSON Schema keyword 'minProperties' at {path} is not supported above one more than the "
                "required properties, unless additionalProperties is false"
            )

    def _check_multiple(self, multiple: Any, path: str) -> None:
        if isinstance(multiple, bool) or not isinstance(multiple, int | float) or multiple <= 0:
            raise UserError(f"the JSON Schema's multipleOf at {path} must be a number above 0")
        digits = Decimal(repr(multiple)).normalize()
        exponent = digits.as_tuple().exponent
        scaled = int(digits.scaleb(-min(int(exponent), 0)))
        if scaled > MAX_MULTIPLE:
            raise UserError(
                f"the JSON Schema's multipleOf at {path} is {multiple}; at most {MAX_MULTIPLE} is allowed "
                "(its decimal point left out)"
            )
        self.multiples.add(scaled)

    def _pattern(self, pattern: Any, path: str) -> str:
        if not isinstance(pattern, str):
            raise UserError(f"the JSON Schema's {path} must be text")
        return to_rust(pattern)

    def _with_format(self, schema: dict[str, Any]) -> dict[str, Any]:
        pattern = _FORMATS.get(schema["format"]) if isinstance(schema.get("format"), str) else None
        if pattern is not None:
            del schema["format"]
            if "pattern" not in schema:
                schema["pattern"] = to_rust(pattern)
            else:
                self.combines = True
                schema["allOf"] = [*schema.get("allOf", []), {"pattern": to_rust(pattern)}]
        return schema


def _is_text(value: Any) -> bool:
    return isinstance(value, str)
