"""From a run's figures to what was wrong with it, and to a summary that a person reads."""

from __future__ import annotations

from typing import Any

from .history import FAULTS

MORE_HANDLES = 16  # kept-alive connections, event loops of new threads
MIB_PER_MIN, MIB_IN_ALL = 2.0, 48.0  # both must be exceeded: allocators settle in steps
LEAST_MEASURED_MIN = 5.0  # over less than that growth is warm-up
LEAST_RIGHT = 0.4  # of all requests: refusing everything would never be wrong


def failures(result: dict[str, Any]) -> list[str]:
    """Every reason for which the run failed; empty when it passed."""
    found = [f"{result['verdicts'][kind]} x {kind}" for kind in FAULTS if result["verdicts"].get(kind)]
    if result["server_gone"]:
        return [*found, result["server_gone"]]
    if result["refused_changes"]:
        found.append(f"{result['refused_changes']} loads or unloads were refused")
    if result["harness_errors"]:
        found.append(f"{result['harness_errors']} errors of the harness itself")
    if result["unasked_deaths"]:
        found.append(f"{len(result['unasked_deaths'])} engine deaths that nobody asked for")
    if result["not_given_back"]:
        found.append(f"not given back: {result['not_given_back']}")
    found += [f"{num} more handles in the {who}" for who, num in result["more_handles"].items() if num > MORE_HANDLES]
    for who, growth in result["memory"].items():
        if (
            growth is not None
            and growth["measured_min"] >= LEAST_MEASURED_MIN
            and growth["mib_per_min"] > MIB_PER_MIN
            and growth["last_less_first_quarter_mib"] > MIB_IN_ALL
        ):
            found.append(f"the {who} grows by {growth['mib_per_min']} MiB a minute")
    if result["exit_status"] != 0:
        found.append(f"the server ended with status {result['exit_status']}")
    right = sum(result["verdicts"].get(kind, 0) for kind in ("right", "late"))
    if right < LEAST_RIGHT * result["requests"]:
        found.append(f"only {right} of {result['requests']} requests were answered")
    return found


def summary(result: dict[str, Any], failed: list[str]) -> str:
    lines = [
        f"{result['requests']} requests in {result['minutes']} min: {result['verdicts']}",
        f"statuses: {result['statuses']}",
    ]
    for name in (
        *("changes", "disturbances", "recoveries_s", "unasked_deaths", "faults_of_the_quiet_pass", "not_given_back"),
        *("more_handles", "memory", "tracebacks_in_log"),
    ):
        lines.append(f"{name.replace('_', ' ')}: {result.get(name)}")
    return "\n".join([*lines, f"FAILED: {'; '.join(failed)}" if failed else "passed: every text was its name's"])
