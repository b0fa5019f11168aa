"""The HTTP server: routes, access, limits, and a start and an end without loose ends.

One asyncio process that never touches the model. `serve` runs until a signal: then /ready answers 503, running requests
get `drain_timeout_s`, and the engine process is ended; a second signal ends everything at once.
"""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
from aiohttp import web

from . import __version__
from .adapter_store import AdapterStore
from .api_types import LoadAdapterRequest, UnloadAdapterRequest
from .config import ServeConfig, engine_part
from .engine_client import EngineClient
from .errors import ErrorInfo, OverloadedError, UserError
from .generation import Generator
from .http_body import json_response, read_json
from .metrics import Metrics
from .model_store import DEFAULT_MODEL, resolve_model
from .openai_api import OpenAIRoutes, error_body
from .tokenizer import TextTokenizer
from .validation import convert

logger = logging.getLogger(__name__)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

OPEN_ROUTES = {"/health", "/ready", "/version", "/metrics"}
ADMIN_ROUTES = {"/v1/load_lora_adapter", "/v1/unload_lora_adapter"}
RETRY_AFTER_S = 1
LOOPBACK_NAMES = {"localhost", "localhost.localdomain", "ip6-localhost"}


class Server:
    """One engine behind one aiohttp application."""

    def __init__(self, config: ServeConfig, model_dir: Path, engine_command: list[str] | None = None):
        self.config = config
        self.metrics = Metrics()
        self.engine = EngineClient(
            msgspec.structs.replace(engine_part(config), model=str(model_dir)),
            silence_timeout_s=config.engine_timeout_s,
            command=engine_command,
        )
        self.store = AdapterStore(self.engine, config.adapters_dir)
        default_name = model_dir.name if config.model else DEFAULT_MODEL.name
        self.model_name = config.served_model_name or default_name
        self._model_dir = model_dir
        self.draining = False
        self._num_in_flight = 0

    def application(self, tokenizer: TextTokenizer) -> web.Application:
        app = web.Application(middlewares=[self._count, self._errors, self._access, self._admit], client_max_size=0)
        generator = Generator(self.config, self.engine, self.store, tokenizer, self.model_name, self.metrics)
        OpenAIRoutes(generator).add_to(app)
        app.router.add_post("/v1/load_lora_adapter", self._load_adapter)
        app.router.add_post("/v1/unload_lora_adapter", self._unload_adapter)
        app.router.add_get("/health", self._health)
        app.router.add_get("/ready", self._ready)
        app.router.add_get("/version", self._version)
        app.router.add_get("/metrics", self._metrics)
        return app

    async def run(self, on_ready: Callable[[str], None], stop: asyncio.Event) -> None:
        """Serve until `stop` is set, then drain. Raises `UserError` when the model or the port is unusable."""
        listener = bind(self.config.host, self.config.port)
        runner: web.AppRunner | None = None
        try:
            # The engine imports torch and reads the model while the tokenizer loads here.
            _, tokenizer = await asyncio.gather(self.engine.start(), asyncio.to_thread(TextTokenizer, self._model_dir))
            runner = web.AppRunner(
                self.application(tokenizer),
                handler_cancellation=True,  # a client that leaves cancels its handler, which aborts its sequences
                keepalive_timeout=self.config.read_timeout_s,  # also closes connections whose headers never come
                access_log=None,
                shutdown_timeout=1.0,  # requests had the drain; aiohttp would add a minute to it
                auto_decompress=False,  # compressed bodies are refused unread, also those aiohttp cannot inflate
                lingering_time=1.0,  # how long the rest of a refused body is still read
            )
            await runner.setup()
            await web.SockSite(runner, listener, backlog=1024).start()
            host, port = listener.getsockname()[:2]
            on_ready(f"http://{f'[{host}]' if ':' in host else host}:{port}")
            await stop.wait()
            await self._drain()
        finally:
            await self.engine.stop()  # first: what still runs ends with an error event, not with a cut connection
            if runner is not None:
                await runner.cleanup()
            listener.close()

    async def _drain(self) -> None:
        self.draining = True
        deadline = asyncio.get_running_loop().time() + self.config.drain_timeout_s
        while self._num_in_flight and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.05)

    # -- middlewares, outermost first

    @web.middleware
    async def _count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        status = 499  # the client left before there was an answer
        self.metrics.in_flight.inc()
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            self.metrics.in_flight.dec()
            self.metrics.requests.labels(route, str(status)).inc()

    @web.middleware
    async def _errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every error in OpenAI's shape, and none that tells more than it should."""
        try:
            return await handler(request)
        except UserError as error:
            headers = {"Retry-After": str(RETRY_AFTER_S)} if error.status in (429, 503) else None
            response = json_response(error_body(error.info()), error.status, headers)
            if error.status in (408, 413):
                response.force_close()  # the rest of the body is not worth waiting for
            response.headers.update(request.get("cors", {}))  # or the page could not read what went wrong
            return response
        except web.HTTPException as error:
            message = f"{request.method} {request.path[:200]}: {error.reason}"
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            return json_response(error_body(ErrorInfo(message, error.status)), error.status, headers)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("%s %s failed", request.method, request.path)
            info = ErrorInfo("internal error; the server's log says more", 500, "server_error", None, "internal_error")
            return json_response(error_body(info), 500)

    @web.middleware
    async def _access(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Host, Origin and keys, before anything of the request is read."""
        config, origin = self.config, request.headers.get("Origin")
        if not host_allowed(request.headers.get("Host", ""), config):
            raise UserError("this Host is not served here (--allowed-hosts)", status=403, code="host_not_allowed")
        cors = {}
        if origin is not None and request.path not in OPEN_ROUTES:
            if not origin_allowed(origin, request.headers.get("Host", ""), config):
                raise UserError("this Origin is not allowed (--allowed-origins)", status=403, code="origin_not_allowed")
            cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin"}
        if request.method == "OPTIONS" and origin is not None:
            allow = {"Access-Control-Allow-Methods": "GET, POST", "Access-Control-Allow-Headers": "*"}
            return web.Response(status=204, headers={**cors, **allow})
        request["cors"] = cors  # a stream sends its headers, and an error leaves, before it comes back here
        if request.path in ADMIN_ROUTES:
            if config.admin_api_key is None and config.api_key is None and not is_loopback(config.host):
                raise UserError("set --admin-api-key to load adapters from other machines", status=403)
            check_key(request, config.admin_api_key or config.api_key, "admin ")
        elif request.path not in OPEN_ROUTES:
            check_key(request, config.api_key, "")
        response = await handler(request)
        if not response.prepared:
            response.headers.update(cors)
        return response

    @web.middleware
    async def _admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "POST":
            return await handler(request)
        if self.draining:
            raise UserError("the server is shutting down", status=503, code="shutting_down")
        if self._num_in_flight >= self.config.max_concurrent_requests:
            raise OverloadedError(f"{self._num_in_flight} requests are running; retry shortly")
        self._num_in_flight += 1
        try:
            return await handler(request)
        finally:
            self._num_in_flight -= 1

    # -- routes beside OpenAI's

    async def _load_adapter(self, request: web.Request) -> web.Response:
        value = await read_json(request, 2**20, self.config.read_timeout_s)
        body = convert(value, LoadAdapterRequest)
        info = await self.store.register(body.lora_name, body.lora_path)
        return json_response({"message": f"adapter {body.lora_name!r} is loaded", "adapter": info})

    async def _unload_adapter(self, request: web.Request) -> web.Response:
        value = await read_json(request, 2**20, self.config.read_timeout_s)
        body = convert(value, UnloadAdapterRequest)
        await self.store.unregister(body.lora_name)
        return json_response({"message": f"adapter {body.lora_name!r} is unloaded"})

    async def _health(self, request: web.Request) -> web.Response:
        state = self.engine.state
        return json_response({"status": "ok" if state == "ready" else state}, 200 if state == "ready" else 503)

    async def _ready(self, request: web.Request) -> web.Response:
        state = "draining" if self.draining else self.engine.state
        return json_response({"status": state}, 200 if state == "ready" else 503)

    async def _version(self, request: web.Request) -> web.Response:
        return json_response({"version": __version__})

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(5.0):
                stats = await self.engine.stats()
        except (UserError, TimeoutError):
            stats = None
        body = self.metrics.render(stats, self.model_name)
        return web.Response(body=body, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def check_key(request: web.Request, key: str | None, kind: str) -> None:
    """Compare the bearer token with `key` in constant time; no key set, no key needed."""
    if key is None:
        return
    scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
    valid = hmac.compare_digest(sent.strip().encode("utf-8", "surrogateescape"), key.encode())
    if scheme.lower() != "bearer" or not valid:
        error = UserError(
            f"a valid {kind}API key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key"
        )
        error.type = "authentication_error"
        raise error


def host_allowed(host: str, config: ServeConfig) -> bool:
    """Against DNS rebinding: a server on loopback answers loopback names and the configured ones only."""
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return False
    if name in {item.lower() for item in (*config.allowed_hosts, config.host)}:
        return True
    if not is_loopback(config.host):
        return not config.allowed_hosts
    return is_loopback(name)


def origin_allowed(origin: str, host: str, config: ServeConfig) -> bool:
    same = urlsplit(origin).netloc.lower() == host.lower() and bool(host)
    return same or origin in config.allowed_origins or "*" in config.allowed_origins


def is_loopback(name: str) -> bool:
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return name in LOOPBACK_NAMES


def bind(host: str, port: int) -> socket.socket:
    """A listening socket; raises `UserError` when the address is taken or unknown."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, proto)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"cannot listen on {host}:{port}: {reason}; choose another --port or --host", param="port"
        ) from None
    listener.setblocking(False)
    return listener


def serve(config: ServeConfig) -> None:
    """Run the server until SIGINT or SIGTERM. Raises `UserError` when it cannot start."""
    level = getattr(logging, config.log_level.upper())
    logging.basicConfig(level=level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    if config.adapters_dir is not None and not Path(config.adapters_dir).is_dir():
        raise UserError(f"adapters_dir {config.adapters_dir!r} is not a directory; create it or leave it out")
    bind(config.host, config.port).close()  # a port that is taken should not cost the wait for the model
    model_dir = resolve_model(config.model, revision=config.revision)
    print(f"loading {model_dir.name} ...", file=sys.stderr, flush=True)
    server = Server(config, model_dir)

    def announce(url: str) -> None:
        names = ", ".join([server.model_name, *server.store.names()])
        print(f"specserve {__version__} is ready at {url} (models: {names})", file=sys.stderr, flush=True)

    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        task = asyncio.ensure_future(server.run(announce, stop))

        def on_signal() -> None:
            if stop.is_set() or server.engine.state == "starting":
                os._exit(1)  # the engine process leaves by itself when its socket closes
            print("shutting down; running requests may finish (once more to stop at once)", file=sys.stderr, flush=True)
            stop.set()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        await task

    asyncio.run(main())
