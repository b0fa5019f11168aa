"""Ways to spread requests over replicas as one PNG; reads figures, computes none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = {
    "random": "tab:orange", "least loaded": "tab:green", "affinity": "tab:blue", "affinity, one copy": "tab:purple",
}  # fmt: skip


def write_plot(found: dict[str, dict[int, dict[str, Any]]], path: Path) -> None:
    """`found` by way and load in percent."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    hits, first, whole = figure.subplots(1, 3)
    for name, by_load in found.items():
        loads = sorted(by_load)
        style = {"marker": "o", "color": COLOURS[name], "label": name}
        hits.plot(loads, [100 * by_load[load]["hit_rate"] for load in loads], **style)
        first.plot(loads, [by_load[load]["ttft_s"]["p99"] for load in loads], **style)
        whole.plot(loads, [by_load[load]["end_to_end_s"]["p99"] for load in loads], **style)
    hits.set(title="requests that find their adapter", ylabel="%", ylim=(0, 100))
    first.set(title="time to first token, 99 of 100 within", ylabel="s", yscale="log")
    whole.set(title="whole answer, 99 of 100 within", ylabel="s", yscale="log")
    for axes in (hits, first, whole):
        axes.set(xlabel="load, % of what can be served")
    hits.legend()
    figure.savefig(path, dpi=110)
