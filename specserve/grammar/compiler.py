"""Grammar specs compiled, on threads of their own, within limits, and kept for the next request.

Owns the matcher's view of the tokenizer, a bounded cache and its counts. A grammar that is refused, for its syntax, for
what cannot be enforced or for a limit, raises `GrammarError` with the reason; nothing is ever served with less than the
grammar that was asked for. Threads may call `compile`; the matcher lets go of the interpreter lock while it works.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import Tokenizer

from ..errors import GrammarError, UserError
from ..messages import MAX_GRAMMAR_BYTES, GrammarSpec
from .grammar import CompiledGrammar
from .matcher_source import matcher_source, readable_reason

MAX_CACHED = 128
MAX_CACHED_BYTES = 4 * 2**20  # of grammar text; a compiled one takes from 40 KB to some MB
NUM_THREADS = 2
COMPILE_TIMEOUT_S = 10.0


class GrammarCompiler:
    """Compiles for one model, whose logits have `vocab_size` columns."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]):
        self._tokenizer = tokenizer
        self._vocab_size = max(vocab_size, tokenizer.get_vocab_size(with_added_tokens=True))
        self._eos_token_ids = tuple(sorted(eos_token_ids))
        self._ll_tokenizer: LLTokenizer | None = None  # half a second of work that not every server needs
        self._limits = LLParserLimits(
            max_items_in_row=8_000,  # 1,000 optional properties take 4,000
            step_lexer_fuel=500_000,  # about 35 ms, the most that a step may wait for one mask
            step_max_items=100_000,
            max_lexer_states=50_000,
            max_grammar_size=200_000,
            verbose_errors=False,
        )
        self._lock = threading.Lock()
        self._tokenizer_lock = threading.Lock()
        self._cache: OrderedDict[tuple[str, bytes], tuple[CompiledGrammar, int]] = OrderedDict()
        self._cached_bytes = 0
        self._running: dict[tuple[str, bytes], Future[CompiledGrammar]] = {}
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="grammar")
        self.began: float | None = None  # when the vocabulary was indexed, on the monotonic clock; None before
        self.num_compiled = 0
        self.num_cache_hits = 0
        self.compile_s = 0.0

    @property
    def mask_words(self) -> int:
        return (self._vocab_size + 31) // 32

    @property
    def num_cached(self) -> int:
        return len(self._cache)

    def submit(self, spec: GrammarSpec) -> Future[CompiledGrammar]:
        """Compile on a thread; equal specs that are under way share one compilation."""
        key = _key(spec)
        if (found := self._cached(key)) is not None:
            future: Future[CompiledGrammar] = Future()
            future.set_result(found)
            return future
        with self._lock:
            if (running := self._running.get(key)) is not None:
                self.num_cache_hits += 1
                return running
            future = self._running[key] = self._threads.submit(self.compile, spec)
        future.add_done_callback(lambda _: self._running.pop(key, None))
        return future

    def compile(self, spec: GrammarSpec) -> CompiledGrammar:
        """The compiled grammar of `spec`, from the cache or made here. Raises `GrammarError`."""
        key = _key(spec)
        if (found := self._cached(key)) is not None:
            return found
        start = time.perf_counter()
        try:
            compiled = self._compile(spec)
        except GrammarError:
            raise
        except UserError as error:
            raise GrammarError(str(error)) from None
        seconds = time.perf_counter() - start
        with self._lock:
            self.num_compiled += 1
            self.compile_s += seconds
            self._cache[key] = (compiled, len(spec.text))
            self._cached_bytes += len(spec.text)
            while len(self._cache) > MAX_CACHED or self._cached_bytes > MAX_CACHED_BYTES:
                _, (_, num_bytes) = self._cache.popitem(last=False)
                self._cached_bytes -= num_bytes
        return compiled

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _cached(self, key: tuple[str, bytes]) -> CompiledGrammar | None:
        with self._lock:
            if (found := self._cache.get(key)) is None:
                return None
            self._cache.move_to_end(key)
            self.num_cache_hits += 1
            return found[0]

    def _compile(self, spec: GrammarSpec) -> CompiledGrammar:
        if len(spec.text.encode()) > MAX_GRAMMAR_BYTES:
            raise GrammarError(f"the grammar has more than {MAX_GRAMMAR_BYTES} bytes; that is the limit")
        tokenizer = self._tokenizer_view()
        matcher = LLMatcher(tokenizer, matcher_source(spec), log_level=0, limits=self._limits)
        if not matcher.is_error():
            probe = matcher.deep_copy()
            allowed = probe.compute_bitmask()  # some grammars fail only here
            if not probe.is_error() and not any(allowed):
                raise GrammarError("the grammar allows no output")
            matcher = matcher if not probe.is_error() else probe
        if matcher.is_error():
            raise GrammarError(readable_reason(spec, matcher.get_error()))
        return CompiledGrammar(matcher, self._vocab_size, self._eos_token_ids)

    def _tokenizer_view(self) -> LLTokenizer:
        with self._tokenizer_lock:
            if self._ll_tokenizer is None:
                tokenizer = Tokenizer.from_str(self._tokenizer.to_str())
                tokenizer.no_padding()
                tokenizer.no_truncation()
                try:
                    self._ll_tokenizer = LLTokenizer(
                        tokenizer.to_str(), n_vocab=self._vocab_size, eos_token=list(self._eos_token_ids)
                    )
                except Exception as error:  # the binding raises what it has
                    raise GrammarError(f"this model's tokenizer allows no structured output: {error}") from None
                self.began = time.monotonic()
            return self._ll_tokenizer


def _key(spec: GrammarSpec) -> tuple[str, bytes]:
    return spec.kind, hashlib.sha256(spec.text.encode()).digest()
