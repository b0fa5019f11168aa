"""Requests from when they are taken on until they leave: what each holds is taken once and given back once.

Holds an adapter's reference, a place in the scheduler with its KV blocks, and what drafts for it. A request leaves when
it has ended, when its client has, for want of time, or for others that need its adapter's place.
"""

from __future__ import annotations

from collections.abc import Collection

from ..drafting.proposer import Proposer
from ..errors import DeadlineError, OverloadedError, UserError
from ..grammar.compiler import GrammarCompiler
from ..grammar.grammar import CompiledGrammar
from ..messages import BACKGROUND_PRIORITY, EngineInfo, GenerateRequest, RequestFailed, TokenLogprobs
from ..pooling_messages import AnyRequest
from ..schedule.scheduler import Scheduler
from ..schedule.sequence import Sequence
from ..text.detokenizer import TokenTexts
from .admission import Admission, check_request
from .engine_adapters import EngineAdapters
from .reports import Reports
from .running import RunningRequest, detokenizer_of
from .text_pooling import text_pooling


class LiveRequests:
    """Of one engine, whose loop alone calls it."""

    def __init__(
        self,
        info: EngineInfo,
        eos_token_ids: Collection[int],
        texts: TokenTexts,
        grammars: GrammarCompiler,
        adapters: EngineAdapters,
        admission: Admission,
        scheduler: Scheduler,
        proposer: Proposer,
        reports: Reports,
    ):
        self._info, self._eos_token_ids, self._texts, self._grammars = info, eos_token_ids, texts, grammars
        self._adapters, self._registry, self._admission = adapters, adapters.registry, admission
        self._scheduler, self._proposer, self._reports = scheduler, proposer, reports
        self._by_id: dict[str, RunningRequest] = {}
        self._num_added = 0

    def add(self, request: AnyRequest, grammar: CompiledGrammar | None) -> None:
        """As `Engine.add_request`."""
        check_request(request, self._info)
        adapter = self._registry.of(request.adapter_hash)  # where it has left meanwhile, the server loads it again
        pooling = text_pooling(request, adapter, self._info.hidden_size)
        spec = request.grammar if isinstance(request, GenerateRequest) else None
        if spec is not None and grammar is None:
            grammar = self._grammars.compile(spec)
        if request.request_id in self._by_id:
            raise UserError(f"request id {request.request_id!r} is already running")
        self._admission.check(request)
        if request.adapter_hash is not None:
            self._registry.acquire(request.adapter_hash, request.priority >= BACKGROUND_PRIORITY)
        self._num_added += 1
        sampling = request.sampling
        place = grammar.start(sampling.ignore_eos) if spec is not None and grammar is not None else None
        seq = Sequence(self._num_added, request, place, pooling.pooling if pooling is not None else None)
        detokenizer = detokenizer_of(request, self._texts)
        prompt_logprobs: list[TokenLogprobs | None] | None = [None] if seq.wants_prompt_logprobs else None
        drafts = self._proposer.start(seq)
        self._by_id[request.request_id] = RunningRequest(
            seq, detokenizer, drafts, self._eos_token_ids, prompt_logprobs, pooling
        )
        self._scheduler.add(seq)
        self._admission.admitted(request)

    def abort(self, request_id: str) -> None:
        """Drop a request; its KV blocks are free at once. Unknown ids are ignored."""
        state = self._by_id.get(request_id)
        if state is not None:
            self.remove(state)
            self._reports.count_end("abort")

    def drop_late(self) -> list[RequestFailed]:
        """Take out the requests whose deadline has passed before they ran."""
        now = self._scheduler.clock()
        late = self._scheduler.waiting.late(now)
        for seq in late:
            self.remove(self._by_id[seq.request_id])
            self._reports.count_end("abort")
        return [
            RequestFailed(
                seq.request_id,
                DeadlineError(
                    f"the deadline passed after {now - seq.arrived:.1f} s of waiting; the request was not run",
                    param="deadline_ms",
                ).info(),
            )
            for seq in late
        ]

    def drop_displaced(self) -> list[RequestFailed]:
        """Take out the rows of batches whose adapters have to make room for others' requests; they run again."""
        if not (displaced := self._registry.displaced()):
            return []
        dropped = [state for state in self._by_id.values() if state.seq.adapter_hash in displaced]
        for state in dropped:
            self.remove(state)
            self._reports.count_end("abort")
        error = OverloadedError("the adapter makes room for requests; the row runs again", status=503).info()
        return [RequestFailed(state.seq.request_id, error) for state in dropped]

    def remove(self, state: RunningRequest) -> None:
        """It has left."""
        seq = state.seq
        self._scheduler.remove(seq)
        self._proposer.end(state.drafts)
        del self._by_id[seq.request_id]
        seq.owner = None  # each held the other
        if seq.adapter_hash is not None:
            self._registry.release(seq.adapter_hash, seq.is_background)
            self._adapters.forget_left()
