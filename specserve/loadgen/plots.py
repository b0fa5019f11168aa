"""Latency and throughput against load, as two PNG files; reads figures, computes none."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .report import LevelFigures

LATENCIES = (
    ("ttft_ms", "time to first token"),
    ("inter_token_ms", "between tokens (share of the gap)"),
    ("inter_chunk_ms", "between chunks"),
    ("end_to_end_ms", "end to end"),
)


def write_plots(levels: Sequence[LevelFigures], directory: Path) -> list[Path]:
    """Write latency.png and throughput.png into `directory`, which is made if it is missing."""
    from matplotlib.figure import Figure  # late: half a second; Figure needs no display and no pyplot state

    directory.mkdir(parents=True, exist_ok=True)
    closed = levels[0].concurrency is not None
    x = [level.concurrency if closed else level.rate_offered for level in levels]
    x_label = "requests at the same time" if closed else "offered requests/s"
    figure = Figure(figsize=(10, 7), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, LATENCIES, strict=True):
        for percentile in ("p50", "p90", "p99"):
            points = [getattr(level, name) for level in levels]
            y = [float("nan") if point is None else getattr(point, percentile) for point in points]
            axes.plot(x, y, marker="o", label=percentile)
        axes.set(title=title, xlabel=x_label, ylabel="ms", ylim=(0, None))
        axes.legend()
    latency = directory / "latency.png"
    figure.savefig(latency, dpi=120)

    figure = Figure(figsize=(10, 4), layout="constrained")
    tokens, requests = figure.subplots(1, 2)
    tokens.plot(x, [level.output_tokens_per_s for level in levels], marker="o")
    tokens.set(title="output", xlabel=x_label, ylabel="tokens/s", ylim=(0, None))
    requests.plot(x, [level.rate_achieved for level in levels], marker="o", label="achieved")
    if not closed:
        requests.plot(x, x, linestyle="--", color="grey", label="offered")
    requests.set(title="requests", xlabel=x_label, ylabel="requests/s", ylim=(0, None))
    requests.legend()
    throughput = directory / "throughput.png"
    figure.savefig(throughput, dpi=120)
    return [latency, throughput]
