"""Runs batches: each from where it stands to its end, whenever the process began.

What a batch has come to is in the store; here is what is being done. A batch is validated, its rows that have no answer
yet run, and its output is written; each step can be done again after a process that ended in it. Where the disk is full
or away a step waits for it, and a row's answer with it: nothing that was computed is lost.
"""

from __future__ import annotations

import asyncio
import logging
import sqlite3
from collections.abc import Awaitable, Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from itertools import islice
from typing import TypeVar

from ..to_the_end import to_the_end
from .outputs import End, Outputs
from .room import DirAwayError, StorageError
from .row_runner import Outcome, RowRunner
from .rows import BatchTooLargeError, FileCheck, InputLostError, NoMoreRowsError, Row, read_rows
from .store import BatchStore, OpenBatch
from .types import Batch, BatchErrors

logger = logging.getLogger(__name__)

MAX_RUNNING = 4  # batches of one owner
MAX_AT_ONCE = 4096  # rows of one batch that run or wait for a place
READ_ROWS = 64  # at a time
RETRY_S = 5.0  # where the disk is full or away
TIDY_EVERY_S = 300.0
T = TypeVar("T")


class BatchWorker:
    """Made and used on one event loop. `max_at_once` says how many rows of a batch there may be at a time.

    `has_errors_apart`: rows that failed have a file of their own.
    """

    def __init__(
        self,
        store: BatchStore,
        runner: RowRunner,
        *,
        max_rows: int,
        max_row_bytes: int,
        max_at_once: Callable[[], int],
        has_errors_apart: bool = True,
    ):
        self._store, self._runner = store, runner
        self._max_rows, self._max_row_bytes, self._max_at_once = max_rows, max_row_bytes, max_at_once
        self._outputs = Outputs(store, max_row_bytes, has_errors_apart)
        self._thread = ThreadPoolExecutor(1, "batches")  # the store's
        self._checking = asyncio.Semaphore(1)
        self._leads: dict[str, asyncio.Task[None]] = {}
        self._running: dict[str, asyncio.Task[End]] = {}
        self._cancelled: set[str] = set()
        self._turns: dict[str, asyncio.Semaphore] = {}  # by owner
        self._tidying: asyncio.Task[None] | None = None
        self.problems: dict[str, str] = {}  # of batches that cannot go on at the moment

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(self._runner.answers)

    async def on_disk(self, work: Callable[..., T], *arguments: object) -> T:
        """Call the store, after those who asked earlier. Who is cancelled waits for the end of what has begun: no file
        may be taken away while the store learns of it. Raises `DirAwayError` when it was closed."""
        try:
            begun = asyncio.get_running_loop().run_in_executor(self._thread, work, *arguments)
        except RuntimeError:  # the thread has ended
            raise DirAwayError("the folder of --batch-dir was replaced meanwhile; try again") from None
        return await to_the_end(begun)

    async def start(self) -> None:
        """Go on with all batches that have not ended."""
        self._tidying = asyncio.ensure_future(self._tidy())
        for opened in await self.on_disk(self._store.open_batches):
            self.begin(opened)

    async def add(self, owner: str, batch: Batch, keep_output_s: int) -> bool:
        """Keep a new batch and begin with it, also for a client that leaves meanwhile; says whether its input is there.
        Raises as `BatchStore.add_batch`."""

        async def add() -> bool:
            opened = await self.on_disk(self._store.add_batch, owner, batch, keep_output_s)
            if opened is not None:
                self.begin(opened)
            return opened is not None

        return await to_the_end(add())

    def begin(self, opened: OpenBatch) -> asyncio.Task[None]:
        lead = self._leads[opened.batch.id] = asyncio.ensure_future(self._lead(opened))
        lead.add_done_callback(lambda _: self._leads.pop(opened.batch.id, None))
        return lead

    async def cancel(self, owner: str, batch_id: str) -> Batch | None:
        """As `BatchStore.cancel`; the rows end at once, also for a client that leaves meanwhile."""

        async def cancel() -> Batch | None:
            batch = await self.on_disk(self._store.cancel, owner, batch_id)
            if batch is not None and batch.status == "cancelling":
                self._cancelled.add(batch_id)
                if (running := self._running.get(batch_id)) is not None:
                    running.cancel()
            return batch

        return await to_the_end(cancel())

    async def stop(self) -> None:
        """What runs ends, and is done again by the next process. Once more does nothing."""
        tasks = [*self._leads.values(), *([self._tidying] if self._tidying is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        await self.stop()
        await self.on_disk(self._store.close)
        self._thread.shutdown()

    async def _tidy(self) -> None:
        while True:
            try:
                await self.on_disk(self._store.forget_old)
            except (StorageError, OSError, sqlite3.Error) as error:
                logger.error("old files and batches stay for now: %s", error)
            await asyncio.sleep(TIDY_EVERY_S)

    # -- one batch

    async def _lead(self, opened: OpenBatch) -> None:
        """From where it stands to its end."""
        batch_id = opened.batch.id
        try:
            if opened.batch.status == "cancelling":
                self._cancelled.add(batch_id)
            is_checked = opened.batch.in_progress_at is not None
            if not is_checked and not await self._with_room(batch_id, self._validate, opened):
                return
            reason: NoMoreRowsError | None = None
            try:
                end = await self._rows(opened)
            except NoMoreRowsError as error:
                end, reason = "failed", error
            await self._with_room(batch_id, self._end, opened, end, reason)
        except asyncio.CancelledError:
            raise
        except Exception:
            logger.exception("%s cannot go on; the next start of the server tries again", batch_id)
            self.problems[batch_id] = "a fault of the server stopped it; its log says more, and its next start goes on"
        finally:
            self._cancelled.discard(batch_id)

    async def _with_room(self, batch_id: str, step: Callable[..., Awaitable[T]], *arguments: object) -> T:
        """Do a step as often as it takes until the disk is there and has room for it."""
        while True:
            try:
                done = await step(*arguments)
            except (StorageError, OSError, sqlite3.Error) as error:
                if batch_id not in self.problems:
                    logger.error("%s waits: %s", batch_id, error)
                reason = error.strerror if isinstance(error, OSError) else error  # no path: its owner reads it
                self.problems[batch_id] = f"waits for its disk: {reason}"
                await asyncio.sleep(RETRY_S)
            else:
                self.problems.pop(batch_id, None)
                return done

    async def _validate(self, opened: OpenBatch) -> bool:
        """Says whether its rows may run."""
        batch, now = opened.batch, self._store.now
        check = FileCheck(
            self._store.folder.file(batch.input_file_id), batch.endpoint, self.endpoints, self._max_rows,
            self._max_row_bytes,
        )  # fmt: skip
        async with self._checking:
            try:
                while await asyncio.to_thread(check.more):
                    pass
            except InputLostError as lost:
                check.errors.append(lost.error)

        def fail(batch: Batch) -> None:
            batch.status, batch.failed_at, batch.errors = "failed", now, BatchErrors(check.errors)

        def begin(batch: Batch) -> None:
            batch.request_counts.total = check.num_rows
            if batch.status == "validating":
                batch.status, batch.in_progress_at = "in_progress", now

        if check.errors:
            await self.on_disk(self._store.end, opened, fail, {})
            return False
        await self.on_disk(self._store.change, opened.number, begin)
        return True

    async def _rows(self, opened: OpenBatch) -> End:
        """Run the rows that have no answer; why there are no more of them. Raises `NoMoreRowsError`."""
        batch_id = opened.batch.id
        if batch_id in self._cancelled:
            return "cancelled"
        running = self._running[batch_id] = asyncio.ensure_future(self._until_expired(opened))
        try:
            return await running
        except asyncio.CancelledError:
            if batch_id not in self._cancelled or (task := asyncio.current_task()) is None or task.cancelling():
                raise
            return "cancelled"
        finally:
            del self._running[batch_id]

    async def _until_expired(self, opened: OpenBatch) -> End:
        batch_id = opened.batch.id
        answered = await self._with_room(batch_id, asyncio.to_thread, self._store.answered_lines, opened.number)
        turns = self._turns.setdefault(opened.owner, asyncio.Semaphore(MAX_RUNNING))
        try:
            async with asyncio.timeout(opened.batch.expires_at - self._store.now), turns:
                await self._run(opened, answered)
        except TimeoutError:
            current = await self._with_room(batch_id, self.on_disk, self._store.current, opened.number)
            counts = current.request_counts
            return "completed" if counts.completed + counts.failed == counts.total else "expired"
        return "completed"

    async def _run(self, opened: OpenBatch, answered: set[int]) -> None:
        rows, last = self._rows_of(opened, answered), 0
        running: set[asyncio.Task[None]] = set()
        ended = asyncio.Event()
        lost: InputLostError | None = None

        def some() -> list[Row]:
            nonlocal rows, last, lost
            try:
                found = list(islice(rows, READ_ROWS))
            except InputLostError as error:  # told when the rows that run have their answers
                lost = error
                return []
            except OSError:  # read again, from where they stand
                rows = self._rows_of(opened, answered, last)
                raise
            last = found[-1].line if found else last
            return found

        def end(task: asyncio.Task[None]) -> None:
            running.remove(task)
            ended.set()

        try:
            async with asyncio.TaskGroup() as group:
                while slice := await self._with_room(opened.batch.id, asyncio.to_thread, some):
                    for row in slice:
                        # Asked each time: while the first engine starts, nobody knows how many there may be.
                        while len(running) >= min(max(1, self._max_at_once()), MAX_AT_ONCE):
                            ended.clear()
                            await ended.wait()
                        running.add(task := group.create_task(self._row(opened, row)))
                        task.add_done_callback(end)
        except ExceptionGroup as group:
            if (found := group.subgroup(BatchTooLargeError)) is None:
                raise
            raise found.exceptions[0] from None
        finally:
            with suppress(ValueError):  # a thread is still reading: it ends by itself
                rows.close()
        if lost is not None:
            raise lost

    def _rows_of(self, opened: OpenBatch, answered: set[int], last: int = 0) -> Generator[Row]:
        """Those behind line `last` that have no answer."""
        path = self._store.folder.file(opened.batch.input_file_id)
        rows = read_rows(path, self._max_row_bytes)
        return (row for row in rows if row.line > last and row.line not in answered)

    async def _row(self, opened: OpenBatch, row: Row) -> None:
        outcome = await self._runner.outcome(opened.owner, row)
        await self._with_room(opened.batch.id, self._keep, opened, row.line, outcome)

    async def _keep(self, opened: OpenBatch, line: int, outcome: Outcome) -> None:
        await self.on_disk(self._store.add_answer, opened, line, outcome.line, outcome.is_failure, outcome.usage)

    # -- its end

    async def _end(self, opened: OpenBatch, end: End, reason: NoMoreRowsError | None) -> None:
        now = self._store.now

        def finalize(batch: Batch) -> None:
            if end == "completed" and batch.status == "in_progress":
                batch.status, batch.finalizing_at = "finalizing", now

        def close(batch: Batch) -> None:
            batch.status = end
            setattr(batch, f"{end}_at", self._store.now)
            batch.request_counts.failed = batch.request_counts.total - batch.request_counts.completed
            if reason is not None:
                batch.errors = BatchErrors([reason.error])

        await self.on_disk(self._store.change, opened.number, finalize)
        with ExitStack() as stack:
            outputs, lost = await asyncio.to_thread(self._outputs.write, opened, end, stack)
            reason = reason or lost
            await self.on_disk(self._store.end, opened, close, outputs)
