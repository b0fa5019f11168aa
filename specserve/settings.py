"""Settings from flags, environment, YAML file and defaults, in that order of precedence.

Derived wholly from the structs in `config`: a field is a flag `--kv-cache-gib`, a variable `SPECSERVE_KV_CACHE_GIB` and
a YAML key `kv_cache_gib`; its type, limits and description are named there and nowhere else. Owns reading and checking
the values, and the wording of what is wrong with one; knows nothing of click. Values of keys named `*api_key` are
secrets: they appear in no message.
"""

import contextlib
import difflib
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import inspect

from .config import EngineConfig, RayConfig
from .errors import UserError
from .renamed_settings import Given, old_setting, translated
from .strict_yaml import read_yaml

ENV_PREFIX = "SPECSERVE_"
CONFIG_ENV = "SPECSERVE_CONFIG"
HIDDEN = "***"
_UNSET = object()
Config = TypeVar("Config", bound=EngineConfig)


class Setting(msgspec.Struct, frozen=True):
    """One field of a configuration struct, as its flag, its variable and its YAML key see it."""

    name: str
    kind: Literal["bool", "int", "float", "str", "list", "choice"]
    description: str
    default: Any
    choices: tuple[str, ...]
    limits: str  # "from 1 to 256", "of at least 1 character"; empty when there are none
    annotation: Any  # what msgspec.convert checks against

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def env(self) -> str:
        return ENV_PREFIX + self.name.upper()

    @property
    def secret(self) -> bool:
        return self.name.endswith("api_key")

    @property
    def expected(self) -> str:
        """What a value must be, for messages: "a whole number from 1 to 256"."""
        if self.kind == "choice":
            return "one of " + ", ".join(self.choices)
        words = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "text"}
        words["list"] = "a list of texts"
        return f"{words[self.kind]} {self.limits}".rstrip()


def settings_of(config_type: type[msgspec.Struct]) -> list[Setting]:
    """The settings of a struct, in the order of its fields."""
    info = inspect.type_info(config_type)
    assert isinstance(info, inspect.StructType)
    annotations: dict[str, Any] = {}
    for base in reversed(config_type.__mro__):
        annotations.update(getattr(base, "__annotations__", {}))
    return [_setting(field, annotations[field.name]) for field in info.fields]


def load(
    config_type: type[Config],
    flags: Mapping[str, Any],
    environ: Mapping[str, str],
    config_file: str | Path | None = None,
) -> Config:
    """Build `config_type` from what is given; raises `UserError` naming key, value, limit and origin.

    `flags` maps field names to the text after the flag (a bool for switches, a sequence of texts for lists); None and
    empty sequences are flags that were not given. An empty environment variable counts as unset. The file may hold any
    key of `RayConfig`, so that one file serves every command; keys that `config_type` lacks are checked and unused.
    """
    if config_file is None:
        config_file = environ.get(CONFIG_ENV) or None
    from_file = read_file(config_file) if config_file is not None else {}

    def given(setting: Setting) -> Given | None:
        flag = flags.get(setting.name)
        if flag is not None and flag != ():
            return Given(setting, parse(setting, flag, setting.flag), setting.flag)
        if environ.get(setting.env):
            return Given(setting, parse(setting, environ[setting.env], setting.env), setting.env)
        return Given(setting, from_file[setting.name], str(config_file)) if setting.name in from_file else None

    values = {}
    for setting in settings_of(config_type):
        found, old = given(setting), old_setting(setting)
        if old is not None:
            found = translated(setting, found, given(old))
        if found is not None:
            values[setting.name] = found.value
    return config_type(**values)


def read_file(path: str | Path) -> dict[str, Any]:
    """The checked values of a YAML file; raises `UserError`."""
    path = Path(path).expanduser()
    content = read_yaml(path, "the configuration file")
    named = check_names(content, str(path))
    return {key: parse(named[key], value, str(path), is_text=False) for key, value in content.items()}


def check_names(names: Iterable[str], origin: str) -> dict[str, Setting]:
    """The settings of any command that these name; raises `UserError` for a name of none."""
    settings = {setting.name: setting for setting in settings_of(RayConfig)}
    known = settings | {old.name: old for old in map(old_setting, settings.values()) if old is not None}
    for name in names:
        if name not in known:
            raise UserError(f"unknown key {name!r} in {origin}{_nearest(str(name), settings)}", param=str(name))
    return {name: known[name] for name in names}


def parse(setting: Setting, value: Any, origin: str, *, is_text: bool = True) -> Any:
    """`value` as the setting's type. `is_text`: it comes from a flag or variable, so that "8" is a number."""
    converted: Any = _UNSET
    if setting.kind == "list" and is_text:
        texts = [value] if isinstance(value, str) else value
        if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
            converted = tuple(part.strip() for text in texts for part in text.split(",") if part.strip()) or _UNSET
    else:
        is_strict = not is_text or setting.kind in ("str", "choice")  # else the text "null" would be none
        with contextlib.suppress(msgspec.ValidationError):
            converted = msgspec.convert(value, setting.annotation, strict=is_strict)
    if isinstance(converted, float) and not math.isfinite(converted):
        converted = _UNSET
    if converted is _UNSET:
        shown = HIDDEN if setting.secret and value else repr(value)
        raise UserError(f"{setting.name}: {shown} from {origin} is not {setting.expected}", param=setting.name)
    return converted


def _setting(field: inspect.Field, annotation: Any) -> Setting:
    described = field.type
    description = ""
    if isinstance(described, inspect.Metadata):
        description = (described.extra_json_schema or {}).get("description", "")
        described = described.type
    members = described.types if isinstance(described, inspect.UnionType) else (described,)
    (plain,) = (member for member in members if not isinstance(member, inspect.NoneType))
    choices: tuple[str, ...] = ()
    kind: Literal["bool", "int", "float", "str", "list", "choice"]
    match plain:
        case inspect.BoolType():
            kind = "bool"
        case inspect.IntType():
            kind = "int"
        case inspect.FloatType():
            kind = "float"
        case inspect.StrType():
            kind = "str"
        case inspect.VarTupleType(item_type=inspect.StrType()):
            kind = "list"
        case inspect.LiteralType():
            kind = "choice"
            choices = _choices_in_order(annotation)
        case _:
            raise TypeError(f"{field.name}: settings of type {plain} have no flag")
    default = field.default if field.default is not msgspec.NODEFAULT else None
    limits = _limits(plain) if isinstance(plain, inspect.IntType | inspect.FloatType) else ""
    if isinstance(plain, inspect.StrType) and plain.min_length:
        limits = f"of at least {plain.min_length} character"
    return Setting(field.name, kind, description, default, choices, limits, annotation)


def _choices_in_order(annotation: Any) -> tuple[str, ...]:
    """The values of Annotated[Literal[...], ...] as written; msgspec.inspect sorts them."""
    return annotation.__origin__.__args__


def _limits(number: inspect.IntType | inspect.FloatType) -> str:
    if number.ge is not None and number.le is not None:
        return f"from {number.ge} to {number.le}"
    parts = {"at least": number.ge, "more than": number.gt, "at most": number.le, "less than": number.lt}
    return " and ".join(f"{words} {limit}" for words, limit in parts.items() if limit is not None)


def _nearest(key: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(key.replace("-", "_").lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "; `specserve serve --help` lists the settings"
