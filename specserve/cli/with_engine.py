"""`specserve generate`, `chat` and `batch`: answers from an engine that the command starts.

The last two also ask a server at --url instead, which has a model and settings of its own: these are refused beside it.
"""

import sys
from pathlib import Path
from typing import Any

import click

from ..config import EngineConfig
from .options import SETTINGS_HELP, colour_option, debug_option, load_settings, settings_options


@click.command(epilog=SETTINGS_HELP)
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


@click.command(epilog=SETTINGS_HELP)
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


@click.command(epilog=SETTINGS_HELP)
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
