"""Does any answer ever come from weights that its name did not hold, while ten adapters change as they are served?

A server with ten names over a pool of contents (random LoRAs of rank 4 to 128, lookahead LoRAs, one without its head,
one with another's head, two chat templates over equal weights). Workers overwrite, patch, preallocate, truncate,
replace, remove and swap their files, load and unload them; clients ask all of them over three routes, leave, and
freeze; the engine is killed and both processes are stopped for seconds. Every text is compared with the golden one of
what its name held at that time (`history.judge`), or asked for under a grammar that allows it alone. Ends with a quiet
pass over all names, everything given back, and a line in bench/results/churn.jsonl; the exit status is 1 if anything
was wrong. Kills at random end after 55% of the time: the engine's memory is measured after that.

    make churn [ARGS="--minutes 60 --seed 0 --model tiny"]
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import click
from baseline import held

from bench import common
from bench.tasks import read_prompts
from specserve.model.store import resolve_model

from .callers import Prompt, ask_once, body_of
from .changes import SHELF, Adapter, Changer
from .contents import make_contents, tiny_demos
from .faults import ENGINE_TIMEOUT_S, Troublemaker
from .history import BASE, Ask
from .reference import NoReference, read_golden, telling_questions
from .run import Run
from .verdict import failures, summary
from .watch import Server, ServerGone, Watch, num_handles

NUM_NAMES, NUM_ON_SHELF = 10, 2
DEMOS = ("control2json", "debtags", "summary")
SETTLE_S = 120.0


def open_session() -> aiohttp.ClientSession:
    """A connection a request: one that is kept may be closed just as it is used again, by a server that was stopped."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))


async def churn(
    run: Run, server: Server, changer: Changer, num_callers: int, num_changers: int, num_grammar_callers: int
) -> dict[str, Any]:
    """The time of `run.minutes`, then the quiet end; the figures of it. Raises `ServerGone`."""
    watch = Watch(server)
    trouble = Troublemaker(watch, run.disturbances, changer.session)
    gap_s = min(45.0, 60 * run.minutes / 12)
    kills_at_random = run.may_kill and run.kill_every_s is None

    async def change(rng: random.Random) -> None:
        await asyncio.sleep(rng.expovariate(1.0))
        await changer.change_one(rng)

    async def kill_on_time(rng: random.Random) -> None:
        assert run.kill_every_s is not None
        await asyncio.sleep(min(run.kill_every_s, 60 * run.minutes))
        if not run.is_over:
            await trouble.kill_engine(rng)

    async def disturb(rng: random.Random) -> None:
        await asyncio.sleep(rng.expovariate(1 / gap_s))
        may_kill = kills_at_random and time.monotonic() - run.started < 0.55 * 60 * run.minutes
        others = [] if may_kill and not trouble.counts else [trouble.stop_server, trouble.stop_engine]  # a kill first
        await rng.choice([trouble.kill_engine] * 3 * may_kill + others)(rng)

    async with open_session() as session:
        async with session.get(server.url + "/v1/models") as response:
            run.base_name = (await response.json())["data"][0]["id"]
        await changer.load_shelf()
        handles = num_handles(server.pid), num_handles(server.engine_pid() or 0)
        run.started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            background = [
                group.create_task(watch.follow(run.started)),
                group.create_task(watch.sample(session, min(5.0, 60 * run.minutes / 60))),
                group.create_task(report_now_and_then(run)),
            ]
            steps = {f"caller {n}": lambda rng: run.call(session, server.url, rng) for n in range(num_callers)}
            steps |= {f"changer {n}": change for n in range(num_changers)}
            steps |= {
                f"grammar {n}": lambda rng: run.call_forced(session, server.url, rng)
                for n in range(num_grammar_callers)
            }
            if run.kill_every_s is not None:
                steps["killer"] = kill_on_time
            steps |= {"freezer": lambda rng: run.freeze(server.url, rng), "faults": disturb}
            await asyncio.wait([group.create_task(run.repeat(step, worker)) for worker, step in steps.items()])
            left = await settle(server, session)
            before = len(run.faults)
            for adapter in changer.adapters:
                await final_pass(run, adapter.name, session, server.url)
            await final_pass(run, BASE, session, server.url)
            left |= await settle(server, session)
            for task in background:
                task.cancel()
    await asyncio.sleep(2.0)  # connections that we closed
    after = num_handles(server.pid), num_handles(server.engine_pid() or 0)
    engine_memory = watch.longest_engine_memory()
    return {
        "changes": dict(changer.counts.most_common()),
        "disturbances": dict(trouble.counts),
        "recoveries_s": common.spread(trouble.recoveries_s) if trouble.recoveries_s else None,
        "unasked_deaths": watch.unasked,
        "faults_of_the_quiet_pass": len(run.faults) - before,
        "not_given_back": left,
        "more_handles": {"server": after[0] - handles[0], "engine": after[1] - handles[1]},
        "memory": {"server": watch.server_memory.growth(), "engine": engine_memory.growth()},
    }


async def final_pass(run: Run, name: str, session: aiohttp.ClientSession, url: str) -> None:
    """Every prompt once more while nothing changes, long enough after the last change that no grace is left."""
    await asyncio.sleep(max(0.0, (run.timeline(name).times[-1] + run.grace_s + 1) - time.monotonic()))
    for question in run.questions:
        ask = Ask(name, *question)
        body = body_of(ask, run.prompts[ask.prompt_idx], run.base_name, None)
        run.record(ask, await ask_once(session, url, ask, body), "quiet pass")


async def settle(server: Server, session: aiohttp.ClientSession) -> dict[str, float]:
    """What requests hold once nothing runs any more, after at most `SETTLE_S`; empty is right."""
    deadline = time.monotonic() + SETTLE_S
    while True:
        metrics = await server.metrics(session)
        left = held(metrics) if "engine_num_kv_blocks" in metrics else {"metrics": 1.0}
        if not left or time.monotonic() > deadline:
            return left
        await asyncio.sleep(0.5)


async def report_now_and_then(run: Run) -> None:
    while True:
        await asyncio.sleep(60)
        click.echo(f"{(time.monotonic() - run.started) / 60:.0f} min: {dict(run.verdicts)}")


async def main_async(
    run_options: dict[str, Any], model: str, threads: int, work: Path, num_seqs: int, workers: tuple[int, int, int]
) -> tuple[dict[str, Any], list[str]]:
    if model == "tiny":
        from tiny_models import make_tiny_model

        model_dir = make_tiny_model(work / "tiny")
        demos, dtype = tiny_demos(model_dir, work / "demos"), "fp32"
        prompts = [Prompt("The quick brown fox", 12), Prompt("Pack my box with five dozen liquor jugs" * 3, 24)]
    else:
        model_dir = resolve_model(model)
        demos, dtype = [common.ROOT / "examples" / "adapters" / name for name in DEMOS], "auto"
        rows = [read_prompts(task)[0]["prompt"] for task in ("control2json", "debtags")]
        story = "Write a story in which somebody installs these two packages and is surprised."
        prompts = [
            Prompt("Tell me about yourself.", 24),
            Prompt("Write a poem about the sea and the people who live by it.", 16),
            Prompt("\n".join([*rows, story]), 24),
        ]
    click.echo("making the contents, and reading their texts where nothing disturbs them ...")
    contents = await asyncio.to_thread(make_contents, model_dir, demos, work / "contents")
    # A small cache: its pages are all touched within minutes, and growth after that is something else's.
    arguments = [str(model_dir), "--dtype", dtype, "--num-threads", str(threads), "--kv-cache-gib", "0.125"]
    golden = await read_golden(arguments, contents, work / "contents", prompts, work / "quiet.log")
    texts = [
        {"content": c, "route": route, "prompt_idx": idx, "text": text} for (c, route, idx), text in golden.items()
    ]
    (work / "golden.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    long_tokens = 250 if model == "tiny" else 600
    run = Run(
        prompts=prompts,
        long_tokens=long_tokens,
        golden=golden,
        questions=telling_questions(golden, contents),
        faults_file=work / "faults.jsonl",
        **run_options,
    )
    root = work / "adapters"
    (root / SHELF).mkdir(parents=True)
    for idx in range(NUM_NAMES):
        on_shelf = idx >= NUM_NAMES - NUM_ON_SHELF
        folder = root / SHELF / f"name-{idx}-0" if on_shelf else root / f"name-{idx}"
        run.adapters.append(Adapter(f"name-{idx}", folder, is_on_shelf=on_shelf))
    async with open_session() as session:
        changer = Changer("", root, contents, run.adapters, run.disturbances, session, run.note)
        changer.prepare(random.Random(run.seed))
        flags = ["--adapters-dir", str(root), "--max-adapters", "12", "--engine-timeout-s", str(ENGINE_TIMEOUT_S)]
        flags += ["--max-num-seqs", str(num_seqs)]
        server = await Server.start([*arguments, *flags], work / "server.log")
        changer.url = server.url
        gone, figures, code = "", {}, None
        try:
            figures = await churn(run, server, changer, *workers)
        except* ServerGone as group:
            gone = "; ".join(str(error) for error in group.exceptions)
        finally:
            code = await server.stop()
    result = {
        "minutes": round((time.monotonic() - run.started) / 60, 1),
        "requests": run.verdicts.total(),
        "verdicts": dict(run.verdicts.most_common()),
        "statuses": dict(run.statuses.most_common()),
        "refused_changes": changer.num_refused,
        **figures,
        "server_gone": gone or None,
        "exit_status": code,
        "tracebacks_in_log": (work / "server.log").read_text(errors="replace").count("Traceback"),
        "harness_errors": run.num_harness_errors,
    }
    return result, failures(result)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--minutes", type=click.FloatRange(0, min_open=True), default=60, show_default=True)
@click.option("--model", default="", help="Base model that the demo adapters fit; `tiny`: a random one; default: ours.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of contents, requests and changes.")
@click.option("--callers", type=click.IntRange(1), default=6, show_default=True, help="Requests at the same time.")
@click.option("--changers", type=click.IntRange(1, NUM_NAMES - 1), default=3, show_default=True, help="Of adapters.")
@click.option(
    "--grace-s", type=click.FloatRange(0), default=5.0, show_default=True, help="How late a change may count."
)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of the model.")
@click.option("--grammar-callers", type=click.IntRange(0), default=1, show_default=True, help="Beside those.")
@click.option("--num-seqs", type=click.IntRange(1), default=64, show_default=True, help="That the server runs at once.")
@click.option("--leaving", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Clients that go early.")
@click.option(
    "--kill-every-s", type=click.FloatRange(1), help="Kills to the end, at this interval; default: at random."
)
@click.option("--kills/--no-kills", default=True, help="Kill the engine now and then.")
@click.option("--save/--no-save", default=True, help="Append the result to bench/results/churn.jsonl.")
def main(
    minutes: float, model: str, seed: int, callers: int, changers: int, grace_s: float, threads: int,
    grammar_callers: int, num_seqs: int, leaving: float, kill_every_s: float | None, kills: bool, save: bool,
) -> None:  # fmt: skip
    machine = common.hardware()
    click.echo(common.hardware_line(machine))
    work = Path(tempfile.mkdtemp(prefix="churn-"))
    options = {"minutes": minutes, "seed": seed, "grace_s": grace_s, "may_kill": kills}
    options |= {"leaving": leaving, "kill_every_s": kill_every_s}
    workers = callers, changers, grammar_callers
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))  # asyncio ends the server on it
    try:
        result, failed = asyncio.run(main_async(options, model, threads, work, num_seqs, workers))
    except (NoReference, ServerGone) as error:
        raise click.ClickException(f"{error}\n(files are in {work})") from None
    setup = {
        "commit": common.commit(), "versions": common.versions("torch", "aiohttp"), "hardware": machine,
        "model": model or "default", "seed": seed, "callers": callers, "changers": changers, "grace_s": grace_s,
        "threads": threads, "kills": kills, "grammar_callers": grammar_callers, "num_seqs": num_seqs,
        "leaving": leaving, "kill_every_s": kill_every_s,
    }  # fmt: skip
    click.echo(summary(result, failed))
    document = setup | result | {"failed": failed}
    common.report("churn", document, save)
    if failed:
        click.echo(f"what was wrong, and the server's log, are in {work}")
        sys.exit(1)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
