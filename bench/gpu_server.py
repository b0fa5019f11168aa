"""On a GPU: does the HTTP server hold under load while adapters join and its engine is killed, and how fast is it?

`specserve serve` with the adapters of a folder, in this order: the time until it is ready; the same chats with drafts
and without; as many chats while adapters join that nobody has asked for before; a killed engine (`kill -9`) with chats
in flight, whose answers have to be those of before, and the time until the next one is there; `specserve bench serve`
at each --concurrency. A chat that fails, but for those that are told after the kill to come again, or a server that
does not come back ends the bench with the reason. Wanted: all chats the same with drafts and after the kill.

    python -m bench.gpu_server [--num 96] [--late 12] [--concurrency 1,32,256] [--duration 6] [--device cuda]
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import click
import safetensors.torch

from specserve.adapter_files import HISTORY_FILE
from specserve.training.data.dataset import read_rows

from . import common, options
from .restart import healthy_again
from .server_process import START_S, Serving, serving
from .tasks import DEMO_TASKS, BaseModel, demo_adapter, demo_rows, in_turn

HEADS = ("lookahead_config.json", "lookahead.safetensors", HISTORY_FILE)
Chat = tuple[str, list[Any]]  # model, messages


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option("--adapters-dir", type=options.ADAPTER, help="Of adapters that generate; default: the demo adapters.")
@options.at_least(2, "--num", 96, "Chats at the same time.")
@options.at_least(1, "--late", 12, "Adapters that join.")
@options.numbers("--concurrency", "1,32,256", "Of bench serve.")
@options.at_least(1, "--duration", 6, "Seconds of a level of bench serve.")
@options.at_least(1, "--max-tokens", 120)
@click.option("--device", default="cuda", show_default=True)
@options.save("gpu_server", default=False)
def main(
    model: str, adapters_dir: Path | None, num: int, late: int, concurrency: list[int], duration: int, max_tokens: int,
    device: str, save: bool,
) -> None:  # fmt: skip
    run = common.start("gpu_server", "torch", device=device)
    base = BaseModel.load(model)
    click.echo("limit: no chat fails, and all say the same with drafts")
    folders = [demo_adapter(task) for task in DEMO_TASKS]
    if adapters_dir is not None:
        folders = sorted(path.parent for path in adapters_dir.glob("*/adapter_config.json"))
        if not folders:
            raise click.UsageError(f"--adapters-dir {adapters_dir.name!r} holds no adapter; name a folder of such")
    names = [source.name for source in folders]
    chats = list(itertools.islice((chat for _, chat in in_turn([chats_of(name) for name in names])), num))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for source in folders:
            shutil.copytree(source, root / "adapters" / source.name)
        start = time.perf_counter()
        flags = ("--device", device, "--adapters-dir", str(root / "adapters"))
        with serving(str(base.path), *flags) as server:
            ready_s = time.perf_counter() - start
            click.echo(f"ready after {ready_s:.1f} s")
            held = asyncio.run(under_load(server, chats, root / "adapters", late, max_tokens))
            levels = bench_serve(server.url, names, concurrency, duration, max_tokens, root / "levels.json")
    figures = {"ready_s": round(ready_s, 1), **held, "levels": levels}
    run.finish({"model": base.name, "num": num, "late": late, "max_tokens": max_tokens, "figures": figures}, save)


def chats_of(name: str) -> list[Chat]:
    """Held-out rows of a demo adapter's task; of other adapters some words."""
    file = demo_rows(name)
    if not file.is_file():
        texts = (f"The morning train left the station at {minute}" for minute in range(60))
        return [(name, [{"role": "user", "content": text}]) for text in texts]
    return [(name, row.messages[:-1]) for row in read_rows(file)]


async def under_load(
    server: Serving, chats: Sequence[Chat], adapters: Path, num_late: int, max_tokens: int
) -> dict[str, Any]:
    timeout, connector = aiohttp.ClientTimeout(total=START_S), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        refused: list[str] = []

        async def ask(chat: Chat, survives_kill: bool = False, **fields: Any) -> str:
            model, messages = chat
            body = {"model": model, "messages": messages, "temperature": 0}
            body |= {"max_tokens": max_tokens, **fields}
            while True:
                async with session.post(f"{server.url}/v1/chat/completions", json=body) as response:
                    if response.status == 200:
                        answer: str = (await response.json())["choices"][0]["message"]["content"]
                        return answer
                    if response.status != 503 or not survives_kill:
                        raise click.ClickException(f"{model}: {response.status} {(await response.text())[:500]}")
                refused.append(model)
                await asyncio.sleep(float(response.headers["Retry-After"]))  # the next engine takes over a minute

        async def ask_all(survives_kill: bool = False) -> list[str]:
            return list(await asyncio.gather(*(ask(chat, survives_kill) for chat in chats)))

        async def ask_late(idx: int) -> str:
            make_late(adapters / chats[idx % len(chats)][0], adapters / f"late-{idx}", idx)
            return await ask((f"late-{idx}", chats[idx % len(chats)][1]))

        plain = await asyncio.gather(*(ask(chat, speculation={"mode": "off"}) for chat in chats))
        before = await ask_all()
        num_same = sum(one == other for one, other in zip(plain, before, strict=True))
        click.echo(f"{num_same} of {len(chats)} chats say the same with drafts and without")
        start = time.perf_counter()
        beside, _ = await asyncio.gather(ask_all(), asyncio.gather(*map(ask_late, range(num_late))))
        joined_s = time.perf_counter() - start
        num_same_beside = sum(one == other for one, other in zip(before, beside, strict=True))
        click.echo(f"{num_late} adapters joined beside as many chats, all answered after {joined_s:.1f} s")
        pid = server.engine_pid()
        assert pid is not None, "a server that answers has an engine"
        answering = asyncio.create_task(ask_all(survives_kill=True))
        await asyncio.sleep(0.1)  # they are in flight
        start = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        back_s = await asyncio.wait_for(healthy_again(session, server.url), START_S) - start
        after = await answering
        num_same_after = sum(one == other for one, other in zip(before, after, strict=True))
        click.echo(f"killed, back after {back_s:.1f} s; {num_same_after} of {len(chats)} chats in flight say the same")
    return {
        "same_with_drafts": num_same, "same_beside_late": num_same_beside, "joined_s": round(joined_s, 1),
        "back_s": round(back_s, 1), "same_after_kill": num_same_after,
        "refused_after_kill": len(refused),
    }  # fmt: skip


def make_late(source: Path, target: Path, idx: int) -> None:
    """A copy with somewhat other weights, so another adapter, and without the head that belongs to `source`."""
    part = target.with_name(f".{target.name}")  # no name of an adapter until it is whole
    shutil.copytree(source, part, ignore=shutil.ignore_patterns(*HEADS))
    weights = part / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(weights)
    first = min(tensors)
    tensors[first] = tensors[first] * (1 + 0.001 * (idx + 1))
    safetensors.torch.save_file(tensors, weights)
    part.rename(target)


def bench_serve(
    url: str, names: Sequence[str], concurrency: Sequence[int], duration: int, max_tokens: int, output: Path
) -> dict[str, Mapping[str, Any]]:
    """`specserve bench serve` as a user runs it; by level its rate and latencies. Raises where a request failed."""
    command = [sys.executable, "-m", "specserve.cli", "bench", "serve", "--url", url, "--adapters", ",".join(names)]
    command += ["--concurrency", ",".join(map(str, concurrency)), "--duration", str(duration)]
    command += ["--max-tokens", str(max_tokens), "--warmup", str(2 * len(names)), "--output", str(output)]
    for name in names:
        if demo_rows(name).is_file():
            command += ["--data", f"{name}={demo_rows(name)}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    click.echo(done.stdout)
    if done.returncode:
        raise click.ClickException(f"specserve bench serve ended with {done.returncode}: {done.stderr[-1000:]}")
    levels: dict[str, Mapping[str, Any]] = {}
    for level in json.loads(output.read_text(encoding="utf-8"))["levels"]:
        if level["errors"]:
            raise click.ClickException(f"specserve bench serve: {level['error_examples']}")
        fields = ("num_ok", "output_tokens_per_s", "ttft_ms", "inter_token_ms")
        levels[str(level["concurrency"])] = {field: level[field] for field in fields}
    return levels


if __name__ == "__main__":
    main()
