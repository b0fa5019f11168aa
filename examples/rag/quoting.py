"""One question to the quoting adapter: passages in, a sentence of one of them out, looked up in them.

With `constrained` the grammar leaves only sentences of the passages and "not found"; what comes is checked either way.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from client import Server
from passages import choices, prompt, source_of

MAX_TOKENS = 128  # the longest sentence has 160 characters
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Quoted:
    """`place`: of the passage, from 0; None where nothing is quoted. `problem`: why the text is no quotation."""

    text: str  # what the adapter wrote
    place: int | None
    quote: str
    problem: str
    trace: list[dict[str, Any]]
    speculation: dict[str, Any]
    num_tokens: int

    @property
    def is_missing(self) -> bool:
        """Whether the adapter said that the passages have no answer."""
        return self.place is None and not self.problem


def quote(
    server: Server,
    adapter: str,
    question: str,
    passages: Sequence[Sequence[str]],
    constrained: bool = True,
    drafts: bool = True,
    fields: Mapping[str, Any] = NOTHING,
) -> Quoted:
    """`fields`: more of the request's body. Raises `UserError` for what the server refuses."""
    body = {
        "model": adapter,
        "messages": [{"role": "user", "content": prompt(question, passages)}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "speculation": {"mode": "auto" if drafts else "off", "trace": True},
        "return_speculation_stats": True,
        **fields,
    }
    if constrained:
        body["structured_outputs"] = {"choice": choices(passages)}
    answered = server.post("/v1/chat/completions", body)
    choice, usage = answered["choices"][0], answered["usage"]
    text = choice["message"]["content"] or ""
    source, problem = None, ""
    try:
        source = source_of(text, passages)
    except ValueError as error:
        problem = str(error)
    place, quoted = source or (None, "")
    trace = choice.get("trace") or []
    return Quoted(text, place, quoted, problem, trace, usage["speculation"], usage["completion_tokens"])
