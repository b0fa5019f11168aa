"""`specserve bench`: the engine alone, or a server under load."""

from pathlib import Path
from typing import Any

import click

from ..config import EngineConfig
from ..errors import UserError
from .bench_serve import serve
from .options import SETTINGS_HELP, debug_option, load_settings, settings_options


@click.group()
def bench() -> None:
    """Measure the engine on this machine, or a server under load."""


@bench.command(epilog=SETTINGS_HELP)
@settings_options(EngineConfig)
@click.option("--batch-sizes", default="1,4,8", show_default=True, metavar="N,N", help="Requests at the same time.")
@click.option("--max-tokens", type=click.IntRange(2), default=64, show_default=True, help="Output per request.")
@click.option("--rounds", type=click.IntRange(1), default=3, show_default=True, help="Interleaved repetitions.")
@click.option(
    "--adapters-dir",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Requests take turns over its adapters; default: none.",
)
@click.option(
    "--profile",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Write traces (chrome://tracing, Perfetto), FILE named by batch size and drafts, and print tables by phase.",
)
@debug_option
def offline(**params: Any) -> None:
    """Tokens per second of the engine alone, with and without drafts, at several batch sizes."""
    config = load_settings(EngineConfig, params)
    from ..compute.device_choice import choose_device, with_defaults
    from .bench_offline import offline as run_offline

    config = with_defaults(config, choose_device(config))
    assert config.max_num_seqs is not None
    try:
        batch_sizes = [int(size) for size in params["batch_sizes"].split(",")]
    except ValueError:
        batch_sizes = []
    if not batch_sizes or not all(1 <= size <= config.max_num_seqs for size in batch_sizes):
        raise UserError(
            f"--batch-sizes {params['batch_sizes']!r} is not a list of whole numbers from 1 to {config.max_num_seqs} "
            "(--max-num-seqs)"
        )
    run_offline(config, batch_sizes, params["max_tokens"], params["rounds"], params["adapters_dir"], params["profile"])


bench.add_command(serve)
