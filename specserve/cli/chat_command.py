"""`specserve chat` from its flags on: whom to talk to, and the terminal that it runs on."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path

import msgspec

from ..config import EngineConfig
from ..terminal import ColourChoice, wants_colour
from .chat import Chat, ChatOptions
from .chat_backends import Backend, EngineBackend, ServerBackend
from .line_reader import LineReader, history_file


class ChatFlags(msgspec.Struct, frozen=True):
    """The flags of `chat` that are not settings of the engine."""

    url: str | None
    api_key: str | None
    adapters_dir: Path | None
    adapter: str | None
    system: str | None
    max_tokens: int | None
    temperature: float
    seed: int | None
    color: ColourChoice
    rejected: bool
    history: bool


def chat(config: EngineConfig | None, flags: ChatFlags) -> int:
    """Chat until the end of the input; without `config`, with the server at `flags.url`. Raises `UserError`."""
    options = ChatOptions(
        adapter=flags.adapter,
        system=flags.system,
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        seed=flags.seed,
        has_colour=wants_colour(sys.stdout, choice=flags.color),
        shows_rejected=flags.rejected,
        is_terminal=sys.stdout.isatty(),
    )
    with ExitStack() as stack:
        chat = Chat(_backend(config, flags, stack), options, sys.stdout, sys.stderr)
        history = history_file(os.environ) if flags.history else None
        reader = LineReader(sys.stdin, sys.stdout, complete=chat.names, history=history)
        stack.callback(reader.close)
        if reader.is_terminal:
            chat.greet()
        return chat.run(reader)


def _backend(config: EngineConfig | None, flags: ChatFlags, stack: ExitStack) -> Backend:
    if config is None:
        assert flags.url is not None
        return ServerBackend(flags.url, flags.api_key)
    from ..llm.llm import LLM

    print("loading the model ...", file=sys.stderr)
    options = msgspec.structs.asdict(config)
    model = options.pop("model") or None
    return EngineBackend(stack.enter_context(LLM(model, adapters_dir=flags.adapters_dir, **options)))
