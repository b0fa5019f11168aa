"""The engine: continuous batching with speculation, one `step()` at a time.

`step()` is schedule, propose, forward, verify, commit, emit. Requests and steps are one thread's: the process around it
(`process`) feeds requests in between steps and, on a device, while it runs. Other threads read, upload and place
adapters. Whatever a request or an adapter does, other requests go on: errors are turned into that request's
`RequestFailed`.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from ..adapter_messages import AdapterInfo
from ..compute.device_choice import choose_device, kv_cache_gib, memory_bytes, step_bytes, with_defaults
from ..compute.grammar_masks import MaskMaker
from ..compute.kv_cache import KVCache
from ..compute.loader import AnyDecoder, choose_paths, load_model, make_path
from ..compute.path import ComputePath, PathInputs, StepLimits
from ..config import EngineConfig
from ..drafting.cost_checks import CostChecks
from ..drafting.cost_model import MEASURED_ROWS, MEASURED_SEQS
from ..drafting.kept_costs import costs_file, keep, measured_costs
from ..drafting.proposer import Proposer
from ..drafting.step_costs import StepSeconds
from ..grammar.compiler import GrammarCompiler
from ..grammar.grammar import CompiledGrammar
from ..messages import EngineInfo
from ..pooling_messages import AnyRequest
from ..schedule.block_manager import BlockManager
from ..schedule.scheduler import Scheduler
from ..stats_messages import EngineStats
from ..text.detokenizer import TokenTexts
from ..text.special_tokens import eos_token_ids, ids_within, load_backend_tokenizer
from .admission import Admission, size_kv
from .commits import Commits
from .engine_adapters import EngineAdapters
from .live_requests import LiveRequests
from .pooling import PooledAnswers
from .queued_step import QueuedStep
from .recent_steps import RecentSteps
from .reports import Event, Reports
from .spare_steps import SpareSteps
from .stats import Counters, engine_stats
from .step_queue import StepQueue
from .step_times import StepTimes
from .wait_estimate import WaitEstimate, decode_step_s


class Engine:
    """Serves one base model and any number of its LoRAs.

    `model_dir` is a local Hugging Face directory. Raises `ModelError` when it cannot be served and `UserError` for
    settings that do not fit the model. `make_path` gives what computes, if it shall not be the loaded model itself.
    `keeps_costs`: what steps cost is taken from an earlier start where that still holds, and kept for the next one.
    """

    def __init__(
        self,
        config: EngineConfig,
        model_dir: Path,
        make_path: Callable[[AnyDecoder, PathInputs], ComputePath] = make_path,
        keeps_costs: bool = False,
    ):
        if config.num_threads:
            torch.set_num_threads(config.num_threads)
        device = choose_device(config)
        self.config = config = with_defaults(config, device)
        assert config.max_num_seqs and config.max_batched_tokens and config.max_prefill_rows and config.max_adapters
        self.decoder = load_model(model_dir, device, config.dtype, choose_paths(config, device))
        self.tokenizer = load_backend_tokenizer(model_dir)
        model = self.decoder.config
        self.eos_token_ids = ids_within(eos_token_ids(model_dir), model.vocab_size)
        limits = StepLimits(
            max_rows=max(config.max_batched_tokens, config.max_num_seqs, MEASURED_ROWS[-1]),
            max_seqs=max(config.max_num_seqs, MEASURED_SEQS),
            max_model_len=config.max_model_len or model.max_position_embeddings,
            max_adapters=config.max_adapters,
            max_lora_rank=config.max_lora_rank,
            max_draft_tokens=config.max_draft_tokens,
        )
        dtype = self.decoder.compute_dtype
        for_steps = step_bytes(device, model, dtype, limits, config.cuda_graphs)
        kv_gib = kv_cache_gib(config, device, for_steps)
        num_blocks, max_model_len = size_kv(config, kv_gib, model, dtype, memory_bytes(device))
        limits = replace(limits, max_model_len=max_model_len)
        kv = KVCache(
            model.num_layers,
            num_blocks,
            config.block_size,
            model.num_kv_heads,
            model.head_dim,
            dtype,
            self.decoder.device,
        )
        self.blocks = BlockManager(num_blocks, config.block_size, config.prefix_caching)
        self.scheduler = Scheduler(
            self.blocks,
            max_num_seqs=config.max_num_seqs,
            max_batched_tokens=config.max_batched_tokens,
            max_prefill_rows=config.max_prefill_rows,
        )
        self.grammars = GrammarCompiler(self.tokenizer, model.vocab_size, sorted(self.eos_token_ids))
        self.masks = MaskMaker(self.grammars.mask_words)
        kv_bytes = sum(tensor.nbytes for tensor in (*kv.k, *kv.v))
        later_bytes = for_steps if device.type == "cuda" else kv_bytes
        self.adapters = EngineAdapters(config, model_dir, self.decoder, later_bytes, self._forget_adapter)
        self.registry, base_lookahead = self.adapters.registry, self.adapters.base_lookahead
        self.info = EngineInfo(
            model=str(model_dir),
            architecture=model.architecture,
            vocab_size=model.vocab_size,
            max_model_len=max_model_len,
            num_kv_blocks=num_blocks,
            block_size=config.block_size,
            device=str(self.decoder.device),
            dtype=self.decoder.weight_dtype_name,
            pid=0,
            eos_token_ids=list(self.eos_token_ids),
            kernels=self.decoder.kernels,
            max_num_seqs=config.max_num_seqs,
            max_adapters=config.max_adapters,
            hidden_size=model.hidden_size,
            is_exact=self.decoder.is_exact,
            base_head=base_lookahead.info() if base_lookahead is not None else None,
            model_hash=self.adapters.model_hash,
        )
        self._ahead: QueuedStep | None = None  # queued behind a step whose tokens were not known
        self._ended: tuple[QueuedStep, StepSeconds] | None = None  # a step that nothing was learned from yet
        self._counters = Counters()
        path = self.path = make_path(
            self.decoder,
            PathInputs(
                kv,
                limits,
                self.masks,
                sorted(self.eos_token_ids),
                self.registry.adapters,
                config.cuda_graphs,
                base_lookahead.head if base_lookahead is not None else None,
            ),
        )
        self.runner, self.sampler, self.is_asynchronous = path.runner, path.sampler, path.is_asynchronous
        self._torch_threads = path.torch_threads
        self._times = StepTimes(path.clock or time.perf_counter, path.is_asynchronous)
        kept = path.costs_key is not None and keeps_costs
        key = (path.costs_key, model, num_blocks, config.block_size, max_model_len)
        file = costs_file(*key) if kept else None
        timed_step = functools.partial(path.seconds, self.blocks, max_model_len)
        cost_model = measured_costs(timed_step, file)
        self._cost_checks: CostChecks | None = None
        if file is not None and not path.is_asynchronous:
            spare_steps = SpareSteps(path, self.blocks, timed_step, self.has_work)
            self._cost_checks = CostChecks(cost_model, spare_steps, functools.partial(keep, file))
        self.proposer = Proposer(
            config,
            cost_model,
            path.heads,
            path.stepped_heads,
            model.vocab_size,
            self.registry.adapters,
            clock=path.clock,
            is_asynchronous=path.is_asynchronous,
            max_logits=path.max_rows_ahead or None,
            base_lookahead=base_lookahead,
            base_hash=self.adapters.base_hash,
        )
        self.reports = Reports(self._counters, self.blocks, self.proposer)
        self.waits = WaitEstimate(self.scheduler, functools.partial(decode_step_s, cost_model, self.scheduler))
        self.requests = LiveRequests(
            self.info,
            self.eos_token_ids,
            TokenTexts(self.tokenizer),
            self.grammars,
            self.adapters,
            Admission(config, self.scheduler, self.waits),
            self.scheduler,
            self.proposer,
            self.reports,
        )
        pooled = PooledAnswers(self.reports, self.requests.remove, model.logits_divisor)
        self.commits = Commits(self.proposer, self.reports, self.requests.remove, pooled)
        self.steps = StepQueue(
            self.scheduler,
            self.proposer,
            path,
            self.registry.adapters,
            self.commits,
            self.reports,
            self._counters,
            self._times.clock,
        )
        self.recent_steps = RecentSteps(cost_model)

    # -- requests

    def add_request(self, request: AnyRequest, grammar: CompiledGrammar | None = None) -> None:
        """Queue a sequence or a text. Raises `UserError` when it can never run or there is no room to wait.

        `grammar` is what `request.grammar` was compiled to, where that was done before; else it is done now.
        """
        self.requests.add(request, grammar)

    def abort(self, request_id: str) -> None:
        """Drop a request; its KV blocks are free at once. Unknown ids are ignored."""
        self.requests.abort(request_id)

    def close(self) -> None:
        """Save what was learned; call it once, when no step will follow."""
        self.proposer.sources.close()
        self.grammars.close()

    def has_work(self) -> bool:
        return self._ahead is not None or self.scheduler.has_work()

    # -- adapters

    def load_adapter(self, name: str, path: str | Path) -> AdapterInfo:
        """Read, check and register the PEFT directory `path`. Raises `AdapterError`."""
        return self.adapters.register(self.adapters.read(name, path))

    def _forget_adapter(self, content_hash: str) -> None:
        self.runner.slots.free(content_hash)
        self.proposer.adapter_left(content_hash)

    # -- the step

    def step(self, while_running: Callable[[], None] | None = None) -> list[Event]:
        """Run one forward and return what it produced; empty when there is nothing to do.

        On a device that runs by itself, `while_running` is called once the forward is queued; requests may be added
        and aborted there. Who gives it reads the events of this step behind `write_events` only, there in the next
        step, or earlier.
        """
        with self._torch_threads():
            step, self._ahead = self._ahead or self.steps.queue(), None
            if step is None:
                return []
            self.steps.num_rows = step.num_rows
            if self.is_asynchronous:
                self._ahead = self.steps.queue_behind(step)
                self._learn()
                self.path.beside_step()
                if while_running is not None:
                    while_running()
                self.write_events()
            if step.output is not None and step.pending is not None:
                self._times.start_waiting()
                kept = self.sampler.collect(step.pending)
                self._times.know()
                self.commits.commit(step, step.output, kept)
        self.proposer.observe(step.verified)
        self._ended = (step, self._times.end(step, self.has_work()))
        if not self.is_asynchronous:
            self._learn()
        if while_running is None or not self.is_asynchronous:
            self.write_events()
        return step.events

    def _learn(self) -> None:
        """From the latest step, for which the device did not have to wait either."""
        ended, self._ended = self._ended, None
        if ended is None:
            return
        step, seconds = ended
        self.recent_steps.add(step, seconds.total)
        if step.proposed is not None:
            self.proposer.end_step(step.proposed, step.verified, seconds)

    def write_events(self) -> None:
        """Complete the events of the latest step, for which the device did not have to wait."""
        self.reports.write()

    # -- bookkeeping

    def measure_load(self) -> None:
        """Learn how fast requests are served; to be called about once a second."""
        self.waits.observe(self._counters.prompt_tokens, self._counters.generated_tokens)
        if self.has_work():
            self._check_costs(is_busy=True)

    def take_idle_turn(self) -> None:
        """While there is nothing to do, now and then: see whether steps cost what drafts are planned by."""
        self._check_costs(is_busy=False)

    def _check_costs(self, is_busy: bool) -> None:
        if self._cost_checks is not None:
            self._cost_checks.take_turn(is_busy)

    def stats(self, check_integrity: bool = True) -> EngineStats:
        """A snapshot; with `check_integrity` the block manager is checked against every live sequence."""
        return engine_stats(self, self._counters, check_integrity)
