"""Several replicas as one engine: what the server needs of an engine process, kept over many (`ServingEngine`).

Sends each request to one of those that serve (`members`), where `policy` says; which contents are where is in
`holders`. What ends with a replica ends as it would with an engine process, and whoever asks again is sent elsewhere.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Collection, Iterable
from contextlib import aclosing
from typing import Any, Unpack

import msgspec

from ..adapter_messages import AdapterInfo, AdapterLoaded, AdapterState
from ..config import ServeConfig
from ..errors import EngineDeadError, EngineLostError, OverloadedError, UserError
from ..messages import Delta, EngineInfo, GenerateRequest
from ..pooling_messages import Pooled, PoolRequest
from ..server.engine_client.serving_engine import LoadOptions, ReplicaState
from ..server.engine_client.supervisor import State
from ..stats_messages import EngineStats
from .copies import Copies
from .expected_cost import ExpectedCost
from .holders import Holders
from .member import Member
from .members import Members
from .merged import merged_adapters, merged_stats
from .policy import AffinityPolicy
from .prefixes import prefix_keys
from .wire import Channel

MAX_ANSWERS = 4096  # whose replica is remembered while their sequences come


class ReplicatedEngine:
    """`channel_to` gives the way to a replica; `set_replicas` says which there are. Of one event loop.

    `policy` chooses among them, by default `AffinityPolicy`.
    """

    def __init__(self, config: ServeConfig, channel_to: Callable[[str], Channel], policy: AffinityPolicy | None = None):
        self.on_adapters_left: Callable[[dict[str, int]], object] = lambda placements: None
        self.on_serving: Callable[[], object] = lambda: None
        self.on_snapshot: Callable[[], object] = lambda: None
        self._policy, self._holders = policy or AffinityPolicy(), Holders()
        self._members = Members(
            config,
            channel_to,
            self._policy,
            self._holders,
            on_adapters_left=lambda placements: self.on_adapters_left(placements),
            on_serving=lambda: self.on_serving(),
            on_snapshot=lambda: self.on_snapshot(),
        )
        self._copies = Copies(self._holders, self._members.ready, self._policy.was_read)
        self._cost = ExpectedCost()
        self._answers_at: dict[str, str] = {}  # answer -> replica, of those with several sequences; newest last

    def set_replicas(self, names: Iterable[str]) -> None:
        """These run now; what another one has begun it finishes."""
        self._members.set_replicas(names)

    def replicas(self) -> dict[str, ReplicaState]:
        """Those that serve, by name."""
        return {
            name: ReplicaState(
                member.client.snapshot[0],
                self._policy.loads[name],
                self._holders.num_of(name),
                member.client.serving_s,
            )
            for name, member in self._members.ready().items()
        }

    # -- what the server sees of the engine

    @property
    def state(self) -> State:
        return self._members.state

    @property
    def generation(self) -> int:
        """What replicas held and hold no more is told one by one, so that no process's end voids what others hold."""
        return 1 if self._members.has_served else 0

    @property
    def num_restarts(self) -> int:
        """Engine processes and replicas that have gone."""
        return self._members.num_losses

    @property
    def info(self) -> EngineInfo:
        if self._members.info is None:
            raise EngineDeadError("no replica has started yet; retry shortly")
        return self._members.info

    @property
    def known_info(self) -> EngineInfo | None:
        return self._members.info

    async def first_info(self) -> EngineInfo:
        if self._members.info is None:
            await self._members.any_ready()
        return self.info

    @property
    def serving_s(self) -> float:
        return max((member.client.serving_s for member in self._members.ready().values()), default=0.0)

    @property
    def snapshot(self) -> tuple[EngineStats | None, float]:
        found = [member.client.snapshot for member in self._members.ready().values()]
        stats = [part for part, _ in found if part is not None]
        return (merged_stats(stats), max(at for _, at in found)) if stats else (None, time.time())

    @property
    def wait_estimate_s(self) -> float:
        return min((member.client.wait_estimate_s for member in self._members.ready().values()), default=0.0)

    async def start(self) -> None:
        """Wait for the first replica, however long that takes."""
        await self._members.first_ready()

    async def stop(self) -> None:
        """Leave all replicas; what runs ends with an error."""
        await self._members.stop()
        await self._copies.stop()

    # -- requests

    def generate(self, request: GenerateRequest) -> AsyncGenerator[Delta]:
        """As `EngineClient.generate`, on whichever replica."""
        return self._answers(request, lambda member: member.client.generate(request))

    def pool(self, request: PoolRequest) -> AsyncGenerator[Pooled]:
        """As `EngineClient.pool`."""
        return self._answers(request, lambda member: member.client.pool(request))

    async def _answers(
        self, request: GenerateRequest | PoolRequest, ask: Callable[[Member], AsyncGenerator[Any]]
    ) -> AsyncGenerator[Any]:
        cost, refusals = self._cost.of(request), dict[str, UserError]()
        while True:
            member = await self._member_for(request, cost, refusals)
            number = self._number(request.adapter_hash, member)
            self._policy.began(member.name, cost, time.monotonic())
            has_begun = False
            try:
                async with member.running(), aclosing(ask(member)) as answers:
                    async for answer in answers:
                        has_begun = True
                        self._cost.learn(request, answer)
                        yield answer
                return
            except UserError as error:
                if has_begun or error.code not in ("adapter_not_resident", OverloadedError.code):
                    raise
                if error.code == OverloadedError.code:
                    refusals[member.name] = error
                elif request.adapter_hash is not None:
                    self._members.left(member, {request.adapter_hash: number})
            finally:
                self._policy.ended(member.name, cost, time.monotonic())

    async def _member_for(
        self, request: GenerateRequest | PoolRequest, cost: int, refusals: dict[str, UserError]
    ) -> Member:
        """Raises `UserError` where nobody can serve the request."""
        ready = await self._members.any_ready()
        adapter, answer = request.adapter_hash, request.together
        holders = self._holders.of(adapter)
        if answer is not None and (name := self._answers_at.get(answer.answer_id)) in ready and name not in refusals:
            if adapter is None or name in holders:
                return ready[name]
        keys = prefix_keys(request.prompt_token_ids, adapter, request.cache_salt)
        cannot = set(refusals)
        while True:
            refusing = cannot if adapter is None else cannot | set(self._copies.refusing(adapter)) - set(holders)
            route = self._policy.route(adapter, cost, keys, holders, refusing)
            if route is None or (adapter is not None and not holders):
                if refusals:
                    raise next(reversed(refusals.values()))
                raise UserError(f"no replica holds adapter {adapter} now", status=503, code="adapter_not_resident")
            if route.has_adapter or (adapter is not None and await self._copies.bring(adapter, route.replica)):
                break
            cannot.add(route.replica)
            ready, holders = await self._members.any_ready(), self._holders.of(adapter)
        if route.replica not in ready:
            raise EngineLostError("the replica ended before the request was sent to it; retry")
        if answer is not None:
            self._answers_at[answer.answer_id] = route.replica
            if len(self._answers_at) > MAX_ANSWERS:
                del self._answers_at[next(iter(self._answers_at))]
        return ready[route.replica]

    def _number(self, adapter: str | None, member: Member) -> int:
        held = self._holders.get(adapter or "")
        return held.by_replica.get(member.name, 0) if held is not None else 0

    # -- adapters

    async def load_adapter(
        self, name: str, path: str, before: AdapterInfo | None = None, **options: Unpack[LoadOptions]
    ) -> AdapterLoaded:
        """As `EngineClient.load_adapter`, on who has it or on its home."""
        lost: set[str] = set()
        while True:
            member = await self._home(path, before, lost)
            try:
                start = time.monotonic()
                answer = await member.client.load_adapter(name, path, before, **options)
            except EngineLostError:
                if lost:
                    raise
                lost.add(member.name)
                continue
            if member.name not in self._holders.of(answer.adapter.content_hash):
                self._policy.was_read(time.monotonic() - start)
            placement = self._holders.loaded(
                name, path, options.get("mount", 0), answer.adapter, member.name, answer.placement
            )
            if options.get("is_pinned") and (held := self._holders.get(answer.adapter.content_hash)) is not None:
                held.is_pinned = True
            return msgspec.structs.replace(answer, placement=placement)

    async def _home(self, path: str, before: AdapterInfo | None, lost: Collection[str]) -> Member:
        ready = await self._members.any_ready()
        key = before.content_hash if before is not None else path
        having = [replica for replica in self._holders.of(key) if replica in ready and replica not in lost]
        home = min(having, key=self._policy.loads.__getitem__) if having else self._policy.home(key, lost)
        if home is None:
            raise EngineDeadError("no replica serves now; retry shortly")
        return ready[home]

    def prioritize_loads(self, path: str, priority: int) -> None:
        for member in self._members.all():
            member.client.prioritize_loads(path, priority)

    def forsake_loads(self, path: str) -> None:
        for member in self._members.all():
            member.client.forsake_loads(path)

    async def unload_adapter(self, adapter_hash: str, placement: int) -> None:
        """Forget it on all replicas, unless a load placed it after `placement`; then it is only pinned no more."""
        held = self._holders.get(adapter_hash)
        if held is None:
            return
        if held.placement > placement:
            await self.pin_adapter(adapter_hash, False, placement)
            return
        await self._copies.forget(adapter_hash, self._holders.forget(adapter_hash))

    async def pin_adapter(self, adapter_hash: str, is_pinned: bool, placement: int) -> None:
        """On all replicas that have it: raises `UserError` where none has, and it shall be pinned."""
        held, ready = self._holders.get(adapter_hash), self._members.ready()
        failure: UserError | None = UserError(
            f"no replica holds adapter {adapter_hash} now", status=503, code="adapter_not_resident"
        )
        for replica, number in list(held.by_replica.items()) if held is not None else ():
            if replica not in ready:
                continue
            try:
                await ready[replica].client.pin_adapter(adapter_hash, is_pinned, number)
                failure = None
            except UserError as error:
                failure = failure and error
        if held is not None and (failure is None or not is_pinned):
            held.is_pinned = is_pinned
        if failure is not None and is_pinned:
            raise failure

    async def adapters(self) -> list[AdapterState]:
        ready = self._members.ready()
        if not ready:
            raise EngineDeadError("no replica serves now; retry shortly")
        return merged_adapters(await asyncio.gather(*(member.client.adapters() for member in ready.values())))

    async def stats(self) -> EngineStats | None:
        """Of all that serve, added up; None while none does."""
        found = await asyncio.gather(*(member.client.stats() for member in self._members.ready().values()))
        parts = [part for part in found if part is not None]
        return merged_stats(parts) if parts else None
