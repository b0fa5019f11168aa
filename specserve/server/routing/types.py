"""What answers say of how a request found its adapter."""

from __future__ import annotations

import msgspec


class RouteCandidate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    adapter: str
    score: float  # cosine to the adapter's profile
    threshold: float  # from which on it counts as one of the adapter's


class Routing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Of a request with model "auto"."""

    adapter: str | None  # None: nothing fits, and the base model answers
    score: float | None
    others: list[RouteCandidate]  # the next best, best first; those that the caller may use
