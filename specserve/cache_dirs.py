"""Where what can be made again is kept: folders of $XDG_CACHE_HOME/specserve. Native code has its own there, too."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path


def cache_dir(name: str, environ: Mapping[str, str] = os.environ) -> Path:
    """The folder `name`, which need not be there yet."""
    return Path(environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "specserve" / name
