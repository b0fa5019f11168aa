"""One run: what callers do, what they were told, and which of it was wrong."""

from __future__ import annotations

import asyncio
import json
import random
import time
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import click

from .callers import ROUTES, TEXT, Prompt, ask_once, body_of, freeze_once
from .changes import Adapter
from .grammars import forced, judge_forced
from .history import BASE, FAULTS, Ask, Disturbances, Reply, Timeline, Verdict, judge
from .reference import Key
from .watch import ServerGone

NOBODY = "nobody"
MAX_HARNESS_ERRORS = 20
NUM_STATES = 8  # of a name, in the record of a fault
FREEZES_S = (5.0, 20.0, 35.0, 80.0)
NUM_SHOWN = 20  # faults on the console; all are in the file


@dataclass(slots=True)
class Run:
    """One run's options, and what came of it."""

    minutes: float
    seed: int
    grace_s: float
    prompts: list[Prompt]
    long_tokens: int  # of an answer that is not read
    golden: dict[Key, str]
    questions: list[tuple[str, int]]  # (route, prompt)
    faults_file: Path
    kill_every_s: float | None = None  # at random if None
    may_kill: bool = True
    leaving: float = 0.1  # of all requests
    base_name: str = ""
    adapters: list[Adapter] = field(default_factory=list)
    disturbances: Disturbances = field(default_factory=Disturbances)
    started: float = field(default_factory=time.monotonic)
    verdicts: Counter[str] = field(default_factory=Counter)
    statuses: Counter[str] = field(default_factory=Counter)
    faults: list[dict[str, Any]] = field(default_factory=list)
    num_harness_errors: int = 0

    @property
    def is_over(self) -> bool:
        return time.monotonic() > self.started + 60 * self.minutes

    def timeline(self, name: str) -> Timeline:
        if name in (BASE, NOBODY):
            always = Timeline()
            always.set(0.0, BASE if name == BASE else None)
            return always
        return next(adapter.timeline for adapter in self.adapters if adapter.name == name)

    def note(self, fault: dict[str, Any]) -> None:
        """Keep a fault, in the file at once."""
        self.faults.append(fault)
        with self.faults_file.open("a") as file:
            file.write(json.dumps(fault) + "\n")
        if len(self.faults) <= NUM_SHOWN:
            click.echo(f"FAULT {json.dumps(fault)[:1000]}")

    def record(self, ask: Ask, reply: Reply, how: str) -> None:
        timeline = self.timeline(ask.name)
        verdict, why = judge(ask, reply, timeline, self.golden, self.disturbances, self.grace_s)
        self._count(ask, reply, how, verdict, why)

    def _count(self, ask: Ask, reply: Reply, how: str, verdict: Verdict, why: str) -> None:
        timeline = self.timeline(ask.name)
        self.verdicts[verdict] += 1
        self.statuses[f"{reply.status} {reply.code}" if reply.error else str(reply.status)] += 1
        if verdict in FAULTS:
            since = timeline.between(reply.start - 60, reply.end)[-NUM_STATES:]
            held = [f"{'moving to ' * state.is_moving}{state.content}" for state in since]
            self.note(
                {
                    "fault": verdict, "what": why, "how": how, **asdict(ask),
                    "from_s": round(reply.start - self.started, 2), "to_s": round(reply.end - self.started, 2),
                    "status": reply.status, "text": reply.text[:300], "error": reply.error[:300],
                    "whole": reply.is_whole, "cut": reply.is_cut,
                    "held": held, "last_change_s": round(timeline.times[-1] - self.started, 2),
                }
            )  # fmt: skip

    async def repeat(self, step: Callable[[random.Random], Awaitable[None]], worker: str) -> None:
        """`step` until the time is over. Its own mistakes are kept and end the run only when they are many."""
        rng = random.Random(f"{self.seed} {worker}")
        while not self.is_over:
            try:
                await step(rng)
            except ServerGone:
                raise
            except Exception:
                self.num_harness_errors += 1
                self.note({"fault": "harness", "what": f"{worker}: {traceback.format_exc()}"})
                if self.num_harness_errors > MAX_HARNESS_ERRORS:
                    raise

    # -- what callers do

    def pick(self, rng: random.Random, routes: tuple[str, ...] = ROUTES) -> Ask:
        question = rng.choice([one for one in self.questions if one[0] in routes])
        name = rng.choice(self.adapters).name
        if rng.random() < 0.08:
            name = rng.choice([BASE, BASE, NOBODY])
        return Ask(name, *question)

    async def call(self, session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
        ask, is_streamed = self.pick(rng), rng.random() < 0.6
        body = body_of(ask, self.prompts[ask.prompt_idx], self.base_name, rng)
        leave_after, leave_s, is_away = None, None, False
        if rng.random() < self.leaving:
            leave_after, leave_s = (rng.randrange(6), None) if is_streamed else (None, rng.uniform(0.01, 1.0))
        try:
            async with asyncio.timeout(leave_s):
                reply = await ask_once(session, url, ask, body, leave_after, is_streamed)
            self.record(ask, reply, "stream" if is_streamed else "whole")
            is_away = reply.status == 503
        except TimeoutError:
            self.verdicts["left"] += 1
        if is_away:
            await asyncio.sleep(1.0)  # as Retry-After says
        await asyncio.sleep(rng.choice([0.0, 0.0, rng.uniform(0, 1)]))

    async def call_forced(self, session: aiohttp.ClientSession, url: str, rng: random.Random) -> None:
        """Under a grammar of its own."""
        name = rng.choice([BASE, rng.choice(self.adapters).name])
        asked, is_streamed = forced(name or self.base_name, rng), rng.random() < 0.5
        leave_after = rng.randrange(6) if is_streamed and rng.random() < self.leaving else None
        ask, timeline = Ask(name, TEXT, 0), self.timeline(name)
        reply = await ask_once(session, url, ask, asked.body, leave_after, is_streamed)
        verdict, why = judge_forced(asked, ask.name, reply, timeline, self.disturbances, self.grace_s)
        self._count(ask, reply, "grammar", verdict, why)
        await asyncio.sleep(1.0 if reply.status == 503 else rng.uniform(0, 1))

    async def freeze(self, url: str, rng: random.Random) -> None:
        ask = self.pick(rng, (TEXT,))
        frozen_s = rng.choice([s for s in FREEZES_S if s < 30 * self.minutes] or FREEZES_S[:1])
        body = body_of(ask, self.prompts[ask.prompt_idx], self.base_name, rng) | {"max_tokens": self.long_tokens}
        self.record(ask, await freeze_once(url, ask, body, frozen_s), f"frozen for {frozen_s:g} s")
        await asyncio.sleep(rng.uniform(0, 10))
