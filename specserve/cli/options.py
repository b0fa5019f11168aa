"""Flags that commands share: one for every field of their settings, and what becomes of them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from .. import settings
from ..config import EngineConfig
from ..renamed_settings import old_setting

SETTINGS_HELP = (
    "Every setting is also an environment variable (SPECSERVE_KV_CACHE_GIB) and a key of the --config file "
    "(kv_cache_gib: 2.0). A flag wins over the variable, the variable over the file."
)
Command = TypeVar("Command", bound=Callable[..., Any])
Config = TypeVar("Config", bound=EngineConfig)


def debug_option(command: Command) -> Command:
    """--debug on every command; `exit_code_of` looks for it itself, as it must also hold for errors in parsing."""
    return click.option("--debug", is_flag=True, expose_value=False, help="Show tracebacks.")(command)


def colour_option(command: Command) -> Command:
    return click.option(
        "--color", type=click.Choice(["auto", "always", "never"]), default="auto", show_default=True,
        help="Shade tokens by their source; auto: on a terminal.",
    )(command)  # fmt: skip


def settings_options(config_type: type[EngineConfig], *, has_argument: bool = True) -> Callable[[Command], Command]:
    """The model argument, if it has one, --config, and a flag for every field of `config_type`."""

    def decorate(command: Command) -> Command:
        for setting in reversed(settings.settings_of(config_type)):
            command = _setting_option(setting)(command)
            if (old := old_setting(setting)) is not None:
                command = _setting_option(old, hidden=True)(command)
        config_file = click.option(
            "--config", "config_file", type=click.Path(path_type=Path), metavar="FILE", help="YAML file of settings."
        )
        command = config_file(command)
        return click.argument("model_argument", metavar="[MODEL]", required=False)(command) if has_argument else command

    return decorate


def _setting_option(setting: settings.Setting, hidden: bool = False) -> Callable[[Command], Command]:
    help_text = setting.description[:1].upper() + setting.description[1:]
    if setting.kind == "bool":
        if setting.default is not None:
            help_text += f"  [default: {'on' if setting.default else 'off'}]"
        return click.option(f"{setting.flag}/--no-{setting.flag[2:]}", setting.name, default=None, help=help_text)
    metavar = {"int": "N", "float": "X", "str": "TEXT", "list": "TEXT", "choice": "|".join(setting.choices)}
    if setting.kind == "list":
        help_text += " (repeat the flag or separate by commas)"
    elif setting.default not in (None, ""):
        help_text += f"  [default: {setting.default}]"
    # Values stay text here: settings.parse checks flags, variables and files alike, with one wording.
    multiple = setting.kind == "list"
    return click.option(
        setting.flag,
        setting.name,
        metavar=metavar[setting.kind],
        multiple=multiple,
        help=help_text,
        hidden=hidden,
        shell_complete=_completion_of(setting),
    )


def _completion_of(setting: settings.Setting) -> Callable[..., list[Any]]:
    """What a shell offers for the value: choices, folders, files."""

    def complete(context: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        if setting.name.endswith(("_dir", "_roots")):
            return [CompletionItem(incomplete, type="dir")]
        if setting.name.endswith("file"):
            return [CompletionItem(incomplete, type="file")]
        return [choice for choice in setting.choices if choice.startswith(incomplete)]

    return complete


def load_settings(config_type: type[Config], params: dict[str, Any]) -> Config:
    """The settings from what `settings_options` put into a command's parameters; other parameters are ignored."""
    if params.get("model_argument") is not None:
        if params["model"] is not None:
            raise click.UsageError("give the model once: as MODEL or as --model")
        params = {**params, "model": params["model_argument"]}
    return settings.load(config_type, params, os.environ, params["config_file"])
