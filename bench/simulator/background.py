"""What does a batch cost the requests that run beside it, by their load?

The engine's own scheduler on a simulated clock (`replica`), a step taking what the newest validation measured, so that
no other work of the machine is in the figures; `bench.batch_beside` is the same over HTTP. Requests of equal lengths
arrive as a Poisson process at shares of what the server can serve, which is printed first, with a backlog of rows that
lasts throughout and without one. Ratios are of the same requests, with rows over without; the target is a p99 of whole
requests of at most 1.1.

    python -m bench.simulator.background [--requests 2000] [--loads 10,30,50,70,90]
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import click

from specserve.messages import BACKGROUND_PRIORITY
from specserve.schedule.waiting import WaitingQueue

from .. import common, options
from .__main__ import saturated_rate
from .costs import FittedCosts
from .replica import Replica, config_of
from .run import Result, kind_figures, simulate
from .trace import Lengths, merged, poisson

LATENCIES = ("end_to_end_s", "ttft_s", "token_s")


@click.command(help=__doc__.partition("\n")[0])
@options.at_least(100, "--requests", 2000, "Beside rows, and without.")
@options.numbers("--loads", "10,30,50,70,90", "Percent of what can be served.")
@options.at_least(1, "--max-num-seqs", 16)
@options.at_least(1, "--prompt", 120, "Mean tokens.")
@options.at_least(1, "--output", 32, "Mean tokens.")
@options.save("background")
def main(requests: int, loads: list[int], max_num_seqs: int, prompt: int, output: int, save: bool) -> None:
    run = common.start("background", "numpy")
    costs, lengths = FittedCosts.saved(), Lengths(prompt, output)
    config = config_of(max_num_seqs, 1)

    def replica() -> Replica:
        return Replica(costs, config, 4096, 0.1, WaitingQueue)

    rate = saturated_rate(replica(), 1, lengths)
    click.echo(f"limit: {rate:.2f} requests/s")
    found: dict[int, dict[str, Any]] = {}
    for load in loads:
        found[load] = beside(replica, rate, load / 100, requests, lengths)
        ratios = "; ".join(
            f"{name} p50 {of['p50']:.2f}, p99 {of['p99']:.2f}" for name, of in found[load]["ratios"].items()
        )
        click.echo(f"load {load}%: {ratios}; rows are {100 * found[load]['rows']:.0f}% of what can be served")
    settings = {"requests": requests, "max_num_seqs": max_num_seqs, "prompt": prompt, "output": output}
    run.finish({**settings, "rate": round(rate, 3), "costs": asdict(costs), "figures": found}, save)


def beside(replica: Any, rate: float, load: float, num: int, lengths: Lengths) -> dict[str, Any]:
    """Latencies beside rows over those without, and what rows were served of what can be."""
    requests = [*poisson(num, load * rate, range(1), "requests", lengths=lengths, kind="requests")]
    rows = [
        replace(row, arrival_s=0.0, caller="batch")
        for row in poisson(
            int(1.2 * num / load), rate, range(1), "rows", lengths=lengths, kind="rows", priority=BACKGROUND_PRIORITY
        )
    ]
    last_s = requests[-1].arrival_s
    without, along = simulate(requests, [replica()]), simulate(merged(iter(requests), iter(rows)), [replica()])
    figures = [_of_requests(result) for result in (without, along)]
    ended = [
        one for one in along.outcomes if one.request.kind == "rows" and one.end_s is not None and one.end_s < last_s
    ]
    return {
        "ratios": {
            name: {key: round(figures[1][name][key] / figures[0][name][key], 3) for key in ("p50", "p90", "p99")}
            for name in LATENCIES
        },
        "without": {name: figures[0][name] for name in LATENCIES},
        "rows": round(len(ended) / last_s / rate, 3),
        "num_preemptions": along.replicas[0].scheduler.num_preemptions,
    }


def _of_requests(result: Result) -> dict[str, Any]:
    outcomes = [outcome for outcome in result.outcomes if outcome.request.kind == "requests"]
    return kind_figures(outcomes, result.end_s, 2.0, 0.2)


if __name__ == "__main__":
    main()
