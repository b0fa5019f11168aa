"""What a slow reader finds of a sequence: all that has come, as one, and its error behind that."""

from __future__ import annotations

import pytest

from specserve.config import EngineConfig
from specserve.errors import ErrorInfo, UserError
from specserve.messages import TARGET, Abort, Delta, GenerateRequest, RequestFailed, SamplingParams, TokenTrace, Usage
from specserve.server.engine_client.client import EngineClient

USAGE = Usage(1, 3, 0, 3, 0, 0, 0, 0)


def delta(*tokens: int, **fields) -> Delta:
    return Delta("a", list(tokens), trace=[TokenTrace(token, "", TARGET, None, 0) for token in tokens], **fields)


async def read(monkeypatch, *messages) -> tuple[list[Delta], list, UserError | None]:
    """(what a reader takes, what was sent to the engine, its error), all messages being there before it reads."""
    client, sent = EngineClient(EngineConfig(model="none"), command=["none"]), []

    class Link:
        def send(self, message):
            sent.append(message)
            for answer in messages if isinstance(message, GenerateRequest) else ():
                client._dispatch(answer)

    async def link(patience_s):
        return Link()

    monkeypatch.setattr(client._engine, "link", link)
    taken = []
    try:
        async for item in client.generate(GenerateRequest("a", [1], SamplingParams(max_tokens=8))):
            taken.append(item)
    except UserError as error:
        return taken, sent, error
    return taken, sent, None


async def test_deltas_that_have_come_are_one(monkeypatch):
    first = delta(1, text="a", prompt_logprobs=[None])
    last = delta(4, 5, text="c", num_silent=1, finish_reason="stop", stop_reason=5, usage=USAGE)
    (joined,), sent, error = await read(monkeypatch, first, delta(2, 3, text="b"), last)
    assert joined.token_ids == [1, 2, 3, 4, 5] and joined.text == "abc" and joined.prompt_logprobs == [None]
    assert [entry.token_id for entry in joined.trace] == joined.token_ids and joined.logprobs is None
    assert (joined.num_silent, joined.finish_reason, joined.stop_reason, joined.usage) == (1, "stop", 5, USAGE)
    assert error is None and len(sent) == 1  # nothing to abort


@pytest.mark.parametrize("is_finished", [False, True])
async def test_an_error_behind_deltas_comes_after_them_unless_they_were_all(monkeypatch, is_finished):
    last = delta(2, finish_reason="length" if is_finished else None)
    failed = RequestFailed("a", ErrorInfo("no more"))
    taken, sent, error = await read(monkeypatch, delta(1), last, failed)
    assert [item.token_ids for item in taken] == [[1, 2]]
    assert (error is None) == is_finished and not any(isinstance(message, Abort) for message in sent)
