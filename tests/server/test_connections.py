"""Connections and standard error that run out: idle peers, peers that speak no HTTP, a log that nobody takes."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from unittest.mock import Mock

import aiohttp
import pytest
import requests
from aiohttp import web
from ports import quiet_port
from server_fixture import ServerProcess
from waiting import until, wait_until

from specserve.server.connections import ACCEPTED_AT_ONCE, PROBE, Connections, _Connection, _Refusal


@pytest.fixture(scope="module")
def server(model_dir):
    """With a soft limit of 100 file handles and a hard one of 400."""
    limits = ("sh", "-c", 'ulimit -Sn 100; ulimit -Hn 400; exec "$@"', "sh")
    server = ServerProcess(model_dir, prefix=limits).wait_ready()
    yield server
    assert server.stop() == 0


@contextlib.contextmanager
def idle(server, num):
    host, port = server.url.removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection((host, int(port)), timeout=60)) for _ in range(num)]


def is_open(sock) -> bool:
    sock.setblocking(False)
    try:
        return sock.recv(1) != b""
    except BlockingIOError:
        return True
    except OSError:
        return False


def test_soft_limit_of_file_handles_is_raised(server):
    with idle(server, 200) as sockets:  # twice the soft limit
        assert requests.get(server.url + "/health", timeout=60).status_code == 200
        assert all(map(is_open, sockets))


def test_idle_connections_over_the_hard_limit_make_room_and_a_line_of_log(server):
    before = len(server.log)
    with idle(server, 900):
        time.sleep(0.5)  # until then they may be about to send a request
        for _ in range(3):
            assert requests.get(server.url + "/health", timeout=60).status_code == 200
        assert server.complete()["text"]
    server.wait_log("connections are open", since=before)
    assert sum("connections are open" in line for line in server.log[before:]) == 1
    assert len(server.log) - before < 5, server.log[before:]


async def test_a_connection_whose_request_has_just_come_is_not_idle(monkeypatch):
    monkeypatch.setattr("specserve.server.connections.ARRIVAL_S", 1000.0)
    peer, sock = socket.socketpair()
    ended = asyncio.Event()

    async def handle(request):
        await ended.wait()
        return web.Response()

    connections = Connections(web.Server(handle), num_handles=2)  # one connection
    first = connections._protocol()
    first.connection_made(Mock(spec=asyncio.Transport, is_closing=lambda: False, get_extra_info=lambda name: sock))
    await asyncio.sleep(0.01)
    assert not first.is_idle  # its request is on its way
    monkeypatch.setattr("specserve.server.connections.ARRIVAL_S", 0.0)
    assert first.is_idle
    peer.send(b"x")
    assert not first.is_idle  # here it is
    sock.recv(1)
    assert first.is_idle
    first.data_received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    for num_steps in range(8):  # from the bytes to the handler
        assert not first.is_idle and isinstance(connections._protocol(), _Refusal), num_steps
        await asyncio.sleep(0)
    ended.set()
    await until(lambda: first.is_idle)
    assert not isinstance(connections._protocol(), _Refusal) and not first.is_idle


async def test_in_a_crowd_each_gets_a_place_or_can_read_why_not():
    ended = asyncio.Event()

    async def handle(request):
        await ended.wait()
        return web.Response()

    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    connections = Connections(web.Server(handle), num_handles=300)  # 172 connections, and 32 refusals at a time
    listening = await connections.listen(listener)

    url = f"http://127.0.0.1:{listener.getsockname()[1]}/"

    async def ask(num_bytes):
        async with aiohttp.ClientSession() as session, session.post(url, data=bytes(num_bytes)) as response:
            return response.status

    crowd = [asyncio.create_task(ask(num_bytes)) for num_bytes in 100 * (10, 100_000)]
    # Those who are refused have their answer while the others wait.
    await until(lambda: sum(task.done() for task in crowd) >= len(crowd) - 172 - ACCEPTED_AT_ONCE)
    ended.set()
    statuses = []
    for answer in await asyncio.gather(*crowd, return_exceptions=True):
        assert not isinstance(answer, BaseException), answer
        statuses.append(answer)
    assert 172 <= statuses.count(200) <= 172 + ACCEPTED_AT_ONCE, statuses
    assert set(statuses) == {200, 503}
    await until(lambda: not connections._refusals)
    listening.close()


@contextlib.asynccontextmanager
async def served():
    """(port, events that end handlers, what became of them): a POST is answered when its event comes."""
    ends, fates = [], []

    async def handle(request):
        text = await request.text()
        if request.method == "POST":
            ends.append(end := asyncio.Event())
            try:
                await end.wait()
            except asyncio.CancelledError:
                fates.append("cancelled")
                raise
        fates.append("answered")
        return web.Response(text=f"you said {text}")

    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    connections = Connections(web.Server(handle, handler_cancellation=True), num_handles=300)
    listening = await connections.listen(listener)
    yield listener.getsockname()[1], ends, fates
    listening.close()


def http(method, version="1.1", body="", length=None):
    return f"{method} / HTTP/{version}\r\nHost: a\r\nContent-Length: {length or len(body)}\r\n\r\n{body}".encode()


async def talk(port, data):
    """All that comes back to who sends this and ends his side."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    writer.write_eof()
    async with asyncio.timeout(60):
        answer = await reader.read()
    writer.close()
    return answer


async def test_a_client_that_ends_its_side_behind_its_request_gets_its_answer():
    async with served() as (port, ends, fates):
        asked = asyncio.ensure_future(talk(port, http("POST", body="hello") + http("GET", body="again")))
        await until(lambda: len(ends) == 1)
        await asyncio.sleep(0.3)  # some probes
        assert not asked.done()
        ends[0].set()
        answer = (await asked).decode()
        while answer.startswith(PROBE.decode()):
            answer = answer.removeprefix(PROBE.decode())
        assert answer.startswith("HTTP/1.1 200 OK") and answer.count("HTTP/1.1 200 OK") == 2
        assert answer.index("you said hello") < answer.index("you said again") and fates == ["answered"] * 2
        old = (await talk(port, http("GET", "1.0", "old"))).decode()
        assert old.startswith("HTTP/1.0 200 OK") and old.endswith("you said old")


@pytest.mark.parametrize(
    "data", [http("POST", "1.0", "hello"), http("POST", body="half", length=9)], ids=["HTTP 1.0", "half a body"]
)
async def test_a_client_that_ends_its_side_and_cannot_be_told_from_one_that_leaves_gets_nothing(data):
    async with served() as (port, ends, fates):
        assert await talk(port, data) == b""
        await until(lambda: len(fates) == len(ends))
        assert "answered" not in fates


async def relayed(port):
    """A server that hands on what comes, and the end of a side as the end of a side, as proxies of connections do."""

    async def pump(reader, writer):
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
            writer.write_eof()
            return
        writer.transport.abort()

    async def relay(reader, writer):
        from_server, to_server = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(pump(reader, to_server), pump(from_server, writer))
        to_server.close()
        writer.close()

    return await asyncio.start_server(relay, "127.0.0.1", 0)


@pytest.mark.parametrize("is_relayed", [False, True])
async def test_a_client_that_leaves_before_its_answer_is_noticed_and_its_handler_ended(is_relayed):
    async with served() as (port, ends, fates):
        relay = await relayed(port) if is_relayed else None
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", relay.sockets[0].getsockname()[1] if relay is not None else port
        )
        writer.write(http("POST", body="hello"))
        await until(lambda: len(ends) == 1)
        writer.close()
        await until(lambda: fates == ["cancelled"])  # nothing else ends it
        if relay is not None:
            relay.close()


BIG = bytes(8 << 20)  # more than two sockets hold


@pytest.mark.parametrize(
    "head", ["GET / HTTP/1.1\r\nHost: a\r\n", "GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"]
)
@pytest.mark.parametrize("left_over", [False, True])
async def test_a_peer_that_takes_nothing_of_its_answer_is_cut_off_and_one_that_is_slow_has_all(head, left_over):
    """`left_over`: so little is left that nobody waits for it but the connection's end."""

    async def handle(request):
        if not left_over:
            return web.Response(body=BIG)
        response = web.StreamResponse()
        response.force_close()
        await response.prepare(request)
        while request.transport.get_write_buffer_size() == 0:
            await response.write(bytes(16 << 10))
            await asyncio.sleep(0.05 if request.transport.get_write_buffer_size() else 0)
        return response

    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 18)  # what is accepted has no larger one
    server = web.Server(handle, handler_cancellation=True)
    listening = await Connections(server, 300, 1.0).listen(listener)
    frozen, slow = (socket.create_connection(listener.getsockname()) for _ in range(2))
    frozen.sendall(head.encode() + b"\r\n")
    await until(lambda: len(server.connections) == 2)
    if not left_over:
        slow.sendall(head.encode() + b"\r\n")
        num, before = 0, time.monotonic()
        while num < len(BIG):
            part = await asyncio.to_thread(slow.recv, 1 << 19)
            assert part
            num += len(part)
            await asyncio.sleep(0.1)
        assert time.monotonic() - before > 1.2, "no slower than one that takes nothing for that long"
    slow.close()
    await until(lambda: not server.connections)
    with contextlib.suppress(ConnectionResetError):
        while part := await asyncio.to_thread(frozen.recv, 1 << 20):
            assert b"\r\n0\r\n\r\n" not in part
    frozen.close()
    listening.close()


def test_malformed_http_is_answered_in_json_and_a_line_of_log(server):
    before = len(server.log)
    for idx in range(200):
        data = [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"GET / HTTP/1.1\r\nNo colon\r\n\r\n", b"GET\r\n\r\n"][
            idx % 3
        ]
        with idle(server, 1) as (sock,):
            sock.sendall(data + b"\r\n\r\n")
            answer = b""
            with contextlib.suppress(ConnectionResetError):
                while chunk := sock.recv(65536):
                    answer += chunk
        assert answer.startswith(b"HTTP/1.0 400 ") and b'{"error":{"message":"' in answer, answer
        assert len(answer) < 600
    assert len(server.log) - before < 5, server.log[before : before + 20]


def test_a_client_that_leaves_while_its_stream_is_written_is_no_warning():
    left, connection = ConnectionResetError("Cannot write to closing transport"), Mock()
    with pytest.raises(ConnectionResetError):
        _Connection.handle_error(connection, Mock(), 500, left)
    connection._seldom.warn.assert_not_called()


def is_ready(process, url) -> bool:
    assert process.poll() is None
    with contextlib.suppress(requests.exceptions.ConnectionError):
        return requests.get(url + "/health", timeout=120).status_code == 200
    return False


def closed_pipe() -> int:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("log", [closed_pipe, pytest.param(full_disk, marks=pytest.mark.slow)])
def test_server_whose_log_nobody_takes_serves_and_ends_at_a_signal(model_dir, log):
    port, stderr = quiet_port(), log()
    command = [sys.executable, "-m", "specserve.cli", "serve", str(model_dir), "--port", str(port)]
    command += ["--dtype", "fp32", "--kv-cache-gib", "0.02", "--num-threads", "1"]
    process, url = subprocess.Popen(command, stderr=stderr), f"http://127.0.0.1:{port}"
    os.close(stderr)
    wait_until(lambda: is_ready(process, url), timeout_s=300)
    reply = requests.post(url + "/v1/completions", json={"prompt": "Hi", "max_tokens": 2}, timeout=60)
    assert reply.status_code == 200
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
