"""The loop of a sweep: rung after rung, runs as processes, and what becomes of the results.

Owns the processes; which runs go on is halving.py's, what a run does rung.py's. Whatever ends the loop, its processes
end with it after the step that they are in, and the next loop goes on from the results that are there.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UserError
from ...own_modules import module_command
from .halving import healthy
from .results import RungResult, SweepDirectory, SweepPlan

_POLL_S = 0.1
Say = Callable[[str], None]


@dataclass(slots=True)
class Outcome:
    """Results by run and rung, and the runs of the last rung."""

    plan: SweepPlan
    results: dict[tuple[str, int], RungResult] = field(default_factory=dict)

    @property
    def finished(self) -> dict[str, RungResult]:
        last = self.plan.num_rungs - 1
        return {name: result for (name, rung), result in self.results.items() if rung == last}

    def newest(self, name: str) -> tuple[int, RungResult] | None:
        """The last rung that the run reached."""
        rungs = [rung for known, rung in self.results if known == name]
        return (max(rungs), self.results[name, max(rungs)]) if rungs else None


class Sweep:
    """Of one directory; `say` gets a line for each thing that happens."""

    def __init__(self, directory: SweepDirectory, plan: SweepPlan, num_jobs: int, say: Say):
        self._directory, self._plan, self._num_jobs, self._say = directory, plan, num_jobs, say

    def run(self) -> Outcome:
        """All rungs. Raises `UserError` where a run cannot begin; what is done is kept."""
        with self._directory.held() as lock:
            self._directory.begin(self._plan)
            outcome = Outcome(self._plan)
            names, others = list(self._plan.points), list[str]()
            for rung in range(self._plan.num_rungs):
                tried = list(names)
                self._rung(names, rung, outcome, lock)
                while others and all(outcome.results[name, rung].has_collapsed for name in tried):
                    names, others = others[: len(names)], others[len(names) :]
                    self._say(f"rung {rung + 1}: all runs collapsed; the next ones go on in their place")
                    tried += names
                    self._rung(names, rung, outcome, lock)
                order = healthy({name: outcome.results[name, rung] for name in tried})
                num = max(1, len(tried) // self._plan.factor)
                names, others = order[:num], order[num:]
                if rung + 1 < self._plan.num_rungs:
                    self._say(f"rung {rung + 1}: {len(names)} of {len(tried)} runs go on")
            return outcome

    def _rung(self, names: Sequence[str], rung: int, outcome: Outcome, lock: int) -> None:
        waiting = []
        for name in names:
            result = self._directory.result(name, rung)
            if result is None:
                waiting.append(name)
            else:
                outcome.results[name, rung] = result
        if len(waiting) < len(names):
            self._say(f"rung {rung + 1}: {len(names) - len(waiting)} of {len(names)} runs were there before")
        running: dict[str, subprocess.Popen[bytes]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self._num_jobs:
                    name = waiting.pop(0)
                    running[name] = self._start(name, rung, lock)
                for name, process in list(running.items()):
                    if process.poll() is not None:
                        del running[name]
                        outcome.results[name, rung] = self._ended(name, rung, process.returncode)
                time.sleep(_POLL_S)
        finally:
            if running:
                self._say(f"{', '.join(running)}: ends with its step, and goes on from there next time")
            _end(list(running.values()))

    def _start(self, name: str, rung: int, lock: int) -> subprocess.Popen[bytes]:
        directory = self._directory
        directory.run_folder(name).mkdir(parents=True, exist_ok=True)
        command = module_command("specserve.training.sweep.rung")
        with open(directory.log(name), "ab") as log:
            return subprocess.Popen(
                [*command, str(directory.path), name, str(rung)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=[lock],
                env=self._environment(),
                start_new_session=True,  # Ctrl-C is for the sweep, which ends its processes one way
            )

    def _environment(self) -> dict[str, str]:
        share = max(1, (os.cpu_count() or 1) // self._num_jobs)
        return ({"OMP_NUM_THREADS": str(share)} if self._num_jobs > 1 else {}) | dict(os.environ)

    def _ended(self, name: str, rung: int, code: int) -> RungResult:
        result = self._directory.result(name, rung)
        if result is None:
            log = self._directory.log(name)
            raise UserError(f"the run {name} ended ({_reason(code, log)}); what is done is kept: see {log}")
        self._say(f"rung {rung + 1}: {name}: {line_of(result)}")
        return result


def line_of(result: RungResult) -> str:
    """What a run came to, for a terminal."""
    parts = [f"{result.step} of {result.num_steps} steps"] if result.num_steps else [f"{result.step} steps"]
    parts += [f"held-out loss {result.loss:.4f}"] if result.loss is not None else []
    parts += [f"score {result.score:.3f}"] if result.score is not None else []
    parts += [f"general text x{result.general_ratio:.2f}"] if result.general_ratio is not None else []
    parts += [", ".join(result.marks)] if result.marks else []
    return f"{'; '.join(parts)} ({result.seconds:.0f} s)"


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    said = next((line for line in reversed(lines) if line.startswith("error: ")), None) if code == 2 else None
    return said.removeprefix("error: ") if said is not None else f"exit code {code}"


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Let them write a checkpoint behind the step that they are in; a step of a large model takes its time."""
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
    for process in processes:
        process.wait()
