"""What is new in what an engine says again, after one that said a part of it ended."""

from __future__ import annotations

import asyncio

import pytest

from specserve.errors import EngineDeadError, EngineLostError
from specserve.messages import BACKGROUND_PRIORITY, TARGET, Delta, GenerateRequest, SamplingParams, Together, TokenTrace
from specserve.server.engine_client.resending import EngineLosses, Resender


def delta(forward: int, *tokens: int) -> Delta:
    drafts = [TokenTrace(token, "", "ngram", 0.5, forward) for token in tokens[:-1]]
    return Delta("a", list(tokens), trace=[*drafts, TokenTrace(tokens[-1], "", TARGET, None, forward)])


def fresh(losses: EngineLosses, deltas: list[Delta]) -> list[tuple[int, int]]:
    """(token, forward) of each entry that is told."""
    told = [rest for item in deltas if (rest := losses.rest_of(item)) is not None]
    assert all([entry.token_id for entry in item.trace] == item.token_ids for item in told)
    return [(entry.token_id, entry.forward) for item in told for entry in item.trace]


def test_a_trace_goes_on_behind_what_was_told_however_the_next_engine_drafts():
    """Better than the first, so that its forwards of new tokens have smaller numbers; then worse."""
    losses = EngineLosses(is_once=False)
    assert fresh(losses, [delta(0, 1), delta(1, 2, 3), delta(2, 4)]) == [(1, 0), (2, 1), (3, 1), (4, 2)]
    losses.num += 1
    losses.begin_again()
    assert fresh(losses, [delta(0, 1, 2, 3), delta(1, 4, 5, 6), delta(2, 7)]) == [(5, 3), (6, 3), (7, 4)]
    losses.num += 1
    losses.begin_again()
    again = [delta(number, number + 1) for number in range(9)]
    assert fresh(losses, again) == [(8, 5), (9, 6)]


def test_an_engine_that_ends_before_it_says_anything_new_moves_no_number():
    losses = EngineLosses(is_once=False)
    fresh(losses, [delta(0, 1), delta(1, 2)])
    for _ in range(2):
        losses.num += 1
        losses.begin_again()
        assert fresh(losses, [delta(0, 1)]) == []
    losses.num += 1
    losses.begin_again()
    assert fresh(losses, [delta(0, 1, 2, 3), delta(1, 4)]) == [(3, 2), (4, 3)]
    with pytest.raises(EngineDeadError):
        losses.num += 1
        losses.begin_again()
        losses.rest_of(delta(0, 1, 7))


class MortalEngine:
    """Ends once with the first sequence in it."""

    generation, state = 1, "ready"

    def __init__(self):
        self.asked = []

    async def generate(self, request):
        self.asked.append(request)
        if len(self.asked) == 1:
            self.generation += 1
            raise EngineLostError("the engine process ended")
        yield Delta(request.request_id, [7], finish_reason="stop")


async def test_what_was_admitted_is_not_refused_for_want_of_room_by_the_next_engine():
    engine = MortalEngine()
    request = GenerateRequest("a", [1], SamplingParams(max_tokens=1), together=Together("an answer", 8, 8))
    deltas = [delta async for delta in Resender(engine).generate(request, EngineLosses(is_once=True))]
    assert [delta.finish_reason for delta in deltas] == ["stop"]
    assert [request.num_together for request in engine.asked] == [8, 0]


class EngineForAll(MortalEngine):
    """Ends once it has so many sequences."""

    def __init__(self, num):
        super().__init__()
        self._num, self._ends = num, asyncio.Event()

    async def generate(self, request):
        self.asked.append(request)
        if len(self.asked) <= self._num:
            if len(self.asked) == self._num:
                self.generation += 1
                self._ends.set()
            await self._ends.wait()
            raise EngineLostError("the engine process ended")
        await asyncio.sleep(0.01)  # until the others have seen it, too
        yield Delta(request.request_id, [7], finish_reason="stop")


async def test_background_sequences_let_others_have_their_turns_first():
    engine = EngineForAll(6)
    resender = Resender(engine)

    async def run(name, priority):
        request = GenerateRequest(name, [1], SamplingParams(max_tokens=1), priority=priority)
        return [delta async for delta in resender.generate(request, EngineLosses(is_once=False))]

    background = [run(f"background {idx}", BACKGROUND_PRIORITY) for idx in range(4)]
    answers = await asyncio.gather(*background, run("one", 0), run("two", 0))
    assert all(deltas[-1].finish_reason == "stop" for deltas in answers)
    again = [request.request_id for request in engine.asked[6:]]
    assert sorted(again[:3]) == ["background 0", "one", "two"] and len(again) == 6
