"""`specserve refit`: flags to what is fitted; the work is in `specserve.training.refit`."""

from pathlib import Path

import click

from .options import debug_option


@click.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--serving-log",
    required=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="What `specserve serve --serving-log DIR` has kept.",
)
@click.option("--model", metavar="MODEL", help="Base model; default: that of the directory's run.yaml.")
@click.option("--key", metavar="NAME", help="Only what was served to the key of this name.")
@click.option("--max-outputs", type=click.IntRange(64), default=4000, show_default=True, help="The newest so many.")
@click.option("--epochs", type=click.IntRange(1), default=8, show_default=True, help="How often each is seen.")
@debug_option
def refit(
    directory: Path, serving_log: Path, model: str | None, key: str | None, max_outputs: int, epochs: int
) -> None:
    """Fit the head of the adapter in DIRECTORY, or of the bare base, to what was served.

    The LoRA stays as it is, and so do all outputs. The new head is written only where it foresees more of outputs that
    were held out than the old one; a server takes it up as it does any changed adapter.
    """
    from ..model.store import resolve_model
    from ..training.refit import refit as fit
    from ..training.run_config import HeadConfig
    from ..training.run_file import RUN_FILE, load_run

    config = load_run(directory / RUN_FILE, [], {}) if (directory / RUN_FILE).is_file() else None
    name = model if model is not None else config.model if config is not None else ""
    head = config.head if config is not None else HeadConfig()
    done = fit(directory, resolve_model(name), serving_log, key=key, max_outputs=max_outputs, epochs=epochs, head=head)
    before = f"{done.before:.2f} before" if done.before is not None else "there was no head"
    gain = f"{done.after:.2f} ({before})"
    click.echo(f"{done.num_outputs} outputs; tokens a forward by the head alone, on those held out: {gain}")
    click.echo(
        f"the head in {directory} is replaced"
        if done.is_written
        else f"the head in {directory} is left as it was: the new one is no better"
    )
