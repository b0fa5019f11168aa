"""What each name held when, and whether a reply is one that it could have given.

Pure: times are seconds on one clock, contents are names, texts come from `Golden`. A reply is right if its text is that
of a content which its name held between the request's start, less a grace of a few seconds, and its end; one that only
the grace makes right is late. A name that is being changed holds the old content, the new one, or neither: what is half
written may be refused, never served.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

BASE = ""  # the content of the base model's own name

Verdict = Literal[
    "right", "late", "left", "refused", "wrong text", "unexpected error", "unclean error", "broken stream"
]
FAULTS: tuple[Verdict, ...] = ("wrong text", "unexpected error", "unclean error", "broken stream")


@dataclass(frozen=True, slots=True)
class State:
    """`content` is None where the name means nothing; while `is_moving`, that is what it is going to hold.

    A name that is given or taken away by a route, unlike one whose files change, holds what it held until that is done.
    """

    content: str | None
    is_moving: bool = False
    keeps_old: bool = False


@dataclass(slots=True)
class Timeline:
    """States of one name, in the order of time; each lasts until the next begins."""

    times: list[float] = field(default_factory=list)
    states: list[State] = field(default_factory=list)

    def set(self, at: float, content: str | None, *, is_moving: bool = False, keeps_old: bool = False) -> None:
        self.times.append(at)
        self.states.append(State(content, is_moving, keeps_old))

    @property
    def last(self) -> State:
        return self.states[-1]

    def between(self, start: float, end: float) -> list[State]:
        first = max(0, bisect_right(self.times, start) - 1)
        while first > 0 and self.states[first].keeps_old:
            first -= 1
        return self.states[first : bisect_right(self.times, end)]


@dataclass(slots=True)
class Disturbances:
    """Spans in which the engine was away or stopped because we asked for it; an open one has no end yet."""

    spans: list[list[float]] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)  # of engine processes

    def begin(self, at: float) -> list[float]:
        self.spans.append([at, float("inf")])
        return self.spans[-1]

    def overlaps(self, start: float, end: float) -> bool:
        return any(begin <= end and start <= finish for begin, finish in reversed(self.spans))

    def num_kills(self, start: float, end: float) -> int:
        return sum(start <= at <= end for at in self.kills)


@dataclass(frozen=True, slots=True)
class Ask:
    """One request: whom, with which of the prompts, over which route."""

    name: str
    route: str
    prompt_idx: int


@dataclass(slots=True)
class Reply:
    """What came of it. `is_whole`: the stream or body ended as its protocol says, with an answer or an error."""

    start: float
    end: float = 0.0
    status: int = 0  # 0: no answer at all
    text: str = ""
    error: str = ""  # its message
    code: str | None = None
    is_json_error: bool = False
    is_whole: bool = False
    is_cut: bool = False  # the connection broke, visibly
    we_left: bool = False
    may_be_cut: bool = False  # we did not read for longer than the server waits
    is_longer: bool = False  # it was asked to go on past the golden text


Golden = Mapping[tuple[str, str, int], str]  # (content, route, prompt) -> text
CLEAN = frozenset({400, 403, 404, 408, 409, 422, 424, 429, 503, 504})
CHANGING = "changes while it is read"  # asks to be asked again
CRASHED = "engine_crashed"  # two engine processes ended with the request in them
AWAY = frozenset({"engine_unavailable", "incomplete_generation", "shutting_down"})


def judge(
    ask: Ask, reply: Reply, timeline: Timeline, golden: Golden, disturbances: Disturbances, grace: float
) -> tuple[Verdict, str]:
    """The verdict, and for a fault what it is in words."""
    now = timeline.between(reply.start, reply.end)
    recent = timeline.between(reply.start - grace, reply.end)
    ended = reply.is_whole and not reply.error and not reply.we_left
    if ended and not reply.text:
        return "wrong text", "an empty answer"
    is_exact, is_late = ended and not reply.is_longer, False
    if reply.text and not _any_fits(ask, reply.text, now, golden, is_exact):
        if not _any_fits(ask, reply.text, recent, golden, is_exact):
            return "wrong text", whose(ask, reply.text, golden, is_exact)
        is_late = True
    if reply.error:
        return judge_error(reply, recent, disturbances)
    if reply.we_left:
        return "left", ""
    if not reply.is_whole:
        if reply.is_cut and (reply.may_be_cut or disturbances.overlaps(reply.start - 1, reply.end)):
            return "left" if reply.may_be_cut else "refused", ""
        return "broken stream", "the connection broke" if reply.is_cut else "a clean end without the end of the answer"
    return "late" if is_late else "right", ""


def judge_error(reply: Reply, recent: list[State], disturbances: Disturbances) -> tuple[Verdict, str]:
    if reply.code == CRASHED and disturbances.num_kills(reply.start - 2, reply.end) > 1:
        return "refused", ""  # it looks like a request that kills engines, and nobody can know better
    if not reply.is_json_error or reply.status not in CLEAN | {200} or "internal error" in reply.error:
        return "unclean error", f"{reply.status} {reply.code}: {reply.error}"
    away = disturbances.overlaps(reply.start - 2, reply.end)
    stood_still = len(recent) == 1 and not recent[0].is_moving and recent[0].content is not None
    about_engine = reply.status in (503, 504) or reply.code in AWAY
    if CHANGING in reply.error and away:
        return "refused", ""  # it was being read when the engine went, or when time stood still
    if reply.may_be_cut or (away if about_engine else not stood_still):
        return "refused", ""
    why = "nobody had disturbed the engine" if about_engine else "the adapter stood still"
    return "unexpected error", f"{why}: {reply.status} {reply.code}: {reply.error}"


def _any_fits(ask: Ask, text: str, states: list[State], golden: Golden, is_exact: bool) -> bool:
    held = {state.content for state in states if state.content is not None}
    return any(fits(text, golden[content, ask.route, ask.prompt_idx], is_exact) for content in held)


def fits(text: str, golden: str, is_exact: bool) -> bool:
    """`text` is the golden one, or one of them is how the other begins: an answer that broke off or went on."""
    if is_exact:
        return text == golden
    return golden.startswith(text.rstrip("\ufffd")) or text.startswith(golden.rstrip("\ufffd"))


def whose(ask: Ask, text: str, golden: Golden, is_exact: bool) -> str:
    """Which content's text it is, for a reply that is none of its name's."""
    owners = sorted({c for (c, route, idx), want in golden.items() if (route, idx) == (ask.route, ask.prompt_idx)
                     and fits(text, want, is_exact)})  # fmt: skip
    if not owners:
        return "the text of no content"
    return "the base model's text" if owners == [BASE] else f"the text of {', '.join(owners)}"
