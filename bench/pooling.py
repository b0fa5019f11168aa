"""Do adapters that pool keep up, and are they any good?

Speed: vectors of texts of one length under several LoRAs in one batch, against transformers + peft with the same
adapters, in turns, with the largest difference between the two, and of each from fp32 for that text; 2 times is wanted.
`--peer vllm` instead: against vLLM's CPU build without LoRA and with them (its python: --vllm-python, or what
`bench.peers --setup` made); 1 is wanted.

`--quality search`: the search adapter, the base model without it, BM25 (rank-bm25) and all-MiniLM-L6-v2 (if its package
is there) search the same documents for held-out lines, and with --reranker a re-ranker orders the adapter's first 20
anew. `--quality rerank`: BM25's first 20 by the re-ranker. `--quality tags`: debtags as one classification pass against
the adapter that writes them as JSON with drafts (F1 over the same labels; texts a second, in turns: 20x is wanted).

    python -m bench.pooling [--peer transformers|vllm] [--batch 32] [--tokens 128] [--rounds 5] [--dtype bf16|fp32]
    python -m bench.pooling --quality search|rerank|tags [--adapter DIR] [--data DIR] [--rows 300] [--corpus-rows 300]
"""

from __future__ import annotations

from pathlib import Path

import click

from . import common, options
from .peers import vllm_cpu
from .pooling_quality import measure_rerank, measure_search
from .pooling_speed import DTYPES, measure_speed, measure_vllm
from .pooling_tags import measure_tags
from .tasks import EXAMPLES, BaseModel, demo_adapter

QUALITIES = ("search", "rerank", "tags")


@click.command(help=__doc__.partition("\n")[0])
@options.model
@click.option("--quality", type=click.Choice(QUALITIES), help="What an adapter is worth, instead of speed.")
@click.option("--peer", type=click.Choice(["transformers", "vllm"]), default="transformers", show_default=True)
@click.option("--vllm-python", envvar="SPECSERVE_BENCH_VLLM_PYTHON", help="Python of an environment with vLLM.")
@options.at_least(1, "--batch", 32, "Texts at a time.")
@options.at_least(1, "--tokens", 128, "Of each text.")
@options.rounds(5)
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bf16", show_default=True)
@options.at_least(1, "--rows", 300, "Held-out rows, at most.")
@click.option("--adapter", type=options.ADAPTER, help="Of --quality; default: the demo of that name.")
@click.option("--reranker", type=options.ADAPTER, help="Of --quality search: orders the adapter's first 20 anew.")
@click.option("--data", type=options.ADAPTER, help="Folder of rows; default: examples/data.")
@options.at_least(0, "--corpus-rows", 300, "Training rows whose documents are searched, too.")
@options.save("pooling")
def main(
    model: str, quality: str | None, peer: str, vllm_python: str | None, batch: int, tokens: int, rounds: int,
    dtype: str, rows: int, adapter: Path | None, reranker: Path | None, data: Path | None, corpus_rows: int, save: bool,
) -> None:  # fmt: skip
    python = vllm_cpu.find(vllm_python)
    if peer == "vllm" and quality is None and python is None:
        raise click.UsageError("--peer vllm: no environment; make one by bench.peers --setup, or give --vllm-python")
    run = common.start("pooling", "torch", "transformers", "peft")
    base = BaseModel.load(model)
    common.print_floor(base.path)
    data = data or EXAMPLES / "data"
    if quality == "search":
        figures = measure_search(base, adapter or demo_adapter("search"), reranker, data, rows, corpus_rows)
    elif quality == "rerank":
        figures = measure_rerank(base, adapter or demo_adapter("rerank"), data, rows, corpus_rows)
    elif quality == "tags":
        figures = measure_tags(base, adapter or demo_adapter("tags"), data, rows, rounds)
    elif peer == "vllm":
        assert python is not None
        figures = measure_vllm(base, python, batch, tokens, rounds, dtype)
    else:
        figures = measure_speed(base, batch, tokens, rounds, dtype)
        click.echo(f"ratio {figures['ratio']}, largest difference {figures['largest_difference']}")
    asked = quality or ("speed" if peer == "transformers" else f"speed against {peer}")
    run.finish({"asked": asked, "model": base.name, **figures}, save)


if __name__ == "__main__":
    main()
