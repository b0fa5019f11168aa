"""An endpoint on a thread of its own, shared by the room's tests."""

import asyncio
import threading

import pytest
from fake_teacher import FakeTeacher
from synthesis_place import Place, wise


@pytest.fixture(scope="package")
def served_endpoint():
    fake, ready, stop = FakeTeacher(wise), threading.Event(), asyncio.Event()

    async def serve():
        nonlocal loop
        loop = asyncio.get_running_loop()
        async with fake.serving():
            ready.set()
            await stop.wait()

    loop: asyncio.AbstractEventLoop | None = None
    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(30)
    yield fake
    loop.call_soon_threadsafe(stop.set)
    thread.join()


@pytest.fixture
def place(tmp_path, served_endpoint, capsys):
    served_endpoint.respond, served_endpoint.bodies = wise, []
    return Place(tmp_path, served_endpoint, capsys)
