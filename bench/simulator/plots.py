"""Both orders side by side as one PNG; reads figures, computes none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .run import Result

COLOURS = {"first come": "tab:orange", "fair": "tab:blue"}


def write_plot(results: dict[str, dict[str, Result]], found: dict[str, dict[str, Any]], path: Path) -> None:
    """`results` and `found` by scenario and order."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    over_time, bars = figure.subplots(1, 2)
    for order, result in results["burst"].items():
        others = [o for o in result.outcomes if o.request.kind == "others" and o.first_token_s is not None]
        over_time.plot(
            [o.request.arrival_s for o in others],
            [(o.first_token_s or 0.0) - o.request.arrival_s for o in others],
            ".", markersize=3, alpha=0.5, color=COLOURS[order], label=order,
        )  # fmt: skip
    over_time.set(
        title="burst of 500 for one adapter: requests of the others",
        xlabel="arrival, s", ylabel="time to first token, s", yscale="log",
    )  # fmt: skip
    over_time.legend(markerscale=4)
    rows = [(name, kind) for name, orders in found.items() for kind in next(iter(orders.values()))["kinds"]]
    for idx, order in enumerate(COLOURS):
        values = [found[name][order]["kinds"][kind]["ttft_s"]["p99"] for name, kind in rows]
        places = [place + 0.4 * idx - 0.2 for place in range(len(rows))]
        drawn = bars.barh(places, values, height=0.38, color=COLOURS[order])
        bars.bar_label(drawn, [_label(found[name][order]["kinds"][kind]) for name, kind in rows], padding=3)
    bars.set(
        title="time to first token, 99 of 100 requests within", xlabel="s", xscale="log",
        yticks=range(len(rows)), yticklabels=[name if kind == "all" else f"{name}:\n{kind}" for name, kind in rows],
    )  # fmt: skip
    bars.margins(x=0.3)
    bars.invert_yaxis()
    figure.savefig(path, dpi=110)


def _label(kind: dict[str, Any]) -> str:
    num_failed = sum(kind["errors"].values())
    failed = f", {100 * num_failed / kind['num']:.0f}% refused or late" if num_failed else ""
    return f"{kind['ttft_s']['p99']:.1f}{failed}"
