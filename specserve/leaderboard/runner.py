"""Makes what is missing: answers of models to the rows of tasks, and a score of each cell.

Models of one base share an engine. Whatever ends the process, the answers that were whole are kept, and the next run
asks for the others. A task or a model that fails is told of and costs the others nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from ..errors import UserError
from .candidates import Candidate, candidate
from .entries import KeptAnswer, StoredTask, TaskRow
from .pooled import pooled_cell
from .scores import cell_of
from .store import LeaderboardStore, model_locks
from .task_rows import conversations, read_task, task_row

Say = Callable[[str], None]


@dataclass(slots=True)
class Ran:
    """What a run came to."""

    num_answers: int = 0
    num_kept: int = 0  # answers that were there before
    failed: list[str] = field(default_factory=list)
    busy: list[str] = field(default_factory=list)  # models that another process has


class LeaderboardRunner:
    def __init__(self, store: LeaderboardStore, say: Say, batch: int = 8):
        self._store, self._say, self._batch = store, say, batch
        self._ran = Ran()

    def run(self, tasks: Sequence[str] = (), models: Sequence[str] = ()) -> Ran:
        """All cells, or those of the named `tasks` and `models`. Raises `UserError` for a name that is unknown."""
        wanted = self._refreshed(_named(self._store.tasks(), tasks, "task"))
        locks = model_locks(self._store.path)
        try:
            found = []
            for stored in _named(self._store.models(), models, "model"):
                if not locks.take(stored.number):
                    self._ran.busy.append(stored.name)
                    continue
                with self._failures(stored.name):
                    found.append(candidate(stored))
            found.sort(key=lambda one: (str(one.model_dir), one.number))
            for model_dir, group in groupby(found, key=lambda one: one.model_dir):
                self._group(model_dir, list(group), wanted)
        finally:
            locks.close()
        return self._ran

    def _refreshed(self, tasks: Sequence[StoredTask]) -> list[StoredTask]:
        """With the rows as their files have them now, but for those that cannot be read."""
        names = set()
        for stored in tasks:
            with self._failures(stored.name):
                self._refresh(stored)
                names.add(stored.name)
        return [stored for stored in self._store.tasks() if stored.name in names]

    def _refresh(self, stored: StoredTask) -> None:
        data_hash, rows = read_task(stored.task)
        if data_hash != stored.data_hash:
            self._say(f"{stored.name}: the rows have changed")
            self._store.put_task(stored.name, stored.task, data_hash, rows)

    def _group(self, model_dir: Path, models: Sequence[Candidate], tasks: Sequence[StoredTask]) -> None:
        """The models of one base."""
        jobs = []
        for model in models:
            for task in tasks:
                if task.task.kind != model.model.adapter_kind:
                    continue
                with self._failures(f"{task.name} by {model.name}"):
                    if task.task.kind == "generate":
                        jobs.append(self._job(model, task))
                    else:
                        self._pooled(model, task)
        answerer = _Answerer(model_dir, jobs, self._batch)
        for job in jobs:
            name = f"{job.task.name} by {job.model.name}"
            with self._failures(name):
                known = self._store.answers(job.config_hash)  # by now also those of the same model under another name
                prompts = {
                    prompt_hash: prompt for prompt_hash, prompt in job.prompts.items() if prompt_hash not in known
                }
                self._ran.num_answers += len(prompts)
                if prompts:
                    answerer.answer(replace(job, prompts=prompts), name, self._store)
                self._score(job)

    def _job(self, model: Candidate, task: StoredTask) -> _Job:
        rows = self._store.rows(task)
        config_hash = model.config_hash(task.task)
        known = self._store.answers(config_hash)
        self._store.put_owner(config_hash, model.number)
        missing = {row.prompt_hash for row in rows} - known.keys()
        self._ran.num_kept += len({row.prompt_hash for row in rows} & known.keys())
        return _Job(model, task, rows, config_hash, prompts_of(model, task, missing) if missing else {})

    def _score(self, job: _Job) -> None:
        if not job.prompts and self._has_cell(job.model, job.task, job.config_hash):
            return
        cell = cell_of(job.task.task, job.rows, self._store.answers(job.config_hash))
        self._put(job.model, job.task, job.config_hash, cell)

    def _pooled(self, model: Candidate, task: StoredTask) -> None:
        config_hash = model.config_hash(task.task)
        if not self._has_cell(model, task, config_hash):
            self._put(model, task, config_hash, pooled_cell(model, task.task))

    def _has_cell(self, model: Candidate, task: StoredTask, config_hash: str) -> bool:
        """Whether there is a score of these rows by this very model."""
        kept = self._store.cells().get((task.name, model.name))
        return kept is not None and kept.is_current and kept.config_hash == config_hash

    def _put(self, model: Candidate, task: StoredTask, config_hash: str, cell: Any) -> None:
        self._store.put_cell(task, model.number, config_hash, cell)
        speed = f", {cell.tokens_per_s:.0f} tokens/s" if cell.tokens_per_s is not None else ""
        self._say(f"{task.name} by {model.name}: {task.task.metric} {cell.score:.3f} over {cell.num_rows} rows{speed}")

    def _failures(self, what: str) -> _Failures:
        return _Failures(what, self._ran.failed, self._say)


@dataclass(slots=True)
class _Failures:
    """Within: a user's mistake is told of, and what comes behind goes on."""

    what: str
    failed: list[str]
    say: Say

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if not isinstance(error, UserError):
            return False
        self.failed.append(f"{self.what}: {error}")
        self.say(f"failed: {self.failed[-1]}")
        return True


@dataclass(frozen=True, slots=True)
class _Job:
    """What one model has to answer of one task; `prompts` are token ids by the hashes of prompts."""

    model: Candidate
    task: StoredTask
    rows: Sequence[TaskRow]
    config_hash: str
    prompts: dict[str, list[int]]


def prompts_of(model: Candidate, task: StoredTask, missing: Iterable[str]) -> dict[str, list[int]]:
    """As the server would make them for this model. Raises `UserError` for one that is too long."""
    from ..model.config import ModelConfig
    from ..text.special_tokens import eos_token_ids
    from ..text.tokenizer import TextTokenizer
    from ..training.data.dataset import RowEncoder

    tokenizer = TextTokenizer(model.model_dir)
    if model.adapter is not None:
        tokenizer = tokenizer.for_adapter_in(model.adapter)
    encoder = RowEncoder(tokenizer.on(model.day), eos_token_ids(model.model_dir), task.task.system)
    limit = ModelConfig.from_dir(model.model_dir).max_position_embeddings - 1
    wanted, prompts = set(missing), {}
    for row in conversations(task.task):
        prompt_hash = task_row(row, task.task.system).prompt_hash
        if prompt_hash in wanted:
            *_, example = encoder.examples(row)
            if example.prompt_len > limit:
                raise UserError(f"{row.where}: {example.prompt_len} tokens, and the model takes {limit}; shorten it")
            prompts[prompt_hash] = example.prompt
    if wanted - prompts.keys():
        raise UserError(f"{task.task.data} was changed while it was read; run again", param="data")
    return prompts


class _Answerer:
    """The engine of one base, made when it is needed, for the longest of `jobs`."""

    def __init__(self, model_dir: Path, jobs: Sequence[_Job], batch: int):
        self._model_dir, self._batch = model_dir, batch
        self._engine: Any = None  # of evaluation/answers.py
        lens = (len(prompt) + job.task.task.max_tokens + 1 for job in jobs for prompt in job.prompts.values())
        self._max_len = max(lens, default=0)

    def answer(self, job: _Job, name: str, store: LeaderboardStore) -> None:
        """Each answer is kept as it comes. Raises `UserError`; the requests that were running end with their engine."""
        from ..training.evaluation.answers import make_engine

        engine = self._engine or make_engine(self._model_dir, batch=self._batch, max_len=self._max_len)
        self._engine = None
        self._answer(engine, job, name, store)
        self._engine = engine

    def _answer(self, engine: Any, job: _Job, name: str, store: LeaderboardStore) -> None:
        from ..training.evaluation.answers import Answer, answer_mixed, hardware_of

        content_hash = None
        if job.model.adapter is not None:
            content_hash = engine.load_adapter(job.model.name, job.model.adapter).content_hash
            if content_hash != job.model.content_hash:
                raise UserError(f"{job.model.adapter} was changed while it was read; run again", param="adapter")
        hardware = f"{hardware_of(engine)}, {engine.info.dtype}, {self._batch} at a time"
        hashes = list(job.prompts)

        def keep(idx: int, answer: Answer, seconds: float) -> None:
            kept = KeptAnswer(
                answer.text,
                answer.finish_reason or "",
                len(answer.tokens),
                len(answer.step_lens),
                sum(answer.step_lens),
                seconds,
                hardware,
            )
            store.put_answer(job.config_hash, hashes[idx], kept)

        requests = [(content_hash, prompt) for prompt in job.prompts.values()]
        answer_mixed(engine, requests, job.task.task.max_tokens, batch=self._batch, desc=name, on_answer=keep)


def _named(stored: Sequence[Any], names: Sequence[str], what: str) -> list[Any]:
    """Those of `names`, all where none is named. Raises `UserError`."""
    if not stored:
        how = "add TASK --data FILE" if what == "task" else "add-model NAME --adapter DIR"
        raise UserError(f"there is no {what} yet: `specserve leaderboard {how}`", param=what)
    known = [one.name for one in stored]
    unknown = next((name for name in names if name not in known), None)
    if unknown is not None:
        raise UserError(f"there is no {what} {unknown!r}; known are {', '.join(known)}", param=what)
    return [one for one in stored if not names or one.name in names]
