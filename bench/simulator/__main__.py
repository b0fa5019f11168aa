"""What do users of other adapters feel of a burst, and who pays for it: first come first served, or the engine's order?

Traces through the engine's own scheduler, KV blocks and adapter places on a simulated clock (`replica`), a step taking
what the newest validation measured (`bench.simulator.validate`). Loads are shares of what the server can serve of
equal adapters, which is printed first. Both orders get the same requests:

- burst: half load, Zipf over all adapters but one, for which 500 requests come within a second
- callers: 0.3 of the load, Zipf over all adapters, and such a burst by another caller for the most popular of them
- distinct: 0.9 of the load, each request for another adapter, all in turn: places and reading decide
- popular: 1.1 times what can be served, Zipf: the most popular adapters ask for more than their share
- priorities: 0.3 of the load urgent, with a deadline of 10 s, and 1.0 batch of a worse priority, over adapters that are
  all in memory; first come first served knows neither priority nor deadline
- priorities, many: the same over all adapters, which wait for places by priority, too

    python -m bench.simulator [--adapters 1000] [--places 32] [--requests 3000] [--plot docs/scheduling.png]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import click

from specserve.schedule.waiting import WaitingQueue

from .. import common, options
from .costs import FittedCosts
from .replica import FirstComeQueue, Replica, config_of
from .run import Result, figures, simulate
from .trace import Lengths, SimulatedRequest, burst, merged, poisson

ORDERS: dict[str, type[WaitingQueue]] = {"first come": FirstComeQueue, "fair": WaitingQueue}
BURST_AT_S, DEADLINE_S = 60.0, 10.0
Trace = list[SimulatedRequest]


def traces(rate: float, num: int, adapters: int, places: int, lengths: Lengths) -> dict[str, Callable[[], Trace]]:
    """By name; `rate` is what the server can serve."""
    everyone = range(adapters)

    def mixed(adapters: range) -> Trace:
        urgent = poisson(
            num * 3 // 13, 0.3 * rate, adapters, "urgent", lengths=lengths, kind="urgent", deadline_s=DEADLINE_S
        )
        batch = poisson(num * 10 // 13, rate, adapters, "batch", lengths=lengths, kind="batch", priority=10)
        return merged(urgent, batch)

    return {
        "burst": lambda: merged(
            poisson(num, 0.5 * rate, everyone[1:], "others", lengths=lengths, kind="others"),
            burst(500, BURST_AT_S, 0, "burst", lengths),
        ),
        "callers": lambda: merged(
            (
                replace(request, kind="others, same adapter" if request.adapter == 0 else "others")
                for request in poisson(num, 0.3 * rate, everyone, "callers", lengths=lengths)
            ),
            burst(500, BURST_AT_S, 0, "burst", lengths, caller="flood"),
        ),
        "distinct": lambda: [*poisson(num, 0.9 * rate, everyone, "distinct", lengths=lengths, in_turn=True)],
        "popular": lambda: [
            replace(request, kind="most popular" if request.adapter == 0 else "others")
            for request in poisson(num, 1.1 * rate, everyone, "popular", lengths=lengths)
        ],
        "priorities": lambda: mixed(everyone[:places]),
        "priorities, many": lambda: mixed(everyone),
    }


@click.command(help=__doc__.partition("\n")[0])
@options.at_least(2, "--adapters", 1000)
@options.at_least(1, "--places", 32, "Adapters in memory.")
@options.at_least(100, "--requests", 3000, "Of each trace, beside a burst.")
@options.at_least(1, "--max-num-seqs", 16)
@options.at_least(1, "--prompt", 120, "Mean tokens.")
@options.at_least(1, "--output", 32, "Mean tokens.")
@options.at_least(0, "--load-ms", 100, "To read an adapter.")
@click.option("--ttft-s", type=float, default=2.0, show_default=True, help="Goodput: first token within.")
@click.option("--token-s", type=float, default=0.2, show_default=True, help="Goodput: mean time between tokens.")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="Write a PNG.")
@options.save("simulator")
def main(
    adapters: int, places: int, requests: int, max_num_seqs: int, prompt: int, output: int, load_ms: int,
    ttft_s: float, token_s: float, plot: Path | None, save: bool,
) -> None:  # fmt: skip
    run = common.start("simulator", "numpy")
    costs, lengths = FittedCosts.saved(), Lengths(prompt, output)
    config = config_of(max_num_seqs, places)

    def replica(order: type[WaitingQueue]) -> Replica:
        return Replica(costs, config, 4096, load_ms / 1e3, order)

    rate = saturated_rate(replica(WaitingQueue), places, lengths)
    click.echo(f"limit: {rate:.2f} requests/s of {places} adapters that are all in memory")
    results: dict[str, dict[str, Result]] = {}
    found: dict[str, dict[str, Any]] = {}
    for name, make in traces(rate, requests, adapters, places, lengths).items():
        results[name], found[name] = {}, {}
        for order, queue in ORDERS.items():
            trace = make()
            if order == "first come":
                trace = [replace(request, priority=0, deadline_s=None) for request in trace]
            results[name][order] = simulate(trace, [replica(queue)])
            found[name][order] = figures(results[name][order], ttft_s, token_s)
            click.echo(_line(name, order, found[name][order]))
    if plot is not None:
        from .plots import write_plot

        write_plot(results, found, plot)
    settings = {
        "adapters": adapters, "places": places, "requests": requests, "max_num_seqs": max_num_seqs, "prompt": prompt,
        "output": output, "load_ms": load_ms, "ttft_s": ttft_s, "token_s": token_s, "rate": round(rate, 3),
    }  # fmt: skip
    run.finish({**settings, "costs": asdict(costs), "scenarios": found}, save)


def saturated_rate(replica: Replica, num_adapters: int, lengths: Lengths) -> float:
    """Requests a second of a server that always has some waiting."""
    for adapter in range(num_adapters):
        replica.hold(adapter)
    trace = [*poisson(500, 1e6, range(num_adapters), "saturated", zipf_exponent=0.0, lengths=lengths)]
    return len(trace) / simulate(trace, [replica]).end_s


def _line(name: str, order: str, found: dict[str, Any]) -> str:
    kinds = "; ".join(
        f"{kind}: TTFT p50 {of['ttft_s']['p50']:.2f}, p99 {of['ttft_s']['p99']:.2f}, max {of['ttft_s']['max']:.1f} s, "
        f"{100 * of['good_share']:.0f}% good{', refused ' + str(of['errors']) if of['errors'] else ''}"
        for kind, of in found["kinds"].items()
    )
    total = sum(of["tokens_per_s"] for of in found["kinds"].values())
    return (
        f"{name}, {order}: {total:.0f} tokens/s, Jain {found['jain']}, {found['loads']} loads, "
        f"{found['requests_a_cpu_minute']} requests a CPU minute\n    {kinds}"
    )


if __name__ == "__main__":
    main()
