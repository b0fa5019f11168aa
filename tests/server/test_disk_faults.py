"""A disk that is away under one adapter, as a network's that hangs: who asks for it is told, and nobody else waits."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from broken.broken_tokens import AWAY, broken_env
from golden import Golden
from server_fixture import ServerProcess, assert_error
from waiting import until, wait_until

from specserve.errors import OverloadedError
from specserve.server import disk
from specserve.server.disk import NUM_THREADS, Disk

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture
def hangs(faults):
    yield faults / "hangs"
    (faults / "hangs").unlink(missing_ok=True)


def test_an_adapter_whose_disk_is_away_is_503_and_everybody_else_is_served(broken_server, hangs):
    server = broken_server
    golden = Golden(server, ("tiny", "good", AWAY))
    hangs.touch()
    with ThreadPoolExecutor(NUM_THREADS + 4) as pool:  # more than there are threads for all looks
        lost = [pool.submit(server.post, TEXT, {"model": AWAY, "prompt": "The"}) for _ in range(NUM_THREADS + 4)]
        for name, tokens in zip(("tiny", "good"), golden.tokens, strict=False):
            assert server.complete(model=name, logprobs=0)["logprobs"]["tokens"] == tokens
        chat = {"messages": [{"role": "user", "content": "The quick " * 50}], "max_tokens": 1, "model": "good"}
        assert server.post(CHAT, chat).status_code == 200
        assert server.get("/health").status_code == 200
        for reply in lost:
            assert_error(reply.result(), 503, AWAY, "disk")
            assert int(reply.result().headers["Retry-After"]) >= 1
        assert_error(server.get("/v1/models"), 503, "disk")
    hangs.unlink()
    golden.check()


@pytest.mark.slow
def test_a_server_that_ends_does_not_wait_for_a_disk_that_is_away(model_dir, broken_dir, hangs):
    env = broken_env(BROKEN_DISK=hangs)
    server = ServerProcess(model_dir, "--adapters-dir", str(broken_dir), env=env).wait_ready()
    server.complete(model=AWAY)
    hangs.touch()
    with ThreadPoolExecutor(8) as pool:
        lost = [pool.submit(server.post, TEXT, {"model": AWAY, "prompt": "a"}) for _ in range(8)]
        wait_until(lambda: server.num_in_flight() == 8)
        assert server.stop() == 0
        assert {reply.result().status_code for reply in lost} == {503}


async def test_looks_that_hang_are_few_for_a_name_and_bounded_in_all(monkeypatch):
    monkeypatch.setattr(disk, "PATIENCE_S", 0.05)
    monkeypatch.setattr(disk, "MAX_LOOKS", 12)
    away, looks = threading.Event(), Disk()
    try:
        for n in range(12):
            with pytest.raises(OverloadedError, match=f"'name-{n % 2}'.*0.05 s"):
                await looks.look(f"name-{n % 2}", away.wait)
        assert looks._looks.total() == 2 * disk.THREADS_A_NAME
        monkeypatch.setattr(disk, "PATIENCE_S", 60.0)
        assert await looks.look("other", lambda: 3) == 3
        monkeypatch.setattr(disk, "PATIENCE_S", 0.05)
        names = (f"third-{n}" for n in range(100))
        while looks._looks.total() < disk.MAX_LOOKS:  # one that found no core in time is not counted
            with pytest.raises(OverloadedError, match="disk"):
                await looks.look(next(names), away.wait)
        with pytest.raises(OverloadedError, match="12 requests wait"):
            await looks.look("another", lambda: 3)
    finally:
        away.set()
    monkeypatch.setattr(disk, "PATIENCE_S", 60.0)
    await until(lambda: not looks._looks)
    assert await looks.look("name-0", lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        await looks.look("name-0", lambda: 1 / 0)
    await asyncio.sleep(0)
    assert not looks._looks and not looks._names


async def test_a_disk_that_is_away_under_many_names_leaves_others_theirs(monkeypatch):
    """Known names lie on the file system that they were loaded from; these are more than there may be threads."""
    monkeypatch.setattr(disk, "PATIENCE_S", 0.2)
    away, looks = threading.Event(), Disk(lambda name: name.partition("/")[0])
    try:
        num = disk.NUM_THREADS + disk.MAX_STUCK + 40
        lost = [asyncio.create_task(looks.look(f"dead/{n}", away.wait)) for n in range(num)]
        await asyncio.wait(lost)
        assert {type(task.exception()) for task in lost} == {OverloadedError}
        await asyncio.sleep(0)
        assert disk.MAX_STUCK_A_MOUNT <= looks._looks.total() <= disk.NUM_THREADS + disk.MAX_STUCK_A_MOUNT
        monkeypatch.setattr(disk, "PATIENCE_S", 60.0)
        assert await looks.look("alive/0", lambda: 3) == 3
    finally:
        away.set()
    await until(lambda: not looks._looks)
    assert await looks.look("dead/0", lambda: 5) == 5


async def test_a_thread_that_cannot_be_started_costs_no_place(monkeypatch):
    looks = Disk()

    def refused(thread):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refused)
        for _ in range(disk.NUM_THREADS + 1):
            with pytest.raises(OverloadedError, match="can't start"):
                await looks.look("a", lambda: 3)
    assert await looks.look("a", lambda: 3) == 3
    await asyncio.sleep(0)
    assert not looks._looks and not looks._names
