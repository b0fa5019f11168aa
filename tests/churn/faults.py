"""What is done to the processes: the engine is killed, also while it starts; both are stopped for seconds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import time
from collections import Counter
from dataclasses import dataclass, field

import aiohttp

from .history import Disturbances
from .watch import ServerGone, Watch

RECOVERY_TIMEOUT_S = 120.0
ENGINE_TIMEOUT_S = 30.0  # --engine-timeout-s of the server that is disturbed


@dataclass(slots=True)
class Troublemaker:
    watch: Watch
    disturbances: Disturbances
    session: aiohttp.ClientSession
    counts: Counter[str] = field(default_factory=Counter)
    recoveries_s: list[float] = field(default_factory=list)

    async def kill_engine(self, rng: random.Random) -> None:
        """kill -9, one time in three once more as soon as another engine is there; then wait until it serves."""
        span = self.disturbances.begin(time.monotonic())
        last = await self._kill(None)
        if rng.random() < 0.33:
            last = await self._kill(last, rng.choice([0.0, 0.3, 1.5]))
        await self._recovered(span, last)

    async def _kill(self, not_this: int | None, delay_s: float = 0.0) -> int:
        deadline = time.monotonic() + RECOVERY_TIMEOUT_S
        while (pid := self.watch.server.engine_pid()) is None or pid == not_this:
            if time.monotonic() > deadline:
                raise ServerGone(f"no new engine process within {RECOVERY_TIMEOUT_S:g} s of a kill")
            await asyncio.sleep(0.02)
        await asyncio.sleep(delay_s)
        self.watch.asked.add(pid)
        with contextlib.suppress(ProcessLookupError):
            self.disturbances.kills.append(time.monotonic())
            os.kill(pid, signal.SIGKILL)
            self.counts["engine killed"] += 1
        return pid

    async def _recovered(self, span: list[float], killed: int) -> None:
        """Until another process is there and serves: a busy server may take a while to notice the death."""
        start = time.monotonic()
        while self.watch.server.engine_pid() in (None, killed) or not await self._is_healthy():
            if time.monotonic() - start > RECOVERY_TIMEOUT_S:
                raise ServerGone(f"the engine was not back {RECOVERY_TIMEOUT_S:g} s after it was killed")
            await asyncio.sleep(0.2)
        self.recoveries_s.append(round(time.monotonic() - start, 1))
        span[1] = time.monotonic()

    async def _is_healthy(self) -> bool:
        try:
            async with self.session.get(
                self.watch.server.url + "/health", timeout=aiohttp.ClientTimeout(total=10)
            ) as response:
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def stop_server(self, rng: random.Random) -> None:
        """SIGSTOP of the server, sometimes for longer than the engine may be silent; nothing may die of it."""
        await self._stop(self.watch.server.pid, rng.choice([1.0, 3.0, 8.0, ENGINE_TIMEOUT_S + 5]), "server stopped")

    async def stop_engine(self, rng: random.Random) -> None:
        """SIGSTOP of the engine for less than that."""
        if (pid := self.watch.server.engine_pid()) is not None:
            await self._stop(pid, rng.choice([0.5, 2.0, 6.0]), "engine stopped")

    async def _stop(self, pid: int, seconds: float, what: str) -> None:
        span = self.disturbances.begin(time.monotonic())
        try:
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(seconds)
        except ProcessLookupError:
            pass
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
            span[1] = time.monotonic() + 2  # buffered work has to go through
        self.counts[what] += 1
