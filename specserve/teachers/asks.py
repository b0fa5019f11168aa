"""What a teacher is asked, and what it answers: values, and the hash under which what came is kept.

Invariant: two asks have one hash exactly if the same teacher was asked the same thing in the same way.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

_FORMAT = "1"  # of what is kept; another one is asked again


@dataclass(frozen=True, slots=True)
class Ask:
    """A conversation to be answered `n` times; `messages` are in the API's shape, `schema` is a JSON Schema to keep to.

    Without messages it asks for what a user would begin with, which only a teacher that runs here can tell.
    Equal asks share their answers, sampled ones too: other samples need another `seed`.
    """

    messages: tuple[Mapping[str, Any], ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    schema: Mapping[str, Any] | None = None
    top_logprobs: int = 0  # of each token of the answer

    def digest(self, identity: str) -> str:
        """SHA-256 of this ask and of who is asked."""
        return _digest(identity, "ask", asdict(self))


@dataclass(frozen=True, slots=True)
class Reading:
    """A text as token ids, to be read and not answered: what is likely at each of its tokens from `start` on."""

    token_ids: tuple[int, ...]
    start: int
    num_top: int

    def digest(self, identity: str) -> str:
        return _digest(identity, "reading", asdict(self))


@dataclass(frozen=True, slots=True)
class TopTokens:
    """Of each token that was read, the most likely tokens in its place, best first, and their log-probabilities."""

    ids: tuple[tuple[int, ...], ...]
    logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token by its bytes, which may be a part of a character, its log-probability, and the most likely ones there."""

    token: bytes
    logprob: float
    top: tuple[tuple[bytes, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    """`finish_reason` is stop or length (cut off); `completion_tokens` None: they are known of all samples together."""

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int | None
    reasoning: str | None = None  # what the teacher thought before, where it says so
    logprobs: tuple[TokenLogprob, ...] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What came of one ask so far, and what was charged for it: a prompt with several samples is often charged once.

    `refused` is what the teacher said in place of further answers. Not `is_counted`: it does not say what it charges.
    """

    answers: tuple[Answer, ...] = ()
    prompt_tokens: int = 0
    completion_tokens: int = 0
    refused: tuple[str, ...] = ()
    is_counted: bool = True

    @property
    def num(self) -> int:
        """Of an ask's samples; a reply is whole when it has all of them."""
        return len(self.answers) + len(self.refused)

    def joined(self, more: Reply) -> Reply:
        return Reply(
            self.answers + more.answers,
            self.prompt_tokens + more.prompt_tokens,
            self.completion_tokens + more.completion_tokens,
            self.refused + more.refused,
            self.is_counted and more.is_counted,
        )

    def without_refusals(self) -> Reply:
        """The answers that say something."""
        said = tuple(answer for answer in self.answers if answer.text.strip())
        return Reply(said, self.prompt_tokens, self.completion_tokens, (), self.is_counted)


def _digest(identity: str, kind: str, value: dict[str, Any]) -> str:
    whole = {"format": _FORMAT, "teacher": identity, kind: value}
    return hashlib.sha256(msgspec.json.encode(whole, order="deterministic")).hexdigest()
