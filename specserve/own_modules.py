"""How this package's modules are started as processes of their own.

Never with the working directory among the places that modules come from, as `python -m` has it: that may be a folder
of downloaded adapters or models, and a `random.py` in it would run.
"""

import sys


def module_command(module: str) -> list[str]:
    """The command that runs `module`, of this package or of the same environment; its arguments go behind."""
    return [sys.executable, "-P", "-m", module]
