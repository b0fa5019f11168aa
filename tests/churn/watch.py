"""The server's process and what is seen of it from outside: engine processes, memory, handles, counters."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

READY = re.compile(rb"is ready at (http://\S+)")
METRIC = re.compile(r"^specserve_(\w+)(?:\{[^}]*\})? (\S+)$", re.MULTILINE)
MIB = 2**20


class ServerGone(Exception):
    """The server process itself has ended, or nothing brings its engine back."""


@dataclass(slots=True)
class Server:
    """`specserve serve` with its log in a file."""

    process: asyncio.subprocess.Process
    log: Path
    url: str = ""

    @classmethod
    async def start(cls, arguments: list[str], log: Path, timeout_s: float = 600) -> Server:
        with log.open("wb") as file:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "specserve.cli", "serve", *arguments, "--port", "0", stdout=file, stderr=file,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )  # fmt: skip
        server = cls(process, log)
        deadline = time.monotonic() + timeout_s
        while not (match := READY.search(log.read_bytes())):
            if process.returncode is not None or time.monotonic() > deadline:
                await server.stop()
                raise ServerGone(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")
            await asyncio.sleep(0.1)
        server.url = match[1].decode()
        return server

    @property
    def pid(self) -> int:
        return self.process.pid

    def engine_pid(self) -> int | None:
        """The running engine process; None while there is none."""
        for pid in _read(f"/proc/{self.pid}/task/{self.pid}/children").split():
            if "specserve.engine." in _read(f"/proc/{pid}/cmdline"):
                return int(pid)
        return None

    async def stop(self, grace_s: float = 60) -> int:
        """The exit status of a stop by SIGTERM; -9 when it took longer than `grace_s`."""
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(grace_s):
                    await self.process.wait()
            except TimeoutError:
                with contextlib.suppress(ProcessLookupError):
                    self.process.kill()
        return await self.process.wait()

    async def metrics(self, session: aiohttp.ClientSession) -> dict[str, float]:
        """Values without labels; empty while the server does not answer."""
        try:
            async with session.get(self.url + "/metrics", timeout=aiohttp.ClientTimeout(total=20)) as response:
                return {name: float(value) for name, value in METRIC.findall(await response.text())}
        except (aiohttp.ClientError, TimeoutError):
            return {}


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def rss_mib(pid: int) -> float | None:
    match = re.search(r"^VmRSS:\s+(\d+) kB", _read(f"/proc/{pid}/status"), re.MULTILINE)
    return int(match[1]) / 1024 if match else None


def num_handles(pid: int) -> int:
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


@dataclass(slots=True)
class MemoryTrace:
    """Memory of one process over its age; `adapters_mib` is what it says that its adapters take."""

    samples: list[tuple[float, float, float]] = field(default_factory=list)  # age in s, RSS, adapters_mib

    @property
    def age_s(self) -> float:
        return self.samples[-1][0] if self.samples else 0.0

    def growth(self) -> dict[str, float] | None:
        """Slope of RSS without adapters after the warm-up: three minutes, or a third of less age."""
        warm = [(age, rss - held) for age, rss, held in self.samples if age > min(180.0, self.age_s / 3)]
        if len(warm) < 10:
            return None
        slope = statistics.linear_regression(*zip(*warm, strict=True)).slope
        quarter = [value for _, value in warm[: len(warm) // 4]], [value for _, value in warm[-(len(warm) // 4) :]]
        return {
            "measured_min": round((warm[-1][0] - warm[0][0]) / 60, 1),
            "rss_first_mib": round(self.samples[0][1]),
            "rss_last_mib": round(self.samples[-1][1]),
            "rss_max_mib": round(max(rss for _, rss, _ in self.samples)),
            "mib_per_min": round(60 * slope, 2),
            "last_less_first_quarter_mib": round(statistics.median(quarter[1]) - statistics.median(quarter[0]), 1),
        }


@dataclass(slots=True)
class Watch:
    """Follows the engine's processes; a death that is not in `asked` is one that nobody asked for."""

    server: Server
    asked: set[int] = field(default_factory=set)
    unasked: list[dict[str, float]] = field(default_factory=list)
    server_memory: MemoryTrace = field(default_factory=MemoryTrace)
    engine_memory: dict[int, MemoryTrace] = field(default_factory=dict)
    _born: dict[int, float] = field(default_factory=dict)

    async def follow(self, started: float) -> None:
        """Until cancelled, or until the server is gone, which raises `ServerGone`."""
        last: int | None = None
        while True:
            if self.server.process.returncode is not None:
                raise ServerGone(f"the server process ended with status {self.server.process.returncode}")
            pid = self.server.engine_pid()
            if last is not None and pid != last and last not in self.asked:
                self.unasked.append({"at_s": round(time.monotonic() - started, 1), "pid": last})
            last = pid
            await asyncio.sleep(0.2)

    async def sample(self, session: aiohttp.ClientSession, interval_s: float) -> None:
        """Memory of both processes, until cancelled."""
        while True:
            pid = self.server.engine_pid()
            metrics = await self.server.metrics(session)
            held = metrics.get("engine_adapter_bytes")
            self._add(self.server_memory, self.server.pid, 0.0)
            if pid is not None and held is not None and pid == self.server.engine_pid():
                self._add(self.engine_memory.setdefault(pid, MemoryTrace()), pid, held / MIB)
            await asyncio.sleep(interval_s)

    def _add(self, memory: MemoryTrace, pid: int, held_mib: float) -> None:
        rss, now = rss_mib(pid), time.monotonic()
        if rss is not None:
            memory.samples.append((now - self._born.setdefault(pid, now), rss, held_mib))

    def longest_engine_memory(self) -> MemoryTrace:
        return max(self.engine_memory.values(), key=lambda memory: memory.age_s, default=MemoryTrace())
