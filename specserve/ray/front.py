"""The front as a Ray Serve deployment: the HTTP server, whose engine is all replicas.

It listens itself, so that events of a stream pass no further process; what comes by Ray's proxies is handed to it
(`asgi`). There is one front, so that limits of keys, names of adapters and batches are one; Ray starts it again where
it fails, and replicas that are there serve it at once. One that is replaced, since its settings are others, ends what
it has begun; the next one waits for that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence

from ray import serve
from ray.serve.handle import DeploymentHandle
from ray.util import get_node_ip_address

from ..config import RayConfig
from ..errors import UserError
from ..log_lines import configure_logging
from ..model.store import resolve_model
from ..server.app import Server
from ..server.connections import bind
from .addresses import by_address
from .asgi import Forwarder
from .parts import unpacked
from .replicated_engine import ReplicatedEngine
from .serve_channel import ServeChannel

logger = logging.getLogger(__name__)


class Front:
    """What Ray Serve calls."""

    async def __init__(self, settings: bytes, replicas: DeploymentHandle, owner: str, patience_s: float):  # type: ignore[misc]  # Ray Serve awaits it
        config = unpacked(settings)
        configure_logging(getattr(logging, config.log_level.upper()))
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # cores are the engines'; a text is one thread's work
        await _free(config, patience_s)
        self._loop = asyncio.get_running_loop()
        self._replicas, self._owner = replicas, owner
        model_dir = await asyncio.to_thread(resolve_model, config.model, revision=config.revision)
        self._engine = ReplicatedEngine(config, lambda name: ServeChannel(replicas, name))
        self._server = Server(config, model_dir, engine=self._engine)
        self._stop, self._url = asyncio.Event(), self._loop.create_future()
        self._serving = asyncio.create_task(self._server.serve_until(self._stop, self._url.set_result))
        self._greeting = asyncio.create_task(self._greet())

    async def _greet(self) -> None:
        """Make a call, which makes the handle's router: that tells of all replicas, now and later."""
        while not self._engine.replicas():
            try:
                async with asyncio.timeout(5.0):
                    await self._replicas.greet.remote(to="")
            except Exception as error:
                logger.warning("no replica yet: %s", type(error).__name__)
            await asyncio.sleep(0.5)

    def replicas_changed(self, names: Sequence[str]) -> None:
        """Called by `NamedRouter`, on a thread of its own."""
        self._loop.call_soon_threadsafe(self._engine.set_replicas, list(names))

    async def public_url(self) -> str:
        """As `url`, for other machines: where it listens on all addresses, by that which this machine has in Ray."""
        return by_address(await self.url(), get_node_ip_address())

    async def url(self) -> str:
        """Where it listens, once a replica serves. Raises the `UserError` that says why it cannot."""
        await asyncio.wait((self._url, self._serving), return_when=asyncio.FIRST_COMPLETED)
        if self._serving.done():
            self._serving.result()
        return self._url.result()

    async def owned_by(self, owner: str) -> None:
        """Who deployed last is who ends it; this front may be older."""
        self._owner = owner

    async def owner(self) -> str:
        """As it was told last."""
        return self._owner

    async def check_health(self) -> None:
        """Raises where Ray should start it again."""
        if self._serving.done():
            self._serving.result()
            raise UserError("the server has ended", status=503)

    async def __del__(self) -> None:
        self._stop.set()
        self._greeting.cancel()
        await asyncio.wait((self._serving,))


async def _free(config: RayConfig, patience_s: float) -> None:
    """The port: a front that this one replaces may have it until its streams have ended. Raises `UserError`."""
    until = time.monotonic() + patience_s
    while True:
        try:
            bind(config.host, config.port).close()
            return
        except UserError:
            if time.monotonic() > until:
                raise
        await asyncio.sleep(0.2)


def forwarder() -> Forwarder:
    """Of the front in this process."""

    async def url() -> str:
        return await serve.get_replica_context().servable_object.url()  # type: ignore[attr-defined]

    return Forwarder(url)
