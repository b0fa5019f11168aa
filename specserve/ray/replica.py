"""A replica as a Ray Serve deployment: one engine process on the CPU cores or GPUs that Ray gave it.

Ray places it, asks for its health, replaces it, and stops it when no front is attached any more. The model is found or
fetched on the machine that it runs on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator

from ray import serve

from ..errors import EngineDeadError
from ..log_lines import configure_logging
from ..model.store import resolve_model
from ..server.app import adapter_roots
from .engine_host import EngineHost
from .parts import unpacked


class EngineReplica:
    """What Ray Serve calls; `to` is the name of the replica that a call is meant for."""

    async def __init__(self, settings: bytes):  # type: ignore[misc]  # Ray Serve awaits it
        config = unpacked(settings)
        configure_logging(getattr(logging, config.log_level.upper()))
        self._name = serve.get_replica_context().replica_tag
        model_dir = await asyncio.to_thread(resolve_model, config.model, revision=config.revision)
        self._host = EngineHost(config, model_dir, adapter_roots(config, None))
        await self._host.start()

    async def attach(self, front: str, to: str) -> AsyncGenerator[bytes]:
        """As `wire.Channel.attach`. Raises `EngineDeadError` where another replica is meant."""
        if to != self._name:
            raise EngineDeadError(f"replica {to} is there no more")
        async for frame in self._host.attach(front):
            yield frame

    async def tell(self, front: str, frame: bytes, to: str) -> None:
        """As `wire.Channel.tell`."""
        if to == self._name:
            await self._host.tell(front, frame)

    async def greet(self, to: str) -> str:
        """The name of whoever answers: a call that makes a front's router, which tells of all replicas."""
        return self._name

    async def check_health(self) -> None:
        """Raises `EngineDeadError` where Ray should replace it."""
        self._host.check()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `autoscaling` reads."""
        return self._host.load()

    async def __del__(self) -> None:
        await self._host.stop()
