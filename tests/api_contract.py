"""Holds every response of a test's server to the OpenAPI document: status, content type, body and stream events."""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import jsonschema

from specserve.openapi import openapi_document


@functools.cache
def document() -> dict[str, Any]:
    return openapi_document()


def operation_of(method: str, path: str) -> dict[str, Any] | None:
    """The operation that serves `method` of `path`; None when there is none."""
    path = path.partition("?")[0]
    for template, operations in document()["paths"].items():
        pattern = re.sub(r"\\\{\w+\\\}", ".+", re.escape(template))
        if re.fullmatch(pattern, path):
            return operations.get(method.lower())
    return None


@functools.cache
def validator(schema_json: str) -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator({**json.loads(schema_json), "components": document()["components"]})


def check(method: str, path: str, response: Any, is_stream: bool = False) -> None:
    """Fail on a status or body that the document does not have; a stream's body is left unread."""
    operation = operation_of(method, path)
    if operation is None:
        assert response.status_code in (404, 405), f"{method} {path} is served but not documented"
        return
    declared = operation["responses"].get(str(response.status_code))
    assert declared is not None, f"{method} {path}: status {response.status_code} is not documented: {response.text}"
    media_type = response.headers["Content-Type"].partition(";")[0]
    assert media_type in declared["content"], f"{method} {path}: {media_type} is not documented"
    if media_type == "application/json" and not is_stream:
        check_value(response.json(), declared["content"][media_type])


def check_event(path: str, event: Any) -> None:
    """Fail on an event of a stream that the document does not have."""
    operation = operation_of("POST", path)
    assert operation is not None
    events = operation["responses"]["200"]["content"]["text/event-stream"]["schema"]
    check_value(event, {"schema": events["properties"]["data"]["contentSchema"]})


def check_value(value: Any, media: dict[str, Any]) -> None:
    if "schema" in media:
        validator(json.dumps(media["schema"])).validate(value)
