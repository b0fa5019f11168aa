"""Two engines as one: the same tokens, wherever they are made; who goes takes only its own with it."""

import asyncio

import msgspec
import numpy as np
import pytest

from specserve.config import ServeConfig
from specserve.errors import EngineLostError, UserError
from specserve.pooling_messages import PoolingParams, PoolRequest
from specserve.ray.engine_host import EngineHost
from specserve.ray.replicated_engine import ReplicatedEngine
from specserve.server.metrics.metrics import Metrics
from specserve.server.shared_store.versions import Versions
from specserve.server.stats.snapshot import StatsSource

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_requests_are_answered_alike_wherever_they_run_and_give_everything_back(replicas, adapter_dirs):
    hashes = [(await replicas.load(directory))[0] for directory in adapter_dirs]
    alone = {name: await replicas.tokens(replicas.request(name)) for name in [None, *hashes]}
    assert len({tuple(tokens) for tokens in alone.values()}) == 4
    asked = [name for name in alone for _ in range(6)]
    together = await asyncio.gather(*(replicas.tokens(replicas.request(name)) for name in asked))
    assert together == [alone[name] for name in asked]
    assert await replicas.num_used_blocks() == 0
    done = {name: state.stats.generated_tokens for name, state in replicas.engine.replicas().items()}
    assert min(done.values()) > 0, done  # both took part


async def test_a_client_that_leaves_ends_its_sequence_on_the_replica(replicas):
    before = await replicas.num_used_blocks()
    deltas = replicas.engine.generate(replicas.request(max_tokens=3000))
    await anext(deltas)
    assert await replicas.num_used_blocks() > before
    await deltas.aclose()
    async with asyncio.timeout(20):
        while await replicas.num_used_blocks() > before:
            await asyncio.sleep(0.02)


async def test_a_replica_whose_engine_dies_loses_only_its_streams_and_comes_back(replicas, adapter_dirs):
    content_hash, _ = await replicas.load(adapter_dirs[0])
    expected = await replicas.tokens(replicas.request(max_tokens=600))
    streams = [replicas.engine.generate(replicas.request(max_tokens=600)) for _ in range(4)]
    firsts = [(await anext(stream)).token_ids for stream in streams]
    ran = {name: state.owed_tokens for name, state in replicas.engine.replicas().items()}
    assert min(ran.values()) > 0, ran  # on both
    before = replicas.engine.num_restarts
    replicas.kill("east")
    outcomes = []
    for stream, first in zip(streams, firsts, strict=True):
        tokens = list(first)
        try:
            async for delta in stream:
                tokens += delta.token_ids
        except EngineLostError:
            assert tokens == expected[: len(tokens)]
            outcomes.append("lost")
        else:
            outcomes.append("whole" if tokens == expected else "wrong")
    assert sorted(set(outcomes)) == ["lost", "whole"], outcomes
    assert await replicas.tokens(replicas.request()) == expected[:8]
    await replicas.until(lambda: len(replicas.engine.replicas()) == 2)
    assert replicas.engine.num_restarts == before + 1 and replicas.engine.state == "ready"
    # What only the dead one held has been told, and can be asked for again by whoever loads it.
    if replicas.left:
        with pytest.raises(UserError) as info:
            await replicas.tokens(replicas.request(content_hash))
        assert info.value.code == "adapter_not_resident"
        assert (await replicas.load(adapter_dirs[0]))[0] == content_hash
    assert len(await replicas.tokens(replicas.request(content_hash))) == 8


async def test_an_unreachable_replica_gets_nothing_and_keeps_nothing(replicas, adapter_dirs):
    streams = [replicas.engine.generate(replicas.request(max_tokens=3000)) for _ in range(2)]
    for stream in streams:
        await anext(stream)
    replicas.channels["west"].cut()
    await replicas.until(lambda: set(replicas.engine.replicas()) == {"east"})
    results = await asyncio.gather(*(replicas.tokens(replicas.request()) for _ in range(4)))
    assert len({tuple(tokens) for tokens in results}) == 1
    for stream in streams:
        await stream.aclose()
    replicas.channels["west"].mend()
    await replicas.until(lambda: len(replicas.engine.replicas()) == 2)
    async with asyncio.timeout(20):
        while await replicas.num_used_blocks():  # the cut one's sequence was aborted
            await asyncio.sleep(0.02)


async def test_one_that_leaves_in_order_finishes_what_it_has(replicas):
    streams = [asyncio.ensure_future(replicas.tokens(replicas.request(max_tokens=400))) for _ in range(4)]
    await replicas.until(lambda: all(state.owed_tokens for state in replicas.engine.replicas().values()))
    replicas.engine.set_replicas(["east"])
    assert set(replicas.engine.replicas()) == {"east"}
    assert [len(tokens) for tokens in await asyncio.gather(*streams)] == [400] * 4
    replicas.engine.set_replicas(["east", "west"])
    await replicas.until(lambda: len(replicas.engine.replicas()) == 2)


async def test_a_new_front_waits_for_what_the_old_one_has_begun_and_then_replaces_it(replicas, config, adapter_dirs):
    old, new = replicas.engine, ReplicatedEngine(config, replicas.channels.__getitem__)
    content_hash, _ = await replicas.load(adapter_dirs[0])
    expected = await replicas.tokens(replicas.request(max_tokens=400))
    stream = old.generate(replicas.request(max_tokens=400))
    tokens = list((await anext(stream)).token_ids)
    new.set_replicas(replicas.hosts)
    await replicas.until(lambda: len(new.replicas()) == 1)  # who had nothing to do
    tokens += [token async for delta in stream for token in delta.token_ids]
    assert tokens == expected
    await replicas.until(lambda: len(new.replicas()) == 2)
    await asyncio.sleep(1.5)  # the old one tries to come back meanwhile
    assert len(new.replicas()) == 2 and not old.replicas()
    replicas.engine, new.on_adapters_left = new, replicas.left.append
    await old.stop()
    assert len(await replicas.tokens(replicas.request())) == 8
    with pytest.raises(UserError):  # contents that replicas hold are the new front's to find
        await replicas.tokens(replicas.request(content_hash))
    again, _ = await replicas.load(adapter_dirs[0])
    assert again == content_hash and len(await replicas.tokens(replicas.request(content_hash))) == 8


async def test_a_front_of_another_model_leaves_replicas_to_the_one_that_serves(replicas, config, caplog):
    other = ReplicatedEngine(msgspec.structs.replace(config, model="other"), replicas.channels.__getitem__)
    other.set_replicas(replicas.hosts)
    await replicas.until(lambda: "this front serves other, specserve" in caplog.text)
    assert not other.replicas() and len(replicas.engine.replicas()) == 2
    assert len(await replicas.tokens(replicas.request())) == 8
    await other.stop()


async def test_a_hot_adapter_gets_a_copy_and_unloading_takes_all_of_them(replicas, adapter_dirs):
    content_hash, placement = await replicas.load(adapter_dirs[0])
    holders = replicas.engine._holders
    assert len(holders.of(content_hash)) == 1
    alone = await replicas.tokens(replicas.request(content_hash, max_tokens=400))
    asked = (replicas.tokens(replicas.request(content_hash, max_tokens=400)) for _ in range(12))
    assert await asyncio.gather(*asked) == [alone] * 12
    assert len(holders.of(content_hash)) == 2
    await replicas.engine.unload_adapter(content_hash, placement)
    assert not holders.of(content_hash) and not await replicas.engine.adapters()
    with pytest.raises(UserError):
        await replicas.tokens(replicas.request(content_hash))


async def test_replicas_fetch_versions_of_the_shared_store_and_pool_alike(replicas, config, adapter_dirs):
    """As the front asks for them: by the folder that it would have, which is not there yet."""
    of_folder, _ = await replicas.load(adapter_dirs[0])
    expected = await replicas.tokens(replicas.request(of_folder))
    await replicas.engine.unload_adapter(of_folder, 1 << 60)
    versions = Versions.of(config)
    version, _ = versions.store.push(adapter_dirs[0])
    folder = versions.folders.path(version)
    content_hash, _ = await replicas.load(folder)
    assert content_hash == of_folder and (folder / "adapter_config.json").exists()
    asked = [replicas.tokens(replicas.request(content_hash)) for _ in range(40)]
    assert await asyncio.gather(*asked) == [expected] * 40
    with pytest.raises(UserError, match="no version"):
        await replicas.load(versions.folders.path("0" * 64))
    before = {name: state.stats.finished.get("pooled", 0) for name, state in replicas.engine.replicas().items()}
    texts = [PoolRequest(f"p{idx}", [5, 6, idx % 3 + 7] * 20, PoolingParams("embed")) for idx in range(30)]
    answers = await asyncio.gather(*(anext(replicas.engine.pool(text)) for text in texts))
    values = [np.frombuffer(answer.values, "<f4") for answer in answers]
    assert all(np.allclose(each, values[idx % 3], atol=1e-4) for idx, each in enumerate(values))  # wherever
    assert not np.allclose(values[0], values[1], atol=1e-2)
    await replicas.engine.stats()
    after = {name: state.stats.finished.get("pooled", 0) for name, state in replicas.engine.replicas().items()}
    assert all(after[name] > before[name] for name in after), (before, after)


async def test_an_unload_that_a_load_has_overtaken_takes_nothing(replicas, adapter_dirs):
    content_hash, first = await replicas.load(adapter_dirs[0])
    again, second = await replicas.load(adapter_dirs[0], "other name")
    assert again == content_hash and second > first
    await replicas.engine.unload_adapter(content_hash, first)
    assert len(await replicas.tokens(replicas.request(content_hash))) == 8
    await replicas.engine.pin_adapter(content_hash, True, second)
    await replicas.engine.unload_adapter(content_hash, second)
    assert not await replicas.engine.adapters()


async def test_metrics_and_stats_tell_of_each_replica(replicas):
    await replicas.tokens(replicas.request(max_tokens=5))
    stats = await replicas.engine.stats()
    text = Metrics("tiny").render(stats, replicas.engine.info, {}, replicas.engine.replicas()).decode()
    assert {f'specserve_replica_owed_tokens{{replica="{name}"}} 0.0' for name in ("east", "west")} <= set(
        text.split("\n")
    )
    assert text.count("specserve_replica_generated_tokens_total{") == 2
    whole = StatsSource(replicas.engine, "tiny").newest()
    assert [replica.name for replica in whole.replicas] == ["east", "west"]
    assert sum(replica.generated for replica in whole.replicas) == whole.tokens.generated == stats.generated_tokens
    assert whole.requests.max_running == 32 and whole.kv.blocks == whole.kv.free_blocks


async def test_a_replica_looks_for_what_its_settings_name_before_its_engine_starts(tmp_path):
    with pytest.raises(UserError, match=r"base_head is .*nowhere, which has no lookahead_config.json"):
        EngineHost(ServeConfig(base_head=str(tmp_path / "nowhere")), tmp_path)
