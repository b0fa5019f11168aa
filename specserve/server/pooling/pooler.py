"""A request to pool as a job, and the job's texts through the engine: what `generation` is for requests that generate.

All texts of a request are admitted, refused and aborted together; the first that fails ends the others. A request names
an adapter of a kind that its route is for, or the base model, which embeds.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass

import msgspec

from ...adapter_kinds import AdapterType, PoolingInfo, PoolingType, check_base, check_kind
from ...adapter_messages import AdapterInfo
from ...errors import UserError, from_info
from ...messages import Together
from ...pooling_messages import BASE_POOLING, Pooled, PoolingParams, PoolRequest
from ...text.tokenizer import TextTokenizer
from ..access.caller import Caller
from ..generation.generator import Generator, before_deadline
from ..openai.conversion import check_cache_salt, priority_of, refuse_unserved
from ..openai.request_types import TokenizeRequest
from .job import PooledTexts, PoolingJob
from .request_types import UNSUPPORTED, PoolingFields
from .texts import Cut, Text, reading_size, tokenized

_BASE = PoolingInfo(pooling=BASE_POOLING, num_outputs=0)  # how the base model wants a text: as it is


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a route wants of the engine. The last three are of embeddings."""

    operation: str  # its name in traces
    id_prefix: str  # of the answer, as vLLM has it
    kinds: tuple[AdapterType, ...]  # of adapters that it is for
    pooling: PoolingType | None = None  # None: as the adapter, or the base model, is used to
    normalize: bool | None = None
    dimensions: int | None = None


CLASSIFY = Wanted("classify", "classify", ("classify",))
RERANK = Wanted("rerank", "rerank", ("rerank",))
# The texts, what they are for an adapter of a kind, or one conversation.
Texts = Sequence[Text] | Callable[[AdapterType], Sequence[Text]] | TokenizeRequest


class Pooler:
    """Pools for one server, with the adapters, tokenizers, sequences and accounts of its generator."""

    def __init__(self, generator: Generator):
        self.config = generator.config
        self._generator = generator

    async def pool(self, fields: PoolingFields, caller: Caller, texts: Texts, wanted: Wanted, cut: Cut) -> PooledTexts:
        """All `texts` of a request, pooled. Raises `UserError`; leaving it aborts what still runs."""
        async with before_deadline(fields) as deadline:
            job = await self._prepare(fields, caller, texts, wanted, cut, deadline)
        return PooledTexts(job, await self._run(job))

    async def _prepare(
        self,
        fields: PoolingFields,
        caller: Caller,
        texts_of: Texts,
        wanted: Wanted,
        cut: Cut,
        deadline: float | None,
    ) -> PoolingJob:
        generator = self._generator
        check_cache_salt(fields.cache_salt)
        refuse_unserved(fields, UNSUPPORTED)
        caller.check_priority(fields.priority)
        caller.allowance.check_tokens()  # before an adapter is loaded and a text is read
        priority = caller.priority(priority_of(fields, self.config))
        info = await generator.engine.first_info()
        adapter = generator.adapter_name(caller, fields.model, fields.adapter_id)
        tokenizer, adapter_info = await generator.prompts.tokenizer_for(adapter, priority)
        kind, pooling = _kind_of(adapter, adapter_info, wanted.kinds)
        texts = await self._texts(texts_of, kind, tokenizer)
        params = _params(wanted, kind, adapter, adapter_info, info.hidden_size)
        args = (texts, tokenizer, kind, pooling, info, cut)
        read = await generator.prompts.read(tokenizer, reading_size(texts), tokenized, *args)
        job_id, num = f"{wanted.id_prefix}-{uuid.uuid4().hex}", len(texts)
        together = Together(job_id, num, sum(map(len, read.ids))) if num > 1 else None
        requests = [
            PoolRequest(
                request_id=f"{job_id}-{idx}",
                prompt_token_ids=ids,
                pooling=params,
                adapter_hash=None if adapter_info is None else adapter_info.content_hash,
                cache_salt=caller.cache_salt(fields.cache_salt),
                caller=caller.key or "",
                priority=priority,
                deadline=deadline,
                together=together,
                is_first=idx == 0,
            )
            for idx, ids in enumerate(read.ids)
        ]
        name = fields.model or adapter or generator.model_name
        settings = {} if wanted.dimensions is None else {"gen_ai.embeddings.dimension.count": wanted.dimensions}
        return PoolingJob(
            *(job_id, name, wanted.operation, kind, adapter, adapter_info, caller, requests, read.cut, deadline),
            names=[text.name for text in texts],
            span_settings=settings,
        )

    async def _texts(self, texts_of: Texts, kind: AdapterType, tokenizer: TextTokenizer) -> Sequence[Text]:
        """A conversation is what its template makes of it: an adapter's prefixes, suffix and end are not added."""
        if not isinstance(texts_of, TokenizeRequest):
            return texts_of(kind) if callable(texts_of) else texts_of
        return [Text("messages", token_ids=await self._generator.prompts.chat_ids(texts_of, tokenizer, ()))]

    async def _run(self, job: PoolingJob) -> list[Pooled]:
        with self._generator.accounts.of(job) as account:

            async def one(idx: int, request: PoolRequest) -> Pooled:
                async with aclosing(self._generator.sequences.pool(request, job.adapter)) as answers:
                    try:
                        pooled = await anext(answers)
                    except UserError as error:
                        if error.code == "model_failure":
                            raise _failed(job, idx, error) from None
                        raise
                account.pooled(idx, pooled)
                return pooled

            tasks = [asyncio.create_task(one(idx, request)) for idx, request in enumerate(job.requests)]
            try:
                async with asyncio.timeout_at(account.end):
                    return await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)


def _failed(job: PoolingJob, idx: int, error: UserError) -> UserError:
    """The error of one text, which says which one."""
    who = "the base model" if job.adapter is None else f"adapter {job.adapter!r}"
    info = error.info()
    return from_info(msgspec.structs.replace(info, message=f"{job.names[idx]}, {who}: {info.message}"))


def _kind_of(
    adapter: str | None, info: AdapterInfo | None, kinds: tuple[AdapterType, ...]
) -> tuple[AdapterType, PoolingInfo]:
    """The kind of what is named, and how it wants a text. Raises `UserError` where it is not among `kinds`."""
    if adapter is None or info is None:
        check_base(kinds)
        return "embed", _BASE
    check_kind(adapter, info.adapter_type, kinds)
    assert info.pooling is not None, f"{info.adapter_type} without what it makes of a text"
    return info.adapter_type, info.pooling


def _params(
    wanted: Wanted, kind: AdapterType, adapter: str | None, info: AdapterInfo | None, hidden_size: int
) -> PoolingParams:
    """What the engine is told. Raises `UserError` for what the adapter, or the base model, does not give."""
    if kind != "embed":
        for name in ("pooling", "dimensions"):
            if getattr(wanted, name) is not None:
                raise UserError(
                    f"{name} is for embeddings, and adapter {adapter!r} gives none; leave it out", param=name
                )
        return PoolingParams("score")
    if adapter is not None and wanted.pooling is not None:
        raise UserError(
            f"pooling is for the base model, and adapter {adapter!r} has its own; leave it out", param="pooling"
        )
    pooling = None if info is None else info.pooling
    sizes = (*pooling.dimensions, pooling.num_outputs) if pooling is not None else (hidden_size,)
    if wanted.dimensions is not None and wanted.dimensions not in sizes:
        who = "the base model" if adapter is None else f"adapter {adapter!r}"
        raise UserError(
            f"dimensions is {wanted.dimensions}; {who} gives {' or '.join(map(str, dict.fromkeys(sizes)))}: shorter "
            "ones are worth something only where an adapter was trained for them",
            param="dimensions",
        )
    return PoolingParams("embed", wanted.pooling, wanted.normalize, wanted.dimensions)
