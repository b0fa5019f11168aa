"""HTTPS: what is spoken, certificates that are exchanged while the server runs, and files that are none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
import sys

import aiohttp
import pytest
import trustme
from places import FIXTURES

from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.server import connections
from specserve.server.app import Server
from specserve.server.tls import Certificate, certificate_of


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture
def files(authority, tmp_path):
    """Writes a new certificate and its key; the paths of both."""

    def write(name="127.0.0.1") -> tuple[str, str]:
        made = authority.issue_cert(name)
        made.private_key_pem.write_to_path(tmp_path / "key.pem")
        made.private_key_and_cert_chain_pem.write_to_path(tmp_path / "cert.pem")
        return str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")

    return write


@pytest.fixture
def client(authority):
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


@contextlib.asynccontextmanager
async def serving(model_dir, plan, monkeypatch, certfile, keyfile):
    """(the server, its address); the engine is one that does nothing."""
    plan.write_text("serve")
    monkeypatch.setenv("FAKE_ENGINE_PLAN", str(plan))
    config = ServeConfig(port=0, tls_certfile=certfile, tls_keyfile=keyfile, drain_timeout_s=0)
    server = Server(config, model_dir, [sys.executable, str(FIXTURES / "fake_engine.py")])
    ready, stop = asyncio.get_running_loop().create_future(), asyncio.Event()
    task = asyncio.create_task(server.serve_until(stop, ready.set_result))
    try:
        await asyncio.wait([task, ready], return_when=asyncio.FIRST_COMPLETED)
        yield server, ready.result()
    finally:
        stop.set()
        await task


async def serial_of(url: str, client: ssl.SSLContext) -> str:
    """Of the certificate of a new connection, which must answer."""
    host, port = url.removeprefix("https://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=client)
    serial = writer.get_extra_info("peercert")["serialNumber"]
    writer.write(f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
    assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    writer.close()
    return serial


async def test_https_is_served_with_a_certificate_that_may_be_exchanged(
    model_dir, files, client, tmp_path, monkeypatch
):
    certfile, keyfile = files()
    monkeypatch.setattr(connections, "HANDSHAKE_TIMEOUT_S", 3.0)  # longer than a good one waits for a core
    async with serving(model_dir, tmp_path / "plan", monkeypatch, certfile, keyfile) as (server, url):
        assert url.startswith("https://")
        first = await serial_of(url, client)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{url}/version", ssl=client) as answer:
                assert answer.status == 200
            files()
            await server.reload()
            second = await serial_of(url, client)
            assert second != first
            async with session.get(f"{url}/version", ssl=client) as answer:  # the connection of before
                assert answer.status == 200
        shutil.copy(keyfile, tmp_path / "old.pem")
        files()
        shutil.copy(tmp_path / "old.pem", keyfile)  # which does not belong to the new certificate
        await server.reload()
        assert await serial_of(url, client) == second
        host, port = url.removeprefix("https://").split(":")
        for text in (b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff", b""):
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(text)
            assert not (await asyncio.wait_for(reader.read(), 60)).startswith(b"HTTP")  # and is closed
            writer.close()
        old = ssl.create_default_context()
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises(ssl.SSLError):
            await asyncio.open_connection(host, int(port), ssl=old)
        assert await serial_of(url, client) == second


def test_a_refused_connection_may_be_one_of_tls():
    """It cannot be half closed."""
    written = []
    refusal = connections._Refusal(set(), 1)

    class Transport(asyncio.WriteTransport):
        def can_write_eof(self):
            return False

        def write(self, data):
            written.append(data)

    loop = asyncio.new_event_loop()
    try:
        loop.run_until_complete(_made(refusal, Transport()))
    finally:
        loop.close()
    assert written[0].startswith(b"HTTP/1.1 503")


async def _made(protocol, transport):
    protocol.connection_made(transport)
    protocol.connection_lost(None)


def test_files_that_are_no_certificate_and_key_are_named(files, tmp_path):
    certfile, keyfile = files()
    Certificate(certfile, None)  # which has the key in it
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("h.example").private_key_pem.write_to_path(other)
    (tmp_path / "text").write_text("no certificate")
    os.mkfifo(tmp_path / "pipe")
    for cert, key, reason in (
        (certfile, str(other), "no PEM certificate and its key"),
        (str(tmp_path / "text"), keyfile, "no PEM certificate and its key"),
        (keyfile, None, "no PEM certificate and its key"),
        (str(tmp_path / "none"), keyfile, "tls_certfile: cannot read"),
        (certfile, str(tmp_path / "none"), "tls_keyfile: cannot read"),
        (certfile, _encrypted(keyfile, tmp_path), "has a password"),
        (certfile, str(tmp_path / "pipe"), "tls_keyfile: .* is not a regular file"),  # would be waited for
        ("", keyfile, "tls_certfile: '' is not"),
    ):
        with pytest.raises(UserError, match=reason):
            Certificate(cert, key)
    with pytest.raises(UserError, match="needs tls_certfile"):
        certificate_of(ServeConfig(tls_keyfile=keyfile))
    assert certificate_of(ServeConfig()) is None


def _encrypted(keyfile, tmp_path) -> str:
    from cryptography.hazmat.primitives import serialization as s

    key = s.load_pem_private_key(open(keyfile, "rb").read(), None)
    text = key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.BestAvailableEncryption(b"secret"))
    (tmp_path / "encrypted.pem").write_bytes(text)
    return str(tmp_path / "encrypted.pem")
