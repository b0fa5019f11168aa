"""What does the HTTP server itself cost: milliseconds of CPU that its process takes for a request?

The real server with an engine of no cost: a process that answers every request with what the demo tasks' held-out rows
say, --tokens-per-event at a time, all sequences once in every --step-ms. Requests come over HTTP from one client
process, so many at a time. What counts is the CPU time of the server's process, its threads included; beside it stands
that of the client, which must not be the limit. One core serves at most so many requests a second as it has times of
one in a second.

    python -m bench.http_path [--concurrency 1,32,256] [--cases stream,whole,completions,schema] [--requests 300]
"""

from __future__ import annotations

import asyncio
import itertools
import json
import multiprocessing
import os
import socket
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp
import click
import msgspec

from specserve.config import EngineConfig, ServeConfig
from specserve.frames import encode_frame, read_frame, to_engine_decoder
from specserve.messages import (
    Abort,
    Delta,
    EngineInfo,
    GenerateRequest,
    GetStats,
    Heartbeat,
    Shutdown,
    Usage,
)
from specserve.own_modules import module_command
from specserve.server.app import Server
from specserve.stats_messages import SNAPSHOT, EngineStats, Stats
from specserve.text.special_tokens import eos_token_ids

from . import common, options
from .server_process import cpu_s
from .tasks import DEMO_TASKS, BaseModel, demo_rows, demo_schema, in_turn

CASES = ("stream", "whole", "completions", "schema")
ANSWER_TOKENS = 64


# -- the engine of no cost


def engine_main() -> None:
    """A process of the server's that speaks as an engine does; answers are those of the file ANSWERS."""
    sock = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
    config = msgspec.msgpack.decode(read_frame(sock) or b"", type=EngineConfig)
    step_s, per_event = float(os.environ["BENCH_STEP_S"]), int(os.environ["BENCH_TOKENS_PER_EVENT"])
    answers = itertools.cycle(json.loads(Path(os.environ["BENCH_ANSWERS"]).read_text()))
    eos = sorted(eos_token_ids(Path(config.model)))
    info = EngineInfo(config.model, "llama", 49152, 8192, 1 << 16, 16, "none", "none", os.getpid(), eos)
    sock.sendall(encode_frame([info]))
    sock.sendall(encode_frame([Stats(SNAPSHOT, EngineStats(*[0] * 14))]))
    running: dict[str, tuple[list[int], int, GenerateRequest]] = {}
    beat = time.monotonic()
    while True:
        until = time.monotonic() + step_s
        while (left := until - time.monotonic()) > 0:
            sock.settimeout(left)
            try:
                payload = read_frame(sock)
            except TimeoutError:
                break
            message = to_engine_decoder.decode(payload) if payload else Shutdown()
            if isinstance(message, Shutdown):
                return
            if isinstance(message, GenerateRequest):
                running[message.request_id] = (next(answers), 0, message)
            elif isinstance(message, Abort):
                running.pop(message.request_id, None)
            elif isinstance(message, GetStats):
                sock.settimeout(None)
                sock.sendall(encode_frame([Stats(message.call_id, EngineStats(*[0] * 14))]))
        sock.settimeout(None)
        events: list[Any] = []
        for request_id, (tokens, done, request) in list(running.items()):
            new = tokens[done : done + per_event]
            if done + len(new) < len(tokens):
                running[request_id] = (tokens, done + len(new), request)
                events.append(Delta(request_id, new))
            else:
                del running[request_id]
                usage = Usage(len(request.prompt_token_ids), len(tokens), 0, len(tokens) // per_event, 0, 0, 0, 0)
                events.append(Delta(request_id, new, finish_reason="length", usage=usage))
        if time.monotonic() - beat > 1.0:
            beat = time.monotonic()
            events.append(Heartbeat(0.0, 1, step_s))
        if events:
            sock.sendall(encode_frame(events))


# -- the server


def server_main(model_dir: str, ready: Any) -> None:
    """The real server in this process, with that engine."""
    command = [*module_command("bench.http_path"), "--engine"]
    command.remove("-P")  # this bench is not an installed module
    config = ServeConfig(model=model_dir, port=0, log_level="warning")
    server = Server(config, Path(model_dir), command)
    asyncio.run(server.serve_until(asyncio.Event(), lambda url: ready.send(url)))


# -- the load


class Load:
    """Bodies by case, sent by `--concurrency` workers over connections that stay."""

    def __init__(self, url: str, model: str):
        self._url, self._model = url, model
        rows = [[json.loads(line) for line in demo_rows(task).read_text().splitlines()] for task in DEMO_TASKS]
        self._rows = in_turn(rows)
        self._schema = json.loads(demo_schema("debtags").read_text())

    def body(self, case: str) -> tuple[str, dict[str, Any]]:
        _, row = next(self._rows)
        messages = row["messages"][:-1] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        fields = {"model": self._model, "max_tokens": ANSWER_TOKENS, "temperature": 0}
        if case == "completions":
            return "/v1/completions", {**fields, "prompt": messages[-1]["content"], "stream": True}
        fields |= {"messages": messages, "stream": case != "whole"}
        if case == "schema":
            schema = {"name": "debtags", "schema": self._schema}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return "/v1/chat/completions", fields

    async def run(self, case: str, concurrency: int, num: int) -> tuple[float, int, list[float]]:
        """(seconds, events, seconds to the first byte of each answer) of `num` requests."""
        bodies = iter([self.body(case) for _ in range(num)])
        events, firsts = 0, []

        async def worker(session: aiohttp.ClientSession) -> None:
            nonlocal events
            for path, body in bodies:
                start = time.perf_counter()
                async with session.post(self._url + path, json=body) as response:
                    if response.status != 200:
                        raise click.ClickException(f"{response.status}: {await response.text()}")
                    data = await response.content.readany()
                    firsts.append(time.perf_counter() - start)
                    events += data.count(b"data: ")
                    async for data in response.content.iter_any():
                        events += data.count(b"data: ")

        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector, read_bufsize=1 << 20) as session:
            start = time.perf_counter()
            await asyncio.gather(*(worker(session) for _ in range(concurrency)))
            return time.perf_counter() - start, events, firsts


@click.command(help=__doc__.partition("\n")[0])
@options.model
@options.numbers("--concurrency", "1,32,256", "Requests at a time.")
@click.option("--cases", default=",".join(CASES), show_default=True, help="Of what is measured.")
@options.at_least(1, "--requests", 300, "Of a case and round.")
@options.rounds(3)
@options.at_least(1, "--tokens-per-event", 4, "Of a sequence's event.")
@click.option("--step-ms", default=4.0, show_default=True, help="Between two events of a sequence.")
@options.save("http_path", default=False)
def main(
    model: str, concurrency: list[int], cases: str, requests: int, rounds: int, tokens_per_event: int, step_ms: float,
    save: bool,
) -> None:  # fmt: skip
    chosen = cases.split(",")
    if unknown := sorted(set(chosen) - set(CASES)):
        raise click.UsageError(f"--cases has {', '.join(unknown)}; there are {', '.join(CASES)}")
    run = common.start("http_path", "aiohttp", "msgspec", "tokenizers")
    base = BaseModel.load(model)
    answers = [example.completion for task in DEMO_TASKS for example in base.examples(demo_rows(task), 20)]
    file = common.cache_dir() / "http_path_answers.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps([answer[:ANSWER_TOKENS] for answer in answers]))
    os.environ |= {
        "BENCH_ANSWERS": str(file), "BENCH_STEP_S": str(step_ms / 1e3), "BENCH_TOKENS_PER_EVENT": str(tokens_per_event),
    }  # fmt: skip
    spawn = multiprocessing.get_context("spawn")
    theirs, ours = spawn.Pipe()
    server = spawn.Process(target=server_main, args=(str(base.path), theirs))
    server.start()
    try:
        load = Load(ours.recv(), base.path.name)
        figures: dict[str, dict[str, Any]] = {}
        runs: dict[tuple[str, int], list[dict[str, float]]] = {}
        for _, case, num in itertools.product(range(-1, rounds), chosen, concurrency):
            assert server.pid is not None
            before, own = cpu_s(server.pid), time.process_time()
            seconds, events, firsts = asyncio.run(load.run(case, num, requests))
            server_s, client_s = cpu_s(server.pid) - before, time.process_time() - own
            runs.setdefault((case, num), []).append({
                "server_ms": 1e3 * server_s / requests, "client_ms": 1e3 * client_s / requests,
                "events": events / requests, "requests_per_s": requests / seconds,
                "first_ms": 1e3 * sorted(firsts)[len(firsts) // 2],
            })  # fmt: skip
        for (case, num), of_case in runs.items():
            found = {name: common.spread([one[name] for one in of_case[1:]]) for name in of_case[0]}
            figures.setdefault(case, {})[str(num)] = found
            medians = {name: value["median"] for name, value in found.items()}
            click.echo(
                f"{case:>11} x {num:<4} server {medians['server_ms']:6.2f} ms of CPU a request, client "
                f"{medians['client_ms']:6.2f}; {medians['events']:5.1f} events; "
                f"{medians['requests_per_s']:7.1f} a second, first after {medians['first_ms']:6.1f} ms"
            )
    finally:
        server.kill()
        server.join()
    settings = {"requests": requests, "rounds": rounds, "step_ms": step_ms, "tokens_per_event": tokens_per_event}
    run.finish({"model": base.name, **settings, "figures": figures}, save)


if __name__ == "__main__":
    if "--engine" in sys.argv:
        engine_main()
    else:
        main()
