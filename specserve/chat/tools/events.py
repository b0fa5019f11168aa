"""What a choice's text is made of, as it comes: thinking, content, the start of a call, and pieces of its arguments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Reasoning:
    text: str


@dataclass(frozen=True, slots=True)
class Content:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Arguments:
    index: int
    text: str


Event = Reasoning | Content | CallStart | Arguments


def merged(events: Sequence[Event]) -> list[Event]:
    """The same events, neighbours of one kind as one."""
    result: list[Event] = []
    for event in events:
        last = result[-1] if result else None
        if isinstance(event, Content) and isinstance(last, Content):
            result[-1] = Content(last.text + event.text)
        elif isinstance(event, Arguments) and isinstance(last, Arguments) and last.index == event.index:
            result[-1] = Arguments(event.index, last.text + event.text)
        else:
            result.append(event)
    return result
