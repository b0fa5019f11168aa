"""Fetched adapters as local folders: shared, bounded, left by all, and as the server loads them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import http.server
import json
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from server_fixture import ServerProcess, assert_error, command_of
from waiting import until

from specserve.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.server.adapter_store import AdapterStore
from specserve.server.app import adapter_roots
from specserve.server.sources import fetcher as fetcher_module
from specserve.server.sources.fetcher import AdapterFetcher
from specserve.server.sources.worker import run


class Files(http.server.ThreadingHTTPServer):
    """A server of `files` by path, and of the hub's answers where a test adds them; `gate` holds back weights."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, tuple[bytes, dict[str, str]]] = {}
        self.requests: list[str] = []
        self.gate = threading.Event()
        self.gate.set()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def put(self, name: str, weights: bytes, config: bytes = b"{}") -> None:
        for file, content in ((CONFIG_FILE, config), (WEIGHTS_FILE, weights)):
            self.files[f"/loras/{name}/{file}"] = content, {"ETag": hashlib.md5(content).hexdigest()}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(f"{self.command} {self.path}")
        if self.command == "GET" and self.path.endswith(WEIGHTS_FILE):
            self.server.gate.wait(120)
        body, headers = self.server.files.get(self.path, (None, {}))
        self.send_response(404 if body is None else 200)
        for name, value in {"Content-Length": str(len(body or b"")), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body or b"")

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *args):
        pass


@pytest.fixture
def source():
    source = Files()
    yield source
    source.gate.set()
    source.shutdown()
    source.server_close()


@pytest.fixture
def make(source, tmp_path):
    """Fetchers of one cache."""
    made = []

    def make(**settings) -> AdapterFetcher:
        defaults = {"adapter_cache_dir": str(tmp_path / "cache"), "allowed_adapter_urls": (f"{source.url}/loras",)}
        made.append(AdapterFetcher(ServeConfig(**{**defaults, **settings})))
        return made[-1]

    yield make
    for fetcher in made:
        fetcher.close()


@pytest.fixture
def in_process(monkeypatch):
    """Fetches in a thread, for tests that start too many processes otherwise."""

    async def run_here(self, job):
        return await asyncio.to_thread(run, job)

    monkeypatch.setattr(AdapterFetcher, "_run", run_here)


async def fetch(fetcher, url, in_use=frozenset()) -> Path:
    async with fetcher.local(url, lambda: in_use) as folder:
        return Path(folder)


def nothing_is_left(fetcher) -> bool:
    root = fetcher.root.parent
    return not any((root / "partial").iterdir()) and not fetcher._fetches and not fetcher._held and not fetcher._waiting


def worker_pids() -> set[str]:
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split()
    return {pid for pid in children if "sources.worker" in command_of(pid)}


async def test_an_adapter_is_fetched_once_however_many_ask_and_not_again_while_it_is_the_same(make, source):
    source.put("a", b"weights")
    source.gate.clear()
    fetcher = make()
    asked = [asyncio.create_task(fetch(fetcher, f"{source.url}/loras/a")) for _ in range(5)]
    await until(lambda: f"GET /loras/a/{WEIGHTS_FILE}" in source.requests)
    asked.pop().cancel()
    source.gate.set()
    (folder,) = set(await asyncio.gather(*asked))
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"weights"}
    assert sum(request.startswith("GET") for request in source.requests) == 2 and nothing_is_left(fetcher)
    fetcher.close()
    source.requests.clear()
    fetcher = make()  # the next run of the server
    assert await fetch(fetcher, f"{source.url}/loras/a") == folder
    assert not any(request.startswith("GET") for request in source.requests)
    (folder / WEIGHTS_FILE).write_bytes(b"damaged")
    assert (await fetch(fetcher, f"{source.url}/loras/a") / WEIGHTS_FILE).read_bytes() == b"weights"
    source.put("b", b"weights")
    assert await fetch(fetcher, f"{source.url}/loras/b") == folder  # by content


async def test_a_fetch_ends_with_the_last_who_waits_and_leaves_nothing(make, source):
    source.put("a", b"weights")
    source.gate.clear()
    fetcher = make()
    asked = [asyncio.create_task(fetch(fetcher, f"{source.url}/loras/a")) for _ in range(2)]
    await until(lambda: f"GET /loras/a/{WEIGHTS_FILE}" in source.requests)
    asked[0].cancel()
    await asyncio.sleep(0.05)
    assert worker_pids()
    asked[1].cancel()
    await until(lambda: not worker_pids() and nothing_is_left(fetcher))
    assert not any(fetcher.root.iterdir())
    source.gate.set()
    await fetch(fetcher, f"{source.url}/loras/a")


async def test_slow_and_failing_sources_hold_up_nobody_else(make, source, monkeypatch):
    monkeypatch.setattr(fetcher_module, "MAX_FETCHES", 2)
    source.put("slow", b"weights")
    source.put("quick", b"weights")
    source.gate.clear()
    fetcher = make()
    slow = asyncio.create_task(fetch(fetcher, f"{source.url}/loras/slow"))
    await until(lambda: f"GET /loras/slow/{WEIGHTS_FILE}" in source.requests)
    with pytest.raises(UserError, match=f"no {CONFIG_FILE} at the source"):
        await fetch(fetcher, f"{source.url}/loras/none")
    other = asyncio.create_task(fetch(fetcher, f"{source.url}/loras/quick"))
    await asyncio.sleep(0)
    with pytest.raises(UserError, match="2 adapters are being fetched") as refusal:
        await fetch(fetcher, f"{source.url}/loras/third")
    assert refusal.value.status == 503
    slow.cancel()
    other.cancel()
    await until(lambda: not worker_pids() and nothing_is_left(fetcher))


async def test_a_fetch_that_takes_too_long_is_ended(make, source):
    source.put("slow", b"weights")
    source.gate.clear()
    fetcher = make(adapter_fetch_timeout_s=0.5)
    with pytest.raises(UserError, match=r"did not come within 0.5 s \(--adapter-fetch-timeout-s\)") as refusal:
        await fetch(fetcher, f"{source.url}/loras/slow")
    assert refusal.value.status == 504 and not worker_pids() and nothing_is_left(fetcher)


async def test_idle_folders_make_room_the_one_used_longest_ago_first(make, source, in_process):
    for name in "abcd":
        source.put(name, name.encode() * 100_000)
    fetcher = make(adapter_cache_gib=250_000 / 2**30)
    folders = {}
    for name in "abab":
        folders[name] = await fetch(fetcher, f"{source.url}/loras/{name}")
        time.sleep(0.02)  # file systems' clocks are coarse
    folders["c"] = await fetch(fetcher, f"{source.url}/loras/c")
    assert {name for name, folder in folders.items() if folder.exists()} == {"b", "c"}
    async with fetcher.local(f"{source.url}/loras/b", lambda: set()):
        await fetch(fetcher, f"{source.url}/loras/d", in_use={folders["c"]})
        assert folders["b"].exists() and folders["c"].exists()


async def test_a_folder_that_is_found_again_makes_no_room_while_its_source_is_asked(make, source, in_process):
    for name in "ab":
        source.put(name, name.encode() * 100_000)
    fetcher = make(adapter_cache_gib=150_000 / 2**30)
    folder = await fetch(fetcher, f"{source.url}/loras/a")
    run_now, asked, go_on = fetcher._run, asyncio.Event(), asyncio.Event()

    async def run_later(job):
        if job.known:
            asked.set()
            await go_on.wait()
        return await run_now(job)

    fetcher._run = run_later
    again = asyncio.create_task(fetch(fetcher, f"{source.url}/loras/a"))
    await asked.wait()
    await fetch(fetcher, f"{source.url}/loras/b")
    assert folder.exists()
    go_on.set()
    assert await again == folder and nothing_is_left(fetcher)


async def test_what_a_fetch_leaves_is_removed_beside_others_and_whoever_leaves_meanwhile_holds_nothing(
    make, source, in_process, monkeypatch
):
    source.put("a", b"weights")
    fetcher = make()
    removing, go_on, waited, rmtree = threading.Event(), threading.Event(), [], shutil.rmtree

    def slow(path, **kwargs):
        if Path(path).parent.name == "partial":
            removing.set()
            waited.append(go_on.wait(60))
        rmtree(path, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", slow)
    client = asyncio.create_task(fetch(fetcher, f"{source.url}/loras/a"))
    await until(removing.is_set)
    assert not client.done()
    client.cancel()
    await asyncio.wait([client])
    go_on.set()
    await until(lambda: nothing_is_left(fetcher))
    assert waited == [True]  # not so on the event loop, where nothing else runs meanwhile


async def test_a_full_disk_is_said_and_leaves_nothing(make, source, in_process, monkeypatch):
    source.put("a", b"weights")
    fetcher = make()

    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for method in ("keep", "make_room"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="No space left") as refusal:
            patch.setattr(fetcher.cache, method, full)
            await fetch(fetcher, f"{source.url}/loras/a")
        assert refusal.value.status == 503 and nothing_is_left(fetcher)


BROKEN_WORKER = """
import sys
from specserve.server.sources import worker

def run(job):
    print("SECRET")
    print("SECRET", file=sys.stderr)
    raise KeyError("SECRET")

worker.run = run
worker.main()
"""


async def test_a_bug_in_a_worker_is_logged_by_its_place_and_told_to_nobody(make, source, capfd, monkeypatch):
    monkeypatch.setattr(fetcher_module, "WORKER", [sys.executable, "-c", BROKEN_WORKER])
    with pytest.raises(UserError, match="the server's log says where") as refusal:
        await fetch(make(), f"{source.url}/loras/a")
    logged = capfd.readouterr().err
    assert "KeyError at" in logged and "SECRET" not in logged + str(refusal.value)


async def test_a_cache_has_one_server_and_loses_what_a_killed_one_left(make, source, tmp_path):
    fetcher = make()
    with pytest.raises(UserError, match="--adapter-cache-dir another"):
        make()
    (tmp_path / "cache" / "partial" / "left" / "files").mkdir(parents=True)
    fetcher.close()
    assert nothing_is_left(make())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be kept"):
        AdapterFetcher(ServeConfig(adapter_cache_dir=str(tmp_path / "file"), allowed_hub_repos=("a/b",)))
    assert AdapterFetcher(ServeConfig(adapter_cache_dir=str(tmp_path / "unused"))).root is None
    assert not (tmp_path / "unused").exists()


async def test_a_cache_that_was_removed_is_made_anew_and_locked(make, source, tmp_path, in_process):
    source.put("a", b"weights")
    fetcher = make()
    await fetch(fetcher, f"{source.url}/loras/a")
    shutil.rmtree(tmp_path / "cache")
    assert (await fetch(fetcher, f"{source.url}/loras/a") / WEIGHTS_FILE).read_bytes() == b"weights"
    assert nothing_is_left(fetcher)
    with pytest.raises(UserError, match="--adapter-cache-dir another"):
        make()
    shutil.rmtree(tmp_path / "cache")
    other = make()  # another server comes first
    with pytest.raises(UserError, match="--adapter-cache-dir another"):
        await fetch(fetcher, f"{source.url}/loras/a")
    other.close()
    await fetch(fetcher, f"{source.url}/loras/a")
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").write_text("")
    with pytest.raises(UserError, match="cannot be kept in"):
        await fetch(fetcher, f"{source.url}/loras/a")


async def test_a_worker_that_is_killed_or_says_nonsense_is_an_error_of_its_requests(
    make, source, monkeypatch, tmp_path
):
    source.put("a", b"weights")
    source.gate.clear()
    fetcher = make()
    asked = asyncio.create_task(fetch(fetcher, f"{source.url}/loras/a"))
    await until(lambda: f"GET /loras/a/{WEIGHTS_FILE}" in source.requests)
    (pid,) = worker_pids()
    os.kill(int(pid), signal.SIGKILL)
    with pytest.raises(UserError, match="ended without an answer"):
        await asked
    monkeypatch.setattr(fetcher_module, "WORKER", ["sh", "-c", "head -c 3000000 /dev/zero; exec sleep 9"])
    with pytest.raises(UserError, match="ended without an answer"):
        await fetch(fetcher, f"{source.url}/loras/a")
    assert nothing_is_left(fetcher)


@pytest.mark.slow
async def test_a_repository_of_the_hub_comes_at_one_commit_with_its_hashes(make, source, monkeypatch):
    commit, weights = "c" * 40, b"weights"
    sha256 = hashlib.sha256(weights).hexdigest()
    siblings = [
        {"rfilename": CONFIG_FILE, "size": 2, "blobId": "b1"},
        {"rfilename": WEIGHTS_FILE, "size": 7, "blobId": "b2", "lfs": {"size": 7, "sha256": sha256, "pointerSize": 1}},
        {"rfilename": "adapter_model.bin", "size": 7, "blobId": "b3"},
    ]
    info = json.dumps({"id": "team/a", "sha": commit, "siblings": siblings, "tags": [], "private": False}).encode()
    said = {"Content-Type": "application/json"}
    for revision in ("main", "v1", commit):
        source.files[f"/api/models/team/a/revision/{revision}?blobs=true"] = info, said
    source.files["/api/models/team/a?blobs=true"] = info, said
    for name, content in ((CONFIG_FILE, b"{}"), (WEIGHTS_FILE, weights)):
        headers = {"ETag": f'"{hashlib.md5(content).hexdigest()}"', "X-Repo-Commit": commit}
        source.files[f"/team/a/resolve/{commit}/{name}"] = content, headers
    for name, value in (("HF_ENDPOINT", source.url), ("HF_HUB_DISABLE_XET", "1"), ("HF_HUB_DISABLE_TELEMETRY", "1")):
        monkeypatch.setenv(name, value)
    fetcher = make(allowed_hub_repos=("team/*",))
    folder = await fetch(fetcher, "hf://team/a@v1")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {CONFIG_FILE: b"{}", WEIGHTS_FILE: weights}
    source.requests.clear()
    assert await fetch(fetcher, "hf://team/a@v1") == folder
    assert not any("resolve" in request for request in source.requests)
    source.files[f"/team/a/resolve/{commit}/{WEIGHTS_FILE}"] = b"another", {"ETag": '"x"', "X-Repo-Commit": commit}
    with pytest.raises(UserError, match="another SHA-256"):
        await fetch(fetcher, "hf://team/a")
    with pytest.raises(UserError, match="no such repository|RepositoryNotFound|HfHubHTTPError"):
        await fetch(fetcher, "hf://team/none")
    assert nothing_is_left(fetcher)


async def test_a_name_is_given_to_what_was_fetched_and_holds_its_folder(make, source, tmp_path, in_process):
    from test_adapter_store import FakeEngine

    source.put("a", b"weights")
    (tmp_path / "adapters").mkdir()
    fetcher = make(adapter_cache_gib=1e-9 * 5)
    roots = adapter_roots(ServeConfig(adapters_dir=str(tmp_path / "adapters")), fetcher.root)
    store = AdapterStore(FakeEngine(), str(tmp_path / "adapters"), "base", roots=roots)
    with pytest.raises(UserError, match="at most"):
        await fetch(fetcher, f"{source.url}/loras/a")
    fetcher.close()
    fetcher = make()
    async with fetcher.local(f"{source.url}/loras/a", store.given_directories) as path:
        info = await store.register("mine", path)
    assert (await store.resolve("mine")).content_hash == info.content_hash
    assert store.given_directories() == {Path(path)} and store.names() == ["mine"]
    source.put("a", b"other weights")
    assert (await store.resolve("mine")).content_hash == info.content_hash  # until it is loaded again
    async with fetcher.local(f"{source.url}/loras/a", store.given_directories) as path:
        assert (await store.register("mine", path, replace=True)).content_hash != info.content_hash
    await store.unregister("mine")
    assert store.given_directories() == set()


async def test_a_cache_given_by_a_path_with_dots_keeps_what_names_mean(make, source, tmp_path, in_process):
    from test_adapter_store import FakeEngine

    for name in "ab":
        source.put(name, name.encode() * 100_000)
    fetcher = make(adapter_cache_dir=f"{tmp_path}/adapters/../dots/cache", adapter_cache_gib=150_000 / 2**30)
    store = AdapterStore(FakeEngine(), None, "base")
    async with fetcher.local(f"{source.url}/loras/a", store.given_directories) as path:
        await store.register("mine", path)
    await fetch(fetcher, f"{source.url}/loras/b", store.given_directories())
    assert Path(path).exists()


@pytest.mark.slow
def test_load_lora_adapter_with_an_address_over_http(source, model_dir, adapters_dir, tmp_path):
    shutil.copytree(adapters_dir / "good", tmp_path / "a")
    source.put("a", (tmp_path / "a" / WEIGHTS_FILE).read_bytes(), (tmp_path / "a" / CONFIG_FILE).read_bytes())
    flags = ("--adapters-dir", str(adapters_dir), "--allowed-adapter-urls", f"{source.url}/loras")
    server = ServerProcess(model_dir, *flags, "--adapter-cache-dir", str(tmp_path / "cache")).wait_ready()
    try:

        def load(path, **fields):
            return server.post("/v1/load_lora_adapter", {"lora_name": "far", "lora_path": path, **fields})

        assert_error(load("https://h.example/loras/a"), 403, "--allowed-adapter-urls")
        for name in ("../far", server.get("/v1/models").json()["data"][0]["id"]):  # refused before it is fetched
            assert "lora_name" in load(f"{source.url}/loras/a", lora_name=name).text and not source.requests
        assert_error(load(f"{source.url}/loras/none"), 400, "no adapter_config.json")
        assert load(f"{source.url}/loras/a").status_code == 200
        assert server.complete(model="far")["text"] == server.complete(model="good")["text"]
        source.put("a", b"broken")
        assert_error(load(f"{source.url}/loras/a", load_inplace=True), 400)
        assert server.complete(model="far")["text"] == server.complete(model="good")["text"]
        server.wait_baseline()
    finally:
        assert server.stop() == 0
