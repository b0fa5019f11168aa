"""Where a step's time goes: wraps an engine's parts with clocks, for `specserve bench offline --profile`.

Parts that call one another are charged their own time only. Which parts compute, and what the host's clocks cannot see
of them, is each path's to say (`ComputePath.phases`, `unseen`). An engine that is not profiled has none of this in its
way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .engine import Engine

_MAX_EVENTS = 200_000
_STEP = "commit and emit"  # what is left of a step


class StepProfile:
    """Clocks on one engine. `start` begins anew; `table` and `write_trace` say what was seen since."""

    def __init__(self, engine: Engine):
        self._path, self._now = engine.path, engine.path.clock or time.perf_counter
        self._stack: list[list[float]] = []  # seconds charged to parts within each open part
        self.clock(engine, "step", _STEP)
        self.clock(engine.scheduler, "schedule", "schedule")
        self.clock(engine.proposer, "propose", "propose drafts")
        self.clock(engine.proposer, "end_step", "learn costs")
        for phase in self._path.phases:
            self.clock(phase.owner, phase.method, phase.name)
        self.start()

    def start(self) -> None:
        self.seconds: dict[str, float] = {}
        self._events: list[dict[str, Any]] = []
        self._num_steps = 0
        self._before = {phase.name: dict(phase.clocks()) for phase in self._path.phases}

    def phases(self) -> dict[str, float]:
        """Seconds by phase, longest first; a phase that has clocks of its own is split by them."""
        phases = dict(self.seconds)
        for phase in self._path.phases:
            if phase.name in phases:
                before = self._before[phase.name]
                parts = {name: now - before[name] for name, now in phase.clocks().items()}
                phases[phase.name] = max(0.0, phases[phase.name] - sum(parts.values()))
                phases |= parts
        return dict(sorted(phases.items(), key=lambda item: -item[1]))

    def summary(self) -> dict[str, Any]:
        """Milliseconds a step by phase, and the share of the model's arithmetic; None where that is not to be seen."""
        phases = self.phases()
        total = sum(phases.values())
        arithmetic = [phase for phase in self._path.phases if phase.is_model]
        names = {name for phase in arithmetic for name in (phase.name, *phase.clocks())}
        model = sum(seconds for name, seconds in phases.items() if name in names)
        return {
            "steps": self._num_steps,
            "ms_per_step": {name: round(1e3 * s / max(1, self._num_steps), 3) for name, s in phases.items()},
            "model_share": round(model / max(1e-9, total), 3) if arithmetic and not self._path.unseen else None,
            **({"unseen": self._path.unseen} if self._path.unseen else {}),
        }

    def table(self) -> str:
        summary = self.summary()
        total = sum(summary["ms_per_step"].values())
        lines = [f"{'phase':<24} {'ms a step':>9} {'share':>6}"]
        lines += [f"{name:<24} {ms:>9.3f} {ms / total:>6.1%}" for name, ms in summary["ms_per_step"].items()]
        share = summary["model_share"]
        seen = f"arithmetic of the model: {share:.1%}" if share is not None else f"not to be seen: {self._path.unseen}"
        return "\n".join([*lines, f"{summary['steps']} steps; {seen}"])

    def write_trace(self, path: Path) -> None:
        """Chrome's trace format, for chrome://tracing or Perfetto."""
        path.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))

    def clock(self, owner: Any, method: str, name: str) -> None:
        """Charge calls of `owner.method` to `name`, less what other clocks within them charge."""
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            within = [0.0]
            self._stack.append(within)
            start = self._now()
            try:
                return inner(*args, **kwargs)
            finally:
                elapsed = self._now() - start
                self._stack.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - within[0]
                if self._stack:
                    self._stack[-1][0] += elapsed
                if name == _STEP:
                    self._num_steps += 1
                if len(self._events) < _MAX_EVENTS:
                    self._events.append(
                        {"name": name, "ph": "X", "pid": 1, "tid": 1, "ts": start * 1e6, "dur": elapsed * 1e6}
                    )

        setattr(owner, method, timed)
