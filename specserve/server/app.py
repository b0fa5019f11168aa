"""The HTTP server: the application, and a start and an end without loose ends.

It never touches the model. At its end /ready answers 503, running requests get `drain_timeout_s`, and then the engine
is stopped.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from .. import __version__
from ..config import ServeConfig
from ..errors import UserError
from ..text.known_tokens import check_tokenizer
from ..text.tokenizer import TextTokenizer
from .access.keys import KeyRing
from .activity_log import summarize
from .adapter_routes import AdapterRoutes
from .adapter_store import AdapterStore
from .batches.api import BatchRoutes
from .batches.service import BatchService
from .connections import Connections, bind, raise_handle_limit
from .engine_client.serving_engine import ServingEngine
from .generation.generator import Generator
from .http_body import json_response
from .lorax.api import LoraxRoutes
from .metrics.metrics import Metrics
from .middlewares import Middlewares
from .openai.api import OpenAIRoutes
from .openapi import openapi_document
from .page_files import PageFiles, leaderboard_root, no_leaderboard, wants_page
from .pooling.api import PoolingRoutes
from .pooling.pooler import Pooler
from .pooling.tei_api import TeiRoutes
from .responses.api import ResponsesRoutes
from .route import Handler
from .routes import add_routes
from .served_engine import engine_of, model_name_of
from .shared_store.names import SharedNames
from .shared_store.versions import Versions, versions_dir
from .sources.fetcher import AdapterFetcher
from .spans import Spans
from .stats.routes import StatsRoutes
from .tls import certificate_of

logger = logging.getLogger(__name__)


class Server:
    """One engine behind one aiohttp application."""

    def __init__(
        self,
        config: ServeConfig,
        model_dir: Path,
        command: list[str] | None = None,
        engine: ServingEngine | None = None,
        leaderboard: Handler | None = None,
    ):
        """`engine` serves instead of a process of this server's own, which `command` would start.

        `leaderboard` answers for the pages of one, where there is one.
        """
        self.config = config
        self.fetcher = AdapterFetcher(config)
        roots = adapter_roots(config, self.fetcher.root)
        self.engine = engine or engine_of(config, model_dir, roots, command)
        self.model_name = model_name_of(config, model_dir)
        self.metrics = Metrics(self.model_name, config.metrics_prefix, config.prefix_caching)
        observe_load_s = self.metrics.adapter_load.observe
        self.versions = Versions.of(config)
        shared = SharedNames(self.versions, config.shared_store_refresh_s) if self.versions is not None else None
        self.store = AdapterStore(self.engine, config.adapters_dir, self.model_name, observe_load_s, roots, shared)
        self.engine.on_adapters_left = self.store.adapters_left
        self.engine.on_serving = self.store.engine_started
        self.spans = Spans.of(config.otlp_traces_endpoint, os.environ)
        self._model_dir = model_dir
        self.keys = KeyRing(config)
        self.stats = StatsRoutes(self.engine, self.model_name, self.store.names_alike, self.keys)
        self.certificate = certificate_of(config)
        self.page = PageFiles(has_leaderboard=leaderboard is not None)
        self.middlewares = Middlewares(
            config, self.keys, self.metrics, lambda: self.engine.wait_estimate_s, self.page.key_page
        )
        self.batches = BatchService(config, self.engine, self.keys, lambda: self.middlewares.num_in_flight)
        self._leaderboard = leaderboard or no_leaderboard
        self._openapi_body = msgspec.json.encode(openapi_document())

    def application(self, tokenizer: TextTokenizer) -> web.Application:
        app = web.Application(middlewares=self.middlewares.all(), client_max_size=0)
        app.on_response_prepare.append(self.middlewares.add_headers)
        generator = Generator(
            self.config, self.engine, self.store, tokenizer, self.model_name, self.metrics, self.spans
        )

        async def start(_: web.Application) -> None:
            await self.batches.start(openai.answers() | responses.answers() | pooling.answers())

        async def close(_: web.Application) -> None:
            await self.batches.close()
            responses.close()
            await generator.close()

        app.on_startup.append(start)
        app.on_cleanup.append(close)
        own = {
            "health": self._health,
            "root": self._root,
            "page_file": self.page.file,
            "leaderboard_root": leaderboard_root,
            "leaderboard": self._leaderboard,
            "leaderboard_page": self._leaderboard,
            "ready": self._ready,
            "version": self._version,
            "metrics": self._metrics,
            "openapi": self._openapi,
        }
        adapters = AdapterRoutes(self.store, self.fetcher, self.engine, self.config.read_timeout_s)
        openai, responses = OpenAIRoutes(generator), ResponsesRoutes(generator)
        pooler = Pooler(generator)
        tei, batches = TeiRoutes(pooler), BatchRoutes(self.config, self.batches)
        pooling = PoolingRoutes(pooler, tei)
        others = (openai, responses, LoraxRoutes(generator), pooling, tei, adapters, self.stats, batches)
        add_routes(app, own | {name: handler for routes in others for name, handler in routes.handlers().items()})
        return app

    async def serve_until(self, stop: asyncio.Event, on_ready: Callable[[str], None]) -> None:
        """Serve until `stop` is set, then drain. Raises `UserError` when the model or the port is unusable.

        The port is open while the model is read: /health says so, and what is to be generated waits.
        """
        listener: socket.socket | None = None
        runner: web.AppRunner | None = None
        listening: asyncio.Server | None = None
        tasks: list[asyncio.Future[Any]] = []
        num_handles = raise_handle_limit()  # before the engine starts, which inherits it
        try:
            await self.keys.reload()  # before the engine, which takes long
            # The engine imports torch and reads the model while the tokenizer loads here.
            tasks.append(starting := asyncio.ensure_future(self.engine.start()))
            tokenizer = await asyncio.to_thread(TextTokenizer, self._model_dir)
            runner = web.AppRunner(
                self.application(tokenizer),
                handler_cancellation=True,  # a client that leaves cancels its handler, which aborts its sequences
                shutdown_timeout=1.0,  # requests had the drain; aiohttp would add a minute to it
            )
            await runner.setup()
            assert runner.server is not None
            connections = Connections(
                runner.server,
                num_handles,
                self.config.write_timeout_s,
                keepalive_timeout=self.config.read_timeout_s,  # also closes connections whose headers never come
                access_log=None,
                auto_decompress=False,  # compressed bodies are refused unread, also those aiohttp cannot inflate
                lingering_time=1.0,  # how long the rest of a refused body is still read
            )
            tls = self.certificate.listening if self.certificate is not None else None
            listener = bind(self.config.host, self.config.port)  # not before there is somebody to answer
            listening = await connections.listen(listener, tls)
            host, port = listener.getsockname()[:2]
            url = f"http{'s' if tls else ''}://{f'[{host}]' if ':' in host else host}:{port}"
            logger.info("listening at %s", url)
            tasks.append(stopping := asyncio.ensure_future(stop.wait()))
            await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
            if starting.done():
                starting.result()
                check_tokenizer(tokenizer, self.engine.info.vocab_size)
                tasks.append(asyncio.ensure_future(summarize(self.engine.stats)))
                on_ready(url)
            await stopping
            await self._drain()
        finally:
            for task in tasks:
                task.cancel()
            await self.engine.stop()  # first: what still runs ends with an error event, not with a cut connection
            await asyncio.gather(*tasks, return_exceptions=True)
            if listening is not None:
                listening.close()
            if runner is not None:
                await runner.cleanup()
            if listener is not None:
                listener.close()
            self.fetcher.close()
            if self.versions is not None:
                await self.versions.stop()
            await asyncio.to_thread(self.spans.close)

    async def reload(self) -> None:
        """Read keys and certificate again; what is wrong with one is logged, and the old one stays."""
        try:
            await self.keys.reload()
        except UserError as error:
            logger.error("the keys stay as they are: %s", error)
        if self.certificate is not None:
            try:
                await asyncio.to_thread(self.certificate.reload)
                logger.info("the certificate has been read again")
            except UserError as error:
                logger.error("the certificate stays as it is: %s", error)

    async def _drain(self) -> None:
        self.middlewares.draining = True
        self.stats.feed.close()  # its listeners would stay for ever
        await self.batches.stop()  # what runs of them is done again by the next start
        deadline = asyncio.get_running_loop().time() + self.config.drain_timeout_s
        while self.middlewares.num_in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)

    # -- routes about the server

    async def _root(self, request: web.Request) -> web.Response:
        return self.page.index(request) if wants_page(request) else await self._health(request)

    async def _health(self, request: web.Request) -> web.Response:
        state = self.engine.state
        return json_response({"status": "ok" if state == "ready" else state}, 200 if state == "ready" else 503)

    async def _ready(self, request: web.Request) -> web.Response:
        state = "draining" if self.middlewares.draining else self.engine.state
        return json_response({"status": state}, 200 if state == "ready" else 503)

    async def _version(self, request: web.Request) -> web.Response:
        return json_response({"version": __version__})

    async def _openapi(self, request: web.Request) -> web.Response:
        return web.Response(body=self._openapi_body, content_type="application/json")

    async def _metrics(self, request: web.Request) -> web.Response:
        stats = await self.engine.stats()
        body = self.metrics.render(stats, self.engine.known_info, self.store.loading(), self.engine.replicas())
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def adapter_roots(config: ServeConfig, fetched_dir: Path | None) -> list[Path]:
    """The folders that adapters must lie in, resolved; none: anywhere."""
    roots = [Path(folder) for folder in (config.adapters_dir, *config.adapter_roots) if folder]
    if roots and fetched_dir is not None:
        roots.append(fetched_dir)
    if roots and config.shared_store is not None:
        roots.append(versions_dir(config))
    return [folder.resolve() for folder in roots]
