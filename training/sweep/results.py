"""What a sweep knows of its runs, as it lies in its directory: sweep.json, and a file for each run and rung.

A file is written whole or not at all; so a sweep that was killed goes on from what is there. One sweep at a time: the
lock is the kernel's, and the processes of the runs hold it too.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from ...errors import UserError
from ...file_lock import FileLock
from ...whole_files import replace_file
from .grid import Values

SWEEP_FILE, LOCK_FILE, LOG_FILE = "sweep.json", "sweep.lock", "log.txt"
_VERSION = 1
_PATIENCE_S = 60.0  # for the process of a run that outlives its sweep: it ends with its step


class SweepPlan(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a sweep is; the same command goes on, another one is refused."""

    version: int = _VERSION
    base: dict[str, Any]  # every setting of the run file, resolved
    points: dict[str, Values]  # by the names of the runs
    factor: int
    num_rungs: int
    forgetting_limit: float
    general: str  # file of the rows that have nothing to do with the task
    files: dict[str, str]  # SHA-256 of the rows and teacher's logits that it reads, by their paths


class RungResult(msgspec.Struct, frozen=True, kw_only=True):
    """Of one run at the end of one rung. `score`, speeds and bytes are of finished runs."""

    step: int
    num_steps: int
    seconds: float
    loss: float | None = None  # over held-out rows
    general_ratio: float | None = None  # perplexity on general rows over the base model's
    marks: tuple[str, ...] = ()
    problem: str | None = None  # why it ended early
    score: float | None = None  # the task's main metric; of a head alone tokens a verification
    task: dict[str, float] = {}
    tokens_per_s: float | None = None  # one answer at a time, with drafts
    tokens_per_verification: float | None = None
    num_bytes: int | None = None  # of what is served

    @property
    def has_collapsed(self) -> bool:
        return any(mark != FORGETS for mark in self.marks)


FORGETS = "forgets"


class SweepDirectory:
    """The folder of one sweep."""

    def __init__(self, path: Path):
        self.path = path

    def run_folder(self, name: str) -> Path:
        """Holds the run's directory alone among folders, so that it can be served from here."""
        return self.path / "runs" / name

    def adapter(self, name: str) -> Path:
        """Where the run of `name` is trained."""
        return self.run_folder(name) / Path(self.plan().base["output"]).name

    def log(self, name: str) -> Path:
        return self.run_folder(name) / LOG_FILE

    def plan(self) -> SweepPlan:
        path = self.path / SWEEP_FILE
        try:
            return msgspec.json.decode(path.read_bytes(), type=SweepPlan)
        except (OSError, msgspec.DecodeError) as error:
            raise UserError(f"{path} is no sweep of ours: {error}", param="output") from None

    def begin(self, plan: SweepPlan) -> None:
        """Write what the sweep is, or find that it is the same. Raises `UserError`."""
        path = self.path / SWEEP_FILE
        if not path.exists():
            replace_file(path, lambda temporary: temporary.write_bytes(_pretty(plan)))
            return
        saved, here = (
            msgspec.to_builtins(p) for p in (self.plan(), msgspec.json.decode(_pretty(plan), type=SweepPlan))
        )
        found = [key for key in here if saved[key] != here[key]]
        if found == ["files"] and saved["files"].keys() == here["files"].keys():
            changed = [path for path in here["files"] if saved["files"][path] != here["files"][path]]
            raise UserError(
                f"{', '.join(changed)} changed since the sweep in {self.path} began; put the old content back, or give "
                "another --output",
                param="output",
            )
        if found:
            raise UserError(
                f"{self.path} holds another sweep ({', '.join(found)} differ); go on with the command that began it, "
                "or give another --output",
                param="output",
            )

    @contextmanager
    def held(self) -> Iterator[int]:
        """Keep others out; gives the lock's handle, which the processes of runs are to inherit. Raises `UserError`."""
        _check_ours(self.path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / LOCK_FILE)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"cannot write to the output directory {self.path}: {reason}", param="output") from None
        with lock:
            _wait_for(lock, self.path)
            lock.sign()
            yield lock.fileno()

    def result(self, name: str, rung: int) -> RungResult | None:
        return _read(self.result_file(name, rung))

    def result_file(self, name: str, rung: int) -> Path:
        return self.run_folder(name) / f"rung-{rung + 1}.json"

    def look_file(self, name: str, rung: int) -> Path:
        """What was seen of the weights before the run was finished, which takes them away."""
        return self.run_folder(name) / f"look-{rung + 1}.json"

    def look(self, name: str, rung: int) -> RungResult | None:
        return _read(self.look_file(name, rung))


def write_result(path: Path, result: RungResult) -> None:
    replace_file(path, lambda temporary: temporary.write_bytes(_pretty(result)), sync=True)


def _read(path: Path) -> RungResult | None:
    return msgspec.json.decode(path.read_bytes(), type=RungResult) if path.is_file() else None


def _pretty(value: msgspec.Struct) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _check_ours(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"--output is {path}, which is a file; give a directory", param="output")
    if path.is_dir() and any(path.iterdir()) and not {SWEEP_FILE, LOCK_FILE} & {p.name for p in path.iterdir()}:
        raise UserError(f"{path} is not empty and holds no sweep of ours; give another --output", param="output")


def _wait_for(lock: FileLock, path: Path) -> None:
    """Raises `UserError` where another sweep is alive; what a killed one left ends within a step."""
    holder = lock.holder
    deadline = time.monotonic() + _PATIENCE_S
    while not lock.take():
        if _is_alive(holder) or time.monotonic() > deadline:
            raise UserError(
                f"another sweep is in {path} (process {holder}); wait for it, or give another --output", param="output"
            )
        time.sleep(0.1)


def _is_alive(holder: str) -> bool:
    try:
        os.kill(int(holder), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
