"""The OpenAPI document: complete, a function of the route table alone, and strict enough to catch a wrong answer."""

import jsonschema
import pytest
from api_contract import check_event, check_value, document, operation_of

from specserve.config import ServeConfig
from specserve.server.app import Server
from specserve.server.routes import ROUTES
from specserve.text.tokenizer import TextTokenizer


def test_every_served_route_is_in_the_document_and_no_other(model_dir):
    app = Server(ServeConfig(), model_dir).application(TextTokenizer(model_dir))
    served = {(route.method, route.resource.canonical) for route in app.router.routes() if route.method != "HEAD"}
    documented = {(m.upper(), path) for path, operations in document()["paths"].items() for m in operations}
    assert served == documented and len(served) == len(ROUTES)


def test_document_is_served_and_its_schemas_are_valid(server):
    assert server.get("/openapi.json").json() == document()
    assert document()["openapi"].startswith("3.1")
    for schema in document()["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    ids = [operation["operationId"] for operations in document()["paths"].values() for operation in operations.values()]
    assert len(ids) == len(set(ids))


def test_unknown_fields_and_wrong_types_do_not_pass_as_answers():
    health = operation_of("GET", "/health")["responses"]["200"]["content"]["application/json"]
    check_value({"status": "ok"}, health)
    for wrong in ({"status": 1}, {}, {"status": "ok", "more": 1}):
        with pytest.raises(jsonschema.ValidationError):
            check_value(wrong, health)
    with pytest.raises(jsonschema.ValidationError):
        check_event("/generate_stream", {"generated_text": "a"})
    check_event("/generate_stream", {"error": "a", "error_type": "overloaded"})
    assert operation_of("GET", "/v1/models/some/name")["operationId"] == "model" and operation_of("PUT", "/") is None


def test_routes_that_need_no_key_say_so():
    open_paths = {path for path, ops in document()["paths"].items() for op in ops.values() if op["security"] == []}
    assert open_paths == {"/", "/ui/{path}", "/health", "/ready"}
