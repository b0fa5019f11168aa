"""The server as a process, from its settings to its end: signals, and what it says on the way.

A first signal drains the server, a second one ends everything at once; a hangup reads again what may change while it
serves, where there is any of that.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from ..config import ServeConfig
from ..errors import UserError
from ..log_lines import configure_logging
from ..model.store import resolve_model
from ..terminal import wants_colour
from .app import Server
from .banner import banner
from .connections import bind
from .console import say, settle
from .route import Handler


def serve(config: ServeConfig, leaderboard: Handler | None = None) -> None:
    """Run the server until SIGINT or SIGTERM. Raises `UserError` when it cannot start."""
    configure_logging(getattr(logging, config.log_level.upper()))
    if config.adapters_dir is not None and not Path(config.adapters_dir).is_dir():
        raise UserError(f"adapters_dir {config.adapters_dir!r} is not a directory; create it or leave it out")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # cores are the engine's; a text is one thread's work
    bind(config.host, config.port).close()  # a port that is taken should not cost the wait for the model
    model_dir = resolve_model(config.model, revision=config.revision)
    say(f"loading {model_dir.name} ...")
    server = Server(config, model_dir, leaderboard=leaderboard)

    def announce(url: str) -> None:
        has_colour = wants_colour(sys.stderr)
        say(banner(url, config, server.model_name, server.engine.info, server.store.own_names(), has_colour))

    async def main() -> None:
        loop, stop = asyncio.get_running_loop(), asyncio.Event()
        task = asyncio.ensure_future(server.serve_until(stop, announce))

        def on_signal() -> None:
            is_asked = server.engine.generation or server.middlewares.num_in_flight
            if stop.is_set() or not is_asked:
                os._exit(1)  # the engine process leaves by itself when its socket closes
            stop.set()
            say("shutting down; running requests may finish (once more to stop at once)")

        reloads: set[asyncio.Task[None]] = set()

        def on_hangup() -> None:
            reloads.add(reload := asyncio.ensure_future(server.reload()))
            reload.add_done_callback(reloads.discard)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal)
        if config.reads_again:
            loop.add_signal_handler(signal.SIGHUP, on_hangup)  # else a terminal that closes ends the server
        await task

    try:
        asyncio.run(main())
    finally:
        settle()
