"""Batches without a server: rows are answered once over ends of all kinds, in turns, within limits of time."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter

import msgspec
from waiting import until

from specserve.errors import EngineDeadError, OverloadedError, UserError


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
        begun, go_on, add = held_back(made.store.files.add)
        adding = asyncio.ensure_future(made.worker.on_disk(add, "me", content, "in.jsonl", 3600))
        adding.add_done_callback(lambda _: content.close())
        await until(begun.is_set)
        adding.cancel()
        await asyncio.sleep(0.05)
        go_on.set()
        await asyncio.wait([adding])
        (file,) = await made.worker.on_disk(made.store.files.page, "me", None, 9, True, None)
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
