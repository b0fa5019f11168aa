"""What a front does with its replicas, against replicas that only answer: pooled texts, rows of batches, leaving."""

from __future__ import annotations

import asyncio
import logging
import threading

import msgspec
import pytest
from fake_replicas import INFO, FakeReplica

from specserve.config import ServeConfig
from specserve.drafters.learning_history import LearningHistory
from specserve.messages import BACKGROUND_PRIORITY, GenerateRequest, SamplingParams
from specserve.pooling_messages import PoolingParams, PoolRequest
from specserve.ray.merged import merged_stats
from specserve.ray.own_folder import OwnFolder
from specserve.ray.replicated_engine import ReplicatedEngine
from specserve.server.access.keys import KeyRing
from specserve.server.batches.service import BatchService
from specserve.stats_messages import EngineStats


@pytest.fixture
def config(tmp_path):
    return ServeConfig(shared_store=str(tmp_path / "store"), adapter_cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def hosts():
    return {"east": FakeReplica(), "west": FakeReplica()}


@pytest.fixture
async def engine(config, hosts):
    engine = ReplicatedEngine(config, hosts.__getitem__)
    engine.set_replicas(hosts)
    await until(lambda: len(engine.replicas()) == 2)
    yield engine
    async with asyncio.timeout(60):
        await engine.stop()


async def until(is_so):
    async with asyncio.timeout(60):
        while not is_so():
            await asyncio.sleep(0.002)


def text(number, adapter=None):
    return PoolRequest(f"p{number}", [number] * 8, PoolingParams("embed"), adapter)


def row(number, adapter=None):
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    return GenerateRequest(f"g{number}", [number] * 8, sampling, adapter, priority=BACKGROUND_PRIORITY)


async def pooled(engine, request):
    (answer,) = [answer async for answer in engine.pool(request)]
    return float.fromhex(answer.values.decode())


async def generated(engine, request, said=None):
    """Its tokens, which `said` has as they come."""
    said = [] if said is None else said
    async for delta in engine.generate(request):
        said += delta.token_ids
    return said


@pytest.mark.parametrize("has_adapter", [False, True])
async def test_texts_that_are_pooled_spread_over_replicas_and_each_gets_its_own_values(engine, hosts, has_adapter):
    adapter = (await engine.load_adapter("a", "/some/adapter")).adapter.content_hash if has_adapter else None
    answers = await asyncio.gather(*(pooled(engine, text(number, adapter)) for number in range(200)))
    assert answers == [8.0 * number for number in range(200)]
    assert min(host.asked["PoolRequest"] for host in hosts.values()) > 40
    assert sum(len(host.loads) for host in hosts.values()) == (2 if has_adapter else 0)  # read once on each


async def test_rows_of_a_batch_have_the_seats_of_all_replicas_and_spread_over_them(engine, hosts, config):
    batches = BatchService(config, engine, KeyRing(config), lambda: 0)
    assert batches._num_places() == 2 * INFO.max_num_seqs
    rows = await asyncio.gather(*(generated(engine, row(number)) for number in range(100)))
    assert rows == [[number] for number in range(100)]
    assert [host.asked["GenerateRequest"] for host in hosts.values()] == [50, 50]


async def test_rows_of_a_replica_that_is_gone_are_lost_and_run_on_the_other(engine, hosts):
    hosts["west"].holds = True
    asked = [asyncio.ensure_future(generated(engine, row(number))) for number in range(10)]
    await until(lambda: len(hosts["west"].running) == 5)
    engine.set_replicas(["east"])
    assert await generated(engine, row(99)) == [99]
    hosts["west"].let_go()  # it finishes what it has
    assert await asyncio.gather(*asked) == [[number] for number in range(10)]


async def test_a_replica_that_nothing_is_heard_of_loses_its_streams_and_is_found_again(config, hosts):
    """As behind a cable that is pulled: no connection ends, no call fails."""
    engine = ReplicatedEngine(msgspec.structs.replace(config, engine_timeout_s=3.0), hosts.__getitem__)
    engine.set_replicas(hosts)
    await until(lambda: len(engine.replicas()) == 2)
    for host in hosts.values():
        host.holds = True
    said = [[] for _ in range(4)]
    asked = [asyncio.ensure_future(generated(engine, row(number), said[number])) for number in range(4)]
    await until(lambda: all(len(host.running) == 2 for host in hosts.values()))
    hosts["west"].say_a_token()
    await until(lambda: sum(map(len, said)) == 2)
    hosts["west"].is_cut = True
    hosts["east"].let_go()
    done, _ = await asyncio.wait(asked)
    assert sorted(str(type(task.exception()).__name__) for task in done) == ["EngineLostError"] * 2 + ["NoneType"] * 2
    assert await generated(engine, row(99)) == [99] and list(engine.replicas()) == ["east"]
    hosts["west"].is_cut = False
    hosts["west"].let_go()
    await until(lambda: len(engine.replicas()) == 2)
    await engine.stop()


@pytest.mark.parametrize("hears", [True, False])
async def test_a_client_that_leaves_a_leaving_replica_ends_its_sequence_there(engine, hosts, hears):
    """At once where the replica can still be told, as its last at the latest, since the way to it closes then."""
    west = hosts["west"]
    west.holds = True
    asked = [asyncio.ensure_future(generated(engine, row(number))) for number in range(4)]
    await until(lambda: len(west.running) == 2)
    left, stays = [next(task for task in asked if not task.done() and _of(task, asked) == each) for each in _on(west)]
    engine.set_replicas(["east"])
    west.is_deaf = not hears
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    if hears:
        await until(lambda: len(west.aborted) == 1 and len(west.running) == 1)
    stays.cancel()
    await asyncio.gather(stays, return_exceptions=True)
    await until(lambda: len(west.aborted) == 2 and not west.running)
    await until(lambda: not engine._members._leaving)


def _on(host):
    return [int(request_id[1:]) for request_id in host.running]


def _of(task, asked):
    return asked.index(task)


async def test_a_replica_that_says_nonsense_at_first_is_tried_again_and_said(config, caplog):
    host = FakeReplica()
    host.broken = [b"\xc1"]
    engine = ReplicatedEngine(config, lambda name: host)
    with caplog.at_level(logging.WARNING):
        engine.set_replicas(["east"])
        await until(lambda: len(engine.replicas()) == 1)
    assert "replica east" in caplog.text
    await engine.stop()


async def test_a_replica_of_another_specserve_is_left_alone_and_told_by_its_version(config, caplog):
    host = FakeReplica()
    host.broken = [msgspec.msgpack.encode({"served": "the default model, specserve 9.9", "engine": ["another"]})]
    engine = ReplicatedEngine(config, lambda name: host)
    with caplog.at_level(logging.WARNING):
        engine.set_replicas(["east"])
        await until(lambda: "specserve 9.9" in caplog.text)
    assert "waits for others" in caplog.text and "Traceback" not in caplog.text
    await engine.stop()


async def test_a_version_of_the_shared_store_is_named_to_replicas_by_its_hash(engine, hosts, tmp_path):
    version = "ab" * 32
    await engine.load_adapter("a", str(tmp_path / "cache" / "versions" / version))
    await engine.load_adapter("b", str(tmp_path / "elsewhere"))
    paths = {load.path for host in hosts.values() for load in host.loads}
    assert paths == {f"version:{version}", str(tmp_path / "elsewhere")}


def test_counters_that_stand_at_nothing_stay_in_sums():
    one = msgspec.structs.replace(EngineStats(*range(14)), finished={"stop": 0, "length": 2})
    two = msgspec.structs.replace(one, finished={"stop": 0, "abort": 0})
    assert merged_stats([one, two]).finished == {"stop": 0, "length": 2, "abort": 0}


def test_no_two_replicas_write_to_one_folder_and_the_next_one_finds_what_was_written(tmp_path):
    first, second = (OwnFolder(str(tmp_path / "histories"), "history_dir") for _ in range(2))
    assert [folder.path.name for folder in (first, second)] == ["replica-0", "replica-1"]
    learning = LearningHistory(None, path=first.path / "x.history")
    learning.learn([1, 2, 3])
    saving = threading.Thread(target=learning.flush, daemon=True)  # as an engine does, while its folder is taken
    saving.start()
    saving.join(60)
    assert not saving.is_alive()
    first.close()
    again = OwnFolder(str(tmp_path / "histories"), "history_dir")
    assert LearningHistory(None, path=again.path / "x.history").current.num_tokens == 3
    for folder in (again, second):
        folder.close()
