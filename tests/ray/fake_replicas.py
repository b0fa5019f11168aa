"""Replicas without engines: a channel that answers as one would, at once or when it is told to."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

import msgspec

from specserve.adapter_messages import (
    AdapterInfo,
    AdapterLoaded,
    AdapterStates,
    GetAdapters,
    LoadAdapter,
    PinAdapter,
    UnloadAdapter,
)
from specserve.config import ServeConfig
from specserve.messages import Abort, CallDone, Delta, EngineInfo, GenerateRequest, GetStats, Heartbeat, Usage
from specserve.pooling_messages import Pooled, PoolRequest
from specserve.ray.parts import served
from specserve.ray.wire import Greeting, encode, to_replica_decoder

BEAT_S = 0.5
INFO = EngineInfo("m", "tiny", 320, 4096, 64, 16, "cpu", "fp32", 1, [2], max_num_seqs=16, max_adapters=4)


class FakeReplica:
    """`holds` keeps answers back until `let_go`; `is_deaf` drops what it is told; while `is_cut`, nothing passes either
    way and nobody hears that."""

    def __init__(self):
        self.loads: list[LoadAdapter] = []
        self.asked: Counter[str] = Counter()
        self.running: dict[str, GenerateRequest | PoolRequest] = {}
        self.aborted: list[str] = []
        self.served = served(ServeConfig())
        self.broken: list[bytes] = []  # what it says before its greeting, once each
        self.holds = self.is_deaf = self.is_cut = False
        self._placements = 0
        self._said: asyncio.Queue | None = None

    async def attach(self, front):
        if self.broken:
            yield self.broken.pop(0)
        await self._cable()
        self._said = asyncio.Queue()
        yield encode(Greeting(self.served, INFO, time.monotonic()))
        yield encode([])
        try:
            while True:
                try:
                    async with asyncio.timeout(BEAT_S):  # not wait_for, which may lose a cancellation before 3.12
                        message = await self._said.get()
                except TimeoutError:
                    message = Heartbeat(0.0, 0, 0.0)
                await self._cable()
                yield encode([message])
        finally:  # as the host does
            self.aborted += self.running
            self.running.clear()

    async def _cable(self):
        while self.is_cut:
            await asyncio.sleep(0.01)

    async def tell(self, front, frame):
        await self._cable()
        if self.is_deaf:
            return
        for message in to_replica_decoder.decode(frame):
            self._take(message)

    def _take(self, message):
        match message:
            case GenerateRequest() | PoolRequest():
                self.asked[type(message).__name__] += 1
                self.running[message.request_id] = message
                if not self.holds:
                    asyncio.get_running_loop().call_later(0.01, self._answer, message)
            case Abort(request_id=request_id):
                if self.running.pop(request_id, None) is not None:
                    self.aborted.append(request_id)
            case LoadAdapter():
                self.loads.append(message)
                self._placements += 1
                info = AdapterInfo(message.path, 4, 1, ["q_proj"], 100, None)
                self._say(AdapterLoaded(message.call_id, info, self._placements))
            case UnloadAdapter() | PinAdapter():
                self._say(CallDone(message.call_id))
            case GetAdapters():
                self._say(AdapterStates(message.call_id, []))
            case GetStats():
                pass

    def say_a_token(self):
        for request_id in self.running:
            self._say(Delta(request_id, [7]))

    def let_go(self):
        self.holds = False
        for message in list(self.running.values()):
            self._answer(message)

    def _answer(self, message):
        if self.running.pop(message.request_id, None) is None:
            return
        if isinstance(message, PoolRequest):
            values = float(sum(message.prompt_token_ids)).hex().encode()
            self._say(Pooled(message.request_id, values, 1, len(message.prompt_token_ids)))
        else:
            usage = Usage(len(message.prompt_token_ids), 1, 0, 1, 0, 0, 0, 0)
            self._say(Delta(message.request_id, message.prompt_token_ids[:1], finish_reason="stop", usage=usage))

    def _say(self, message):
        assert self._said is not None
        self._said.put_nowait(msgspec.convert(message, type(message)))
