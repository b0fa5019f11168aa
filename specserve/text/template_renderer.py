"""Chat templates that nobody vouches for, rendered within limits of time and memory in processes that can be killed.

Owns the processes: started when the first such template is rendered, at most `NUM_WORKERS` at a time, one for each
template, so that a slow one holds up its own requests. A process that does not answer in time, or whose request is
given up, is killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from weakref import WeakValueDictionary

import msgspec

from ..errors import OverloadedError, UserError
from ..own_modules import module_command
from .chat_template import TEMPLATE_FAILED
from .template_worker import Rendered, TemplateJob, pack, payload_len

logger = logging.getLogger(__name__)

NUM_WORKERS = 2
RENDER_TIMEOUT_S = 5.0
START_TIMEOUT_S = 60.0
_READY = TemplateJob("", [], None, False, {}, START_TIMEOUT_S)


class TemplateRenderer:
    """Renders templates for one server; `close` ends its processes."""

    def __init__(self) -> None:
        self._idle: list[asyncio.subprocess.Process] = []
        self._workers = asyncio.Semaphore(NUM_WORKERS)
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()  # by template

    async def render(self, job: TemplateJob, name: str) -> str:
        """The text of `job`, whose template is called `name` in errors. Raises `UserError` when there is none."""
        turn = self._turns.setdefault(job.template, asyncio.Lock())
        async with turn, self._workers:
            worker = self._idle_worker() or await _start()
            try:
                async with asyncio.timeout(job.timeout_s):
                    rendered = await _ask(worker, job)
            except BaseException as error:
                await _kill(worker)
                if isinstance(error, TimeoutError):
                    raise _refused(name, f"it takes longer than {job.timeout_s:g} s") from None
                if isinstance(error, asyncio.IncompleteReadError | OSError):
                    raise _refused(name, "it ended the process that rendered it") from None
                raise
            self._idle.append(worker)
        if rendered.error is not None:
            raise _refused(name, rendered.error)
        return rendered.text

    def _idle_worker(self) -> asyncio.subprocess.Process | None:
        """One that still lives: what ended the others while nobody used them is no template's fault."""
        while self._idle:
            worker = self._idle.pop()
            if worker.returncode is None:
                return worker
        return None

    async def close(self) -> None:
        while self._idle:
            await _kill(self._idle.pop())


def _refused(name: str, reason: str) -> UserError:
    return UserError(f"{name} refuses these messages: {reason}", param="messages", code=TEMPLATE_FAILED)


async def _start() -> asyncio.subprocess.Process:
    """Raises `OverloadedError` when there is no place for another process."""
    worker: asyncio.subprocess.Process | None = None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            worker = await asyncio.create_subprocess_exec(
                *module_command("specserve.text.template_worker"),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
            )
            await _ask(worker, _READY)
    except BaseException as error:
        if worker is not None:
            await _kill(worker)
        if isinstance(error, asyncio.IncompleteReadError | OSError):
            logger.warning("a process that renders chat templates does not start: %s", error or "too slow")
            raise OverloadedError(
                "no process could be started to render the adapter's chat template; retry shortly", status=503
            ) from None
        raise
    return worker


async def _ask(worker: asyncio.subprocess.Process, job: TemplateJob) -> Rendered:
    assert worker.stdin is not None and worker.stdout is not None
    worker.stdin.write(pack(job))
    await worker.stdin.drain()
    head = await worker.stdout.readexactly(4)
    return msgspec.json.decode(await worker.stdout.readexactly(payload_len(head)), type=Rendered)


async def _kill(worker: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        worker.kill()
    await worker.wait()
