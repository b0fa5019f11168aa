"""How a worker talks to `bench.peers`: JSON lines on stdin and stdout, one measurement at a time.

Standard library only, because it runs in each peer's own environment. Settings come as one JSON argument. Whatever a
library prints goes to stderr: the real stdout is kept aside for replies.

  worker -> bench   {"ready": {...}}                                  after loading; versions, dtype, threads
  bench -> worker   {"prompts": [[ids]], "adapters": [idx or null], "num_tokens": n, "mode": "off",
                     "ignore_eos": true, "schemas": [JSON Schema text or null] (optional)}
  worker -> bench   {"wall_s", "decode_s", "num_decode_tokens", "token_ids": [[...]]} or {"error": "..."}
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


class Recorder:
    """Collects the tokens of one measurement and when they came; its clock starts when it is made."""

    def __init__(self, num_requests: int):
        self.token_ids: list[list[int]] = [[] for _ in range(num_requests)]
        self._events: list[tuple[float, int]] = []  # seconds since start, tokens
        self._first_s: list[float | None] = [None] * num_requests
        self._start = time.perf_counter()

    def add(self, request_idx: int, token_ids: list[int]) -> None:
        if not token_ids:
            return
        now = time.perf_counter() - self._start
        if self._first_s[request_idx] is None:
            self._first_s[request_idx] = now
        self.token_ids[request_idx] += token_ids
        self._events.append((now, len(token_ids)))

    def result(self) -> dict[str, Any]:
        """Wall time from submission to the last token, and the part after every request had its first one."""
        all_started_s = max(first for first in self._first_s if first is not None)
        wall_s = self._events[-1][0]
        return {
            "wall_s": wall_s,
            "decode_s": wall_s - all_started_s,
            "num_decode_tokens": sum(count for at, count in self._events if at > all_started_s),
            "token_ids": self.token_ids,
        }


Measure = Callable[[dict[str, Any]], dict[str, Any]]


def serve(load: Callable[[dict[str, Any]], tuple[dict[str, Any], Measure]]) -> None:
    """Run a worker: `load(settings)` gives what to report and the function that answers one request."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        info, measure = load(json.loads(sys.argv[1]))
    except Exception as error:
        traceback.print_exc()
        reply({"error": f"{type(error).__name__}: {error}"})
        return
    reply({"ready": info})
    for line in sys.stdin:
        try:
            reply(measure(json.loads(line)))
        except Exception as error:
            traceback.print_exc()
            reply({"error": f"{type(error).__name__}: {error}"})
