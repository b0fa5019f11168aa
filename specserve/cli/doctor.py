"""`specserve doctor`: what a server with these settings would miss on this machine, a line each, and the fix.

Owns how findings are shown and the exit status. What is looked at: `doctor_machine` without a model, `doctor_serving`
with the settings. Nothing is downloaded and no server started; native kernels are built as a server would build them.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from typing import IO, Literal

import msgspec

from ..config import ServeConfig
from ..errors import UserError
from ..log_lines import one_line

logger = logging.getLogger(__name__)

Status = Literal["ok", "warning", "missing"]
_COLOURS = {"ok": 32, "warning": 33, "missing": 31}


class Finding(msgspec.Struct, frozen=True):
    """Of one thing. `missing`: a server with these settings does not start, or not whole; `fix` says what to do."""

    name: str
    status: Status
    found: str
    fix: str = ""


Check = Callable[[ServeConfig], Iterable[Finding]]


def doctor(config: ServeConfig, out: IO[str], *, as_json: bool, has_colour: bool) -> int:
    """Print what is found; 1 when something needed is missing."""
    from .doctor_machine import MACHINE_CHECKS
    from .doctor_serving import SERVING_CHECKS

    findings: list[Finding] = []
    for name, check in {**MACHINE_CHECKS, **SERVING_CHECKS}.items():
        for finding in examined(name, check, config):
            findings.append(finding)
            if not as_json:
                print(shown(finding, has_colour), file=out, flush=True)
    num_missing = sum(finding.status == "missing" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not num_missing, "findings": msgspec.to_builtins(findings)}, indent=2), file=out)
    else:
        print("nothing is missing" if not num_missing else f"{num_missing} missing", file=out)
    return int(num_missing > 0)


def examined(name: str, check: Check, config: ServeConfig) -> Iterable[Finding]:
    """What `check` finds; an error that it raises is what is missing, in its own words, and the others go on."""
    try:
        yield from check(config)
    except UserError as error:
        yield Finding(name, "missing", str(error))
    except OSError as error:
        yield Finding(name, "missing", f"cannot be looked at: {error}", "see to the file or folder that it names")
    except Exception as error:  # a machine that nobody thought of
        logger.error("the check of %s failed", name, exc_info=True)
        found = f"cannot be looked at: {type(error).__name__}: {error}"
        yield Finding(name, "missing", found, "please report it, with what the log says")


def shown(finding: Finding, has_colour: bool) -> str:
    """One line: "missing  compiler  no C++ compiler was found -> apt install g++"."""
    status = f"{finding.status:<7}"
    if has_colour:
        status = f"\x1b[{_COLOURS[finding.status]}m{status}\x1b[0m"
    fix = f" -> {finding.fix}" if finding.fix else ""
    return f"{status}  {finding.name:<14}  {one_line(finding.found + fix)}"
