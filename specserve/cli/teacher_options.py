"""Flags that name a teacher, for every command that makes data with one, and the teachers that they mean.

Owns the wording of what is wrong with such a flag, and the question about a provider's terms on a terminal.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from .. import settings
from ..cache_dirs import cache_dir
from ..config import ServeConfig
from ..errors import UserError
from ..strict_json import decode_json
from ..teachers.spec import DEFAULT_CACHE_GIB, FIELDS_HERE, Price, TeacherSpec, parse_spec
from .options import Command

if TYPE_CHECKING:
    from ..teachers.usage import Budget

TEACHER_HELP = (
    "SPEC of a teacher: MODEL@https://HOST/v1 for an endpoint with OpenAI's API; MODEL or MODEL+ADAPTER_DIR for a "
    "directory or hub id that runs here, with 'default' as the default model."
)
_Option = Callable[[Command], Command]


def teacher_options(
    *, many: bool = False, required: bool = True, default: str | None = None
) -> Callable[[Command], Command]:
    """--teacher, once or `many` times, and what goes with it; `teachers_of` and `budget_of` read the parameters."""
    first = click.option(
        "--teacher", "teachers", multiple=True, metavar="SPEC", callback=None if many else _single, required=required,
        default=default and (default,), show_default=True,
        help="Who answers (below)." + (" Repeat for several." if many else ""),
    )  # fmt: skip

    def decorate(command: Command) -> Command:
        for option in reversed((first, *_options())):
            command = option(command)
        return command

    return decorate


def endpoint_options(command: Command) -> Command:
    """The same without --teacher: for a command that names a teacher by a flag of its own."""
    for option in reversed(_options()):
        command = option(command)
    return command


def _single(context: click.Context, param: click.Parameter, value: tuple[str, ...]) -> tuple[str, ...]:
    if len(value) > 1:
        raise click.BadParameter("one teacher is expected here")
    return value


def _options() -> tuple[_Option[Any], ...]:
    count = click.IntRange(1)
    return (
        click.option("--teacher-key-env", "teacher_key_env", multiple=True, metavar="NAME|HOST=NAME",
                     help="Environment variable with the endpoint's key; of several, HOST=NAME for each."),
        click.option("--teacher-price", multiple=True, metavar="IN,OUT|MODEL=IN,OUT",
                     help="Price of a million prompt and answer tokens, of all endpoints or of one model."),
        click.option("--max-cost", type=click.FloatRange(0, min_open=True), metavar="X",
                     help="Stop before more than X would be spent, in the currency of the prices."),
        click.option("--teacher-requests-per-minute", type=count, metavar="N", help="Limit of each endpoint."),
        click.option("--teacher-tokens-per-minute", type=count, metavar="N", help="Limit of each endpoint."),
        click.option("--teacher-concurrency", type=count, metavar="N",
                     help="Requests at a time.  [default: 16 of an endpoint, 128 here]"),
        click.option("--teacher-timeout-s", type=click.FloatRange(0, min_open=True), default=300.0, show_default=True,
                     metavar="X", help="Longest wait for one answer."),
        click.option("--teacher-retries", type=click.IntRange(0, 100), default=6, show_default=True, metavar="N",
                     help="Further attempts at a request that met 5xx, a timeout or a cut; 429 is waited for."),
        click.option("--teacher-option", multiple=True, metavar="KEY=VALUE",
                     help="A setting of the engine of a teacher that runs here, as in dtype=bf16; may be repeated."),
        click.option("--teacher-field", multiple=True, metavar="KEY=JSON",
                     help="A field of an endpoint's bodies, as in reasoning_effort='\"low\"'; null leaves one out. "
                     f"A teacher that runs here takes {' and '.join(FIELDS_HERE)}."),
        click.option("--teacher-any-model", is_flag=True, help="Answers may come from a model of another name."),
        click.option("--teacher-retry-refused", is_flag=True,
                     help="Ask again what was refused before, or answered with nothing."),
        click.option("--teacher-cache", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
                     help="Where answers are kept.  [default: ~/.cache/specserve/teachers]"),
        click.option("--teacher-cache-gib", type=click.FloatRange(0), default=DEFAULT_CACHE_GIB, show_default=True,
                     metavar="X", help="Most that is kept: after a run, answers that were used longest ago go."),
        click.option("--accept-teacher-terms", is_flag=True,
                     help="You have read what the provider says of training on answers, and agree."),
    )  # fmt: skip


def budget_of(params: Mapping[str, Any]) -> Budget:
    """What --max-cost allows, for all teachers of a command. Raises `UserError` where no price tells the cost."""
    from ..teachers.usage import Budget

    if params["max_cost"] is not None and not params["teacher_price"]:
        raise UserError("--max-cost needs --teacher-price IN,OUT: without it no cost is known", param="max_cost")
    return Budget(params["max_cost"])


def teachers_of(params: Mapping[str, Any], specs: Sequence[str] | None = None) -> list[TeacherSpec]:
    """The teachers of --teacher, or those of `specs`, such as a judge's, under the same flags.

    Asks on a terminal for what must be agreed to. Raises `UserError`.
    """
    _check_keys(params)
    found = [_teacher(params, text) for text in (params["teachers"] if specs is None else specs)]
    _check_fields(params, found)
    _warn_of_open_keys(found)
    return [_agreed(spec) for spec in found]


def _teacher(params: Mapping[str, Any], text: str) -> TeacherSpec:
    spec = parse_spec(text)
    common = {
        "concurrency": params["teacher_concurrency"],
        "timeout_s": params["teacher_timeout_s"],
        "max_retries": params["teacher_retries"],
        "accept_terms": params["accept_teacher_terms"],
        "any_model": params["teacher_any_model"],
        "retry_refused": params["teacher_retry_refused"],
        "cache_gib": params["teacher_cache_gib"],
        "cache_dir": params["teacher_cache"] or cache_dir("teachers"),
    }
    fields = _fields(params["teacher_field"])
    if spec.url is None:
        here = {name: fields[name] for name in FIELDS_HERE if name in fields}
        return dataclasses.replace(spec, **common, options=_engine_options(params["teacher_option"]), fields=here)
    return dataclasses.replace(
        spec,
        **common,
        key_env=_for(params["teacher_key_env"], urlsplit(spec.url).netloc, urlsplit(spec.url).hostname or ""),
        price=_price(_for(params["teacher_price"], spec.model)),
        fields=fields,
        requests_per_minute=params["teacher_requests_per_minute"],
        tokens_per_minute=params["teacher_tokens_per_minute"],
    )


def _check_keys(params: Mapping[str, Any]) -> None:
    """One host's key is not sent to another: with several, each key names its own. Raises `UserError`."""
    urls = [spec.url for spec in map(parse_spec, _texts(params)) if spec.url is not None]
    hosts = list(dict.fromkeys(urlsplit(url).netloc for url in urls))
    general = next((value for value in params["teacher_key_env"] if "=" not in value), None)
    if general is not None and len(hosts) > 1:
        raise UserError(
            f"--teacher-key-env {general} names no host, and there are {len(hosts)} ({', '.join(hosts)}), which would "
            f"all be sent that key; give HOST=NAME, as in --teacher-key-env {hosts[0]}={general}",
            param="teacher_key_env",
        )


def _check_fields(params: Mapping[str, Any], found: Sequence[TeacherSpec]) -> None:
    """Where there is no endpoint, a field of its bodies would be lost. Raises `UserError`."""
    unread = [name for name in _fields(params["teacher_field"]) if name not in FIELDS_HERE]
    if unread and all(spec.url is None for spec in (*found, *map(parse_spec, _texts(params)))):
        taken = " and ".join(FIELDS_HERE)
        raise UserError(
            f"--teacher-field {unread[0]} is of an endpoint; a teacher that runs here takes {taken}",
            param="teacher_field",
        )


def _texts(params: Mapping[str, Any]) -> list[str]:
    """The specs of all teachers of the command, and of its judge."""
    return [*params.get("teachers", ()), *([params["judge"]] if params.get("judge") else [])]


def _warn_of_open_keys(specs: Sequence[TeacherSpec]) -> None:
    """Once of each host that is sent a key by http, but for this machine: whoever is on the way can read it."""
    from ..server.access.network import is_loopback

    warned: set[str] = click.get_current_context().meta.setdefault(f"{__name__}.warned", set())
    for spec in specs:
        parts = urlsplit(spec.url or "")
        if (
            spec.key_env is None
            or parts.scheme != "http"
            or is_loopback(parts.hostname or "")
            or parts.netloc in warned
        ):
            continue
        warned.add(parts.netloc)
        click.echo(
            f"warning: the key in ${spec.key_env} and all prompts go to {parts.netloc} as plain text, which everybody "
            "on the way can read and change; give an https:// address if it has one",
            err=True,
        )


def _for(values: Sequence[str], *names: str) -> str | None:
    """The value that one of `names` has, else the one without a name."""
    named = dict(value.rsplit("=", 1) for value in values if "=" in value)
    general = [value for value in values if "=" not in value]
    return next((named[name] for name in names if name in named), general[-1] if general else None)


def _price(text: str | None) -> Price | None:
    if text is None:
        return None
    try:
        prompt, completion = (float(part) for part in text.split(","))
        if prompt < 0 or completion < 0 or prompt + completion == float("inf") or prompt != prompt:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--teacher-price {text!r} is not IN,OUT: two numbers, the prices of a million prompt and answer tokens",
            param="teacher_price",
        ) from None
    return Price(prompt, completion)


def _pairs(flag: str, values: Sequence[str]) -> list[tuple[str, str]]:
    pairs = []
    for value in values:
        key, sign, rest = value.partition("=")
        if not sign or not key:
            raise UserError(f"{flag} {value!r} is not KEY=VALUE", param=flag)
        pairs.append((key, rest))
    return pairs


def _engine_options(values: Sequence[str]) -> dict[str, Any]:
    known = {setting.name: setting for setting in settings.settings_of(ServeConfig)}
    options = {}
    for key, text in _pairs("--teacher-option", values):
        if key not in known:
            raise UserError(f"--teacher-option {key}: no such setting; `specserve serve --help` lists them", param=key)
        options[key] = settings.parse(known[key], text, "--teacher-option")
    return options


def _fields(values: Sequence[str]) -> dict[str, Any]:
    return {
        key: decode_json(text.encode(), f"--teacher-field {key}") for key, text in _pairs("--teacher-field", values)
    }


def _can_ask() -> bool:
    return sys.stdin.isatty() and sys.stderr.isatty()


def _agreed(spec: TeacherSpec) -> TeacherSpec:
    """`spec`, with the user's agreement if it is needed and can be asked for."""
    if spec.url is None or spec.accept_terms or not _can_ask():
        return spec
    from ..teachers.answer_cache import AnswerCache
    from ..teachers.terms import is_agreed, note_on

    assert spec.cache_dir is not None
    cache = AnswerCache(spec.cache_dir)
    try:
        if is_agreed(spec, cache):
            return spec
    finally:
        cache.close()
    click.echo(note_on(spec), err=True)
    return dataclasses.replace(spec, accept_terms=click.confirm("Go on?", err=True))
