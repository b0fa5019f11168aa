"""A peer's process as the bench sees it: started with its settings, stopped except while it is asked, ended as a group.

What is said between the two stands in workers/worker_io.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from .. import common

SCRIPTS = Path(__file__).parent / "workers"


class WorkerError(Exception):
    """A worker did not start, did not answer, or answered with an error."""


class Worker:
    """One peer's process. It is stopped except while it starts or measures."""

    def __init__(self, script: str, python: str, settings: dict[str, Any], env: dict[str, str], start_timeout_s: float):
        self.log = (
            common.cache_dir()
            / "logs"
            / f"{script}-{settings['dtype']}-{settings['quantization']}-{len(settings['adapters'])}.log"
        )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(SCRIPTS / f"{script}_worker.py"), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | env,
                start_new_session=True,  # the group is stopped and ended as one
            )
        self._closed = False
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        start = time.perf_counter()
        try:
            self.info: dict[str, Any] = self._answer(start_timeout_s)["ready"]
        except BaseException:
            self.close()
            raise
        self.info["start_s"] = round(time.perf_counter() - start, 1)
        self._signal(signal.SIGSTOP)

    def measure(self, request: dict[str, Any], timeout_s: float = 1800.0) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        time.sleep(0.05)  # its threads are scheduled again before its clock starts
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer(timeout_s)
        except OSError:
            raise WorkerError(f"the worker ended; see {self.log}") from None
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process and whatever it started."""
        if self._closed:
            return
        self._closed = True
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise WorkerError(f"no answer in {timeout_s:.0f} s; see {self.log}") from None
        if not line:
            raise WorkerError(f"the worker ended; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{answer['error']}; see {self.log}")
        return answer


def make_request(
    prompts: list[list[int]], adapters: list[int | None], num_tokens: int, mode: str, ignore_eos: bool = True
) -> dict[str, Any]:
    return {
        "prompts": prompts,
        "adapters": adapters,
        "num_tokens": num_tokens,
        "mode": mode,
        "ignore_eos": ignore_eos,
    }
