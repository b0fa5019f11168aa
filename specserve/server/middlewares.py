"""What surrounds every request: counting, errors as JSON, access, admission, and limits of keys.

Outermost first, in this order. Owns the number of requests in flight and whether the server drains; knows no route's
meaning. Nothing of a body is read before host, origin and key were checked.
"""

from __future__ import annotations

import asyncio
import logging
import math
import re
import uuid
from collections.abc import Awaitable, Callable

from aiohttp import web

from ..config import ServeConfig
from ..errors import ErrorInfo, OverloadedError, ShuttingDownError, UserError
from .access.caller import Caller, caller_of, found_caller, set_caller
from .access.key_file import Scope
from .access.keys import KeyRing
from .access.network import host_allowed, is_loopback, origin_allowed
from .error_bodies import SAFE_HEADERS, error_response
from .metrics.metrics import Metrics
from .route import Access, Handler
from .routes import access_of, meant_path
from .spans import remember_context

logger = logging.getLogger(__name__)

MAX_RETRY_AFTER_S = 600
REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=\-]{1,128}")


class Middlewares:
    """The middlewares of one server."""

    def __init__(
        self,
        config: ServeConfig,
        keys: KeyRing,
        metrics: Metrics,
        wait_estimate_s: Callable[[], float],
        key_page: Callable[[web.Request], web.Response | None],
    ):
        """`key_page` is shown to who has no key, if it is not None."""
        self._config = config
        self._keys = keys
        self._metrics = metrics
        self._open_info = config.open_info if config.open_info is not None else config.api_keys_file is None
        self._wait_estimate_s = wait_estimate_s
        self._key_page = key_page
        self.draining = False
        self.num_in_flight = 0

    def all(self) -> list[Callable[..., Awaitable[web.StreamResponse]]]:
        return [self.count, self.errors, self.access, self.admit, self.limit]

    async def add_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """Before any headers leave, a stream's and an error's too: the request's id, the CORS grant, what is left."""
        sent = request.headers.get("X-Request-Id", "")
        response.headers["X-Request-Id"] = sent if REQUEST_ID.fullmatch(sent) else uuid.uuid4().hex
        response.headers.update(SAFE_HEADERS)
        response.headers.update(request.get("cors", {}))
        if (caller := found_caller(request)) is not None:
            response.headers.update(caller.allowance.headers())

    @web.middleware
    async def count(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        resource = request.match_info.route.resource
        route = resource.canonical if resource is not None else "unknown"
        status = 499  # the client left before there was an answer
        # Who looks does not count himself: an idle server has none.
        is_counted = route not in ("/metrics", "/v1/stats")
        self._metrics.in_flight.inc(is_counted)
        try:
            response = await handler(request)
            status = response.status
            return response
        finally:
            self._metrics.in_flight.dec(is_counted)
            self._metrics.requests.labels(route, str(status)).inc()
            if (caller := found_caller(request)) is not None:
                self._metrics.key_requests.labels(self._metrics.key_label(caller.name), str(status)).inc()

    @web.middleware
    async def errors(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every error in its route's shape, and none that tells more than it should."""
        try:
            return await handler(request)
        except UserError as error:
            response = error_response(request, error.info(), retry_headers(error))
            if error.status in (408, 413):
                response.force_close()  # the rest of the body is not worth waiting for
            return response
        except web.HTTPException as error:
            message = f"{request.method} {request.rel_url.raw_path[:200]}: {error.reason}"  # raw: nothing unprintable
            if error.status == 404 and (meant := meant_path(request.method, request.path)) not in (None, request.path):
                message += f"; did you mean {meant}?"
            headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
            return error_response(request, ErrorInfo(message, error.status), headers)
        except (ConnectionError, asyncio.CancelledError):
            raise
        except Exception:
            logger.exception("%s %s failed", request.method, request.rel_url.raw_path)
            info = ErrorInfo("internal error; the server's log says more", 500, "server_error", None, "internal_error")
            return error_response(request, info)

    @web.middleware
    async def access(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Host, Origin and keys, before anything of the request is read."""
        config, origin = self._config, request.headers.get("Origin")
        access = access_of(request.method, request.path)
        if access in ("info", "metrics") and self._open_info:
            access = "open"
        if not host_allowed(request.headers.get("Host", ""), config):
            raise UserError("this Host is not served here (--allowed-hosts)", status=403, code="host_not_allowed")
        cors = {}
        if origin is not None and access != "open":
            if not origin_allowed(origin, request.headers.get("Host", ""), config):
                raise UserError("this Origin is not allowed (--allowed-origins)", status=403, code="origin_not_allowed")
            cors = {"Access-Control-Allow-Origin": origin, "Vary": "Origin", "Access-Control-Expose-Headers": "*"}
        if request.method == "OPTIONS" and origin is not None:
            allow = {
                "Access-Control-Allow-Methods": "GET, POST, DELETE",
                "Access-Control-Allow-Headers": "Authorization, *",
            }
            return web.Response(status=204, headers={**cors, **allow})
        request["cors"] = cors
        if access != "open":
            try:
                set_caller(request, self._caller(request, access))
            except UserError as error:
                if error.status == 401 and (page := self._key_page(request)) is not None:
                    return page
                raise
        return await handler(request)

    def _caller(self, request: web.Request, access: Access) -> Caller:
        """Whose key it is, when that may do what the route needs. Raises `UserError`."""
        caller, scope = self._keys.authenticate(request.headers.get("Authorization", "")), _scope(request, access)
        what = "admin " if scope == "admin" else ""
        is_enough = caller is not None and (scope is None or scope in caller.scopes)
        if caller is None or (caller is self._keys.anonymous and not is_enough):
            error = UserError(
                f"a valid {what}API key is needed: Authorization: Bearer KEY", status=401, code="invalid_api_key"
            )
            error.type = "authentication_error"
            raise error
        if not is_enough:
            raise UserError(
                f"key {caller.name!r} has not the scope {scope}; send another, or give it that in the file of keys",
                status=403,
                code="insufficient_scope",
            )
        if scope == "admin" and caller is self._keys.anonymous and not is_loopback(self._config.host):
            raise UserError("set --admin-api-key to load adapters from other machines", status=403)
        return caller

    @web.middleware
    async def admit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        if request.method != "POST":
            return await handler(request)
        remember_context(request.headers)
        if self.draining:
            raise ShuttingDownError("the server is shutting down")
        if self.num_in_flight >= self._config.max_concurrent_requests:
            wait_s = self._wait_estimate_s()
            raise OverloadedError(
                f"{self.num_in_flight} requests are in the server (--max-concurrent-requests); retry in about "
                f"{max(1.0, wait_s):.0f} s",
                retry_after_s=wait_s,
            )
        self.num_in_flight += 1
        try:
            return await handler(request)
        finally:
            self.num_in_flight -= 1

    @web.middleware
    async def limit(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """What the key may use; tokens are counted when the request has been tokenised."""
        if request.method != "POST":
            return await handler(request)
        with caller_of(request).allowance.running():
            return await handler(request)


def _scope(request: web.Request, access: Access) -> Scope | None:
    """What a key must be good for; None: any key will do."""
    if access == "admin" or access == "metrics":
        return access
    return "generate" if access == "key" and request.method == "POST" else None


def retry_headers(error: UserError) -> dict[str, str] | None:
    """When to try again, in whole seconds, for what may go better then; 1 where nobody knows."""
    if error.status not in (429, 503):
        return None
    seconds = min(max(1, math.ceil(error.retry_after_s or 1.0)), MAX_RETRY_AFTER_S)
    return {"Retry-After": str(seconds), "x-should-retry": "true"}
