"""Two real engines of a tiny model as replicas of one front, without Ray: a channel that calls the host itself."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess
from tiny_models import make_tiny_model

from specserve.config import ServeConfig
from specserve.messages import GenerateRequest, SamplingParams
from specserve.ray.engine_host import EngineHost
from specserve.ray.replicated_engine import ReplicatedEngine

PATIENCE_S = 60.0


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def adapter_dirs(model_dir, tmp_path_factory):
    """Three of different contents."""
    root = tmp_path_factory.mktemp("adapters")
    return [make_peft_adapter(model_dir, root / name, r=4, std=0.3, seed=seed) for seed, name in enumerate("abc")]


class LocalChannel:
    """As Ray's, in this process; `is_cut` breaks it as a machine that is gone does."""

    def __init__(self, host: EngineHost):
        self._host = host
        self.is_cut = False
        self._cut = asyncio.Event()

    def cut(self):
        self.is_cut = True
        self._cut.set()

    def mend(self):
        self.is_cut = False
        self._cut.clear()

    async def attach(self, front):
        if self.is_cut:
            raise ConnectionError("no way there")
        frames = self._host.attach(front)
        try:
            while True:
                ahead, cut = asyncio.ensure_future(anext(frames)), asyncio.ensure_future(self._cut.wait())
                try:
                    await asyncio.wait((ahead, cut), return_when=asyncio.FIRST_COMPLETED)
                    if self.is_cut:
                        raise ConnectionError("the way broke")
                    yield ahead.result()
                except StopAsyncIteration:
                    return
                finally:
                    for task in (ahead, cut):
                        task.cancel()
                    await asyncio.gather(ahead, cut, return_exceptions=True)
        finally:
            await frames.aclose()

    async def tell(self, front, frame):
        if self.is_cut:
            raise ConnectionError("no way there")
        await self._host.tell(front, frame)


class Replicas:
    """The engine of two replicas, `east` and `west`, and what is behind it."""

    def __init__(self, config: ServeConfig, model_dir):
        self.hosts = {name: EngineHost(config, model_dir) for name in ("east", "west")}
        self.channels: dict[str, LocalChannel] = {}
        self.engine = ReplicatedEngine(config, self.channels.__getitem__)
        self.left: list[dict[str, int]] = []
        self.engine.on_adapters_left = self.left.append
        self._num = 0

    async def start(self):
        await asyncio.gather(*(host.start() for host in self.hosts.values()))
        self.channels |= {name: LocalChannel(host) for name, host in self.hosts.items()}
        self.engine.set_replicas(self.hosts)
        await self.engine.start()
        await self.until(lambda: len(self.engine.replicas()) == 2)

    async def stop(self):
        await self.engine.stop()
        await asyncio.gather(*(host.stop() for host in self.hosts.values()))

    @staticmethod
    async def until(is_so):
        async with asyncio.timeout(PATIENCE_S):
            while not is_so():
                await asyncio.sleep(0.01)

    def request(self, adapter=None, max_tokens=8, prompt=(5, 6, 7, 8), **fields):
        self._num += 1
        sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        return GenerateRequest(f"r{self._num}", list(prompt), sampling, adapter_hash=adapter, **fields)

    async def tokens(self, request):
        return [token async for delta in self.engine.generate(request) for token in delta.token_ids]

    async def load(self, directory, name=None, **fields):
        answer = await self.engine.load_adapter(name or directory.name, str(directory), **fields)
        return answer.adapter.content_hash, answer.placement

    def kill(self, name):
        """Of the replica's engine."""
        os.kill(self.hosts[name].pid, signal.SIGKILL)

    async def num_used_blocks(self):
        stats = await self.engine.stats()
        assert stats is not None and stats.integrity_error is None
        return stats.num_kv_blocks - stats.num_free_kv_blocks


@asynccontextmanager
async def running(config, model_dir):
    made = Replicas(config, model_dir)
    try:
        await made.start()
        yield made
    finally:
        await made.stop()


@pytest.fixture(scope="session")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    return ServeConfig(
        dtype="fp32", kv_cache_gib=0.02, num_threads=1, kernels="torch", engine_timeout_s=20.0, max_num_seqs=16,
        shared_store=str(root / "store"), adapter_cache_dir=str(root / "cache"),
    )  # fmt: skip


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def both(config, model_dir):
    async with running(config, model_dir) as made:
        yield made


@pytest_asyncio.fixture(loop_scope="module")
async def replicas(both):
    """With both serving and nothing held; a start takes longer than most tests."""
    both.left.clear()
    yield both
    assert len(both.engine.replicas()) == 2
    for content_hash in list(both.engine._holders._held):
        await both.engine.unload_adapter(content_hash, 1 << 60)
    async with asyncio.timeout(PATIENCE_S):
        while await both.num_used_blocks():
            await asyncio.sleep(0.02)
    assert {state.owed_tokens for state in both.engine.replicas().values()} == {0}


@pytest.fixture(scope="session")
def expected(model_dir, adapter_dirs):
    """What one engine alone says, by request: a function of no replica."""
    known: dict[str, str] = {}
    alone = ServerProcess(model_dir, "--adapters-dir", str(adapter_dirs[0].parent)).wait_ready()

    def of(body: dict) -> str:
        key = json.dumps(body)
        if key not in known:
            known[key] = alone.post("/v1/completions", body).json()["choices"][0]["text"]
        return known[key]

    yield of
    assert alone.stop() == 0
