"""A shared store in a bucket of a real S3 server, by s3fs: what holds for folders holds there, and failures are told.

Needs s3fs and moto's server: `make buckets` runs these.
"""

from __future__ import annotations

import threading
import time

import pytest
import requests
from peft_adapters import make_peft_adapter
from s3_server import BUCKET, S3Server
from server_fixture import ServerProcess
from test_shared_store import adapter, fetched
from waiting import wait_until

from specserve.errors import UserError
from specserve.server.shared_store.store import SharedStore

pytest.importorskip("s3fs")
pytest.importorskip("moto.server")
pytestmark = pytest.mark.slow

URL = f"s3://{BUCKET}/team/loras"
AWAY_S = 10.0


@pytest.fixture(scope="module")
def s3():
    server = S3Server()
    yield server
    server.close()


@pytest.fixture
def store(s3, monkeypatch):
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    store = SharedStore(URL)
    yield store
    for name in store.names():
        store.remove(name)
    store.prune(0.0)


def test_a_content_is_there_once_is_read_whole_and_goes_when_no_name_means_it(store, tmp_path):
    one, two = (adapter(tmp_path / name, name * 100_000) for name in "ab")
    version, is_new = store.push(one, "a")
    assert is_new and store.push(one, "b") == (version, False)
    assert set(fetched(store, version, tmp_path).values()) == {"{}", "a" * 100_000}
    other, _ = store.push(two, "a")
    assert store.named("a").version == other and store.named("b").version == version
    assert store.prune(0.0) == []
    assert store.remove("b") and not store.remove("b") and store.names() == ["a"]
    assert store.prune(3600.0) == [] and store.prune(0.0) == [version]
    assert store.versions() == [other] and store.version(version) is None
    with pytest.raises(UserError, match=f"has no version {version[:12]}"):
        fetched(store, version, tmp_path)


def test_who_reads_while_another_pushes_gets_one_content_whole(store, tmp_path):
    one, two = (adapter(tmp_path / name, name * 100_000, **{"tokenizer.json": name * 1000}) for name in "ab")
    store.push(one, "a")
    wholes, stop = [], threading.Event()

    def read() -> None:
        reader = SharedStore(URL)
        while not stop.is_set():
            files = fetched(reader, reader.named("a").version, tmp_path)
            wholes.append({text[:1] for name, text in files.items() if name != "adapter_config.json"})

    threads = [threading.Thread(target=read) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        store.push(two, "a")
        store.push(one, "a")
    stop.set()
    for thread in threads:
        thread.join()
    assert wholes and all(found in ({"a"}, {"b"}) for found in wholes), wholes


def test_what_is_wrong_is_told_by_name(s3, store, tmp_path):
    store.push(adapter(tmp_path / "one", "w"), "a")
    missing = SharedStore("s3://nowhere/loras")
    for ask in (missing.names, lambda: missing.named("a"), lambda: missing.push(tmp_path / "one", "a")):
        with pytest.raises(UserError, match="has no bucket; create 'nowhere'") as told:
            ask()
        assert told.value.code == "store_unavailable"
    with s3.refusing():
        for ask in (store.names, lambda: store.named("a"), lambda: store.push(tmp_path / "one", "b")):
            with pytest.raises(UserError, match="refuses the credentials") as told:
                ask()
            assert told.value.code == "store_unavailable" and "secret" not in str(told.value)
    with s3.away(), pytest.raises(UserError, match="does not answer"):
        SharedStore(URL).names()
    assert store.names() == ["a"]


def test_a_bucket_of_which_one_prefix_alone_may_be_seen_is_not_taken_for_missing(store, monkeypatch):
    call = store.files._fs._call_s3

    async def call_below(method, *arguments, **fields):
        if method in ("head_bucket", "get_bucket_location"):
            raise PermissionError("Forbidden")
        return await call(method, *arguments, **fields)

    monkeypatch.setattr(store.files._fs, "_call_s3", call_below)
    assert store.named("a") is None and store.names() == []


def test_servers_follow_a_name_together_and_serve_on_while_the_bucket_is_away(s3, store, model_dir, tmp_path):
    old, new = (make_peft_adapter(model_dir, tmp_path / name, r=4, std=0.3, seed=idx) for idx, name in enumerate("ab"))
    store.push(old, "mine")
    flags = ("--shared-store", URL, "--shared-store-refresh-s", "0.2")
    servers = [
        ServerProcess(model_dir, *flags, "--adapter-cache-dir", str(tmp_path / f"cache-{idx}"), env=s3.env)
        for idx in range(2)
    ]

    def answer(server, name="mine"):
        body = {"model": name, "prompt": "The quick", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        return requests.post(server.url + "/v1/completions", json=body, timeout=300)

    def text(server) -> str:
        response = answer(server)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    try:
        for server in servers:
            server.wait_ready()
        (before,) = {text(server) for server in servers}
        store.push(new, "mine")
        seen = [before]
        wait_until(lambda: seen.extend(map(text, servers)) or seen[-2:] != [before, before] and seen[-2] == seen[-1])
        after = seen[-1]
        assert after != before and set(seen) == {before, after}
        assert all(text(server) == after for server in servers)

        with s3.away():
            until, waits = time.monotonic() + AWAY_S, []
            while time.monotonic() < until:
                start = time.monotonic()
                assert text(servers[0]) == after
                waits.append(time.monotonic() - start)
                time.sleep(0.1)
            unknown = answer(servers[0], "another")
            assert (unknown.status_code, unknown.json()["error"]["code"]) == (503, "store_unavailable")
        assert len(waits) > 3, waits
        store.push(old, "mine")
        wait_until(lambda: all(text(server) == before for server in servers))
        store.remove("mine")
        wait_until(lambda: all(answer(server).status_code == 404 for server in servers))
    finally:
        assert [server.stop() for server in servers] == [0, 0]
