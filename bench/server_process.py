"""`specserve serve`, or `specserve ray`, in a process of its own, for benches that ask it over HTTP."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import click

READY = re.compile(r"is ready at (http://\S+)")
METRIC = re.compile(r"^specserve_(\w+) (\S+)$", re.MULTILINE)
START_S = 300


@dataclass(frozen=True, slots=True)
class Serving:
    url: str
    pid: int

    def cpu_s(self) -> float:
        """CPU time that the server and its engine have taken so far."""
        return sum(cpu_s(pid) for pid in (self.pid, *children(self.pid)))

    def engine_pid(self) -> int | None:
        """The engine's process; None while there is none."""
        for pid in children(self.pid):
            with contextlib.suppress(OSError):  # it may end while it is looked at
                if b"specserve.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return pid
        return None


def children(pid: int) -> list[int]:
    """Processes that `pid` has started, by any of its threads, and that have not ended."""
    found: list[int] = []
    for file in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # its thread has ended meanwhile
            found += map(int, file.read_text().split())
    return found


def cpu_s(pid: int) -> float:
    """CPU time of a process so far, user and system."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def serving(model: str, *flags: str, program: str = "serve") -> Iterator[Serving]:
    """A server once it is ready; it ends with the context."""
    command = [sys.executable, "-m", "specserve.cli", program, "--model", model, "--port", "0", *flags]
    env = os.environ | {"SPECSERVE_LOG_LEVEL": "warning"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    url, log, ready = [""], [], threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            log.append(line)
            if match := READY.search(line):
                url[0] = match[1]
                ready.set()
        ready.set()

    threading.Thread(target=read, daemon=True).start()
    try:
        if not ready.wait(START_S) or not url[0]:
            raise click.ClickException(f"the server did not start: {''.join(log[-20:])}")
        yield Serving(url[0], process.pid)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait()


async def metrics(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """Those without labels."""
    async with session.get(f"{url}/metrics") as response:
        return {name: float(value) for name, value in METRIC.findall(await response.text())}
