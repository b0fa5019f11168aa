"""`specserve batch IN OUT`: every row of a file answered once, by an engine of its own or by a server.

Owns the two files and the folder OUT.progress between them: what has been done is kept there until OUT is whole, so the
same command goes on after whatever ended it. An engine of its own runs the server's code for batches over that folder
(`server/batches`); a server has its own (`batch_remote`). OUT has a line for each row, failures too, in IN's order.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from tqdm import tqdm

from ..config import EngineConfig
from ..errors import UserError, shortened
from ..file_hash import file_hash
from ..file_lock import FileLock
from ..server.access.caller import ANONYMOUS
from ..server.batches.disk import BatchDir, Incoming
from ..server.batches.rows import FileCheck
from ..server.batches.store import BatchStore, OpenBatch
from ..server.batches.types import Batch, RequestCounts

if TYPE_CHECKING:
    from ..llm.service import Service

MAX_ROW_BYTES = 8 << 20
NO_LIMIT = 1 << 60
YEAR_S = 365 * 86400
POLL_S = 0.2


class BatchFlags(msgspec.Struct, frozen=True):
    """The flags of `batch` that are not settings of the engine."""

    url: str | None
    api_key: str | None
    adapters_dir: Path | None
    window: str


class BatchFiles:
    """IN, OUT and OUT.progress. Raises `UserError` where one of them cannot be used."""

    def __init__(self, source: Path, target: Path):
        self.source, self.target = source, target
        self.progress = target.with_name(target.name + ".progress")
        if not source.is_file():
            raise UserError(f"{source} is no file; give a JSONL file, with a request a line")
        if target.exists() and target.samefile(source):
            raise UserError(f"{target} is the input; give another file for the output")
        if target.exists() and not self.progress.exists():
            raise UserError(f"{target} exists; remove it, or give another file for the output")
        if not target.parent.is_dir():
            raise UserError(f"{target.parent} is no folder; make it, or give another file for the output")

    @property
    def is_done(self) -> bool:
        """OUT is put in its place when it is whole, and then the folder goes."""
        return self.target.exists()

    def check(self) -> FileCheck:
        """What is in IN. Raises `UserError` that names the lines that are no requests."""
        check = FileCheck(self.source, None, (), NO_LIMIT, MAX_ROW_BYTES)
        while check.more():
            pass
        if check.errors:
            told = [f"{f'line {bad.line}: ' if bad.line else ''}{bad.message}" for bad in check.errors[:10]]
            more = f"; and {len(check.errors) - 10} more" if len(check.errors) > 10 else ""
            raise UserError(f"{self.source} cannot be run: {shortened('; '.join(told), 2000)}{more}")
        return check

    def digest(self) -> str:
        return file_hash(self.source)

    def changed(self) -> UserError:
        return UserError(
            f"{self.source} is not the file that {self.progress} was begun for; remove that folder to begin anew, or "
            "give another file for the output"
        )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep OUT.progress, which exists, from other processes. Raises `UserError` where one has it."""
        with FileLock(self.progress / "lock") as lock:
            if not lock.take():
                raise UserError(
                    f"{self.progress} is used by another process; wait for it, or give another file for the output"
                )
            yield

    def put(self, output: Path) -> None:
        """Let `output`, a whole file within the folder, be OUT."""
        os.replace(output, self.target)
        shutil.rmtree(self.progress)


class Progress:
    """The bar, on a terminal, and the closing line."""

    def __init__(self, counts: RequestCounts):
        self._begun_with, self._start = counts.completed + counts.failed, time.monotonic()
        self._bar = tqdm(total=counts.total, initial=self._begun_with, desc="rows", unit="", disable=None)
        self._counts = counts

    def show(self, counts: RequestCounts) -> None:
        self._counts = counts
        if counts.failed:
            self._bar.set_postfix(failed=counts.failed, refresh=False)
        self._bar.update(counts.completed + counts.failed - self._bar.n)

    def close(self) -> None:
        self._bar.close()

    def result(self, target: Path) -> int:
        """Say it, and give the exit code."""
        counts, seconds = self._counts, time.monotonic() - self._start
        num = counts.completed + counts.failed - self._begun_with
        failed = f", {counts.failed} of them failed" if counts.failed else ""
        before = f" ({self._begun_with} before)" if self._begun_with else ""
        print(f"{target}: {counts.total} rows{failed}{before}; {num / seconds:.1f} rows/s", file=sys.stderr)
        return 1 if counts.failed else 0


def batch(config: EngineConfig | None, flags: BatchFlags, source: Path, target: Path) -> int:
    """Run `source` to `target`; without `config`, on the server at `flags.url`. Raises `UserError`."""
    files = BatchFiles(source, target)
    if files.is_done:
        shutil.rmtree(files.progress)
        print(f"{target} is complete", file=sys.stderr)
        return 0
    try:
        if config is not None:
            return _run_here(config, flags, files)
        from .batch_remote import run_remote

        return asyncio.run(run_remote(flags, files))
    except KeyboardInterrupt:
        print("stopped; the same command goes on where it was", file=sys.stderr)
        raise


def _run_here(config: EngineConfig, flags: BatchFlags, files: BatchFiles) -> int:
    is_new = not (files.progress / "state.sqlite3").exists()
    check = files.check() if is_new else None  # before the model is loaded, which takes long
    with closing(BatchStore(BatchDir(files.progress, NO_LIMIT))) as store:
        found = store.batches(ANONYMOUS, None, 1)
        if found and (found[0].metadata or {}).get("sha256") != files.digest():
            raise files.changed()
        if not found:
            found = [_copied(store, files, check or files.check())]
        if found[0].status == "failed":
            raise _failed(files, found[0])
        if found[0].status == "in_progress" or found[0].status == "finalizing":
            _restore(store, files, found[0])
            print("loading the model ...", file=sys.stderr)
            return asyncio.run(_run_engine(config, flags, files, store))
        progress = Progress(found[0].request_counts)
        files.put(store.folder.file(found[0].output_file_id or ""))
        progress.close()
        return progress.result(files.target)


def _copied(store: BatchStore, files: BatchFiles, check: FileCheck) -> Batch:
    """The batch of IN's rows, of which the folder keeps a copy: what runs cannot change under it."""
    with _copy(store, files) as content:
        store.files.add(ANONYMOUS, content, files.source.name, YEAR_S)
    batch = Batch(
        id=f"batch_{uuid.uuid4().hex}",
        endpoint=check.endpoint or "",
        input_file_id=content.id,
        completion_window="365d",
        status="in_progress",
        created_at=store.now,
        in_progress_at=store.now,
        expires_at=store.now + YEAR_S,
        request_counts=RequestCounts(total=check.num_rows),
        metadata={"sha256": files.digest()},
    )
    store.add_batch(ANONYMOUS, batch, YEAR_S)
    return batch


@contextmanager
def _copy(store: BatchStore, files: BatchFiles) -> Iterator[Incoming]:
    """IN's content in the folder, which goes again unless the store learns of it."""
    with closing(store.folder.incoming()) as content, files.source.open("rb") as file:
        while data := file.read(1 << 20):
            content.write(data)
        content.finish()
        yield content


def _restore(store: BatchStore, files: BatchFiles, batch: Batch) -> None:
    """Copy IN, which is the same file, again where its copy was removed."""
    copy = store.folder.file(batch.input_file_id)
    if not copy.exists():
        with _copy(store, files) as content:
            os.link(store.folder.file(content.id), copy)


def _failed(files: BatchFiles, batch: Batch) -> UserError:
    """Of a run whose folder was changed by hand."""
    told = batch.errors.data[0].message if batch.errors else "its rows could not be read"
    return UserError(f"the run in {files.progress} failed: {told}; remove that folder and run the command anew")


async def _run_engine(config: EngineConfig, flags: BatchFlags, files: BatchFiles, store: BatchStore) -> int:
    from ..llm.options import config_of
    from ..llm.service import Service
    from ..model.store import resolve_model

    options = msgspec.structs.asdict(config) | {"adapters_dir": flags.adapters_dir}
    serving = config_of(options.pop("model") or None, options)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # cores are the engine's
    service = Service(serving, resolve_model(serving.model, serving.revision, progress=sys.stderr.isatty()))
    await service.start()
    try:
        (opened,) = store.open_batches()
        done, progress = await _run_rows(service, store, opened)
    finally:
        await service.close()
    if done.status == "failed":
        raise _failed(files, done)
    files.put(store.folder.file(done.output_file_id or ""))
    return progress.result(files.target)


async def _run_rows(service: Service, store: BatchStore, opened: OpenBatch) -> tuple[Batch, Progress]:
    from ..server.batches.places import Places
    from ..server.batches.row_runner import RowRunner
    from ..server.batches.worker import BatchWorker
    from ..server.openai.api import OpenAIRoutes
    from ..server.pooling.api import PoolingRoutes
    from ..server.pooling.pooler import Pooler
    from ..server.pooling.tei_api import TeiRoutes
    from ..server.responses.api import ResponsesRoutes

    generator = service.generator
    pooler = Pooler(generator)
    pooling = PoolingRoutes(pooler, TeiRoutes(pooler))
    answers = OpenAIRoutes(generator).answers() | ResponsesRoutes(generator).answers() | pooling.answers()
    if opened.batch.endpoint not in answers:
        raise UserError(f"the rows have the url {opened.batch.endpoint!r}; there are {', '.join(answers)}")
    num_places: Callable[[], int] = lambda: 2 * service.engine.info.max_num_seqs  # noqa: E731, a queue behind the seats
    worker = BatchWorker(
        store,
        RowRunner(service.engine, answers, lambda _: service.caller, Places(num_places)),
        max_rows=NO_LIMIT,
        max_row_bytes=MAX_ROW_BYTES,
        max_at_once=num_places,
        has_errors_apart=False,
    )
    progress = Progress(opened.batch.request_counts)
    try:
        lead, told = worker.begin(opened), ""
        while True:
            await asyncio.wait([lead], timeout=POLL_S)
            batch = await worker.on_disk(store.current, opened.number)
            progress.show(batch.request_counts)
            if lead.done():
                break
            if (problem := worker.problems.get(batch.id, "")) != told and problem:
                tqdm.write(f"waiting: {problem}", file=sys.stderr)
            told = problem
        if batch.status not in ("completed", "failed"):
            raise RuntimeError(worker.problems.get(batch.id, batch.status))
        return batch, progress
    finally:
        progress.close()
        await worker.stop()
