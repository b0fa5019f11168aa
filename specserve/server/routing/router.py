"""Which adapter a request gets that names none: `model: "auto"`.

Owns the choice. Adapters whose profile is alike enough to the request's text are candidates, the most alike is taken,
and where there is none the base model. What moves between the choice and the load moves the choice: an adapter that
has gone, that is of another kind or has another profile by then is chosen again, or not. An adapter that is there and
cannot be loaded is an error, as where it is named: the base model's answer would pass for its.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import TypeVar

from ...adapter_files import changing
from ...errors import UserError
from ..access.caller import Caller
from ..adapter_store import AdapterStore
from ..openai.request_types import ChatRequest, CompletionRequest
from .likeness import Likeness, cosines
from .profiles import LOOK_EVERY_S, Known, Profiles
from .text import request_text
from .types import RouteCandidate, Routing

AUTO = "auto"
MAX_OTHERS = 5
MAX_CHOICES = 4  # that a request sees overtaken by changes
MANY = 128  # adapters, to compare with which takes about a millisecond
MOVED = frozenset({"model_not_found", "wrong_adapter_type"})  # errors of an adapter that is no candidate any more

T = TypeVar("T")


class Router:
    """Over the adapters of one store; `base_name` is the base model's."""

    def __init__(self, store: AdapterStore, base_name: str):
        self._store = store
        self._base_name = base_name
        self._profiles = Profiles(store)

    async def is_asked(self, caller: Caller, model: str | None, adapter_id: str | None) -> bool:
        """Whether a request leaves its adapter open. What is named so goes before: a model or an adapter `auto`."""
        if model != AUTO or self._base_name == AUTO or adapter_id not in (None, ""):
            return False
        return not (caller.may_use(AUTO) and await self._store.look(self._has, AUTO))

    def _has(self, name: str) -> bool:
        try:
            self._store.path(name)
        except UserError:
            return False
        return True

    async def route(
        self,
        request: CompletionRequest | ChatRequest,
        caller: Caller,
        load: Callable[[str | None], Awaitable[T]],
    ) -> tuple[Routing, T]:
        """The choice, and what `load` made of its adapter, by name; None is the base model. Raises `UserError`."""
        text = request_text(request)
        gone: set[str] = set()
        max_age_s = LOOK_EVERY_S
        for _ in range(MAX_CHOICES):
            known = await self._profiles.now(max_age_s)
            routing = await self.choose(text, known, caller, gone)
            name = routing.adapter
            try:
                loaded = await load(name)
            except UserError as error:
                if name is None or error.code not in MOVED:
                    raise
                gone.add(name)
            else:
                if name is None or await self._profiles.is_still(name, known[name]):
                    return routing, loaded
            max_age_s = 0.0
        raise changing(name or AUTO)

    async def choose(self, text: str, known: dict[str, Known], caller: Caller, gone: Collection[str] = ()) -> Routing:
        """Among the adapters that are `known` and for the caller; `gone` are names that have proved to be neither."""
        likely = {
            name: one.likeness
            for name, one in known.items()
            if one.likeness is not None and caller.may_use(name) and name not in gone
        }
        return await asyncio.to_thread(choice_of, text, likely) if len(likely) > MANY else choice_of(text, likely)


def said(routing: Routing) -> str:
    """For the log."""
    if routing.adapter is not None:
        return f"auto is {routing.adapter!r}, score {routing.score:.3f}"
    if not routing.others:
        return "auto is the base model, no adapter has a profile"
    best = routing.others[0]
    return f"auto is the base model, nearest {best.adapter!r} with score {best.score:.3f} of {best.threshold:.3f}"


def choice_of(text: str, likely: Mapping[str, Likeness]) -> Routing:
    """The most alike of those by name, of equals the first, if it reaches its threshold.

    Else none: what is most like one adapter and not like enough is no other's either.
    """
    scores = cosines(text, [likeness.direction for likeness in likely.values()])
    candidates = [
        RouteCandidate(name, round(float(score), 4), round(likeness.threshold, 4))
        for (name, likeness), score in zip(likely.items(), scores, strict=True)
    ]
    ranked = sorted(candidates, key=lambda candidate: (-candidate.score, candidate.adapter))
    best = ranked[0] if ranked else None
    if best is None or best.score < best.threshold:
        return Routing(None, None, ranked[:MAX_OTHERS])
    return Routing(best.adapter, best.score, ranked[1 : 1 + MAX_OTHERS])
