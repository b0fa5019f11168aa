"""Which teacher, and how it may be asked: a value with every setting, and its short form on a command line.

Owns no secret: a key is named by the environment variable that has it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import UserError

DEFAULT_MODEL = "default"
DEFAULT_CACHE_GIB = 4.0
FIELDS_HERE = ("chat_template_kwargs", "reasoning_effort")  # that a teacher in process takes: its template reads them
_HOSTED = re.compile(r"(?P<model>.+)@(?P<url>https?://.*)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Price:
    """Dollars, or whatever the provider charges in, for a million tokens."""

    prompt: float
    completion: float

    def of(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (self.prompt * prompt_tokens + self.completion * completion_tokens) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherSpec:
    """An endpoint (`url`) and its model's name there, or a local model ("" is the default one) and an adapter's folder.

    `options` are of `specserve.AsyncLLM`; `fields` go into each body that an endpoint gets, those that are None leave
    it; a local model takes `FIELDS_HERE`. `accept_terms`: the user has agreed to what the provider says of training on
    answers. `any_model`: answers may come from a model of another name. `cached_only`: nobody is asked anything that
    was not asked before. `retry_refused`: what the teacher refused before, or answered with nothing, is asked again.
    The cache is held to `cache_gib` at the end of a run; None: it grows.
    """

    model: str
    url: str | None = None
    key_env: str | None = None
    adapter: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    price: Price | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    concurrency: int | None = None
    timeout_s: float = 300.0
    max_retries: int = 6
    retry_wait_s: float = 1.0
    accept_terms: bool = False
    any_model: bool = False
    cached_only: bool = False
    retry_refused: bool = False
    cache_dir: Path | None = None
    cache_gib: float | None = DEFAULT_CACHE_GIB

    @property
    def name(self) -> str:
        """As messages and summaries name it, and as `parse_spec` reads it."""
        if self.url is not None:
            return f"{self.model}@{self.url}"
        return (self.model or DEFAULT_MODEL) + (f"+{self.adapter}" if self.adapter is not None else "")


def model_of(text: str) -> str:
    """A model that runs here as it is named on a command line: "" is the default one."""
    return "" if text == DEFAULT_MODEL else text


def parse_spec(text: str) -> TeacherSpec:
    """`MODEL@https://HOST/v1`, or `MODEL` or `MODEL+ADAPTER_DIR` in process, `default` the default model.

    Raises `UserError`.
    """
    text = text.strip()
    if not text:
        raise UserError("a teacher is empty; give MODEL@URL, or a model's directory or name", param="teacher")
    hosted = _HOSTED.fullmatch(text)
    if hosted is not None:
        return TeacherSpec(model=hosted["model"], url=_url(hosted["url"]))
    if text.startswith(("http://", "https://")):
        raise UserError(f"the teacher {text!r} names no model; give MODEL@{text}", param="teacher")
    model, plus, adapter = (text, "", "") if Path(text).is_dir() else text.partition("+")
    if plus and not Path(adapter).is_dir():
        raise UserError(f"the teacher {text!r}: {adapter!r} is not the directory of an adapter", param="teacher")
    return TeacherSpec(model=model_of(model), adapter=Path(adapter) if plus else None)


def _url(url: str) -> str:
    """Without its last slash and what follows the API's root."""
    host = url.partition("://")[2].partition("/")[0]
    if not host or "@" in host:
        what = "holds a name or password, which belongs into an environment variable" if host else "names no host"
        raise UserError(f"the teacher's address {url.rpartition('@')[2]!r} {what}", param="teacher")
    if "?" in url or "#" in url:
        root = re.split("[?#]", url)[0]  # a query may hold a key, which no message shows
        raise UserError(f"the teacher's address {root!r} has a query; give the API's root, such as https://HOST/v1")
    return url.rstrip("/").removesuffix("/chat/completions").rstrip("/")
