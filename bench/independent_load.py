"""Does `specserve bench serve` see what an independent load generator sees? Puts both tools' files side by side.

Measures nothing itself: reads what `specserve bench serve --output` and guidellm (kind=json) wrote when both put the
same load on one server at the same time, so that both saw the same machine, and appends one line to
bench/results/independent_load.jsonl; docs/load_testing.md has the commands. Compared is what both tools define alike:
throughput over the run, time to first token, time of a request. guidellm's inter-token latency is (last - first) /
(tokens - 1) of a request, given once a token: its mean, not its percentiles, is that of `inter_token_ms` but for the
tokens of first chunks. Of guidellm's requests those count that lie within the time in which bench serve ran: what it
sends while it has the server for itself says nothing about bench serve.

    python -m bench.independent_load --mode "closed, 2" --own OWN.json ... --guidellm GUIDELLM.json ... --ended T ...
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import click

from specserve import __version__
from specserve.loadgen.report import distribution

from . import common, options


@click.command(help=__doc__.partition("\n")[0])
@click.option("--mode", required=True, help="The load in words.")
@click.option("--own", multiple=True, required=True, type=options.FILE, help="A file of bench serve; one a round.")
@click.option("--guidellm", multiple=True, required=True, type=options.FILE, help="A file of guidellm; one a round.")
@click.option("--ended", multiple=True, required=True, type=float, help="Unix time at which bench serve ended.")
@options.save("independent_load")
def main(mode: str, own: tuple[Path, ...], guidellm: tuple[Path, ...], ended: tuple[float, ...], save: bool) -> None:
    if not len(own) == len(guidellm) == len(ended):
        raise click.UsageError("give --own, --guidellm and --ended once for each round")
    ours = [json.loads(path.read_text()) for path in own]
    theirs = [json.loads(path.read_text()) for path in guidellm]
    rounds = {
        "specserve": [own_figures(document) for document in ours],
        "guidellm": [
            guidellm_figures(document, end_s - mine["levels"][0]["duration_s"], end_s)
            for document, mine, end_s in zip(theirs, ours, ended, strict=True)
        ],
    }
    names = list(rounds["specserve"][0])
    medians = {
        tool: {name: statistics.median(r[name] for r in runs) for name in names} for tool, runs in rounds.items()
    }
    ratios = {
        name: common.spread([a[name] / b[name] for a, b in zip(rounds["specserve"], rounds["guidellm"], strict=True)])
        for name in names
    }
    for name in names:
        values = "  ".join(f"{tool} {medians[tool][name]:.1f}" for tool in rounds)
        click.echo(f"{name}: medians {values}; ratio {ratios[name]}")
    fields = {
        "commit": common.commit(),
        "versions": {"specserve": __version__, "guidellm": theirs[0]["metadata"]["guidellm_version"]},
        "hardware": common.hardware(),
    }
    common.report("independent_load", {**fields, "mode": mode, "rounds": rounds, "ratios": ratios}, save)


def own_figures(document: dict[str, Any]) -> dict[str, float]:
    (level,) = document["levels"]
    return {
        "num_ok": level["num_ok"],
        "output_tokens_per_s": level["output_tokens_per_s"],
        "ttft_ms_p50": level["ttft_ms"]["p50"],
        "ttft_ms_p90": level["ttft_ms"]["p90"],
        "inter_token_ms_mean": level["inter_token_ms"]["mean"],
        "end_to_end_ms_p50": level["end_to_end_ms"]["p50"],
        "end_to_end_ms_p90": level["end_to_end_ms"]["p90"],
    }


def guidellm_figures(document: dict[str, Any], start_s: float, end_s: float) -> dict[str, float]:
    (benchmark,) = document["benchmarks"]
    requests = [
        request
        for request in benchmark["requests"]["successful"]
        if start_s <= request["request_start_time"] and request["request_end_time"] <= end_s
    ]
    if not requests:
        raise click.UsageError(f"guidellm has no request between {start_s} and {end_s}; is --ended of this round?")
    tokens = [request["output_tokens"] for request in requests]
    ttft = distribution([request["time_to_first_token_ms"] for request in requests])
    total = distribution([1e3 * request["request_latency"] for request in requests])
    gaps = distribution([request["inter_token_latency_ms"] for request in requests], [num - 1 for num in tokens])
    assert ttft is not None and total is not None and gaps is not None
    return {
        "num_ok": len(requests),
        "output_tokens_per_s": round(sum(tokens) / (end_s - start_s), 3),
        "ttft_ms_p50": ttft.p50,
        "ttft_ms_p90": ttft.p90,
        "inter_token_ms_mean": gaps.mean,
        "end_to_end_ms_p50": total.p50,
        "end_to_end_ms_p90": total.p90,
    }


if __name__ == "__main__":
    main()
