"""The `specserve` command: flags to settings, errors to one line on stderr, each command's work elsewhere.

Exit codes: 0 done, 1 a check found problems or a bug of ours, 2 the user can fix it, 130 interrupted. Nothing heavy is
imported before a command runs, so that `--help` and a typing mistake answer at once.
"""

import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from .. import __version__
from ..config import ServeConfig
from ..errors import UserError
from .bench import bench
from .curve import curve
from .distill import distill
from .grouped_help import GroupedCommands
from .label import label
from .leaderboard import leaderboard
from .options import SETTINGS_HELP, debug_option, load_settings, settings_options
from .prompts import prompts
from .ray import ray
from .refit import refit
from .route import route
from .store import store
from .sweep import sweep
from .synthesize import synthesize
from .teacher_cache import teacher_cache
from .train import evaluate, train
from .with_engine import batch, chat, generate

DEBUG_ENV = "SPECSERVE_DEBUG"
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 120}


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script."""
    sys.exit(exit_code_of(sys.argv[1:] if argv is None else argv))


def exit_code_of(argv: Sequence[str]) -> int:
    """Run a command line and return its exit code; prints errors, raises nothing unless debugging is on."""
    debug = "--debug" in argv or os.environ.get(DEBUG_ENV, "0") not in ("", "0")
    try:
        result = cli.main(args=list(argv), prog_name="specserve", standalone_mode=False)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except UserError as error:
        if debug:
            raise
        return _fail(str(error), 2)
    except click.exceptions.NoArgsIsHelpError as error:  # a command's name alone
        print(error.format_message(), file=sys.stderr)
        return 2
    except click.ClickException as error:
        hint = f" (see `{error.ctx.command_path} --help`)" if isinstance(error, click.UsageError) and error.ctx else ""
        return _fail(f"{error.format_message()}{hint}", 2)
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:  # the reader of our output left, as in `specserve generate | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if debug:
            raise
        return _fail(f"internal error, please report it: {type(error).__name__}: {error}; --debug shows where", 1)


def _fail(message: str, code: int) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return code


@click.group(cls=GroupedCommands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="specserve")
@debug_option
def cli() -> None:
    """Serve many task LoRAs of one language model, several times faster through exact speculation."""


@cli.command(epilog=SETTINGS_HELP)
@settings_options(ServeConfig)
@click.option(
    "--leaderboard",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Show the board of `specserve leaderboard` at /leaderboard/.",
)
@debug_option
def serve(leaderboard: Path | None, **params: Any) -> None:
    """Serve MODEL over HTTP with the OpenAI API.

    MODEL is a Hugging Face directory, a .gguf file or a hub id; without it, SmolLM2-135M-Instruct is used.
    """
    config = load_settings(ServeConfig, params)
    if config.reads_again:
        # Until there is somebody to hear it: there is nothing older to replace, and the import takes half a second.
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    from ..server.run import serve as run_server

    if leaderboard is None:
        run_server(config)
        return
    from ..leaderboard.site import LeaderboardSite

    run_server(config, LeaderboardSite(leaderboard).page)


@cli.command(epilog=SETTINGS_HELP)
@settings_options(ServeConfig)
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@debug_option
def doctor(as_json: bool, **params: Any) -> int:
    """Check what `specserve serve` with the same MODEL and settings needs here; a line each, and the fix.

    Exit code 1 if something needed is missing. Downloads nothing.
    """
    config = load_settings(ServeConfig, params)
    from ..terminal import wants_colour
    from .doctor import doctor as examine

    return examine(config, sys.stdout, as_json=as_json, has_colour=wants_colour(sys.stdout))


@cli.command()
@click.argument("model", required=False, default="")
@click.option("--revision", help="Hub revision.")
@click.option("--quiet", is_flag=True, help="Print nothing but the directory.")
@debug_option
def pull(model: str, revision: str | None, quiet: bool) -> None:
    """Download MODEL (default: SmolLM2-135M-Instruct), convert it if it must be, and print its directory."""
    from ..model.store import resolve_model

    click.echo(resolve_model(model, revision, progress=not quiet))


@cli.group()
def adapters() -> None:
    """Look at LoRA directories."""


@adapters.command("list")
@click.argument("directory", type=click.Path(path_type=Path))
@debug_option
def list_adapters(directory: Path) -> int:
    """List the adapters in DIRECTORY: every folder in it is one. Exit code 1 if one has a problem."""
    from .adapters import list_directory

    return list_directory(directory)


@adapters.command("inspect")
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--model", help="Base model to check the shapes against: directory, hub id, or '' for the default model.")
@click.option("--dtype", type=click.Choice(["auto", "fp32", "bf16", "fp16"]), default="auto", show_default=True)
@click.option("--max-lora-rank", type=click.IntRange(1), default=256, show_default=True)
@debug_option
def inspect_adapter(directory: Path, model: str | None, dtype: str, max_lora_rank: int) -> int:
    """Show what the LoRA in DIRECTORY is, and check it. Exit code 1 if it cannot be served.

    With --model it is read as the server reads it with the same --dtype and --max-lora-rank.
    """
    from .adapters import inspect_directory

    return inspect_directory(directory, model, dtype, max_lora_rank)


@cli.group()
def keys() -> None:
    """Make API keys for `serve --api-keys-file`."""


@keys.command("new")
@click.argument("name")
@click.option("--file", type=click.Path(dir_okay=False, path_type=Path), help="Add the entry to FILE, or make it.")
@click.option("--scope", "scopes", multiple=True, type=click.Choice(["generate", "admin", "metrics"]), help="Repeat.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME", help="Only these (*, ? match); repeat.")
@click.option("--priority", is_flag=True, help="May set the priority of its requests.")
@click.option("--requests-per-minute", type=click.IntRange(1))
@click.option("--tokens-per-minute", type=click.IntRange(1))
@click.option("--max-concurrent", type=click.IntRange(1), help="Requests at a time.")
@debug_option
def new_key(name: str, file: Path | None, **fields: Any) -> None:
    """Make a key for NAME and print it, once; only its hash is kept."""
    from .keys import make_key

    make_key(
        name, file, {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items() if value}
    )


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@debug_option
def completion(shell: str) -> None:
    """Print what makes SHELL complete `specserve`: commands, flags, and values where they are known.

    \b
    bash:  eval "$(specserve completion bash)"               in ~/.bashrc
    zsh:   eval "$(specserve completion zsh)"                in ~/.zshrc
    fish:  specserve completion fish | source                in ~/.config/fish/config.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None, shell
    click.echo(kind(cli, {}, "specserve", "_SPECSERVE_COMPLETE").source())


for each in (
    *(generate, chat, batch, ray),
    *(prompts, distill, synthesize, label, teacher_cache),
    *(train, evaluate, refit, sweep, curve, leaderboard),
    *(route, store, bench),
):
    cli.add_command(each)
