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
from collections.abc import Callable, Iterable
from typing import Any


class Recorder:
    """Collects the tokens of one measurement and when they came; its clock starts when it is made.

    Decoding begins behind the step that gives the last request its first token. Where all answers have one length it
    ends with the first request that ends, so that the whole batch decodes all the time; else with the last one.
    """

    def __init__(self, num_requests: int, has_one_length: bool):
        self.token_ids: list[list[int]] = [[] for _ in range(num_requests)]
        self._has_one_length = has_one_length
        self._steps: list[tuple[float, int]] = []  # seconds since start, tokens
        self._first_s = [0.0] * num_requests
        self._last_s = [0.0] * num_requests
        self._start = time.perf_counter()

    def add_step(self, new_tokens: Iterable[tuple[int, list[int]]]) -> None:
        """What a step gave, by request; all of it came at one time."""
        now = time.perf_counter() - self._start
        num_tokens = 0
        for idx, token_ids in new_tokens:
            if token_ids:
                self._first_s[idx] = self._first_s[idx] or now
                self._last_s[idx] = now
                self.token_ids[idx] += token_ids
                num_tokens += len(token_ids)
        self._steps.append((now, num_tokens))

    def result(self) -> dict[str, Any]:
        """Wall time from submission to the last token, and decoding; no seconds of it where there was none."""
        begin_s, end_s = max(self._first_s), (min if self._has_one_length else max)(self._last_s)
        return {
            "wall_s": max(self._last_s),
            "decode_s": max(0.0, end_s - begin_s),
            "num_decode_tokens": sum(count for at, count in self._steps if begin_s < at <= end_s),
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
