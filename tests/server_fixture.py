"""A real server process with a tiny model, and small helpers to talk to it over real HTTP."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import api_contract
import requests

READY = re.compile(r"is ready at (http://\S+)")
METRIC = re.compile(r"^specserve_(\w+)(?:\{([^}]*)\})? (\S+)$", re.MULTILINE)


class ServerProcess:
    """`specserve serve` on a free port; `url` once it is ready."""

    def __init__(self, model_dir, *flags: str, env: dict[str, str] | None = None, prefix: Sequence[str] = ()):
        command = [sys.executable, "-m", "specserve.cli", "serve", str(model_dir), "--port", "0", "--dtype", "fp32"]
        command += ["--kv-cache-gib", "0.02", "--num-threads", "1", *flags]
        env = {**os.environ, "SPECSERVE_LOG_LEVEL": "info", **(env or {})}
        self.process = subprocess.Popen([*prefix, *command], stderr=subprocess.PIPE, text=True, env=env)
        self.log: list[str] = []
        self.url = ""
        self._ready = threading.Event()
        threading.Thread(target=self._read_log, daemon=True).start()

    def _read_log(self) -> None:
        for line in self.process.stderr:
            self.log.append(line)
            if match := READY.search(line):
                self.url = match[1]
                self._ready.set()
        self._ready.set()

    def wait_ready(self, timeout_s: float = 300) -> ServerProcess:
        assert self._ready.wait(timeout_s) and self.url, "".join(self.log)
        return self

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(timeout=timeout_s)

    # -- requests

    def get(self, path: str, **kwargs):
        response = requests.get(self.url + path, timeout=60, **kwargs)
        api_contract.check("GET", path, response)
        return response

    def post(self, path: str, body, **kwargs):
        response = requests.post(self.url + path, json=body, timeout=120, **kwargs)
        api_contract.check("POST", path, response, is_stream=kwargs.get("stream", False))
        return response

    def complete(self, prompt="The quick brown", **fields):
        """A greedy completion's choice; fails the test on an error."""
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
        response = self.post("/v1/completions", body)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]

    def stream(self, path: str, body, **kwargs):
        """The events of a stream, decoded, without [DONE]; asserts that [DONE] came last."""
        response = self.post(path, {**body, "stream": True}, stream=True, **kwargs)
        assert response.status_code == 200, response.text
        lines = [line.decode()[6:] for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        events = [json.loads(line) for line in lines[:-1]]
        for event in events:
            api_contract.check_event(path, event)
        return events

    # -- state

    def metrics(self) -> dict[str, float]:
        """Metric values; labelled ones are keyed name{labels}."""
        text = self.get("/metrics").text
        return {
            name + (f"{{{labels}}}" if labels else ""): float(value) for name, labels, value in METRIC.findall(text)
        }

    def wait_baseline(self, timeout_s: float = 30) -> None:
        """Everything a request held has been given back."""
        deadline = time.monotonic() + timeout_s
        while True:
            m = self.metrics()
            problems = {
                "running": m["engine_num_running"],
                "waiting": m["engine_num_waiting"],
                "blocks": m["engine_num_kv_blocks"] - m["engine_num_free_kv_blocks"],
                "adapter references": m["engine_num_adapter_refs"],
                "integrity": 1 - m["engine_integrity_ok"],
            }
            if not any(problems.values()):
                return
            assert time.monotonic() < deadline, problems
            time.sleep(0.05)

    def engine_pids(self) -> set[int]:
        """The engine processes among the server's children: one, but for a moment of a restart."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return {int(pid) for pid in children if "engine_process" in _command_of(pid)}

    def engine_pid(self) -> int:
        (pid,) = self.engine_pids()
        return pid


def _command_of(pid: str) -> str:
    """Nothing for a process that has just gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def assert_error(response, status: int, *words: str, param: str | None = None) -> dict:
    """An error in OpenAI's shape with this status whose message holds the words."""
    assert response.status_code == status, f"{response.status_code}: {response.text[:500]}"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    for word in words:
        assert word in error["message"], error["message"]
    if param is not None:
        assert error["param"] == param, error
    return error
