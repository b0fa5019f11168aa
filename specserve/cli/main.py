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
from ..config import EngineConfig, ServeConfig
from ..errors import UserError
from .bench_serve import serve as bench_serve
from .curve import curve
from .distill import distill
from .grouped_help import GroupedCommands
from .label import label
from .leaderboard import leaderboard
from .options import SETTINGS_HELP, colour_option, debug_option, load_settings, settings_options
from .prompts import prompts
from .ray import ray
from .refit import refit
from .route import route
from .store import store
from .sweep import sweep
from .synthesize import synthesize
from .teacher_cache import teacher_cache
from .train import evaluate, train

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
@settings_options(EngineConfig)
@click.option("-p", "--prompt", metavar="TEXT", help="The prompt; without it, standard input is read.")
@click.option("--prompt-file", type=click.Path(path_type=Path), metavar="FILE", help="Read the prompt from FILE.")
@click.option("--adapter", type=click.Path(path_type=Path), metavar="DIR", help="LoRA directory to use.")
@click.option("--chat/--raw", default=None, help="Apply the chat template or not.  [default: if there is one]")
@click.option("--system", metavar="TEXT", help="System message; only with the chat template.")
@click.option("--max-tokens", type=click.IntRange(1), default=256, show_default=True, help="Longest output.")
@click.option("--temperature", type=click.FloatRange(0, 100), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--top-k", type=click.IntRange(0), default=0, show_default=True, help="0 is off.")
@click.option("--stop", metavar="TEXT", multiple=True, help="End before this text; may be repeated.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True)
@click.option("--ignore-eos", is_flag=True, help="Go on to --max-tokens.")
@click.option("--trace", is_flag=True, help="Shade each token by what drafted it, and print a legend.")
@click.option("--rejected", is_flag=True, help="With --trace: show wrong drafts as well, struck through.")
@colour_option
@debug_option
def generate(**params: Any) -> None:
    """Generate from one prompt, without a server; the text goes to stdout as it comes, the speed to stderr."""
    config = load_settings(EngineConfig, params)
    from .generate import GenerateOptions, generate_text, read_prompt, refuse_prompt_as_model

    if params["prompt"] is None and params["prompt_file"] is None:
        refuse_prompt_as_model(config.model, sys.stdin)
    prompt = read_prompt(params["prompt"], params["prompt_file"], sys.stdin)
    names = GenerateOptions.__struct_fields__
    generate_text(config, prompt, GenerateOptions(**{name: params[name] for name in names}))


@cli.command(epilog=SETTINGS_HELP)
@settings_options(EngineConfig)
@click.option("--url", metavar="URL", help="Talk to the server there, instead of starting an engine.")
@click.option("--api-key", envvar="SPECSERVE_API_KEY", metavar="KEY", help="Key for the server at --url.")
@click.option(
    "--adapters-dir", type=click.Path(path_type=Path), metavar="DIR", help="Every folder in it is an adapter."
)
@click.option("--adapter", metavar="NAME", help="The adapter to begin with.")
@click.option("--system", metavar="TEXT", help="System message.")
@click.option("--max-tokens", type=click.IntRange(1), help="Longest answer.  [default: the room that there is]")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--seed", type=click.IntRange(-(2**63), 2**63 - 1), help="Of answers that are sampled.")
@colour_option
@click.option("--rejected", is_flag=True, help="Show wrong drafts as well, struck through.")
@click.option("--history/--no-history", default=True, help="Keep the lines that were typed.  [default: on]")
@debug_option
def chat(**params: Any) -> int:
    """Chat with MODEL and its adapters, or with a server; tokens are shaded by who guessed them.

    On a terminal /help lists what else may be typed. From a pipe, every line is a message; answers go to stdout.
    """
    from .chat_command import ChatFlags
    from .chat_command import chat as run_chat

    config = _settings_without_server(params)
    return run_chat(config, ChatFlags(**{name: params[name] for name in ChatFlags.__struct_fields__}))


def _settings_without_server(params: dict[str, Any]) -> EngineConfig | None:
    """Of the engine that a command starts; None where it talks to the server at --url, which has its own."""
    if params["url"] is None:
        return load_settings(EngineConfig, params)
    given = [name for name in EngineConfig.__struct_fields__ if params[name] not in (None, ())]
    if params.get("model_argument") or params["adapters_dir"] or given:
        what = "MODEL" if params.get("model_argument") else "--" + (given or ["adapters_dir"])[0].replace("_", "-")
        raise click.UsageError(f"--url is for a server that runs, which has a model and settings; leave out {what}")
    return None


@cli.command(epilog=SETTINGS_HELP)
@click.argument("source", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.argument("target", metavar="OUT.jsonl", type=click.Path(path_type=Path))
@settings_options(EngineConfig, has_argument=False)
@click.option("--url", metavar="URL", help="Run the rows as batches of the server there, instead of an engine here.")
@click.option("--api-key", envvar="SPECSERVE_API_KEY", metavar="KEY", help="Key for the server at --url.")
@click.option(
    "--window", default="24h", show_default=True, metavar="TIME", help="With --url: how long the server may take."
)
@click.option(
    "--adapters-dir", type=click.Path(path_type=Path), metavar="DIR", help="Every folder in it is an adapter."
)
@debug_option
def batch(source: Path, target: Path, **params: Any) -> int:
    """Answer every row of IN.jsonl, as OpenAI's batches have them, into OUT.jsonl.

    The model is --model, or the default one, in an engine that this command starts; with --url it is a server's, where
    the rows run behind all other requests. After a crash or Ctrl-C the same command goes on where it was: what is done
    is kept in OUT.jsonl.progress until OUT.jsonl is whole. Exit code 1 if a row failed.
    """
    from .batch import BatchFlags
    from .batch import batch as run_batch

    config = _settings_without_server(params)
    flags = BatchFlags(**{name: params[name] for name in BatchFlags.__struct_fields__})
    return run_batch(config, flags, source, target)


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


cli.add_command(train)
cli.add_command(evaluate)
cli.add_command(refit)
cli.add_command(sweep)
cli.add_command(distill)
cli.add_command(leaderboard)
cli.add_command(route)
cli.add_command(synthesize)
cli.add_command(prompts)
cli.add_command(curve)
cli.add_command(ray)
cli.add_command(label)
cli.add_command(teacher_cache)
cli.add_command(store)


@cli.group()
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


bench.add_command(bench_serve)
