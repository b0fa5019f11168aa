"""Runs the `case_*` functions of a client's script, in that client's own environment, and reports each as JSON.

Nothing of this project is imported: the scripts know the server by its address alone.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import traceback

MESSAGES = [{"role": "user", "content": "Say hello"}]
DOCUMENTS = ["The quick brown fox jumps.", "A lazy dog sleeps.", "Five dozen liquor jugs."]
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "level": {"enum": ["low", "high"]}},
    "required": ["ok", "level"],
    "additionalProperties": False,
}
TOOL = {
    "type": "function",
    "function": {"name": "set_level", "description": "Set the level.", "parameters": SCHEMA},
}


def run(namespace: dict) -> None:
    """Call every case with (url, key) of the command line; print {case: null or traceback} as the last line."""
    url, key = sys.argv[1:3]
    results = {}
    for name, function in namespace.items():
        if not name.startswith("case_"):
            continue
        try:
            found = function(url, key)
            if inspect.isawaitable(found):
                asyncio.run(found)
            results[name] = None
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def check_answer(ok, level) -> None:
    assert isinstance(ok, bool) and level in ("low", "high"), (ok, level)
