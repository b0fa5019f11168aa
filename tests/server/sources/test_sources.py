"""Adapters from elsewhere: what an address may be, and sources that are slow, wrong, hostile or change."""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket

import fsspec
import pytest
from aiohttp import web

from specserve.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.routing_profile import MAX_PROFILE_BYTES, PROFILE_FILE
from specserve.server.sources import fetching, http_source
from specserve.server.sources.locations import Location, address_allowed, allowed_sources
from specserve.server.sources.worker import FetchJob, run

FILES = {CONFIG_FILE: b"{}", WEIGHTS_FILE: b"w" * 3_000_000, "adapter_model.bin": b"pickle", "x.py": b"code"}
MAX_BYTES = 4_000_000


def allowed(*urls, repos=(), networks=()):
    config = ServeConfig(allowed_adapter_urls=urls, allowed_hub_repos=repos, allowed_adapter_networks=networks)
    return allowed_sources(config)


# -- addresses


@pytest.mark.parametrize(
    "url",
    [
        *(
            "https://h.example/loras",
            "https://h.example/loras/",
            "https://h.example/loras/a/b",
            "https://H.EXAMPLE/loras/a",
        ),
        *("s3://bucket/team/a", "s3://bucket/team/a=b"),
    ],
)
def test_what_lies_under_a_prefix_is_allowed(url):
    sources = allowed("https://h.example/loras", "s3://bucket/team/")
    location = sources.location(url)
    assert sources.allows(location) and not location.url.endswith("/")


@pytest.mark.parametrize(
    "url",
    [
        *("https://h.example/lorasX/a", "https://h.example/", "https://h.example", "http://h.example/loras/a"),
        *("https://h.example:444/loras/a", "https://h.example.evil/loras/a", "https://evil/h.example/loras/a"),
        *("https://h.example/loras/../x", "https://h.example/loras/%2e%2e/x", "https://h.example/loras/a%2Fb"),
        *("https://h.example/loras/a%00", "https://h.example/loras/a\\b", "https://h.example/loras//a"),
        *(
            "https://h.example@evil/loras/a",
            "https://user:secret@h.example/loras/a",
            "https://h.example/loras/a?sig=secret",
        ),
        *(
            "https://h.example/loras/a#x",
            "https://h.example/loras/ a",
            "https://h.example/loras/a\n",
            "https:///loras/a",
        ),
        *("file:///etc", "local:///etc", "s3://other/team/a", "s3://bucket/teams", "S3://bucket/team/a"),
        *(
            "simplecache::https://h.example/loras/a",
            "zip://a::https://h.example/loras/a",
            "hf://owner/name",
            "://",
            "é://a/b",
        ),
        *(
            "https://h.example/loras/" + "a" * 3000,
            "https://[::1/loras",
            "https://h.example:99999/loras",
            "https://:80/loras",
        ),
    ],
)
def test_what_does_not_or_can_be_read_in_two_ways_is_refused(url):
    with pytest.raises(UserError) as refusal:
        allowed("https://h.example/loras", "s3://bucket/team/").location(url)
    assert refusal.value.param == "lora_path" and "secret" not in str(refusal.value)


def test_repositories_are_allowed_by_pattern_and_revision_is_theirs():
    sources = allowed(repos=("team/*", "a/b"))
    assert sources.location("hf://team/x@v1.0").url == "hf://team/x@v1.0"
    assert sources.location("hf://a/b") == Location("hf", "a/b", "")
    for text in (
        "hf://b/a",
        "hf://team",
        "hf://team/x/y",
        "hf://team/..",
        "hf://team/x@a..b",
        "hf://team/x@",
        "hf://te am/x",
    ):
        with pytest.raises(UserError):
            sources.location(text)


def test_nothing_is_allowed_by_default_and_settings_that_cannot_be_are_refused():
    for url in ("https://h.example/a", "s3://b/a", "hf://a/b"):
        with pytest.raises(UserError) as refusal:
            allowed().location(url)
        assert refusal.value.status == 403
    for settings in ({"networks": ("10.0.0.0/33",)}, {"networks": ("x",)}):
        with pytest.raises(UserError, match="allowed_adapter_networks"):
            allowed(**settings)
    for repository in ("team", "a/b/c", "../x", "a b/c", "hf://a/b", "team/[ab]"):
        with pytest.raises(UserError, match=re.escape(f"allowed_hub_repos {repository!r}")):
            allowed(repos=(repository,))
    for url in ("https://", "h.example", "https://u:p@h/", "file:///srv", "hf://a/b"):
        with pytest.raises(UserError) as refusal:
            allowed(url)
        assert url.replace("u:p@", "") in str(refusal.value) or url == "hf://a/b"


@pytest.mark.parametrize(
    ("address", "host", "is_allowed"),
    [
        ("93.184.215.14", "h.example", True),
        ("2606:2800:21f:cb07:6820:80da:af6b:8b2c", "h.example", True),
        *((ip, "h.example", False) for ip in ("127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254")),
        *((ip, "h.example", False) for ip in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "::1", "fe80::1%eth0", "fd00::1")),
        *((ip, "h.example", False) for ip in ("::ffff:127.0.0.1", "::ffff:10.0.0.1", "::")),
        ("10.9.1.1", "h.example", True),
        ("::ffff:10.9.1.1", "h.example", True),
        ("127.0.0.1", "localhost", True),
        ("10.0.0.1", "localhost", False),
    ],
)
def test_names_lead_to_public_addresses_or_to_networks_of_the_settings(address, host, is_allowed):
    assert address_allowed(address, host, ("10.9.0.0/16",)) is is_allowed


# -- HTTP


class Store:
    """An HTTP server of files whose answers a test may bend; `requests` are methods and paths."""

    def __init__(self):
        self.files = dict(FILES)
        self.tags = True
        self.bend = None
        self.requests = []

    async def handle(self, request):
        self.requests.append((request.method, request.path))
        assert "Authorization" not in request.headers and "Cookie" not in request.headers
        if self.bend is not None and (answer := await self.bend(request)) is not None:
            return answer
        folder, _, name = request.path.rpartition("/")
        if folder != "/loras/a" or name not in self.files:
            return web.Response(status=404)
        body = self.files[name]
        headers = {"ETag": f'"{hashlib.md5(body).hexdigest()}"'} if self.tags else {}
        return web.Response(body=body, headers=headers)


@pytest.fixture
async def store():
    store = Store()
    runner = web.ServerRunner(web.Server(store.handle), shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    store.host = f"127.0.0.1:{runner.addresses[0][1]}"
    yield store
    await runner.cleanup()


@pytest.fixture
def get(store, tmp_path):
    """Fetches the folder of the store, in a thread as the worker does in a process."""

    async def get(known=None, url=None, sources=None, max_bytes=MAX_BYTES):
        sources = sources or allowed(f"http://{store.host}/loras")
        place = tmp_path / f"place{len(list(tmp_path.iterdir()))}"
        place.mkdir()
        location = sources.location(url or f"http://{store.host}/loras/a")
        fetched = await asyncio.to_thread(run, FetchJob(location, sources, str(place), known or {}, max_bytes))
        return fetched, {file.name: file.read_bytes() for file in (place / "files").iterdir()}

    return get


async def test_only_files_of_an_adapter_are_asked_for_and_none_that_is_as_it_was(store, get):
    fetched, files = await get()
    assert files == {name: FILES[name] for name in (CONFIG_FILE, WEIGHTS_FILE)}
    assert fetched.files[WEIGHTS_FILE].sha256 == hashlib.sha256(FILES[WEIGHTS_FILE]).hexdigest()
    assert not any(path.endswith(("adapter_model.bin", ".py")) for _, path in store.requests)
    store.requests.clear()
    again, files = await get(known=fetched.states)
    assert again.files is None and not files and {method for method, _ in store.requests} == {"HEAD"}
    store.files[CONFIG_FILE] = b"[]"
    assert (await get(known=fetched.states))[1][CONFIG_FILE] == b"[]"


async def test_a_source_without_tags_is_fetched_each_time(store, get):
    store.tags = False
    fetched, _ = await get()
    assert (await get(known=fetched.states))[0].files is not None


async def test_files_that_change_meanwhile_are_fetched_again_and_those_that_go_on_changing_are_refused(store, get):
    num_changes = 1

    async def change(request):
        nonlocal num_changes
        if request.method == "GET" and request.path.endswith(WEIGHTS_FILE) and num_changes:
            num_changes -= 1
            store.files[CONFIG_FILE] += b" "

    store.bend = change
    assert (await get())[1][CONFIG_FILE] == b"{} "
    num_changes = 100
    with pytest.raises(UserError, match="changes at its source") as refusal:
        await get()
    assert refusal.value.code == "adapter_changing" and num_changes == 100 - fetching.NUM_ATTEMPTS


async def refused(get, match, status=502, **kwargs):
    with pytest.raises(UserError, match=match) as refusal:
        await get(**kwargs)
    assert refusal.value.status == status


async def test_what_is_no_adapter_or_too_large_is_refused(store, get, monkeypatch):
    await refused(get, f"{WEIGHTS_FILE} has more than 1999998 bytes", status=400, max_bytes=2_000_000)
    assert ("GET", f"/loras/a/{WEIGHTS_FILE}") not in store.requests
    monkeypatch.setitem(fetching.MAX_FETCHED_BYTES, CONFIG_FILE, 1)
    await refused(get, f"{CONFIG_FILE} has more than 1 bytes", status=400)
    del store.files[WEIGHTS_FILE]
    await refused(get, f"no {WEIGHTS_FILE} at the source", status=400)


async def test_a_routing_profile_comes_along_and_is_left_out_where_it_is_too_large(store, get):
    store.files[PROFILE_FILE] = b'{"prompts": ["a"]}'
    fetched, files = await get()
    assert files[PROFILE_FILE] == b'{"prompts": ["a"]}'
    store.files[PROFILE_FILE] = b'{"prompts": ["b"]}'
    changed, files = await get(known=fetched.states)
    assert files[PROFILE_FILE] == b'{"prompts": ["b"]}'
    store.files[PROFILE_FILE] = b" " * (MAX_PROFILE_BYTES + 1)
    too_large, files = await get(known=changed.states)
    assert set(files) == set(too_large.files) == {CONFIG_FILE, WEIGHTS_FILE}
    assert (await get(known=too_large.states))[0].files is None

    async def endless(request):
        """Says nothing of its length."""
        if request.path.endswith(PROFILE_FILE):
            answer = web.StreamResponse()
            answer.enable_chunked_encoding()
            await answer.prepare(request)
            for _ in range(10 if request.method == "GET" else 0):
                await answer.write(b" " * MAX_PROFILE_BYTES)
            return answer

    store.bend = endless
    assert set((await get())[1]) == {CONFIG_FILE, WEIGHTS_FILE}


async def test_a_body_that_is_not_what_was_said_is_refused(store, get):
    async def endless(request):
        """Says nothing of its length, and has none."""
        if request.path.endswith(WEIGHTS_FILE):
            answer = web.StreamResponse()
            answer.enable_chunked_encoding()
            await answer.prepare(request)
            for _ in range(1000 if request.method == "GET" else 0):
                await answer.write(b"x" * 100_000)
            return answer

    store.bend = endless
    await refused(get, f"{WEIGHTS_FILE} has more than", status=400)

    async def shorter(request):
        """Says one length to HEAD and has another."""
        if request.method == "GET" and request.path.endswith(WEIGHTS_FILE):
            return web.Response(body=b"short")

    store.bend = shorter
    await refused(get, "has 5 bytes, and the source said 3000000")

    async def cut(request):
        if request.method == "GET" and request.path.endswith(WEIGHTS_FILE):
            answer = web.StreamResponse(headers={"Content-Length": "3000000"})
            await answer.prepare(request)
            await answer.write(b"x")
            request.transport.abort()
            return answer

    store.bend = cut
    await refused(get, "Client")

    async def packed(request):
        return web.Response(body=b"", headers={"Content-Encoding": "gzip"})

    store.bend = packed
    await refused(get, "uncompressed")

    async def broken(request):
        return web.Response(status=500, text="secret")

    store.bend = broken
    await refused(get, "answers 500")


async def test_a_source_that_says_nothing_is_given_up(store, get, monkeypatch):
    monkeypatch.setattr(http_source, "TIMEOUT", http_source.aiohttp.ClientTimeout(sock_read=0.1))

    async def silent(request):
        await asyncio.sleep(5)

    store.bend = silent
    await refused(get, "says nothing for 0.1 s")


@pytest.mark.parametrize(
    "to",
    [
        *(
            "http://169.254.169.254/latest/meta-data",
            "http://127.0.0.1:1/loras/a",
            "/other/file",
            "/loras/../other",
            "http://[",
            "http://HOST:0/",
        ),
        *(
            "//evil.example/loras/a",
            "file:///etc/passwd",
            "http://user:pass@HOST/loras/a",
            "http://HOST/loras/%2e%2e/x",
            "",
        ),
    ],
)
async def test_redirects_out_of_what_is_allowed_are_not_followed_nor_told(store, get, to):
    async def redirect(request):
        return web.Response(status=302, headers={"Location": to.replace("HOST", store.host)})

    store.bend = redirect
    with pytest.raises(UserError, match="--allowed-adapter-urls|more than") as refusal:
        await get()
    assert not to or to not in str(refusal.value)
    assert all(path.startswith("/loras/a/") for _, path in store.requests)


async def test_redirects_to_what_is_allowed_are_followed_with_their_signature_and_not_for_ever(store, get):
    async def redirect(request):
        if request.path.startswith("/loras/moved"):
            return web.Response(
                status=307, headers={"Location": f"/loras/a/{request.path.rpartition('/')[2]}?sig=a%2Fb"}
            )
        assert request.raw_path.endswith("?sig=a%2Fb")

    store.bend = redirect
    assert (await get(url=f"http://{store.host}/loras/moved"))[1][CONFIG_FILE] == b"{}"

    async def loop(request):
        return web.Response(status=302, headers={"Location": request.path})

    store.bend = loop
    await refused(get, "redirected more than")


async def test_a_name_that_leads_to_a_private_address_is_not_connected_to(store, get, monkeypatch):
    port = store.host.partition(":")[2]
    real = socket.getaddrinfo

    def resolve(host, *args, **kwargs):
        return real("127.0.0.1" if host == "rebound.example" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    url = f"http://rebound.example:{port}/loras"
    await refused(get, "not public", status=403, url=f"{url}/a", sources=allowed(url))
    assert store.requests == []
    _, files = await get(url=f"{url}/a", sources=allowed(url, networks=("127.0.0.0/8",)))
    assert CONFIG_FILE in files


# -- fsspec


@pytest.fixture
def memory():
    fs = fsspec.filesystem("memory")
    for name, content in FILES.items():
        fs.pipe(f"/bucket/loras/a/{name}", content)
    yield fs
    fs.rm("/bucket", recursive=True)


def from_memory(tmp_path, known=None, url="memory://bucket/loras/a"):
    place = tmp_path / f"place{len(list(tmp_path.iterdir()))}"
    place.mkdir()
    sources = allowed("memory://bucket/loras", "nosuch://bucket")
    fetched = run(FetchJob(sources.location(url), sources, str(place), known or {}, MAX_BYTES))
    return fetched, {file.name: file.read_bytes() for file in (place / "files").iterdir()}


def test_any_file_system_of_fsspec_serves(memory, tmp_path):
    fetched, files = from_memory(tmp_path)
    assert files == {name: FILES[name] for name in (CONFIG_FILE, WEIGHTS_FILE)}
    assert from_memory(tmp_path, fetched.states)[0].files is None
    memory.pipe(f"/bucket/loras/a/{CONFIG_FILE}", b"[]")
    assert from_memory(tmp_path, fetched.states)[1][CONFIG_FILE] == b"[]"
    memory.rm(f"/bucket/loras/a/{WEIGHTS_FILE}")
    with pytest.raises(UserError, match=f"no {WEIGHTS_FILE}"):
        from_memory(tmp_path)
    with pytest.raises(UserError, match="no file system for nosuch://"):
        from_memory(tmp_path, url="nosuch://bucket/a")


def test_what_a_library_says_of_its_failure_is_not_told(memory, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError("the key AKIASECRET is not valid")

    for method in ("info", "open"):
        with monkeypatch.context() as patch, pytest.raises(UserError, match="PermissionError") as refusal:
            patch.setattr(type(memory), method, fail)
            from_memory(tmp_path)
        assert "SECRET" not in str(refusal.value)
