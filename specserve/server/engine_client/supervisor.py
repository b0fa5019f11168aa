"""Keeps one engine process running: starts it, watches it, and starts the next one when it dies or hangs.

Nothing that goes wrong ends this: not a process that dies while it starts, not a server without handles or memory.
Nor does a process serve whose model is another than the first one's, as when its folder was updated meanwhile.
Each failure is logged with its reason and followed by another try, after a pause that grows up to `MAX_BACKOFF_S`.
`generation` counts the processes that served: what was told to one is unknown to the next.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal

from ...awake_clock import AwakeClock
from ...errors import EngineDeadError
from ...messages import EngineInfo, Heartbeat, Shutdown
from .link import Link

logger = logging.getLogger(__name__)

State = Literal["starting", "ready", "restarting", "stopped"]
STOPPED = "the engine is shutting down"  # by a server's end, or a program's that has an `LLM`
MAX_BACKOFF_S = 5.0  # with the start of a small model that makes less than 10 s
_FIRST_BACKOFF_S = 0.5
_STABLE_S = 10.0  # a process that served for so long is replaced without a pause
_STOP_GRACE_S = 5.0  # in which the engine saves what it learned
_EXIT_S = 0.5  # between a process's last word and its end
_MAX_TICK_S = 1.0
_EXPECTED_TIMES = 20  # what a step may take of what it is expected to, from few rows and short contexts at start
_COMPILING_TIMES = 6  # what one may take on CUDA, where kernels are compiled and graphs captured when first met


class EngineSupervisor:
    """Calls `on_message` with what the engine says, and `on_lost` when a process that served has gone.

    `on_serving` is called when one has started.
    """

    def __init__(
        self,
        launch: Callable[[], Awaitable[Link]],
        on_message: Callable[[Any], None],
        on_lost: Callable[[], None],
        *,
        silence_timeout_s: float,
        step_timeout_s: float,
        on_serving: Callable[[], object] = lambda: None,
    ):
        self.state: State = "stopped"
        self.generation = 0
        self.info: EngineInfo | None = None  # of the newest process that served
        self.serving_since: float | None = None  # of time.monotonic(), the same process
        self._launch = launch
        self._on_message = on_message
        self._on_lost = on_lost
        self._on_serving = on_serving
        self._silence_timeout_s = silence_timeout_s
        self._step_timeout_s = step_timeout_s
        self._link: Link | None = None
        self._problem = ""
        self._settled = asyncio.Event()  # the state is "ready" or "stopped"
        self._task: asyncio.Task[None] | None = None
        self._heard = False
        self._heartbeat: Heartbeat | None = None  # the newest of the process that serves

    async def start(self) -> None:
        """Start the first process and wait for its model; raises the `UserError` that says why it cannot serve."""
        self.state = "starting"
        started: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._task = asyncio.create_task(self._keep_running(started))
        await started

    async def stop(self) -> None:
        """End the process, or the try to start one."""
        self.state = "stopped"
        self._settled.set()
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._link is not None:
            self._link.send(Shutdown())
            await self._link.end(_STOP_GRACE_S)
            self._link = None

    def send(self, message: Any) -> None:
        """Tell the process that serves; nothing comes of it while there is none."""
        if self._link is not None:
            self._link.send(message)

    async def link(self, patience_s: float = 0.0) -> Link:
        """The process that serves; a restart is waited for, up to `patience_s`. Raises `EngineDeadError`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while self.state not in ("ready", "stopped"):
                    await self._settled.wait()
        if self.state == "stopped":
            raise EngineDeadError(STOPPED)
        if self._link is None or self.state != "ready":
            raise EngineDeadError(f"the engine is not running ({self._problem or self.state}); retry shortly")
        return self._link

    async def _keep_running(self, started: asyncio.Future[None]) -> None:
        num_failures = 0
        while True:
            served_s = 0.0
            try:
                self._link = await self._launch_same()
                since = time.monotonic()
                if not started.done():
                    started.set_result(None)
                problem = await self._serve(self._link)
                served_s = time.monotonic() - since
            except asyncio.CancelledError:
                if not started.done():
                    started.set_exception(EngineDeadError(STOPPED))
                raise
            except Exception as error:
                if not started.done():
                    started.set_exception(error)
                    return
                logger.debug("the engine is away", exc_info=True)
                problem = str(error) or type(error).__name__
            self._problem = problem
            num_failures = 1 if served_s > _STABLE_S else num_failures + 1
            pause_s = _pause_s(num_failures)
            logger.error("%s; starting it again in %.1f s (failure %d in a row)", problem, pause_s, num_failures)
            await asyncio.sleep(pause_s)

    async def _launch_same(self) -> Link:
        """A process with the model of the first one: prompts, streams and adapters were made for that.

        Raises `EngineDeadError` where the files hold another by now.
        """
        link = await self._launch()
        if self.info is not None and link.info.model_hash != self.info.model_hash:
            await link.end(0.0)
            raise EngineDeadError(
                f"the weights or the tokenizer in {link.info.model} are others than at the start of this server; put "
                "them back, or start the server again to serve these"
            )
        return link

    async def _serve(self, link: Link) -> str:
        """Dispatch what the process says until it ends or has to be ended; says why. The process is gone then."""
        self.info, self.state, self._heartbeat = link.info, "ready", None
        self.serving_since = time.monotonic()
        self.generation += 1
        self._settled.set()
        self._on_serving()
        tasks = asyncio.create_task(self._read(link)), asyncio.create_task(self._watch(link.info.device))
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        problem = next(result for task, result in zip(tasks, results, strict=True) if task in done)
        if isinstance(problem, BaseException):
            logger.error("the connection to the engine broke", exc_info=problem)
            problem = f"the connection to the engine broke: {type(problem).__name__}: {problem}"
        self.state = "restarting"
        self._settled.clear()
        self._link = None
        try:
            self._on_lost()
        finally:
            status = await link.end(_EXIT_S if not problem else 0.0)
        return problem or f"the engine process ended ({status})"

    async def _read(self, link: Link) -> str:
        async for messages in link.messages():
            self._heard = True
            for message in messages:
                if isinstance(message, Heartbeat):
                    self._heartbeat = message
                self._on_message(message)
            await asyncio.sleep(0)  # a burst of buffered frames must not keep their readers from running
        return ""

    async def _watch(self, device: str) -> str:
        """Until the process counts as hung, by what was heard of it while this loop ran itself."""
        least_s = self._step_timeout_s * (1 if device == "cpu" else _COMPILING_TIMES)
        tick_s = min(_MAX_TICK_S, self._silence_timeout_s / 4)
        clock, heard_at = AwakeClock(tick_s), 0.0
        while True:
            await asyncio.sleep(tick_s)
            now = clock.tick()
            if self._heard:
                self._heard, heard_at = False, now
            if now - heard_at > self._silence_timeout_s:
                return f"the engine has been silent for {now - heard_at:.0f} s and was killed (--engine-timeout-s)"
            beat = self._heartbeat
            if beat is not None and beat.turn_s > max(least_s, _EXPECTED_TIMES * beat.expected_s):
                return (
                    f"the engine has been busy with one step of {beat.num_rows} rows for {beat.turn_s:.0f} s, where "
                    f"{beat.expected_s:.2g} s were expected, and was killed (--engine-step-timeout-s)"
                )


def _pause_s(num_failures: int) -> float:
    """0, then 0.5, 1, 2 .. `MAX_BACKOFF_S`."""
    return 0.0 if num_failures == 1 else min(_FIRST_BACKOFF_S * 2.0 ** (min(num_failures, 16) - 2), MAX_BACKOFF_S)
