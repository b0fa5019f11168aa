"""What the server and the engine process say of pooling: a text in, the values of its pooled hidden states out.

A `PoolRequest` is one text: a request of 100 texts, or a query with 100 documents, is 100 of these, which run in the
same ragged batch as all else. It is admitted, refused, aborted (`Abort`), dropped at its deadline and preempted as a
`GenerateRequest` is; it is answered once, by `Pooled` or `RequestFailed`. Values are a function of the text, the
adapter and the parameters alone; with the same process and path they are the same bits whatever runs beside.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from .adapter_kinds import AdapterType, PoolingType
from .messages import GenerateRequest, SamplingParams, Speculation, Together

PoolingTask = Literal["embed", "score"]
# Which adapters a task may name; the base model, without any, embeds.
KINDS_OF_TASK: dict[PoolingTask, tuple[AdapterType, ...]] = {"embed": ("embed",), "score": ("rerank", "classify")}
# How the base model embeds where a request does not say: as vLLM embeds with a model for generation.
BASE_POOLING: PoolingType = "last"
BASE_NORMALIZE = True
_NO_SAMPLING = SamplingParams(max_tokens=0, temperature=0.0, detokenize=False)
_NO_DRAFTS = Speculation(mode="off")


class PoolingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is made of the hidden states behind the last layer and its norm, of all positions of the text.

    `embed`: pooled [H], then the first `dimensions` of them, then scaled to length 1 if `normalize`. `score`: pooled,
    times the adapter's score matrix: its outputs as they are, no sigmoid, no softmax (`pooled_values`).
    """

    task: PoolingTask
    pooling: PoolingType | None = None  # None: what the adapter says, `BASE_POOLING` without one; of embed only
    normalize: bool | None = None  # the same, of embed only
    dimensions: int | None = None  # one of the adapter's `PoolingInfo.dimensions`, or all of them; of embed only


class PoolRequest(msgspec.Struct, frozen=True, tag="pool"):
    """One text to pool."""

    request_id: str  # unique among running requests, those that generate included
    prompt_token_ids: list[int]  # 1 .. max_model_len ids in [0, vocab_size), with prefix, suffix and end as wanted
    pooling: PoolingParams
    adapter_hash: str | None = None  # content hash of a loaded adapter; None is the bare base
    cache_salt: str = ""
    caller: str = ""  # who sends it, of those that share the server: a key's name; "" is anybody without one
    priority: int = 0  # lower is sooner
    deadline: float | None = None  # of time.monotonic(), which all processes of a machine share: then nobody wants it
    together: Together | None = None  # all texts of one answer; None: it is all there is of it, or that has begun
    is_first: bool = True  # of its answer; of the others none is dropped for want of time once the answer has begun

    @property
    def num_together(self) -> int:
        """The texts that are admitted with it; 0 where its answer has begun."""
        return self.together.num if self.together is not None else int(self.is_first)

    @property
    def sampling(self) -> SamplingParams:
        """As of a request that generates nothing."""
        return _NO_SAMPLING

    @property
    def speculation(self) -> Speculation:
        """As of a request that generates nothing."""
        return _NO_DRAFTS


class Pooled(msgspec.Struct, frozen=True, tag="pooled"):
    """The answer to a `PoolRequest`, and the end of it."""

    request_id: str
    values: bytes  # little-endian float32, all finite
    num_values: int
    prompt_tokens: int
    cached_tokens: int = 0  # of them, taken from the prefix cache
    queue_s: float = 0.0  # from arrival in the engine to the first admission to a step


AnyRequest = GenerateRequest | PoolRequest
