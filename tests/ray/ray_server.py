"""`specserve ray` with a tiny model as a process of its own, and callers that say what became of each request."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import requests
from ports import quiet_port
from server_fixture import ServerProcess, command_of

START_S, AWAY_S = 300, 180
NAMES = ("a", "b", "c")
REPLICA = re.compile(r'specserve_replica_\w+\{replica="(\w+)"\}')


def here(*command: str, **options) -> subprocess.Popen:
    """A process of this machine."""
    return subprocess.Popen(command, **options)


class RayServer(ServerProcess):
    """The front's address as of a server; processes are found by what they run."""

    def __init__(self, model_dir, adapters_dir, *flags: str, port: int | None = None, popen=here):
        self.port = port or quiet_port()
        command = [sys.executable, "-m", "specserve.cli", "ray", "--model", str(model_dir), "--port", str(self.port)]
        command += [
            "--dtype",
            "fp32",
            "--kv-cache-gib",
            "0.05",
            "--num-threads",
            "1",
            "--drain-timeout-s",
            "20",
            *flags,
        ]
        command += ["--adapters-dir", str(adapters_dir)] if adapters_dir is not None else []
        env = {**os.environ, "RAY_AUTH_MODE": "disabled"}
        self.process = popen(*command, stderr=subprocess.PIPE, text=True, env=env)
        self.log, self.url, self._ready = [], "", threading.Event()
        threading.Thread(target=self._read_log, daemon=True).start()

    def replicas(self) -> set[str]:
        """Names of those that serve; none while the front is away."""
        try:
            return set(REPLICA.findall(requests.get(self.url + "/metrics", timeout=10).text))
        except requests.RequestException:
            return set()

    def wait_replicas(self, num: int, patience_s: float = AWAY_S) -> set[str]:
        deadline = time.monotonic() + patience_s
        while len(found := self.replicas()) != num:
            assert time.monotonic() < deadline, f"{found} serve:\n" + "".join(self.log[-30:])
            time.sleep(0.2)
        return found

    def pids(self, words: str) -> list[int]:
        """Processes below this one whose command holds `words`."""
        below, is_below = parents(), {self.process.pid}
        while new := {pid for pid, parent in below.items() if parent in is_below} - is_below:
            is_below |= new
        return [pid for pid in sorted(is_below) if words in command_of(str(pid))]


def parents() -> dict[int, int]:
    found = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            try:
                found[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    return found


def body_of(name: str, prompt: str, num: int) -> dict:
    return {"model": name, "prompt": prompt, "max_tokens": num, "temperature": 0, "ignore_eos": True}


PROMPTS = ("The quick brown fox", "A server answers", "Pack my box with", 'in JSON: {"a":')
LENGTHS = (8, 40, 200)


class Callers:
    """Threads that ask for mixed adapters, half of them as streams, until the context ends."""

    def __init__(self, server, expected, num=8):
        self._server, self._expected = server, expected
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(idx,)) for idx in range(num)]
        self.outcomes: list[str] = []

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _run(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._stop.is_set():
            name = rng.choice(("tiny", *NAMES))
            body = body_of(name, rng.choice(PROMPTS), rng.choice(LENGTHS))
            try:
                self.outcomes.append(self._stream(body) if rng.random() < 0.5 else self._whole(body))
            except requests.RequestException as error:
                self.outcomes.append(f"no connection: {type(error).__name__}")

    def _whole(self, body: dict) -> str:
        response = requests.post(self._server.url + "/v1/completions", json=body, timeout=300)
        if response.status_code != 200:
            return f"status {response.status_code}: {response.json()['error']['code']}"
        return "right" if response.json()["choices"][0]["text"] == self._expected(body) else "wrong"

    def _stream(self, body: dict) -> str:
        text, error = "", None
        url = self._server.url + "/v1/completions"
        with requests.post(url, json={**body, "stream": True}, stream=True, timeout=300) as response:
            if response.status_code != 200:
                return f"status {response.status_code}"
            for line in response.iter_lines():
                if line and line != b"data: [DONE]":
                    event = json.loads(line[6:])
                    error = event.get("error", error)
                    text += "".join(choice["text"] for choice in event.get("choices", ()))
        if error is not None:
            return "lost" if self._expected(body).startswith(text.rstrip("\ufffd")) and text else "wrong"
        return "right" if text == self._expected(body) else "wrong"


def warm(expected) -> None:
    for name in ("tiny", *NAMES):
        for prompt in PROMPTS:
            for num in LENGTHS:
                expected(body_of(name, prompt, num))
