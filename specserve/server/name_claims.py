"""Names that loads which run will give to directories. Plain bookkeeping, no files and no engine.

The load that began last has the name; where it fails, the one before it that still runs has it again.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """One load's."""

    name: str
    directory: Path


class NameClaims:
    """Those of one store."""

    def __init__(self) -> None:
        self._claims: dict[str, list[Claim]] = {}  # newest last, none empty

    def directory(self, name: str) -> Path | None:
        """What the newest load will give the name to."""
        return self._claims[name][-1].directory if name in self._claims else None

    def directories(self) -> set[Path]:
        return {claim.directory for claims in self._claims.values() for claim in claims}

    def begin(self, name: str, directory: Path) -> Claim:
        claim = Claim(name, directory)
        self._claims.setdefault(name, []).append(claim)
        return claim

    def end(self, claim: Claim, *, with_older: bool = False) -> None:
        """Nothing, where it has ended; with all that began before it, where its load has given the name away."""
        claims = self._claims.get(claim.name, [])
        if claim in claims:
            at = claims.index(claim)
            del claims[0 if with_older else at : at + 1]
            if not claims:
                del self._claims[claim.name]

    def end_all(self, name: str) -> None:
        self._claims.pop(name, None)
