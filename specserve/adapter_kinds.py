"""What kinds of adapters there are, and what one that does not generate makes of a text.

Owns the words that the engine, the server and the trainer share; how an adapter says them in files is `adapters/`'s.
An adapter is of one kind. A request of another kind is refused by `check_kind`, wherever it is met first.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal

import msgspec

from .errors import UserError

AdapterType = Literal["generate", "embed", "rerank", "classify"]
PoolingType = Literal["last", "mean", "weighted_mean"]
GENERATES: tuple[AdapterType, ...] = ("generate",)

# Where the server takes requests for an adapter of a kind; the first is the one that errors name.
ROUTES: dict[AdapterType, tuple[str, ...]] = {
    "generate": ("/v1/chat/completions", "/v1/completions"),
    "embed": ("/v1/embeddings", "/embed"),
    "rerank": ("/v1/rerank", "/rerank", "/score"),
    "classify": ("/classify",),
}
_DOES: dict[AdapterType, str] = {
    "generate": "generates text",
    "embed": "gives embeddings",
    "rerank": "scores pairs of a query and a document",
    "classify": "classifies texts",
}


class Question(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of the questions that a classification adapter answers: consecutive outputs, one for each label.

    multi_class: exactly one label holds, probabilities are a softmax over the labels' outputs. multi_label: each label
    holds or not, probabilities are a sigmoid of each output. `pooled_values` computes both.
    """

    name: str
    kind: Literal["multi_class", "multi_label"]
    labels: tuple[str, ...]
    first_output: int  # labels[i] is output first_output + i
    temperature: float = 1.0  # outputs are divided by it first, which calibrates the probabilities
    thresholds: tuple[float, ...] = ()  # multi_label: from which probability each label holds; empty: 0.5 for all


class PoolingInfo(msgspec.Struct, frozen=True):
    """What an adapter that does not generate makes of a text, and how it wants the text."""

    pooling: PoolingType
    num_outputs: int  # values of an answer: the hidden size of an embedder, else the rows of its score matrix
    normalize: bool = False  # embeddings are of length 1, unless a request says otherwise
    dimensions: tuple[int, ...] = ()  # shorter embeddings that it was trained for (Matryoshka), ascending
    questions: tuple[Question, ...] = ()  # of classify: all outputs, in order; none of others
    query_prefix: str = ""  # before a text that is searched with
    document_prefix: str = ""  # before one that is found; rerank: query_prefix + query + document_prefix + document
    suffix: str = ""  # behind every text
    append_eos: bool = False  # the model's end-of-sequence token stands behind that
    max_tokens: int | None = None  # that a text may have, all of these included; longer ones are cut or refused


def check_kind(name: str, has: AdapterType, wanted: Collection[AdapterType]) -> None:
    """Raise `UserError` (400, `wrong_adapter_type`) unless the adapter `name` is of a `wanted` kind."""
    if has in wanted:
        return
    does = " or ".join(_DOES[kind] for kind in wanted)
    raise UserError(
        f"adapter {name!r} {_DOES[has]} (adapter_type {has!r}) and this request needs one that {does}: send it to "
        f"{ROUTES[has][0]}, or name another model",
        param="model",
        code="wrong_adapter_type",
    )


def check_base(wanted: Collection[AdapterType]) -> None:
    """The same for a request that names no adapter: the base model generates, and embeds."""
    if "generate" in wanted or "embed" in wanted:
        return
    does = " or ".join(_DOES[kind] for kind in wanted)
    raise UserError(
        f"this request needs an adapter that {does}, and it names none: name one as model",
        param="model",
        code="wrong_adapter_type",
    )
