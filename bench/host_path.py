"""How long does a device that runs by itself wait for the host between two steps, and what does the host do then?

The real engine, from its scheduler to encoded events, on a stand-in device (`stand_in_device.py`) that takes --step-ms
and --row-us a step in the background. Time is the CPU time of the host's thread and what it waits for that device, so
that what else the machine does changes little. Sequences of three adapters, as many as given at any time, say what
their tasks' held-out answers say; heads guess right at --head-rate. Printed for each case: idle time of the device
between steps (`gap`), the host's time in it and beside the device's, microseconds a sequence by phase, and tokens a
second as a share of those without drafts, prompts included. No GPU is needed, none is used.

    python -m bench.host_path [--sequences 1,8,32,128,256] [--cases off,heads,all,grammar,stop,logprobs] [--rounds 3]
"""

from __future__ import annotations

import gc
import itertools
import os
import random
import statistics
from collections.abc import Sequence
from typing import Any

import click
import torch

from specserve.compute.sampler import token_logprobs
from specserve.config import EngineConfig
from specserve.drafters.protocol import DraftSource
from specserve.engine import commits
from specserve.engine.engine import Engine, Event
from specserve.engine.step_profile import StepProfile
from specserve.frames import encode_frames
from specserve.messages import (
    Delta,
    GenerateRequest,
    GrammarSpec,
    RequestFailed,
    SamplingParams,
    Speculation,
    TokenLogprobs,
)
from specserve.model.config import ModelConfig

from . import common, options
from .stand_in_device import DeviceTimes, Script, StandIn
from .tasks import DEMO_TASKS, BaseModel, demo_adapter, demo_rows, demo_schema, in_turn

CASES = ("off", "heads", "all", "grammar", "stop", "logprobs")
MAX_TOKENS = 160
ROWS_OF_A_TASK = 64
FEW_LOGITS = 1024


class Bench:
    """One engine on a stand-in device, measured case by case."""

    def __init__(self, base: BaseModel, times: DeviceTimes, head_rate: float, most: int):
        self.script = Script(head_rate, ModelConfig.from_dir(base.path).vocab_size)
        self.stand_in = StandIn(times, self.script)
        self.engine = stand_in_engine(base, self.stand_in, most)
        hashes = [self.engine.load_adapter(task, demo_adapter(task)).content_hash for task in DEMO_TASKS]
        examples = [base.examples(demo_rows(task), ROWS_OF_A_TASK) for task in DEMO_TASKS]
        grammars = [_grammar_of(task) for task in DEMO_TASKS]
        self._answers = (
            (hashes[idx], grammars[idx], example.prompt, [t for t in example.completion if t not in base.eos])
            for idx, example in in_turn(examples)
        )
        self._ids = itertools.count()
        self._num_tokens = 0
        self._spoken: set[str] = set()  # requests that have given a token
        self._sources = self.engine.proposer.sources.of
        self._profile = StepProfile(self.engine)
        self._profile.clock(self, "_write_and_encode", "events")
        self._profile.clock(self, "_refill", "new requests")
        commits.token_logprobs = few_logprobs  # type: ignore[assignment]
        gc.collect()
        gc.freeze()  # as the engine's process

    def run(self, case: str, num: int, num_steps: int, num_warm: int) -> dict[str, Any]:
        """`num_steps` steps of `num` sequences; who ends is followed by another.

        Counted from `num_warm` steps after each has given a token. The first ones end at random places, so that ends
        and prompts lie apart from the beginning on.
        """
        self.engine.proposer.sources.of = (  # type: ignore[method-assign]
            self._only_heads if case == "heads" else self._sources
        )
        rng = random.Random(num)
        self._spoken.clear()
        for _ in range(num):
            self._add(case, rng.randint(1, MAX_TOKENS))
        held: list[Event] = []
        start: float | None = None  # when counting began
        left, warm_left = num_steps, num_warm
        while left:
            if start is None and len(self._spoken) >= num:
                warm_left -= 1
                if warm_left < 0:
                    self._profile.start()
                    self.stand_in.clock.idle_s = []
                    self._num_tokens = 0
                    start = self.stand_in.clock.now
            if not self.engine.has_work():
                self._refill(case, num)
            events = self.engine.step(lambda events=held: self._while_running(events, case, num))
            held = events
            if start is not None:
                left -= 1
            if failed := next((event for event in events if isinstance(event, RequestFailed)), None):
                raise click.ClickException(f"a request failed: {failed.error.message}")
        assert start is not None
        result = self._figures(self.stand_in.clock.now - start, num, num_steps, self._num_tokens)
        self._write_and_encode(held)
        for request_id in [seq.request_id for seq in self.engine.scheduler.sequences()]:
            self.engine.abort(request_id)
        while self.engine.has_work():  # what was queued ahead
            self.engine.step()
        return result

    def _while_running(self, events: list[Event], case: str, num: int) -> None:
        """What the engine's process does while a step runs: tell of the step before, and hear of new requests."""
        self._write_and_encode(events)
        self._refill(case, num)

    def _refill(self, case: str, num: int) -> None:
        for _ in range(num - len(self.engine.scheduler.sequences())):
            self._add(case)

    def _write_and_encode(self, events: list[Event]) -> None:
        self.engine.write_events()
        if events:
            encode_frames(events)
        for event in events:
            if isinstance(event, Delta):
                self._num_tokens += len(event.token_ids)
                self._spoken.add(event.request_id)

    def _figures(self, seconds: float, num: int, num_steps: int, tokens: int) -> dict[str, Any]:
        phases, idle_s = self._profile.phases(), self.stand_in.clock.idle_s
        del phases["wait"]
        host_s, gap_s = sum(phases.values()), sum(idle_s)
        return {
            "gap_ms": round(1e3 * statistics.median(idle_s), 3),
            "mean_gap_ms": round(1e3 * gap_s / num_steps, 3),
            "host_ms": round(1e3 * host_s / num_steps, 3),
            "overlapped_ms": round(1e3 * max(0.0, host_s - gap_s) / num_steps, 3),
            "host_us_per_seq": round(1e6 * host_s / num_steps / num, 1),
            "us_per_seq": {name: round(1e6 * s / num_steps / num, 1) for name, s in phases.items()},
            "tokens_per_step": round(tokens / num_steps, 1),
            "tokens_per_s": round(tokens / seconds),
        }

    def _add(self, case: str, max_tokens: int = MAX_TOKENS) -> None:
        adapter_hash, grammar, prompt, answer = next(self._answers)
        request_id = f"{case}-{next(self._ids)}"
        self.script.tokens[request_id] = answer
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=0.0,
            ignore_eos=True,
            stop=["\n\n\n\n"] if case == "stop" else [],
            logprobs=5 if case == "logprobs" else None,
            detokenize=case == "stop",  # as the server asks: it writes the other texts itself
        )
        self.engine.add_request(
            GenerateRequest(
                request_id,
                prompt,
                sampling,
                adapter_hash=adapter_hash,
                speculation=Speculation(mode="off" if case in ("off", "stop", "logprobs") else "auto"),
                grammar=grammar if case == "grammar" else None,
            )
        )

    def _only_heads(self, request: GenerateRequest) -> list[DraftSource]:
        return [source for source in self._sources(request) if source.source == "head"]


def stand_in_engine(base: BaseModel, stand_in: StandIn, most: int) -> Engine:
    """An engine for `most` sequences at a time on the stand-in device."""
    os.environ["TRITON_INTERPRET"] = "1"  # the CUDA path's parts on a CPU; nothing is launched
    config = EngineConfig(
        model=str(base.path),
        device="cpu",
        kernels="triton",
        max_num_seqs=most,
        max_batched_tokens=2048,  # the defaults of a GPU
        max_prefill_rows=1024,
        max_waiting=100_000,
        max_model_len=2048,
        kv_cache_gib=0.03 * most + 0.1,
    )
    return Engine(config, base.path, stand_in.make_path)  # type: ignore[arg-type]


def _grammar_of(task: str) -> GrammarSpec:
    """What a task's answers keep to: its JSON Schema, or any text."""
    schema = demo_schema(task)
    if schema.exists():
        return GrammarSpec("json_schema", schema.read_text(encoding="utf-8"))
    return GrammarSpec("regex", r"(?s:.*)")


def few_logprobs(logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """As the sampler's, of a few of the vocabulary: on a device the rest would not be the host's time."""
    return token_logprobs(logits[:, :FEW_LOGITS], rows, [token % FEW_LOGITS for token in tokens], num_top)


@click.command(help=__doc__.partition("\n")[0])
@options.model
@options.numbers("--sequences", "1,8,32,128,256")
@click.option("--cases", default=",".join(CASES), show_default=True, help="Of what is measured.")
@options.at_least(10, "--steps", 100, "Steps that count, in each case.")
@options.at_least(0, "--warm-steps", 100, "Steps before these.")
@options.rounds(1)
@click.option("--step-ms", default=1.3, show_default=True, help="What a step takes on the device.")
@click.option("--row-us", default=2.0, show_default=True, help="What each row adds to it.")
@click.option("--head-rate", default=0.8, show_default=True, help="How often a head's guess is right.")
@options.save("host_path", default=False)
def main(
    model: str, sequences: list[int], cases: str, steps: int, warm_steps: int, rounds: int, step_ms: float,
    row_us: float, head_rate: float, save: bool,
) -> None:  # fmt: skip
    chosen = cases.split(",")
    if unknown := sorted(set(chosen) - set(CASES)):
        raise click.UsageError(f"--cases has {', '.join(unknown)}; there are {', '.join(CASES)}")
    run = common.start("host_path", "torch")
    base = BaseModel.load(model)
    times = DeviceTimes(step_ms / 1e3, row_us / 1e6)
    click.echo(f"floor: a step of the device takes {step_ms} ms and {row_us} us a row; no gap is the aim")
    bench = Bench(base, times, head_rate, max(sequences))
    runs: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for num, _, case in itertools.product(sequences, range(rounds), chosen):
        found = bench.run(case, num, steps, warm_steps)
        runs.setdefault((case, num), []).append(found)
        click.echo(
            f"{case:>9} x {num:<4} gap {found['gap_ms']:7.3f} ms  host {found['host_us_per_seq']:7.1f} us a sequence  "
            f"{found['us_per_seq']}  {found['tokens_per_step']} tokens a step, {found['tokens_per_s']} a second"
        )
    figures: dict[str, dict[int, Any]] = {}
    for (case, num), rounds_of in runs.items():
        of_case = figures.setdefault(case, {})
        of_case[num] = sorted(rounds_of, key=lambda found: found["tokens_per_s"])[len(rounds_of) // 2]
        if case != "off" and "off" in chosen:
            pairs = zip(rounds_of, runs["off", num], strict=True)
            ratio = common.spread([one["tokens_per_s"] / off["tokens_per_s"] for one, off in pairs])
            of_case[num]["share_of_off"] = ratio
            click.echo(f"{case:>9} x {num:<4} {ratio['median']:.2f} of the tokens/s without drafts {ratio}")
    settings = {"steps": steps, "rounds": rounds, "step_ms": step_ms, "row_us": row_us, "head_rate": head_rate}
    run.finish({"model": base.name, **settings, "figures": figures}, save)


if __name__ == "__main__":
    main()
