"""Whether a stream is a terminal that shows colours; everybody who writes to people asks here."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import IO, Literal

ColourChoice = Literal["auto", "always", "never"]


def wants_colour(out: IO[str], environ: Mapping[str, str] = os.environ, choice: ColourChoice = "auto") -> bool:
    """Whether to write colours to `out`: where it is a terminal that takes them, unless `choice` says.

    NO_COLOR (no-color.org) is heeded.
    """
    if choice != "auto":
        return choice == "always"
    try:
        is_terminal = out.isatty()
    except ValueError:  # closed
        return False
    return is_terminal and not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"
