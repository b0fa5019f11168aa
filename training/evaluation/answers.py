"""Answers of an adapter through the real engine, in this process: for self-distillation and for evaluation."""

from __future__ import annotations

import platform
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from ...adapter_files import CONFIG_FILE
from ...adapter_messages import LookaheadInfo
from ...adapters.lookahead import Lookahead
from ...config import EngineConfig
from ...engine.engine import Engine
from ...errors import UserError
from ...messages import Delta, GenerateRequest, RequestFailed, SamplingParams, Speculation, TokenTrace
from ...model.config import ModelConfig
from ...text.tokenizer import TextTokenizer
from ...text.traced_text import TracedText
from ..data.dataset import Example


@dataclass(slots=True)
class Answer:
    """One answer; `step_lens` has the tokens that each verification gave, the prompt's first token left out."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    step_lens: list[int] = field(default_factory=list)
    drafted: int = 0
    finish_reason: str | None = None
    accepted_by_source: dict[str, int] = field(default_factory=dict)
    trace: list[TokenTrace] = field(default_factory=list)  # where the tokens came from, if that was asked for


@dataclass(slots=True)
class Answers:
    answers: list[Answer]
    seconds: float  # all of it
    decode_seconds: float  # of the steps that held no prompt
    decode_tokens: int

    @property
    def num_tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    def answered(self, asked: Sequence[Example]) -> list[Example]:
        """`asked`, the examples whose prompts were answered, with these answers; those of one token are left out."""
        return [
            Example(e.prompt + a.tokens, [False] * len(e.prompt) + [True] * len(a.tokens), e.line)
            for e, a in zip(asked, self.answers, strict=True)
            if len(a.tokens) > 1
        ]

    @property
    def mean_accepted_length(self) -> float:
        """Tokens that a verification gave on average, the bonus token included."""
        lens = [n for answer in self.answers for n in answer.step_lens]
        return sum(lens) / max(1, len(lens))

    @property
    def accepted_by_source(self) -> Counter[str]:
        total: Counter[str] = Counter()
        for answer in self.answers:
            total.update(answer.accepted_by_source)
        return total


def make_engine(model_dir: Path, *, batch: int, max_len: int, base_head: Path | None = None) -> Engine:
    """An engine for `batch` sequences at a time, of at most `max_len` tokens or what the model allows."""
    config = EngineConfig(
        model=str(model_dir),
        max_num_seqs=batch,
        max_model_len=min(max_len, ModelConfig.from_dir(model_dir).max_position_embeddings),
        max_waiting=100_000,
        num_threads=torch.get_num_threads(),
        max_draft_tokens=32,
        base_head=str(base_head) if base_head is not None else None,
    )
    return Engine(config, model_dir)


def hardware_of(engine: Engine) -> str:
    """Machine, threads and device."""
    num = torch.get_num_threads()
    return f"{platform.machine()}, {'1 thread' if num == 1 else f'{num} threads'}, {engine.info.device}"


@dataclass(frozen=True, slots=True)
class Served:
    """An engine that has what a directory holds: an adapter, or a head of the bare base."""

    engine: Engine
    adapter_hash: str | None  # None is the base
    info: LookaheadInfo | None

    @classmethod
    def of(cls, model_dir: Path, directory: Path, *, batch: int, max_len: int) -> Served:
        """With the settings of `make_engine`."""
        if not (directory / CONFIG_FILE).is_file():
            engine = make_engine(model_dir, batch=batch, max_len=max_len, base_head=directory)
            return cls(engine, None, engine.info.base_head)
        engine = make_engine(model_dir, batch=batch, max_len=max_len)
        adapter = engine.load_adapter(directory.name, directory)
        return cls(engine, adapter.content_hash, adapter.lookahead)

    @property
    def lookahead(self) -> Lookahead | None:
        """What drafts, and what was learned of it."""
        if self.adapter_hash is None:
            return self.engine.adapters.base_lookahead
        return self.engine.registry.adapters[self.adapter_hash].lookahead


def answer(
    engine: Engine,
    adapter_hash: str | None,
    prompts: Sequence[Sequence[int]],
    max_tokens: int,
    *,
    mode: str = "auto",
    batch: int = 8,
    temperature: float = 0.0,
    desc: str | None = None,
    traced_by: TextTokenizer | None = None,
) -> Answers:
    """Answers of one adapter to `prompts`, at most `batch` at a time, with a progress bar if `desc` names it."""
    requests = [(adapter_hash, prompt) for prompt in prompts]
    return answer_mixed(
        engine,
        requests,
        max_tokens,
        mode=mode,
        batch=batch,
        temperature=temperature,
        desc=desc,
        traced_by=traced_by,
    )


def answer_mixed(
    engine: Engine,
    requests: Sequence[tuple[str | None, Sequence[int]]],
    max_tokens: int,
    *,
    mode: str = "auto",
    batch: int = 8,
    max_draft_tokens: int = 16,
    temperature: float = 0.0,
    desc: str | None = None,
    traced_by: TextTokenizer | None = None,
    on_answer: Callable[[int, Answer, float], None] | None = None,
) -> Answers:
    """Answers to (adapter hash, prompt) pairs, at most `batch` at a time. Raises `UserError` if one fails.

    At a `temperature` above 0 each has its index for a seed, so that a call repeated gives the same answers.
    With `traced_by`, the engine's tokenizer, answers say where their tokens came from. `on_answer` gets each one when
    it is whole, its index first, and the engine's seconds since the one before.

    Prompts share cached prefixes within one call, as they do in the server, but not with other calls, so that a call
    repeated does the same work.
    """
    salt, clock = uuid.uuid4().hex, engine.path.clock or time.perf_counter
    answers = [Answer() for _ in requests]
    waiting = list(enumerate(requests))[::-1]
    running = 0
    in_prefill: set[int] = set()
    traced: dict[int, TracedText] = {}
    seconds = decode_seconds = told_seconds = 0.0
    decode_tokens = 0
    progress = tqdm(total=len(requests), unit="answer", desc=desc, disable=desc is None, dynamic_ncols=True)
    while waiting or running:
        while waiting and running < batch:
            idx, (adapter_hash, prompt) = waiting.pop()
            limit = min(max_tokens, engine.info.max_model_len - len(prompt))
            engine.add_request(
                GenerateRequest(
                    str(idx),
                    list(prompt),
                    SamplingParams(max_tokens=limit, temperature=temperature, seed=idx),
                    adapter_hash=adapter_hash,
                    cache_salt=salt,
                    speculation=Speculation(mode, max_draft_tokens, traced_by is not None),  # type: ignore[arg-type]
                )
            )
            running += 1
            in_prefill.add(idx)
        is_decode = not in_prefill
        start = clock()
        events = engine.step()
        elapsed = clock() - start
        seconds += elapsed
        if is_decode:
            decode_seconds += elapsed
        for event in events:
            if isinstance(event, RequestFailed):
                raise UserError(f"an answer failed: {event.error.message}")
            assert isinstance(event, Delta)  # nothing is pooled here
            idx = int(event.request_id)
            state = answers[idx]
            if idx in in_prefill:
                in_prefill.discard(idx)
            else:
                state.step_lens.append(len(event.token_ids))
            if is_decode:
                decode_tokens += len(event.token_ids)
            state.tokens += event.token_ids
            state.text += event.text
            if traced_by is not None:
                if idx not in traced:
                    traced[idx] = TracedText(traced_by.detokenizer(requests[idx][1], True))
                state.trace += traced[idx].told(event).trace or []
            if event.usage is not None:
                state.finish_reason = event.finish_reason
                running -= 1
                progress.update()
                state.drafted = event.usage.draft_tokens
                state.accepted_by_source = event.usage.accepted_by_source
                if on_answer is not None:
                    on_answer(idx, state, seconds - told_seconds)
                    told_seconds = seconds
    progress.close()
    return Answers(answers, seconds, decode_seconds, decode_tokens)
