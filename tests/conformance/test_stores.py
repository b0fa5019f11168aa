"""Adapters from object stores, by their own clients: s3fs against moto's server, gcsfs against answers of its API.

The worker that fetches is the real one, started in an environment that has these packages.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import requests

from specserve.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.server.sources import fetcher as fetcher_module
from specserve.server.sources.fetcher import AdapterFetcher

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
SIGNED = {
    "Authorization": "AWS4-HMAC-SHA256 Credential=an-id/20260101/us-east-1/s3/aws4_request"
}  # moto checks no more
CONFIG, WEIGHTS = b"{}", os.urandom(3 << 20)  # more than a client reads at once


@pytest.fixture
def fetch(executable, tmp_path, monkeypatch):
    """Fetches an address into a cache of the test's own."""
    python = executable("stores", "python")
    monkeypatch.setattr(fetcher_module, "WORKER", [str(python), "-P", "-m", "specserve.server.sources.worker"])
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    settings = {
        "adapter_cache_dir": str(tmp_path / "cache"),
        "allowed_adapter_urls": ("s3://bucket/team", "gs://bucket/team"),
    }
    fetcher = AdapterFetcher(ServeConfig(**settings))

    async def fetch(url: str) -> Path:
        async with fetcher.local(url, lambda: frozenset()) as folder:
            return Path(folder)

    yield fetch
    fetcher.close()


@pytest.fixture
def s3(executable, monkeypatch):
    """The address of an S3 server."""
    command = [executable("stores", "moto_server"), "-H", "127.0.0.1", "-p", "0"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        try:
            url = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
            threading.Thread(target=server.stderr.read, daemon=True).start()  # so that it is never full
            for name, value in {
                "AWS_ENDPOINT_URL": url,
                "AWS_ACCESS_KEY_ID": "an-id",
                "AWS_SECRET_ACCESS_KEY": "a-secret",
                "AWS_DEFAULT_REGION": "us-east-1",
            }.items():
                monkeypatch.setenv(name, value)
            yield url
        finally:
            server.terminate()


class Gcs(ThreadingHTTPServer):
    """Objects of one bucket as Google's JSON API gives them."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), GcsHandler)
        self.objects: dict[str, tuple[bytes, int]] = {}  # (content, generation)
        self.num_reads = 0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def put(self, name: str, content: bytes) -> None:
        self.objects[name] = content, self.objects.get(name, (b"", 0))[1] + 1


class GcsHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        parts = urlsplit(self.path)
        found = re.fullmatch(r"(/download)?/storage/v1/b/bucket/o(?:/(.*))?", parts.path)
        name = unquote(found[2] or "") if found else ""
        if found and not name:
            self.answer(200, json.dumps({"kind": "storage#objects"}).encode())
        elif name not in self.server.objects:
            self.answer(404, b'{"error": {"code": 404, "message": "No such object"}}')
        else:
            content, generation = self.server.objects[name]
            if "alt=media" in parts.query:
                self.server.num_reads += 1
                return self.answer_range(content)
            link = f"http://{self.headers['Host']}/download{parts.path}?alt=media"
            entry = {"kind": "storage#object", "bucket": "bucket", "name": name, "size": str(len(content))}
            entry |= {"generation": str(generation), "etag": f"e{generation}", "mediaLink": link}
            self.answer(200, json.dumps(entry).encode())

    def answer_range(self, content):
        if (asked := re.match(r"bytes=(\d+)-(\d+)?", self.headers.get("Range", ""))) is None:
            return self.answer(200, content)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        self.answer(206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def answer(self, status, body, headers=()):
        self.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **dict(headers),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def gcs(monkeypatch):
    server = Gcs()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{server.server_address[1]}")
    yield server
    server.shutdown()
    server.server_close()


def is_adapter(folder: Path, weights: bytes) -> bool:
    return {file.name: file.read_bytes() for file in folder.iterdir()} == {CONFIG_FILE: CONFIG, WEIGHTS_FILE: weights}


async def test_an_adapter_of_a_bucket_comes_whole_once_and_again_when_it_changes(s3, fetch):
    def put(path, content=b""):
        requests.put(f"{s3}/bucket{path}", data=content, headers=SIGNED, timeout=60).raise_for_status()

    put("")
    for name, content in ((CONFIG_FILE, CONFIG), (WEIGHTS_FILE, WEIGHTS), ("adapter_model.bin", b"pickle")):
        put(f"/team/a/{name}", content)
    folder = await fetch("s3://bucket/team/a")
    assert is_adapter(folder, WEIGHTS) and await fetch("s3://bucket/team/a") == folder
    put(f"/team/a/{WEIGHTS_FILE}", b"changed")
    changed = await fetch("s3://bucket/team/a")
    assert changed != folder and is_adapter(changed, b"changed")
    with pytest.raises(UserError, match=f"no {CONFIG_FILE} at the source"):
        await fetch("s3://bucket/team/none")


async def test_a_bucket_that_may_not_be_read_is_an_error_without_its_text(s3, fetch, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(UserError) as failed:
        await fetch("s3://bucket/team/a")
    assert failed.value.status == 502 and "a-secret" not in str(failed.value) and "127.0.0.1" not in str(failed.value)


async def test_an_adapter_of_googles_store_comes_whole_once_and_again_when_it_changes(gcs, fetch):
    for name, content in ((CONFIG_FILE, CONFIG), (WEIGHTS_FILE, WEIGHTS), ("adapter_model.bin", b"pickle")):
        gcs.put(f"team/a/{name}", content)
    folder = await fetch("gs://bucket/team/a")
    assert is_adapter(folder, WEIGHTS)
    num_reads = gcs.num_reads
    assert await fetch("gs://bucket/team/a") == folder and gcs.num_reads == num_reads
    gcs.put(f"team/a/{WEIGHTS_FILE}", b"changed")
    assert is_adapter(await fetch("gs://bucket/team/a"), b"changed")
    with pytest.raises(UserError, match=f"no {CONFIG_FILE} at the source"):
        await fetch("gs://bucket/team/none")
