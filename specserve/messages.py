"""What the server and the engine process say to each other.

`frames.py` has which of it a frame may hold, either way; `adapter_messages.py` what is said of adapters,
`pooling_messages.py` of pooling, and `stats_messages.py` of the engine itself. Everything here is plain values; neither
side shares objects with the other. Validation of user input happens in the server; the engine trusts these ranges
except where it says that it checks.
"""

from collections.abc import Sequence
from typing import Literal, TypeVar

import msgspec

from .adapter_messages import LookaheadInfo
from .errors import ErrorInfo

T = TypeVar("T")


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How one sequence is sampled. Ranges are checked by the server; defaults are neutral (greedy is temperature 0)."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0  # (0, 1]
    top_k: int = 0  # 0 = off
    min_p: float = 0.0  # [0, 1]
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0  # EOS and stop ids are forbidden until this many tokens
    seed: int = 0  # unsigned 64 bit; the server draws one when the client sends none
    logprobs: int | None = None  # None: none; n >= 0: the sampled token's and the n most likely ones'
    prompt_logprobs: int | None = None  # the same for every prompt token after the first
    skip_special_tokens: bool = True
    detokenize: bool = True  # False: deltas have no text, and there are no stop strings


class Speculation(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Per-request speculation: `auto` uses every source that helps, `ngram` only prompt lookup, `off` none.

    `fixed` verifies as many drafts as the sources have, up to the limit, whether or not they pay.
    """

    mode: Literal["auto", "off", "ngram", "fixed"] = "auto"
    max_draft_tokens: int = 16
    trace: bool = False  # deltas say where each token came from


MAX_GRAMMAR_BYTES = 256 * 1024


class GrammarSpec(msgspec.Struct, frozen=True):
    """What the output must be. Equal specs share one compiled grammar; `text` has at most `MAX_GRAMMAR_BYTES`.

    `text` is a JSON Schema (json_schema), nothing (json_object), a regular expression, a Lark grammar, or a JSON list
    of strings (choice).
    """

    kind: Literal["json_schema", "json_object", "regex", "lark", "choice"]
    text: str


BACKGROUND_PRIORITY = 1 << 20  # of what gives way to all others; no request may ask for it
AWAY_S = 10.0  # since the last request of others, until what gives way to them may take what they used


class Together(msgspec.Struct, frozen=True):
    """All sequences of one answer, which are admitted or refused with whichever of them comes first."""

    answer_id: str  # unique among answers
    num: int  # 2 or more
    prompt_tokens: int  # of all


class GenerateRequest(msgspec.Struct, frozen=True, tag="generate"):
    """One sequence to generate. A client request with n > 1 is n of these, `sample_idx` 0 .. n-1."""

    request_id: str  # unique among running requests
    prompt_token_ids: list[int]  # 1 .. max_model_len - 1 ids in [0, vocab_size)
    sampling: SamplingParams
    adapter_hash: str | None = None  # content hash of a loaded adapter; None is the bare base
    cache_salt: str = ""
    caller: str = ""  # who sends it, of those that share the server: a key's name; "" is anybody without one
    sample_idx: int = 0
    speculation: Speculation = Speculation()
    prediction_token_ids: list[int] = []  # the client's expected output (OpenAI `prediction`)
    grammar: GrammarSpec | None = None
    priority: int = 0  # lower is sooner
    deadline: float | None = None  # of time.monotonic(), which all processes of a machine share: then nobody wants it
    together: Together | None = None  # None: it is all there is of its answer, or the answer has begun
    is_first: bool = True  # of its answer; of the others none is dropped for want of time once the answer has begun

    @property
    def num_together(self) -> int:
        """The sequences that are admitted with it; 0 where its answer has begun."""
        return self.together.num if self.together is not None else int(self.is_first)


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a request; its KV blocks are free before the next step. Unknown ids are ignored."""

    request_id: str


class GetStats(msgspec.Struct, frozen=True, tag="get_stats"):
    call_id: int


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Finish nothing more; leave the process."""


class EngineInfo(msgspec.Struct, frozen=True, tag="engine_info"):
    """First frame from the engine: the model is loaded and requests may come."""

    model: str
    architecture: str
    vocab_size: int
    max_model_len: int
    num_kv_blocks: int
    block_size: int
    device: str
    dtype: str
    pid: int
    eos_token_ids: list[int]
    kernels: str = ""  # what multiplies: a level of the native CPU path, torch or triton
    max_num_seqs: int = 0
    max_adapters: int = 0  # in the memory that steps read
    undrafted_rates: list[tuple[int, float]] = []  # (sequences, tokens/s of all) without drafts, by the cost table
    hidden_size: int = 0  # values of an embedding
    is_exact: bool = False  # whether a row's bits are the same in every step
    base_head: LookaheadInfo | None = None  # what --base-head names
    model_hash: str = ""  # of weights and tokenizer: a process that comes later must have the same


class CallDone(msgspec.Struct, frozen=True, tag="call_done"):
    call_id: int


class CallFailed(msgspec.Struct, frozen=True, tag="call_failed"):
    call_id: int
    error: ErrorInfo


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log-probabilities (natural log) under the model's raw distribution, before penalties and temperature."""

    logprob: float
    top: list[tuple[int, float]]  # (token id, logprob), most likely first
    rank: int  # 1 = the most likely token


class RejectedDraft(msgspec.Struct, frozen=True):
    """A token that was drafted and verified in vain."""

    token_id: int
    text: str
    source: str
    chance: float  # as in `TokenTrace`


TARGET = "target"  # the source of tokens that nobody had drafted
MAX_REJECTED = 16  # drafts that a token's trace shows


class TokenTrace(msgspec.Struct, frozen=True, omit_defaults=True):
    """Where a token of an output came from, in the words of the HTTP API.

    The engine leaves the texts empty; who writes the output's text writes them (`text/traced_text.py`).
    """

    token_id: int
    text: str
    source: str  # of drafts, or `TARGET`
    chance: float | None  # what the drafter expected: that this draft is right, those before it being right
    forward: int  # which of the output's forwards gave it, from 0
    rejected: list[RejectedDraft] = []  # whose place it took, and those behind that, up to `MAX_REJECTED`


def renumbered(trace: list[TokenTrace], by: int) -> list[TokenTrace]:
    """With the numbers of its forwards moved `by` so many: a part of an output that is several sequences in turn."""
    return [msgspec.structs.replace(entry, forward=entry.forward + by) for entry in trace] if by else trace


class Usage(msgspec.Struct, frozen=True):
    """Counts of one finished sequence. Tokens after a stop, EOS or max_tokens are counted nowhere."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    num_forwards: int  # forwards that produced output tokens
    draft_tokens: int  # drafts that were verified
    accepted_draft_tokens: int  # of those, how many were kept
    accepted_prediction_tokens: int  # the client's prediction only
    rejected_prediction_tokens: int
    accepted_by_source: dict[str, int] = {}
    queue_s: float = 0.0  # from arrival in the engine to the first admission to a step


class Delta(msgspec.Struct, frozen=True, tag="delta", omit_defaults=True):
    """New output of one request; the last one carries `finish_reason` and `usage`.

    `text` never holds an incomplete character nor text past a stop string; token ids may run ahead of it.
    """

    request_id: str
    token_ids: list[int]
    text: str = ""
    num_silent: int = 0  # token ids at the end that are no text: an end of sequence, a stop token
    logprobs: list[TokenLogprobs] | None = None
    trace: list[TokenTrace] | None = None  # of each of the token ids; beside a text, of those whose text is certain
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # once, on the first delta
    finish_reason: Literal["stop", "length", "abort"] | None = None
    stop_reason: str | int | None = None  # the stop string or stop token id that ended it
    usage: Usage | None = None


def joined(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one sequence that follow one another, as one. None but the last has silent tokens."""
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    return msgspec.structs.replace(
        last,
        token_ids=[token for delta in deltas for token in delta.token_ids],
        text="".join([delta.text for delta in deltas]),
        logprobs=_in_turn([delta.logprobs for delta in deltas]),
        trace=_in_turn([delta.trace for delta in deltas]),
        prompt_logprobs=deltas[0].prompt_logprobs,
    )


def _in_turn(parts: Sequence[list[T] | None]) -> list[T] | None:
    return [item for part in parts for item in part or ()] if any(part is not None for part in parts) else None


class RequestFailed(msgspec.Struct, frozen=True, tag="request_failed"):
    """This request ended with an error; others go on."""

    request_id: str
    error: ErrorInfo


class Heartbeat(msgspec.Struct, frozen=True, tag="heartbeat"):
    """Sent once a second by a thread of its own, whatever the engine's loop is doing.

    `turn_s` is how long the loop's present turn, a step or the messages between two, has taken of this process's own
    time: not that in which it was stopped or waited for a core.
    """

    turn_s: float
    num_rows: int  # of the newest step
    expected_s: float  # that such a step takes at most, by what was measured of others
