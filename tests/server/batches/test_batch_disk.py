"""Batches and their disk: full ones, inputs that go or change, folders that others use; nothing answered is lost."""

from __future__ import annotations

import asyncio
import errno
import shutil
import sqlite3
import time

import pytest
from batch_setup import MIB, URL, Setup
from msgspec.structs import replace
from waiting import until

from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.server.access.keys import KeyRing
from specserve.server.batches.disk import BatchDir
from specserve.server.batches.room import DirAwayError, DiskFullError
from specserve.server.batches.rows import read_rows
from specserve.server.batches.service import BatchService
from specserve.server.batches.store import BatchStore
from specserve.server.batches.types import BatchUsage


async def test_an_answer_waits_for_room_on_the_disk_and_is_not_computed_again(setup, monkeypatch):
    monkeypatch.setattr("specserve.server.batches.worker.RETRY_S", 0.01)
    async with setup(max_bytes=20_000) as made:
        opened = made.add(12)
        other = made.store.folder.incoming()
        other.write(b"x" * (20_000 - made.store.folder.room.num_bytes - 500))
        lead = made.worker.begin(opened)
        await until(lambda: opened.batch.id in made.worker.problems)
        assert "--batch-disk-gib" in made.worker.problems[opened.batch.id]
        assert (await made.batch(opened)).status == "in_progress"
        made.store.folder.room.max_bytes = MIB
        await lead
        batch = await made.batch(opened)
        assert batch.request_counts.completed == 12 and len(made.lines(batch.output_file_id)) == 12
        assert set(made.asked.values()) == {1} and opened.batch.id not in made.worker.problems
        other.close()


async def test_a_batch_whose_answers_can_never_fit_ends_with_those_that_do(setup):
    async with setup(max_bytes=6000) as made:
        (batch,) = await made.run(made.add(30))
        assert batch.status == "failed" and not made.store.open_batches() and not made.worker.problems
        (error,) = batch.errors.data
        assert error.code == "batch_too_large" and "--batch-disk-gib" in error.message
        lines = made.lines(batch.output_file_id)
        assert 0 < len(lines) == batch.request_counts.completed == 30 - batch.request_counts.failed
        (after,) = await made.run(made.add(2))
        assert after.status == "completed"


@pytest.mark.parametrize("gone", ["incoming", "files", ""])
async def test_a_folder_that_is_away_is_waited_for_and_named_to_nobody(setup, monkeypatch, gone):
    monkeypatch.setattr("specserve.server.batches.worker.RETRY_S", 0.01)
    async with setup() as made:
        opened, place = made.add(1), made.store.folder.path / gone
        place.rename(place.with_name("elsewhere"))
        lead = made.worker.begin(opened)
        await until(lambda: opened.batch.id in made.worker.problems)
        problem = made.worker.problems[opened.batch.id]
        assert problem.startswith("waits for its disk: ") and str(place) not in problem
        place.with_name("elsewhere").rename(place)
        await lead
        assert (await made.batch(opened)).status == "completed"


async def test_a_folder_that_goes_while_rows_run_and_comes_back_loses_no_answer(setup, monkeypatch):
    monkeypatch.setattr("specserve.server.batches.worker.RETRY_S", 0.01)
    monkeypatch.setattr("specserve.server.batches.worker.READ_ROWS", 2)
    gate, stale = asyncio.Event(), [True]

    async def slow(value):
        await gate.wait()

    def reads(path, max_bytes):
        for row in read_rows(path, max_bytes):
            if row.line == 21 and stale and stale.pop():
                raise OSError(errno.ESTALE, "Stale file handle")
            yield row

    monkeypatch.setattr("specserve.server.batches.worker.read_rows", reads)
    async with setup(answer=slow) as made:
        opened, place = made.add(40), made.store.folder.path
        lead = made.worker.begin(opened)
        await until(lambda: made.places.num_held == 4)
        place.rename(place.with_name("elsewhere"))
        gate.set()
        await until(lambda: opened.batch.id in made.worker.problems)
        for work in (made.store.open_batches, made.store.forget_old):
            with pytest.raises(DirAwayError, match="put it back"):
                await made.worker.on_disk(work)
        place.mkdir()  # by hand, or by a mount point that is left
        await asyncio.sleep(0.03)
        assert not list(place.iterdir()) and opened.batch.id in made.worker.problems
        place.rmdir()
        place.with_name("elsewhere").rename(place)
        await lead
        batch = await made.batch(opened)
        assert batch.status == "completed" and len(made.lines(batch.output_file_id)) == 40
        assert set(made.asked.values()) == {1} and not made.worker.problems and not stale


async def test_another_folder_in_its_place_is_opened_when_it_rests(tmp_path, monkeypatch):
    """As of a backup, or of a disk that was mounted again."""
    monkeypatch.setattr("specserve.server.batches.service.LOOK_S", 0.02)
    place, backup = tmp_path / "batches", tmp_path / "backup"
    made = Setup(place)
    made.now = time.time()
    opened = made.add(3, owner="anonymous")
    await made.worker.close()
    shutil.copytree(place, backup)
    config = ServeConfig(batch_dir=str(place))
    service = BatchService(config, made.engine, KeyRing(config), lambda: 0)
    made.engine.known_info = None

    async def answer(value, caller):
        return {"text": value["prompt"]}

    try:
        await service.start({URL: answer})
        (store, worker), batch = service.open(), ("anonymous", opened.batch.id)
        await until(lambda: store.batch(*batch).status == "completed")
        shutil.rmtree(place)
        with pytest.raises(DirAwayError):
            await worker.on_disk(store.batch, *batch)
        await asyncio.sleep(0.1)
        assert not place.exists() and service.open() == (store, worker)
        (backup / "state.sqlite3").rename(tmp_path / "state.sqlite3")
        backup.rename(place)  # not whole yet
        await asyncio.sleep(0.1)
        (place / "state.sqlite3").write_bytes(b"")
        (tmp_path / "state.sqlite3").rename(place / "state.sqlite3")
        await until(lambda: service._store not in (store, None) and service._worker not in (worker, None))
        with pytest.raises(DirAwayError, match="try again"):
            await worker.on_disk(store.batch, *batch)
        store, worker = service.open()
        assert store.files.get("anonymous", opened.batch.input_file_id) is not None
        await until(lambda: store.batch(*batch).status == "completed")  # once more: it had not run when it was copied
    finally:
        await service.close()


@pytest.mark.parametrize("when", ["before it is read", "while its rows run", "before it goes on", "changed"])
async def test_an_input_that_was_removed_by_hand_ends_its_batch_with_the_reason(setup, monkeypatch, when):
    monkeypatch.setattr("specserve.server.batches.worker.READ_ROWS", 2)
    gate = asyncio.Semaphore(2)

    async def slow(value):
        await gate.acquire()

    async with setup(answer=slow, places=lambda: 2) as made:
        opened = made.add(6)
        path = made.store.folder.file(opened.batch.input_file_id)
        if when == "before it is read":
            path.unlink()
        lead = made.worker.begin(opened)
        if when != "before it is read":
            await until(lambda: made.asked.total() == 4)
            await made.worker.stop()
            if when == "changed":
                path.write_text('{"custom_id": "0"}\n' * 6)
            elif when == "before it goes on":
                path.unlink()
            (opened,) = made.store.open_batches()
            lead = made.worker.begin(opened)
            if when == "while its rows run":
                await until(lambda: made.places.num_held == 2)
                await made.worker.cancel("me", opened.batch.id)
                path.unlink()
            for _ in range(6):
                gate.release()
        await lead
        batch = await made.batch(opened)
        code = "input_file_changed" if when == "changed" else "input_file_missing"
        assert [error.code for error in batch.errors.data] == [code] and str(path) not in batch.errors.data[0].message
        assert batch.status == ("cancelled" if when == "while its rows run" else "failed")
        assert not made.worker.problems and not made.store.open_batches()
        assert len(made.lines(batch.output_file_id)) == batch.request_counts.completed
        assert when == "before it is read" or batch.request_counts.completed >= 2


def test_a_full_disk_changes_nothing(tmp_path):
    store = BatchStore(BatchDir(tmp_path, MIB))
    made = Setup.__new__(Setup)
    made.store = store
    opened = made.add(1)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages}").fetchall()
    before, used = store.current(opened.number), store.folder.room.num_bytes
    with pytest.raises(DiskFullError, match="disk"):
        store.add_answer(opened, 1, b"x" * 100_000, False, before.usage)
    assert store.current(opened.number) == before and store.folder.room.num_bytes == used
    assert store.answered_lines(opened.number) == set()
    store._db.execute("PRAGMA max_page_count = 1000000").fetchall()
    for _ in range(2):  # the second time the row has its answer
        store.add_answer(opened, 1, b"x" * 100_000, False, before.usage)
    assert store.current(opened.number).request_counts.completed == 1
    store.close()


class Cursed:
    """A connection that fails, as on a full disk, at statements that begin with `word`."""

    def __init__(self, db, word):
        self._db, self.word = db, word

    def __getattr__(self, name):
        return getattr(self._db, name)

    def execute(self, query, *values):
        if query.startswith(self.word):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error
        return self._db.execute(query, *values)


async def test_a_disk_that_is_full_at_the_last_moment_changes_nothing_and_ends_nothing(setup, monkeypatch):
    monkeypatch.setattr("specserve.server.batches.worker.RETRY_S", 0.01)
    monkeypatch.setattr("specserve.server.batches.worker.TIDY_EVERY_S", 0.01)
    async with setup() as made:
        opened = made.add(2)
        used = made.store.folder.room.num_bytes
        made.store._db.connection = db = Cursed(made.store._db.connection, "COMMIT")
        for _ in range(3):
            with pytest.raises(DiskFullError):
                made.store.add_answer(opened, 1, b"x" * 1000, False, BatchUsage())
        assert made.store.folder.room.num_bytes == used
        db.word = "DELETE"
        unused = made.store.folder.incoming()
        unused.finish()
        made.store.files.add("me", unused, "old.jsonl", 3600)
        with pytest.raises(DiskFullError):
            made.store.files.delete("me", unused.id)
        made.now += 3000
        opened = made.add(2)
        made.now += 1000
        await made.worker.start()
        await asyncio.sleep(0.05)
        db.word = "PRAGMA incremental_vacuum"
        await until(lambda: not made.store.folder.file(unused.id).exists())  # tidied when there was room again
        await until(lambda: not made.store.open_batches())
        batch = await made.batch(opened)
        assert batch.status == "completed" and len(made.lines(batch.output_file_id)) == 2 and not made.worker.problems


def test_a_batch_whose_input_was_just_deleted_is_none(tmp_path):
    made = Setup.__new__(Setup)
    made.store = BatchStore(BatchDir(tmp_path, MIB))
    batch = made.add(1).batch
    made.store.end(made.store.open_batches()[0], lambda batch: None, {})
    assert made.store.files.delete("me", batch.input_file_id)
    assert made.store.add_batch("me", replace(batch, id="batch_late"), 3600) is None
    assert not made.store.open_batches()
    made.store.close()


def test_old_files_and_batches_go_and_their_bytes_with_them(tmp_path):
    now = [0.0]
    store = BatchStore(BatchDir(tmp_path, MIB), lambda: now[0])
    made = Setup.__new__(Setup)
    made.store = store
    opened = made.add(2)
    now[0] = 4000.0
    store.forget_old()
    assert store.folder.file(opened.batch.input_file_id).exists()  # a batch reads it
    store.end(opened, lambda batch: None, {})
    store.forget_old()
    assert not store.folder.file(opened.batch.input_file_id).exists() and store.folder.room.num_bytes == 0
    assert store.batch("me", opened.batch.id) is not None
    now[0] += 31 * 86400
    store.forget_old()
    assert store.batch("me", opened.batch.id) is None
    store.close()


def test_a_folder_is_of_one_process_and_foreign_files_in_it_stay(tmp_path):
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "thesis.txt").write_text("mine")
    store = BatchStore(BatchDir(tmp_path, MIB))
    with pytest.raises(UserError, match="another process"):
        BatchDir(tmp_path, MIB)
    store.close()
    assert (tmp_path / "files" / "thesis.txt").read_text() == "mine"
    (tmp_path / "state.sqlite3").write_bytes(b"no database" * 100)
    with pytest.raises(UserError, match=r"state\.sqlite3, cannot be read: .*; put a backup of the folder"):
        BatchStore(BatchDir(tmp_path, MIB))
    with pytest.raises(UserError, match="batch-dir"):
        BatchDir(tmp_path / "state.sqlite3" / "below", MIB)
