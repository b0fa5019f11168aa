"""Requests made up from the OpenAPI document: no fault, no undocumented status, no answer off its schema."""

import os
import subprocess

import pytest

pytestmark = pytest.mark.slow

CHECKS = "not_a_server_error,status_code_conformance,response_schema_conformance,response_headers_conformance"


# A deadline of the request's own that passes is no fault of the server.
CONFIG = """[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", "504"]
"""


def test_made_up_requests_get_documented_answers(server, executable, tmp_path):
    golden = server.complete()["text"]
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [executable("schemathesis", "st"), "run", f"{server.url}/openapi.json", "--checks", CHECKS]
    command += ["-H", f"Authorization: Bearer {server.key}", "--phases", "examples,coverage,fuzzing", "--seed", "1"]
    command += ["--max-examples", "40", "--workers", "1", "--max-time", "150", "--no-shrink", "--request-timeout", "60"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, env={**os.environ})
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    server.wait_baseline()
    assert server.complete()["text"] == golden
