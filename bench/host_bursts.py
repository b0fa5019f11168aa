"""Is `auto` ever slower than `off` where requests come in bursts: prompts first, then decoding, then ever fewer?

The pattern of `gpu_serving` without a GPU: the engine on a stand-in device (`stand_in_device.py`), the demo adapters'
held-out prompts, as many at a time as given until twice as many are answered, without drafts and with, in turn. Time is
that device's and the CPU time of the host's thread, times --host-factor for a slower one.

    python -m bench.host_bursts [--loads 1,8,32,64,128,256] [--rounds 4] [--host-factor 2]
"""

from __future__ import annotations

import gc
import itertools
import json

import click

from specserve.model.config import ModelConfig

from . import common, options
from .gpu_serving import of_load
from .host_path import stand_in_engine
from .stand_in_device import DeviceTimes, Script, StandIn
from .tasks import DEMO_TASKS, BaseModel, demo_adapter, demo_rows, in_turn


@click.command(help=__doc__.partition("\n")[0])
@options.model
@options.numbers("--loads", "1,8,32,64,128,256", "Requests at a time.")
@options.rounds(4)
@options.at_least(1, "--max-tokens", 200)
@options.at_least(1, "--max-requests", 384, "Of one way and load.")
@click.option("--step-ms", default=1.6, show_default=True, help="What a step takes on the device; an H200's.")
@click.option("--row-us", default=3.6, show_default=True, help="What each row adds to it.")
@click.option("--head-rate", default=0.8, show_default=True, help="How often a head's guess is right.")
@click.option("--host-factor", default=1.0, show_default=True, help="How many times slower the host is.")
@options.save("host_bursts", default=False)
def main(
    model: str, loads: list[int], rounds: int, max_tokens: int, max_requests: int, step_ms: float, row_us: float,
    head_rate: float, host_factor: float, save: bool,
) -> None:  # fmt: skip
    run = common.start("host_bursts", "torch")
    base = BaseModel.load(model)
    times = DeviceTimes(step_ms / 1e3, row_us / 1e6, 0.4e-3, host_factor)
    click.echo(
        f"floor: a step of the device takes {step_ms} ms and {row_us} us a row; auto over off is to be 1 or more"
    )
    stand_in = StandIn(times, Script(head_rate, ModelConfig.from_dir(base.path).vocab_size))
    engine = stand_in_engine(base, stand_in, max(loads))
    hashes = [engine.load_adapter(task, demo_adapter(task)).content_hash for task in DEMO_TASKS]
    examples = [base.examples(demo_rows(task)) for task in DEMO_TASKS]
    gc.collect()
    gc.freeze()  # as the engine's process
    figures = {}
    for size in loads:
        asked = list(itertools.islice(in_turn(examples), min(max_requests, max(12, 2 * size))))
        stand_in.script.tokens = {str(idx): example.completion for idx, (_, example) in enumerate(asked)}
        requests = [(hashes[task], example.prompt) for task, example in asked]
        figures[str(size)] = of_load(engine, requests, size, rounds, max_tokens)
        click.echo(f"{size} at a time: {json.dumps(figures[str(size)])}")
    settings = {
        "rounds": rounds,
        "step_ms": step_ms,
        "row_us": row_us,
        "head_rate": head_rate,
        "host_factor": host_factor,
    }
    run.finish({"model": base.name, **settings, "figures": figures}, save)


if __name__ == "__main__":
    main()
