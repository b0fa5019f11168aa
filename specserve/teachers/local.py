"""A model and an adapter in process: `specserve.AsyncLLM`, which batches what is asked and drafts.

Started at the first ask that no cache answers. Its identity is what its answers depend on: weights, tokenizer, chat
template and what that is given, the adapter's content, and how weights are held. A template that has no place for a
system message (Gemma 2's refuses it, others leave it out) has its text before the first message.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from ..adapter_files import check_complete, open_adapter, read_texts
from ..adapters.kind import adapter_type_in
from ..chat.messages import template_variables
from ..errors import UserError
from ..llm.async_llm import AsyncLLM
from ..llm.outputs import CompletionOutput, RequestOutput
from ..llm.params import MAX_PROMPT_LOGPROBS, LoRARequest, SamplingParams
from ..model.fingerprint import base_fingerprint, tokenizer_fingerprint
from ..model.store import resolve_model
from ..text.tokenizer import TextTokenizer
from .asks import Answer, Ask, Reading, Reply, TokenLogprob, TopTokens
from .errors import TeacherError
from .spec import TeacherSpec
from .user_turn import user_turn

CONCURRENCY = 128  # asks that wait in the engine cost little, and its steps are never short of them
MAX_TOP_LOGPROBS = MAX_PROMPT_LOGPROBS
# Statuses of what may be gone later: an adapter that changes, an engine or a disk that is away or has too much to do.
PASSING = frozenset({409, 429, 503, 504})
_SHAPING = ("dtype", "quantization", "kernels")  # options that change answers


class LocalBackend:
    """Of a spec without `url`. Raises `UserError` for a model or an adapter that is not there or does not generate."""

    def __init__(self, spec: TeacherSpec):
        self._spec = spec
        self.concurrency = spec.concurrency or CONCURRENCY
        adapter = () if spec.adapter is None else _read_adapter(spec.adapter, spec.name)
        self.model_dir = resolve_model(spec.model, None, progress=sys.stderr.isatty())
        self._adapter = None if spec.adapter is None else LoRARequest(spec.adapter.resolve().name, 0, str(spec.adapter))
        self.identity = self._identity(adapter)
        self._llm: AsyncLLM | None = None
        self._takes_system: bool | None = None  # not known yet
        self._turn: tuple[list[int], int] | None = None  # the user's

    async def start(self) -> None:
        try:
            llm = AsyncLLM(self.model_dir, **self._spec.options)
            await llm.start()
        except UserError as error:
            raise TeacherError(f"{self._spec.name}: {error}", ends_run=True, status=error.status) from None
        await asyncio.to_thread(self.as_taken, ())  # while nobody waits for it
        self._llm = llm

    async def close(self) -> None:
        if self._llm is not None:
            await self._llm.close()
            self._llm = None

    async def ask(self, ask: Ask, num_there: int = 0) -> Reply:
        seed = ask.seed + num_there if ask.seed is not None else None
        output = await self._output(replace(ask, n=ask.n - num_there, seed=seed) if num_there else ask)
        answers = tuple(self._answer(output, one, ask) for one in output.outputs)
        return Reply(answers, len(output.prompt_token_ids), sum(len(one.token_ids) for one in output.outputs))

    async def read(self, reading: Reading) -> TopTokens:
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=reading.num_top)
        assert self._llm is not None
        try:
            (output,) = await self._llm.generate(list(reading.token_ids), params, adapter=self._adapter)
        except UserError as error:
            raise self._failed(error) from None
        ids, logprobs = [], []
        for scored in (output.prompt_logprobs or [])[reading.start :]:
            best = sorted((scored or {}).items(), key=lambda item: item[1].rank)[: reading.num_top]
            ids.append(tuple(token for token, _ in best))
            logprobs.append(tuple(one.logprob for _, one in best))
        return TopTokens(tuple(ids), tuple(logprobs))

    @property
    def tokenizer_dir(self) -> Path:
        """Where the tokenizer that it reads with lies: an adapter may bring its own."""
        adapter = self._spec.adapter
        return adapter if adapter is not None and (adapter / "tokenizer.json").is_file() else self.model_dir

    def tokenizer(self) -> TextTokenizer:
        """The tokenizer and chat template of what it is asked."""
        tokenizer, fields = TextTokenizer(self.model_dir), self._spec.fields
        if self._spec.adapter is not None:
            tokenizer = tokenizer.for_adapter_in(self._spec.adapter)
        return tokenizer.given(template_variables(fields.get("chat_template_kwargs"), fields.get("reasoning_effort")))

    def as_taken(self, messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """A conversation as its chat template takes it."""
        if self._takes_system is None:
            self._takes_system = _takes_system(self.tokenizer())
        return list(messages) if self._takes_system else _without_system(messages)

    def user_turn(self) -> tuple[list[int], int]:
        """The tokens before a user's first words, and the one that ends them. Raises `UserError`."""
        if self._turn is None:
            self._turn = user_turn(self.tokenizer())
        return self._turn

    async def _output(self, ask: Ask) -> RequestOutput:
        assert self._llm is not None
        if ask.top_logprobs > MAX_TOP_LOGPROBS:
            raise TeacherError(f"top_logprobs is {ask.top_logprobs}; a local teacher has up to {MAX_TOP_LOGPROBS}")
        params = SamplingParams(
            n=ask.n,
            temperature=ask.temperature,
            top_p=ask.top_p,
            seed=ask.seed,
            max_tokens=ask.max_tokens,
            stop=list(ask.stop) or None,
            logprobs=ask.top_logprobs or None,
            structured_outputs=None if ask.schema is None else {"json": dict(ask.schema)},
        )
        try:
            if ask.messages:
                messages = self.as_taken(ask.messages)
                (output,) = await self._llm.chat(messages, params, adapter=self._adapter, **self._spec.fields)
            else:
                before, end = self.user_turn()
                params = msgspec.structs.replace(params, stop_token_ids=[end])
                (output,) = await self._llm.generate(before, params, adapter=self._adapter)
        except UserError as error:
            raise self._failed(error) from None
        return output

    def _answer(self, output: RequestOutput, one: CompletionOutput, ask: Ask) -> Answer:
        message = one.message or {}
        return Answer(
            text=one.text if one.message is None else message.get("content") or "",
            finish_reason=one.finish_reason or "",
            prompt_tokens=len(output.prompt_token_ids),
            completion_tokens=len(one.token_ids),
            reasoning=message.get("reasoning_content"),
            logprobs=self._logprobs(one) if ask.top_logprobs else None,
        )

    def _logprobs(self, one: CompletionOutput) -> tuple[TokenLogprob, ...]:
        assert self._llm is not None
        text_of = self._llm.get_tokenizer().token_bytes
        found = []
        for token, scored in zip(one.token_ids, one.logprobs or (), strict=True):
            top = tuple((bytes(text_of(other)), each.logprob) for other, each in scored.items())
            found.append(TokenLogprob(bytes(text_of(token)), scored[token].logprob, top))
        return tuple(found)

    def _failed(self, error: UserError) -> TeacherError:
        is_retryable = error.status in PASSING
        return TeacherError(f"{self._spec.name}: {error}", retryable=is_retryable, status=error.status)

    def _identity(self, adapter: Sequence[str]) -> str:
        parts = [base_fingerprint(self.model_dir), tokenizer_fingerprint(self.model_dir)]
        parts.append(str(read_texts(self.model_dir, self.model_dir.name)[0]))
        parts += adapter
        parts += [f"{name}={self._spec.options[name]}" for name in _SHAPING if name in self._spec.options]
        parts += [f"{name}={json.dumps(value, sort_keys=True)}" for name, value in sorted(self._spec.fields.items())]
        return "local\n" + hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _takes_system(tokenizer: TextTokenizer) -> bool:
    """Whether the chat template writes what a system message says."""
    if tokenizer.template.text is None:
        return True
    mark = secrets.token_hex(16)
    told = [{"role": "system", "content": mark}, {"role": "user", "content": "it"}]
    try:
        return mark in tokenizer.template.render(told, True, None)
    except UserError:
        return False


def _without_system(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The same conversation, the text of a system message at the beginning of the user's first."""
    if len(messages) < 2 or messages[0]["role"] != "system" or messages[1]["role"] != "user":
        return list(messages)
    content = f"{messages[0]['content']}\n\n{messages[1]['content']}"
    return [{**messages[1], "content": content}, *messages[2:]]


def _read_adapter(directory: Path, teacher: str) -> tuple[str, str]:
    """The hashes of what it is and of its texts. Raises `UserError` for one that does not generate."""
    name = directory.resolve().name
    with open_adapter(directory, name) as files:
        check_complete(files, directory, name)
        kind = adapter_type_in(name, files.paths)
        if kind != "generate":
            raise UserError(
                f"the teacher {teacher}: adapter {name!r} is for {kind!r} (adapter_type), and a teacher generates "
                "text; name an adapter that does, or the model alone",
                param="teacher",
            )
        return files.content_hash, str(files.text_hash)


async def local_backend(spec: TeacherSpec) -> LocalBackend:
    """Made on a thread: the model's and the adapter's files are read for their fingerprints."""
    return await asyncio.to_thread(LocalBackend, spec)
