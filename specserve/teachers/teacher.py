"""Many asks to one teacher: cached, paced, retried, counted, and as many at a time as it takes.

Invariant: a reply is in the cache before anybody sees it. An ask that fails is a result like others; a teacher that
nobody can ask any more ends the run, after what was in flight has come.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from functools import partial
from typing import TypeVar

from ..cache_dirs import cache_dir
from ..errors import UserError
from .answer_cache import AnswerCache
from .asks import Answer, Ask, Reading, Reply, TopTokens
from .attempts import Attempts
from .backend import Backend
from .errors import NoAnswerError, NotAskedError, TeacherError
from .pacing import Pacing
from .spec import TeacherSpec, parse_spec
from .terms import check_terms
from .turns import Turns
from .usage import LIMITS, Budget, Usage, most_tokens

MAX_FAILED_IN_A_ROW = 5  # asks whose every attempt failed: nobody is there
MAX_REFUSED_FIRST = 20  # asks that were refused before one was answered: it is not the asks

Item = TypeVar("Item")
Found = TypeVar("Found")
Result = list[Answer] | TeacherError


@asynccontextmanager
async def open_teacher(spec: TeacherSpec | str, budget: Budget | None = None) -> AsyncIterator[Teacher]:
    """The teacher of `spec`; `budget` is shared by all that get it. Raises `UserError`.

    Nothing is loaded or reached before the first ask that the cache does not answer.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    max_bytes = int(spec.cache_gib * 2**30) if spec.cache_gib is not None else None
    cache = AnswerCache(spec.cache_dir or cache_dir("teachers"), max_bytes)
    try:
        check_terms(spec, cache)
        teacher = Teacher(spec, await _backend(spec), cache, budget or Budget())
        try:
            yield teacher
        finally:
            await teacher.close()
    finally:
        cache.close()


async def _backend(spec: TeacherSpec) -> Backend:
    if spec.url is not None:
        from .hosted import HostedBackend

        return HostedBackend(spec)
    from .local import local_backend

    return await local_backend(spec)


class Teacher:
    """Made by `open_teacher`, and used on one event loop. `usage` counts what was asked of it."""

    def __init__(self, spec: TeacherSpec, backend: Backend, cache: AnswerCache, budget: Budget):
        unlimited = [name for name in LIMITS if name in spec.fields and spec.fields[name] is None]
        if unlimited and budget.limit is not None:
            raise UserError(
                f"--teacher-field {unlimited[0]}=null takes away the limit of answers, without which --max-cost cannot "
                "be kept; give a number, or leave one of the two out",
                param="teacher_field",
            )
        self.spec, self.backend, self.usage = spec, backend, Usage()
        self._cache, self._budget = cache, budget
        self._pacing = Pacing(spec)
        self._attempts = Attempts(spec, self._pacing, self.usage)
        self._starting = asyncio.Lock()
        self._is_started = False
        self._asked_now: set[str] = set()
        self._turns = Turns(cache, self._pacing, spec.timeout_s)
        self._failed_in_a_row = self._num_refused = self._num_done = 0
        self._fatal: TeacherError | None = None

    def answers(self, asks: Iterable[Ask]) -> AsyncGenerator[tuple[int, Result]]:
        """(index of an ask, its `n` answers or the error) as they come, in no order.

        Asks are taken from the iterable as places get free. Raises `TeacherError` where no other ask can be answered,
        after all results that were in flight. Close it (`contextlib.aclosing`) when you leave it early.
        """
        return self._results(asks, self.answer)

    async def first_answers(self, asks: Sequence[Ask]) -> list[Answer | TeacherError]:
        """The first answer to each ask, or the error, in the order of the asks. Raises as `answers` does."""
        found: dict[int, Answer | TeacherError] = {}
        async with aclosing(self.answers(asks)) as results:
            async for idx, result in results:
                found[idx] = result if isinstance(result, TeacherError) else result[0]
        return [found[idx] for idx in range(len(asks))]

    def readings(self, readings: Iterable[Reading]) -> AsyncGenerator[tuple[int, TopTokens | TeacherError]]:
        """The same of texts that are read: a local teacher's."""
        return self._results(readings, self.reading)

    async def answer(self, ask: Ask) -> Result:
        """Of one ask; fewer than `n` where the teacher refused some, or failed while some had come.

        Raises `TeacherError` where no other can be answered either.
        """
        digest = ask.digest(self.backend.identity)
        async with self._turns.here(digest):
            reply = self._cached(digest)
            if self.spec.cached_only and not reply.num:
                return NotAskedError(f"{self.spec.name} was not asked this before")
            if self.spec.cached_only or reply.num >= ask.n:
                self._count_cached(reply)
            else:
                try:
                    reply = await self._asked(ask, digest)
                except TeacherError as error:
                    failure, reply = self._counted(error), self._cached(digest)
                    if not reply.answers:
                        return failure
        if not any(answer.text.strip() for answer in reply.answers):
            reasons = ", ".join(sorted({answer.finish_reason for answer in reply.answers}))
            empty = f"{self.spec.name} gave an empty answer (finish_reason {reasons})"
            return NoAnswerError(empty if reasons else reply.refused[0])
        return list(reply.answers)

    async def reading(self, reading: Reading) -> TopTokens | TeacherError:
        """Of one text. Raises as `answer` does."""
        digest = reading.digest(self.backend.identity)
        async with self._turns.here(digest):
            if (found := self._cache.get(digest, TopTokens)) is not None:
                return found
            if self.spec.cached_only:
                return NotAskedError(f"{self.spec.name} did not read this before")
            async with self._turns.among_programs(digest):
                if (found := self._cache.get(digest, TopTokens)) is not None:
                    return found
                try:
                    found = await self._tried(lambda: self.backend.read(reading))
                except TeacherError as error:
                    return self._counted(error)
                self._num_done += 1
                self._cache.put(digest, self.spec.name, found)
                return found

    async def unload(self) -> None:
        """Give back the memory of a teacher that runs here; the next ask loads it again."""
        async with self._starting:
            await self.backend.close()
            self._is_started = False

    async def close(self) -> None:
        self._pacing.end()
        await self.backend.close()

    async def _results(
        self, items: Iterable[Item], work: Callable[[Item], Awaitable[Found]]
    ) -> AsyncGenerator[tuple[int, Found]]:
        todo = iter(enumerate(items))
        running: dict[asyncio.Future[Found], int] = {}
        fatal: TeacherError | None = None
        try:
            while True:
                while fatal is None and len(running) < self.backend.concurrency:
                    if (following := next(todo, None)) is None:
                        break
                    running[asyncio.ensure_future(work(following[1]))] = following[0]
                if not running:
                    break
                finished, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in finished:
                    index = running.pop(task)
                    try:
                        result = task.result()
                    except TeacherError as error:
                        fatal = fatal or error
                        continue
                    yield index, result
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
        if fatal is not None:
            raise fatal

    def _cached(self, digest: str) -> Reply:
        """What is there of an ask; without its refusals, where those are to be asked again in this run."""
        reply = self._cache.get(digest, Reply) or Reply()
        return reply.without_refusals() if self.spec.retry_refused and digest not in self._asked_now else reply

    def _count_cached(self, reply: Reply) -> None:
        """Refusals count among the first; that they end the run is for one to say that was asked now."""
        self.usage.add_cached(reply, self.spec.price)
        self._num_done += bool(reply.answers)
        self._num_refused += not reply.answers

    async def _asked(self, ask: Ask, digest: str) -> Reply:
        """All samples; those that have come are in the cache, also where this raises."""
        async with self._turns.among_programs(digest):
            reply = self._cached(digest)
            if reply.num >= ask.n:
                self._count_cached(reply)
                return reply
            self._asked_now.add(digest)
            while reply.num < ask.n:
                reply = await self._tried(partial(self._attempt, ask, digest, reply))
                if reply.answers and not reply.is_counted and self.spec.price is not None:
                    raise self._uncounted()
        self.usage.requests += 1
        self._num_done += bool(reply.answers)
        if not reply.answers:
            self._note(TeacherError(reply.refused[0]))
        return reply

    async def _attempt(self, ask: Ask, digest: str, so_far: Reply) -> Reply:
        """`so_far` with what one request brings."""
        price = self.spec.price
        tokens = most_tokens(ask, ask.n - so_far.num, self.spec.fields)
        most, reserved, used = price.of(*tokens) if price is not None else 0.0, tokens[0] // 4 + tokens[1], 0
        async with self._budget.room_for(most):
            await self._pacing.turn(reserved)
            if self._fatal is not None:
                raise self._fatal
            try:
                more = await self.backend.ask(ask, so_far.num)
                reply, used = so_far.joined(more), more.prompt_tokens + more.completion_tokens
                self._cache.put(digest, self.spec.name, reply)
                self._budget.spend(self.usage.add(more, price, most))
                return reply
            except TeacherError as error:
                if error.may_be_billed:
                    self._budget.spend(self.usage.add_lost(error.tokens, price, most))
                raise
            except asyncio.CancelledError:
                if self.spec.url is not None:
                    self._budget.spend(self.usage.add_lost(None, price, most))
                raise
            finally:
                self._pacing.settle(reserved, used)

    def _uncounted(self) -> TeacherError:
        error = TeacherError(
            f"{self.spec.name} does not say how many tokens an answer took, so its cost is not known; leave out the "
            "price and the limit of cost. What was answered is kept",
            ends_run=True,
        )
        self._end(error)
        return error

    async def _tried(self, attempt: Callable[[], Awaitable[Found]]) -> Found:
        try:
            async with self._starting:
                if self._fatal is not None:
                    raise self._fatal
                if not self._is_started:
                    await self.backend.start()
                    self._is_started = True
            found = await self._attempts(attempt)
        except TeacherError as error:
            self._note(error)
            raise self._fatal or error from None
        self._failed_in_a_row = 0
        return found

    def _counted(self, error: TeacherError) -> TeacherError:
        if error.ends_run:
            raise error
        self.usage.failed += 1
        return error

    def _note(self, error: TeacherError) -> None:
        """Remember an error that ends the run, or that so many asks met that nobody can be there."""
        self._failed_in_a_row += error.retryable
        self._num_refused += not error.retryable
        kept = "What was answered is kept; the same command goes on from there"
        if error.ends_run:
            self._end(error)
        elif self._failed_in_a_row >= MAX_FAILED_IN_A_ROW:
            told = f"{self._failed_in_a_row} requests in a row had no answer after {self.spec.max_retries} retries"
            self._end(TeacherError(f"{error}; {told}. {kept}", ends_run=True, status=error.status))
        elif self._num_refused >= MAX_REFUSED_FIRST and not self._num_done:
            told = f"the first {self._num_refused} requests were all refused"
            self._end(TeacherError(f"{error}; {told}. {kept}", ends_run=True, status=error.status))

    def _end(self, error: TeacherError) -> None:
        self._fatal = self._fatal or error
        self._pacing.end()
