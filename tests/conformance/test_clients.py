"""Clients that nobody here wrote, each in its own environment, against a real server."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPTS = Path(__file__).parent / "clients"
CASES = [
    (script.stem.removesuffix("_client"), name)
    for script in sorted(SCRIPTS.glob("*_client.py"))
    for name in re.findall(r"^(?:async )?def (case_\w+)", script.read_text(), re.MULTILINE)
]


@functools.cache
def results(python: Path, client: str, url: str, key: str) -> dict[str, str | None]:
    """What each case of `client` came to; all run in one process, because some clients take seconds to import."""
    command = [python, SCRIPTS / f"{client}_client.py", url, key]
    env = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0 and done.stdout, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize(("client", "case"), CASES, ids=lambda value: value.removeprefix("case_"))
def test_client_works_unchanged(server, executable, client, case):
    failure = results(executable(client, "python"), client, server.url, server.key)[case]
    assert failure is None, failure
