"""`specserve train` and `specserve eval`: flags to a run's configuration; the work is in `specserve.training`."""

from pathlib import Path
from typing import Any

import click

from ..errors import UserError
from .options import debug_option

_FLAGS = {
    "data": "data.train",
    "eval_data": "data.eval",
    "output": "output",
    "task": "task",
    "model": "model",
    "max_steps": "optimizer.max_steps",
    "lora_r": "lora.r",
    "adapter": "lora.adapter",
}


@click.command()
@click.argument("run_file", required=False, type=click.Path(path_type=Path))
@click.option("--data", metavar="FILE", help="JSONL of training rows.")
@click.option("--eval-data", metavar="FILE", help="JSONL of held-out rows.")
@click.option("--task", type=click.Choice(["generate", "embed", "rerank", "classify"]), help="Default: generate.")
@click.option("--output", metavar="DIR", help="Where the adapter goes.")
@click.option("--model", help="Base model: directory or hub id; default: specserve's default model.")
@click.option("--max-steps", type=click.IntRange(1), help="Stop after so many steps.")
@click.option("--lora-r", type=click.IntRange(1, 256), help="Rank of the LoRA.")
@click.option("--adapter", metavar="DIR", help="Go on from this PEFT LoRA, with its rank and modules.")
@click.option("--head-only", is_flag=True, help="With --adapter: leave the LoRA as it is and train a head for it.")
@click.option("--base", is_flag=True, help="With --head-only: no LoRA, but a head of the bare base model.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Any setting, as in --set lora.r=32.")
@click.option("--check-data", is_flag=True, help="Only look at the data. Exit code 1 if it has problems.")
@click.option("--dry-run", is_flag=True, help="Only estimate memory and time.")
@click.option("--resume", is_flag=True, help="Go on from the checkpoint in the output directory.")
@debug_option
def train(run_file: Path | None, head_only: bool, base: bool, overrides: tuple[str, ...], **params: Any) -> int:
    """Train a LoRA from RUN_FILE (YAML) or from flags: for answers, together with its lookahead head, or to embed, to
    re-rank or to classify. With --head-only it is a head alone, of an adapter or of the bare base."""
    from ..training.run_file import check_ready, load_run

    if base and not head_only:
        raise UserError("--base goes with --head-only: the base model itself is not trained", param="base")
    flags = {key: params[name] for name, key in _FLAGS.items()}
    flags |= {"lora.frozen": True if head_only else None, "lora.enabled": False if base else None}
    config = load_run(run_file, overrides, flags)
    check_ready(config, writes=not (params["check_data"] or params["dry_run"]))
    if params["check_data"] or params["dry_run"]:
        from ..training.looks import look_at_data, look_at_time

        problems = look_at_data(config) if params["check_data"] else 0
        if params["dry_run"]:
            look_at_time(config)
        return 1 if problems else 0
    from ..training.evaluation.verdict import summary_of
    from ..training.run import train_run

    result = train_run(config, resume=params["resume"])
    if result is None:
        return 0
    if result.was_finished:
        click.echo(f"{result.output} is finished already; there is nothing to resume")
        return 0
    for line in summary_of(result.report) if result.report is not None else ():
        click.echo(line)
    if result.report is None:
        click.echo("nothing was measured: there are no held-out rows (--eval-data FILE)")
    for warning in result.warnings:
        click.echo(f"warning: {warning}", err=True)
    served = f"--adapters-dir {result.output.parent}" if config.lora.enabled else f"--base-head {result.output}"
    serve = f"serve it with `specserve serve {served}`"
    click.echo(
        f"{result.output} is written; see the warnings, then {serve}"
        if result.warnings
        else f"{result.output} is ready: {serve}"
    )
    return 0


@click.command("eval")
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--data", type=click.Path(path_type=Path), metavar="FILE", help="Held-out rows; default: the run's.")
@click.option("--rows", type=click.IntRange(1), help="Only the first so many.")
@click.option("--max-tokens", type=click.IntRange(1), default=512, show_default=True, help="Longest answer.")
@debug_option
def evaluate(directory: Path, data: Path | None, rows: int | None, max_tokens: int) -> None:
    """Measure the adapter in DIRECTORY: its task metric, and of one that answers its speed with and without drafts."""
    from ..training.looks import evaluate_any

    report = evaluate_any(directory, data, rows, max_tokens)
    click.echo((directory / "README.md").read_text(encoding="utf-8").partition("---\n# ")[2])
    click.echo(f"written to {directory / 'report.json'}; {report['rows']} rows")
