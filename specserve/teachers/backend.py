"""What a teacher's two kinds have in common: one attempt at one ask, or at one text to be read."""

from __future__ import annotations

from typing import Protocol

from .asks import Ask, Reading, Reply, TopTokens


class Backend(Protocol):
    """`identity` tells everything that answers depend on; `concurrency` is how many asks it takes at a time."""

    identity: str
    concurrency: int

    async def start(self) -> None:
        """Before the first ask that no cache answers. Raises `TeacherError` when there is nobody to ask."""

    async def ask(self, ask: Ask, num_there: int = 0) -> Reply:
        """Samples that are missing where `num_there` are there, perhaps not all. Raises `TeacherError`."""

    async def read(self, reading: Reading) -> TopTokens:
        """Raises `TeacherError`."""

    async def close(self) -> None: ...
