"""Where a step's time goes: wraps an engine's parts with clocks, for `specserve bench offline --profile`.

Parts that call one another are charged their own time only. The native forward's phases come from its own clocks. An
engine that is not profiled has none of this in its way.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..compute.native.decoder import NativeDecoder
from ..kernels.native import PHASES

if TYPE_CHECKING:
    from .engine import Engine

MODEL_PHASES = ("embed and batch", *PHASES, "lm_head")  # what counts as arithmetic of the model
_MAX_EVENTS = 200_000


class StepProfile:
    """Clocks on one engine. `start` begins anew; `table` and `write_trace` say what was seen since."""

    def __init__(self, engine: Engine):
        self._engine = engine
        self._stack: list[list[float]] = []  # seconds charged to parts within each open part
        self._wrap(engine, "step", "commit and emit")
        self._wrap(engine.scheduler, "schedule", "schedule")
        self._wrap(engine.proposer, "propose", "propose drafts")
        self._wrap(engine.proposer, "end_step", "learn costs")
        if engine.proposer.growth.heads is not None:
            self._wrap(engine.proposer.growth.heads, "step", "lookahead heads")
        self._wrap(engine.runner, "run", "build the batch")
        self._wrap(engine.decoder, "forward", "forward")
        self._wrap(engine.decoder, "logits", "lm_head")
        self._wrap(engine.sampler, "sample", "sample")
        self.start()

    def start(self) -> None:
        self.seconds: dict[str, float] = {}
        self._events: list[dict[str, Any]] = []
        self._num_steps = 0
        if isinstance(self._engine.decoder, NativeDecoder):
            self._before = list(self._engine.decoder.phase_seconds)

    def phases(self) -> dict[str, float]:
        """Seconds by phase, the native forward's parts in place of the whole."""
        phases = dict(self.seconds)
        decoder = self._engine.decoder
        if isinstance(decoder, NativeDecoder) and "forward" in phases:
            parts = [now - before for now, before in zip(decoder.phase_seconds, self._before, strict=True)]
            phases["embed and batch"] = max(0.0, phases.pop("forward") - sum(parts))
            phases |= dict(zip(PHASES, parts, strict=True))
        return dict(sorted(phases.items(), key=lambda item: -item[1]))

    def summary(self) -> dict[str, Any]:
        """Milliseconds a step by phase, and the share of the model's arithmetic."""
        phases = self.phases()
        total = sum(phases.values())
        model = sum(s for name, s in phases.items() if name in (*MODEL_PHASES, "forward"))
        per_step = {name: round(1e3 * s / max(1, self._num_steps), 3) for name, s in phases.items()}
        return {"steps": self._num_steps, "ms_per_step": per_step, "model_share": round(model / max(1e-9, total), 3)}

    def table(self) -> str:
        summary = self.summary()
        total = sum(summary["ms_per_step"].values())
        lines = [f"{'phase':<18} {'ms a step':>9} {'share':>6}"]
        lines += [f"{name:<18} {ms:>9.3f} {ms / total:>6.1%}" for name, ms in summary["ms_per_step"].items()]
        lines.append(f"{summary['steps']} steps; arithmetic of the model: {summary['model_share']:.1%}")
        return "\n".join(lines)

    def write_trace(self, path: Path) -> None:
        """Chrome's trace format, for chrome://tracing or Perfetto."""
        path.write_text(json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))

    def _wrap(self, owner: Any, method: str, name: str) -> None:
        inner: Callable[..., Any] = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            within = [0.0]
            self._stack.append(within)
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - start
                self._stack.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + elapsed - within[0]
                if self._stack:
                    self._stack[-1][0] += elapsed
                if name == "commit and emit":
                    self._num_steps += 1
                if len(self._events) < _MAX_EVENTS:
                    self._events.append(
                        {"name": name, "ph": "X", "pid": 1, "tid": 1, "ts": start * 1e6, "dur": elapsed * 1e6}
                    )

        setattr(owner, method, timed)
