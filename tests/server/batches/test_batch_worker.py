"""Batches without a server: rows are answered once over ends of all kinds, in turns, within limits of disk and time."""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import threading
from collections import Counter
from contextlib import asynccontextmanager
from types import SimpleNamespace

import msgspec
import pytest
from msgspec.structs import replace
from waiting import until

from specserve.errors import EngineDeadError, OverloadedError, UserError
from specserve.server.access.caller import Caller
from specserve.server.access.limits import Allowance, Limits
from specserve.server.batches.disk import BatchDir
from specserve.server.batches.places import Places
from specserve.server.batches.room import DiskFullError
from specserve.server.batches.row_runner import RowRunner
from specserve.server.batches.store import BatchStore
from specserve.server.batches.types import Batch, BatchUsage
from specserve.server.batches.worker import BatchWorker

URL = "/v1/completions"
MIB = 1 << 20


def caller(name):
    return Caller(name, frozenset({"generate"}), None, True, None, Allowance(name, Limits(), lambda: 0.0))


class Setup:
    """A store on `path` and a worker over it, whose rows `answer` answers; `asked` counts how often each was."""

    def __init__(self, path, answer=None, places=lambda: 4, max_bytes=MIB, callers=caller):
        self.now = 1_000_000.0
        self.store = BatchStore(BatchDir(path, max_bytes), lambda: self.now)
        self.engine = SimpleNamespace(num_restarts=0)
        self.asked: Counter[str] = Counter()
        self.running: list[str] = []
        self.places = Places(places)

        async def answered(value, caller):
            assert caller.is_background
            self.asked[value["prompt"]] += 1
            self.running.append(caller.name)
            if answer is not None:
                await answer(value)
            return {"text": value["prompt"], "usage": {"prompt_tokens": 2, "completion_tokens": 3}}

        self.worker = BatchWorker(
            self.store,
            RowRunner(self.engine, {URL: answered}, callers, self.places),
            max_rows=1000,
            max_row_bytes=1000,
            max_at_once=places,
        )

    def add(self, num, owner="me", window_s=3600):
        """A batch of so many rows, that has not begun."""
        content = self.store.folder.incoming()
        for idx in range(num):
            row = {"custom_id": str(idx), "method": "POST", "url": URL, "body": {"prompt": f"{owner} {idx}"}}
            content.write(json.dumps(row).encode() + b"\n")
        content.finish()
        self.store.add_file(owner, content, "in.jsonl", 3600)
        content.close()
        batch = Batch(
            id=f"batch_{os.urandom(4).hex()}", endpoint=URL, input_file_id=content.id, completion_window="1h",
            status="validating", created_at=self.store.now, expires_at=self.store.now + window_s,
        )  # fmt: skip
        return self.store.add_batch(owner, batch, 3600)

    async def batch(self, opened):
        return await self.worker.on_disk(self.store.current, opened.number)

    async def run(self, *opened):
        """To their ends; the batches then."""
        await asyncio.gather(*[self.worker.begin(one) for one in opened])
        return [await self.batch(one) for one in opened]

    def lines(self, file_id):
        return [] if file_id is None else [json.loads(line) for line in self.store.folder.file(file_id).open()]


@pytest.fixture
def setup(tmp_path):
    @asynccontextmanager
    async def make(**kwargs):
        setup = Setup(tmp_path / "batches", **kwargs)
        try:
            yield setup
        finally:
            await setup.worker.close()

    return make


async def test_a_batch_goes_on_where_another_process_left_it_and_each_row_is_answered_once(setup):
    hang = asyncio.Event()

    async def slow(value):
        if int(value["prompt"].split()[1]) % 3 == 2:
            await hang.wait()

    async with setup(answer=slow) as first:
        opened = first.add(30)
        first.worker.begin(opened)
        await until(lambda: first.places.num_held == 4 and first.asked.total() > 10 and len(set(first.asked)) > 10)
        await until(lambda: all(int(name.split()[1]) % 3 == 2 for name in list(first.asked)[-1:]))
        counts = (await first.batch(opened)).request_counts
    hang.set()
    async with setup() as second:
        await second.worker.start()
        await until(lambda: not second.store.open_batches())
        batch = await second.batch(opened)
        assert batch.status == "completed" and batch.error_file_id is None
        assert (batch.request_counts.completed, batch.request_counts.total) == (30, 30)
        lines = second.lines(batch.output_file_id)
        assert [line["custom_id"] for line in lines] == [str(idx) for idx in range(30)]
        assert batch.usage.total_tokens == 30 * 5
        assert second.asked.total() == 30 - counts.completed  # what was stored is not computed again


async def test_an_end_while_the_output_is_written_leaves_one_output(setup, monkeypatch):
    async with setup() as first:
        opened = first.add(5)
        monkeypatch.setattr(first.store, "end", lambda *arguments: 1 / 0)
        await first.worker.begin(opened)
        assert (await first.batch(opened)).status == "finalizing"
        assert opened.batch.id in first.worker.problems
        leftover = first.store.folder.incoming()
        leftover.write(b"half of an upload")
    async with setup() as second:
        await second.worker.start()
        await until(lambda: not second.store.open_batches())
        batch = await second.batch(opened)
        assert len(second.lines(batch.output_file_id)) == 5 and not second.asked
        kept = {path.name for path in second.store.folder.file("").iterdir()}
        assert kept == {batch.input_file_id, batch.output_file_id}
        assert not list((second.store.folder.path / "incoming").iterdir())


def held_back(work):
    """`work` that waits, when it has begun, to go on; both events, and what it is then."""
    begun, go_on = threading.Event(), threading.Event()

    def held(*arguments):
        begun.set()
        go_on.wait()
        return work(*arguments)

    return begun, go_on, held


async def test_a_stop_while_the_store_learns_of_the_output_takes_no_file_away(setup, monkeypatch):
    async with setup() as made:
        opened = made.add(3)
        begun, go_on, end = held_back(made.store.end)
        monkeypatch.setattr(made.store, "end", end)
        made.worker.begin(opened)
        await until(begun.is_set)
        stopping = asyncio.ensure_future(made.worker.stop())
        await asyncio.sleep(0.05)
        go_on.set()
        await stopping
        batch = await made.batch(opened)
        assert batch.status == "completed" and len(made.lines(batch.output_file_id)) == 3


async def test_a_client_that_leaves_while_the_store_learns_of_its_file_takes_none_away(setup):
    async with setup() as made:
        content = made.store.folder.incoming()
        content.write(b"{}")
        content.finish()
        begun, go_on, add = held_back(made.store.add_file)
        adding = asyncio.ensure_future(made.worker.on_disk(add, "me", content, "in.jsonl", 3600))
        adding.add_done_callback(lambda _: content.close())
        await until(begun.is_set)
        adding.cancel()
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.wait([adding])
        (file,) = await made.worker.on_disk(made.store.files, "me", None, 9, True, None)
        assert adding.cancelled() and made.store.folder.file(file.id).read_bytes() == b"{}"


async def test_a_client_that_leaves_while_the_store_learns_of_its_batch_or_of_its_end_has_asked_all_the_same(
    setup, monkeypatch
):
    async def leave_while(name, work):
        begun, go_on, held = held_back(getattr(made.store, name))
        monkeypatch.setattr(made.store, name, held)
        asking = asyncio.ensure_future(work)
        await until(begun.is_set)
        asking.cancel()
        await asyncio.sleep(0.01)
        go_on.set()
        await asyncio.wait([asking])
        assert asking.cancelled()

    async with setup(answer=lambda value: asyncio.sleep(3600)) as made:
        opened = made.add(2)
        batch = msgspec.structs.replace(opened.batch, id="batch_new")
        await leave_while("add_batch", made.worker.add("me", batch, 3600))
        await until(lambda: made.running)
        await leave_while("cancel", made.worker.cancel("me", batch.id))
        async with asyncio.timeout(20):
            while (await made.worker.on_disk(made.store.batch, "me", batch.id)).status != "cancelled":
                await asyncio.sleep(0.01)


async def test_a_full_server_and_a_lost_engine_are_no_answers_but_a_bad_row_is(setup, monkeypatch):
    tries: Counter[str] = Counter()

    async def moody(value):
        idx = int(value["prompt"].split()[1])
        tries[idx] += 1
        if idx == 1:
            raise UserError("no", param="prompt")
        if idx == 2 and tries[idx] < 6:
            raise OverloadedError("full", retry_after_s=0.5)
        if idx == 3:
            made.engine.num_restarts += 1
            raise EngineDeadError("it ended while the row ran")
        if idx == 4:
            raise RuntimeError("a fault of ours")
        if idx == 5 and tries[idx] < 6:
            raise EngineDeadError("there is none at the moment")

    async with setup(answer=moody, places=lambda: 1) as made:
        monkeypatch.setattr("specserve.server.batches.row_runner.MAX_WAIT_S", 0.0)
        (batch,) = await made.run(made.add(7))
        errors = {line["custom_id"]: line["response"] for line in made.lines(batch.error_file_id)}
        assert {name: response["status_code"] for name, response in errors.items()} == {"1": 400, "3": 503, "4": 500}
        assert errors["1"]["body"]["error"]["param"] == "prompt"
        assert [line["custom_id"] for line in made.lines(batch.output_file_id)] == ["0", "2", "5", "6"]
        assert tries[3] == 3 and tries[2] == 6 and tries[4] == 1


async def test_the_window_ends_a_batch_with_what_there_is(setup):
    async def slow(value):
        if not value["prompt"].endswith(" 0"):
            await asyncio.sleep(60)

    async with setup(answer=slow) as made:
        (batch,) = await made.run(made.add(6, window_s=2))
        assert batch.status == "expired" and batch.expired_at and batch.completed_at is None
        assert [line["custom_id"] for line in made.lines(batch.output_file_id)] == ["0"]
        errors = made.lines(batch.error_file_id)
        assert {line["error"]["code"] for line in errors} == {"batch_expired"} and len(errors) == 5
        assert (batch.request_counts.completed, batch.request_counts.failed) == (1, 5)
        late = made.add(0, window_s=-5)
        (batch,) = await made.run(late)
        assert batch.status == "failed"


async def test_a_batch_that_is_cancelled_before_its_rows_run_ends_cancelled(setup):
    async with setup() as made:
        opened = made.add(3)
        await made.worker.cancel("me", opened.batch.id)
        (batch,) = await made.run(opened)
        assert batch.status == "cancelled" and len(made.lines(batch.error_file_id)) == 3 and not made.asked
        assert made.store.cancel("me", opened.batch.id).status == "cancelled" and made.store.cancel("you", "x") is None


async def test_owners_take_turns_whoever_has_more_rows(setup):
    gate = asyncio.Semaphore(0)

    async def one(value):
        await gate.acquire()

    async with setup(answer=one, places=lambda: 4) as made:
        leads = [made.worker.begin(made.add(40, "many"))]
        await until(lambda: made.places.num_held == 4)
        leads.append(made.worker.begin(made.add(6, "few")))
        await until(lambda: made.places.num_waiting == 4)
        gate.release()
        for _ in range(45):
            gate.release()
        await asyncio.gather(*leads)
        assert made.running[:4] == ["many"] * 4
        assert made.running[4:16].count("few") == 6


async def test_a_batch_that_began_before_the_engine_gets_all_its_seats(setup):
    seats = [1]
    gate = asyncio.Semaphore(0)

    async def one(value):
        await gate.acquire()

    async with setup(answer=one, places=lambda: seats[0]) as made:
        lead = made.worker.begin(made.add(12))
        await until(lambda: made.places.num_held == 1)
        seats[0] = 5
        gate.release()
        await until(lambda: made.places.num_held == 5)
        for _ in range(11):
            gate.release()
        await lead


async def test_no_row_runs_for_a_key_that_is_gone(setup):
    async with setup(callers=lambda name: None) as made:
        (batch,) = await made.run(made.add(2))
        assert not made.asked
        assert {line["response"]["status_code"] for line in made.lines(batch.error_file_id)} == {401}


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


async def test_what_keeps_a_batch_from_going_on_names_no_path(setup, monkeypatch):
    monkeypatch.setattr("specserve.server.batches.worker.RETRY_S", 0.01)
    async with setup() as made:
        opened, place = made.add(1), made.store.folder.path / "incoming"
        place.rename(place.with_name("elsewhere"))
        lead = made.worker.begin(opened)
        await until(lambda: opened.batch.id in made.worker.problems)
        assert made.worker.problems[opened.batch.id] == "waits for its disk: No such file or directory"
        place.with_name("elsewhere").rename(place)
        await lead
        assert (await made.batch(opened)).status == "completed"


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


async def test_an_input_on_a_disk_that_is_away_is_waited_for(setup, monkeypatch):
    monkeypatch.setattr("specserve.server.batches.worker.RETRY_S", 0.01)
    async with setup() as made:
        opened, place = made.add(1), made.store.folder.path / "files"
        place.rename(place.with_name("elsewhere"))
        lead = made.worker.begin(opened)
        await until(lambda: opened.batch.id in made.worker.problems)
        place.with_name("elsewhere").rename(place)
        await lead
        assert (await made.batch(opened)).status == "completed"


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
        made.store.add_file("me", unused, "old.jsonl", 3600)
        with pytest.raises(DiskFullError):
            made.store.delete_file("me", unused.id)
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
    assert made.store.delete_file("me", batch.input_file_id)
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
    with pytest.raises(UserError, match=r"state\.sqlite3"):
        BatchStore(BatchDir(tmp_path, MIB))
    with pytest.raises(UserError, match="batch-dir"):
        BatchDir(tmp_path / "state.sqlite3" / "below", MIB)
