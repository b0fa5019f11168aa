"""A shared store while writers write at once, are killed, and files of it are damaged: whole and right, or an error."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import msgspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from specserve.adapter_files import CONFIG_FILE, WEIGHTS_FILE, content_hash
from specserve.errors import AdapterError, UserError
from specserve.server.shared_store.records import LIST_FILE
from specserve.server.shared_store.store import SharedStore

MAX = 1 << 20


def adapter(path: Path, weights: str, **texts: str) -> Path:
    path.mkdir(exist_ok=True)
    for name, text in {CONFIG_FILE: "{}", WEIGHTS_FILE: weights, **texts}.items():
        (path / name).write_text(text)
    return path


class Objects(MemoryFileSystem):
    """As S3: an object is there whole or not, and none is renamed."""

    protocol = "objects"

    def put_file(self, lpath, rpath, **_):
        self.pipe_file(rpath, Path(lpath).read_bytes())

    def _open(self, path, mode="rb", **fields):
        file = super()._open(path, mode, **fields)
        return io.BytesIO(file.getvalue()) if mode == "rb" else file  # readers share no place in it

    def mv(self, *_, **__):
        raise AssertionError("an object store renames nothing")

    rename = mv


@pytest.fixture(params=["objects", "folder"])
def store(request, tmp_path):
    """In each kind of place: where files come whole, and where they are made beside and renamed."""
    fsspec.register_implementation("objects", Objects, clobber=True)
    yield SharedStore("objects://bucket/loras" if request.param == "objects" else str(tmp_path / "store"))
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


@pytest.fixture
def one(tmp_path):
    return adapter(tmp_path / "one", "w" * 1000)


def fetched(store, version, tmp_path) -> dict[str, str]:
    target = tmp_path / f"fetched-{time.monotonic_ns()}-{threading.get_ident()}"
    target.mkdir()
    store.fetch(version, target, MAX)
    return {path.name: path.read_text() for path in target.iterdir()}


def damage(store, path: str, body: bytes) -> None:
    store.files.put_bytes(path, body)


def test_a_content_is_there_once_and_names_point_to_it(store, one, tmp_path):
    version, is_new = store.push(one, "a")
    assert is_new and store.push(one, "b") == (version, False) and store.versions() == [version]
    assert store.named("a").version == store.named("b").version == version and store.named("c") is None
    assert fetched(store, version, tmp_path) == {CONFIG_FILE: "{}", WEIGHTS_FILE: "w" * 1000}
    other, _ = store.push(adapter(tmp_path / "two", "w" * 1000, **{"chat_template.jinja": "{{ x }}"}), "a")
    assert other != version and store.version(other).content_hash == store.version(version).content_hash
    assert store.version(version).content_hash == content_hash(one)
    assert store.point("a", version[:8]) == version == store.named("a").version and store.names() == ["a", "b"]
    assert store.remove("a") and not store.remove("a") and store.names() == ["b"]
    for wrong in ("", "0" * 64, "../names"):
        with pytest.raises(UserError, match="version"):
            store.point("b", wrong)
    with pytest.raises(AdapterError, match="has no adapter_config.json"):
        store.push(tmp_path, "b")
    with pytest.raises(UserError, match="not a valid name"):
        store.push(one, "../b")


def test_a_writer_that_ends_in_the_middle_changes_nothing_and_the_next_one_finishes(store, one, tmp_path, monkeypatch):
    before, _ = store.push(adapter(tmp_path / "old", "old"), "a")
    for num_files in range(3):
        writes = []
        put = store.files.put

        def fail(path, write, writes=writes, put=put, num_files=num_files):
            writes.append(path)
            if len(writes) > num_files:
                raise KeyboardInterrupt
            put(path, write)

        with monkeypatch.context() as patch:
            patch.setattr(store.files, "put", fail)
            with pytest.raises(KeyboardInterrupt):
                store.push(one, "a")
        assert store.named("a").version == before and fetched(store, before, tmp_path)[WEIGHTS_FILE] == "old"
        assert [version for version in store.versions() if store.is_whole(version)] == [before]
    version, is_new = store.push(one, "a")
    assert is_new and store.named("a").version == version and store.is_whole(version, reads=True)


def test_what_a_killed_writer_left_is_no_version_and_is_pruned(one, tmp_path):
    code = (
        "import sys, time\nfrom pathlib import Path\nfrom specserve.server.shared_store import store as s\nimport os\n"
        "os.replace = lambda *_: (print('writing', flush=True), time.sleep(60))\n"
        "s.SharedStore(sys.argv[1]).push(Path(sys.argv[2]), 'a')\n"
    )
    root = tmp_path / "store"
    writer = subprocess.Popen([sys.executable, "-c", code, root, one], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "writing\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    store = SharedStore(str(root))
    assert len(list((root / "unfinished").iterdir())) == 1 and store.names() == []
    assert not any(store.is_whole(version) for version in store.versions())
    store.prune(3600)
    assert len(list((root / "unfinished").iterdir())) == 1  # somebody may be writing it now
    store.prune(0)
    assert list((root / "unfinished").iterdir()) == [] and store.versions() == []


def test_two_writers_and_readers_at_once_see_whole_contents(store, tmp_path):
    contents = [adapter(tmp_path / f"w{idx}", str(idx) * 1000) for idx in range(2)]
    store.push(contents[0], "a")
    ends, errors = time.monotonic() + 0.6, []

    def run(work):
        try:
            while time.monotonic() < ends:
                work()
        except BaseException as error:
            errors.append(error)

    def read():
        files = fetched(store, store.named("a").version, tmp_path)
        assert files[WEIGHTS_FILE] in ("0" * 1000, "1" * 1000)

    works = [lambda: store.push(contents[0], "a"), lambda: store.push(contents[1], "a"), read, read]
    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert len(store.versions()) == 2 and all(store.is_whole(version, reads=True) for version in store.versions())


@pytest.mark.parametrize("body", [b"w" * 999, b"", b"x" + b"w" * 999, b"w" * 1001])
def test_a_damaged_file_is_an_error_with_its_name_and_a_push_mends_it(store, one, tmp_path, body):
    version, _ = store.push(one, "a")
    damage(store, f"versions/{version}/{WEIGHTS_FILE}", body)
    with pytest.raises(UserError, match=f"{WEIGHTS_FILE}.*damaged") as info:
        fetched(store, version, tmp_path)
    assert info.value.status == 502
    assert store.push(one, "a") == (version, True) and fetched(store, version, tmp_path)[WEIGHTS_FILE] == "w" * 1000


def test_a_damaged_list_or_name_is_an_error_and_leads_nowhere_else(store, one, tmp_path):
    version, _ = store.push(one, "a")
    listed = f"versions/{version}/{LIST_FILE}"
    good = store.files.take(listed)
    evil = msgspec.json.encode(msgspec.json.decode(good) | {"files": {"../../x": {"size": 1, "sha256": "0" * 64}}})
    for body in (b"", good[:20], good.replace(b'"size":2', b'"size":3'), b"[]", evil):
        damage(store, listed, body)
        with pytest.raises(UserError):
            fetched(store, version, tmp_path)
    assert store.push(one, "a") == (version, True)
    for body in (b"", b'{"version":"../x","since":0}', b"{}"):
        damage(store, "names/a", body)
        with pytest.raises(UserError, match="push"):
            store.named("a")
    store.push(one, "a")
    assert store.named("a").version == version


def test_a_reader_during_a_removal_has_all_or_an_error(store, one, tmp_path, monkeypatch):
    version, _ = store.push(one, "a")
    store.remove("a")
    assert fetched(store, version, tmp_path)  # whoever had read the name
    found = store.version(version)
    monkeypatch.setattr(store, "version", lambda _: found)  # a reader that has the list already
    assert store.prune(3600) == [] and store.prune(0, is_dry=True) == [version] and store.is_whole(version)
    assert store.prune(0) == [version]
    with pytest.raises(UserError, match="cannot be fetched"):
        fetched(store, version, tmp_path)


def test_pruning_keeps_what_is_named_or_young(store, one, tmp_path):
    named, _ = store.push(one, "a")
    other, _ = store.push(adapter(tmp_path / "two", "two"))
    assert store.prune(60) == [] and store.prune(0) == [other] and store.versions() == [named]
    assert store.is_whole(named)


def test_what_gets_a_name_while_it_is_pruned_stays(store, one, tmp_path, monkeypatch):
    """The push comes whole behind the pruner's look at names and times."""
    version, _ = store.push(one)
    pruner = SharedStore(store.url)
    changed_at = pruner.files.changed_at
    monkeypatch.setattr(pruner.files, "changed_at", lambda folder: (changed_at(folder), store.push(one, "a"))[0])
    assert pruner.prune(0) == []
    assert store.named("a").version == version and fetched(store, version, tmp_path)[WEIGHTS_FILE] == "w" * 1000
    assert store.is_whole(version)


def test_a_push_puts_back_what_was_pruned_before_it_gave_the_name(store, one, tmp_path, monkeypatch):
    version, _ = store.push(one)
    pruner, write = SharedStore(store.url), store.files.write

    def write_late(path, record):
        if path.startswith("names/"):
            assert pruner.prune(0) == [version]
        write(path, record)

    monkeypatch.setattr(store.files, "write", write_late)
    store.push(one, "a")
    assert store.named("a").version == version and fetched(store, version, tmp_path)[WEIGHTS_FILE] == "w" * 1000
    with pytest.raises(UserError, match="was pruned meanwhile"):
        store.remove("a")
        store.point("b", version)


def test_a_folder_that_is_removed_while_it_is_written_is_told_to_who_pushes(one, tmp_path, monkeypatch):
    store = SharedStore(str(tmp_path / "store"))
    monkeypatch.setattr(os, "replace", lambda source, target: os.rename(source, tmp_path / "gone" / "file"))
    with pytest.raises(UserError, match="somebody removed it meanwhile; push again"):
        store.push(one, "a")
    assert not list((tmp_path / "store" / "unfinished").iterdir())


@pytest.mark.parametrize("url", ["nope://bucket/x", "s3://key:secret@bucket/x"])
def test_an_address_that_cannot_be_is_refused_without_its_secrets(url):
    with pytest.raises(UserError) as info:
        SharedStore(url)
    assert "secret" not in str(info.value) and info.value.param == "shared_store"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ConnectionError("secret"), "does not answer: ConnectionError"),
        (PermissionError("secret"), "refuses the credentials"),  # s3fs
        (OSError("Forbidden: secret"), "refuses the credentials"),  # gcsfs
    ],
)
def test_a_store_that_does_not_answer_is_said(store, one, monkeypatch, error, said):
    store.push(one, "a")
    if store.files._is_local and not isinstance(error, ConnectionError):
        said = f"does not answer: {type(error).__name__}"

    def fail(*_, **__):
        raise error

    for name in ("info", "ls", "put_file"):
        monkeypatch.setattr(store.files._fs, name, fail, raising=True)
    for ask in (lambda: store.named("a"), store.names, lambda: store.push(one, "a")):
        with pytest.raises(UserError, match=said) as info:
            ask()
        assert info.value.status == 503 and "secret" not in str(info.value)


def test_a_store_whose_file_system_cannot_be_opened_is_named_as_the_store(monkeypatch):
    def away(*_, **__):
        raise ConnectionRefusedError("secret")

    monkeypatch.setattr("fsspec.url_to_fs", away)
    with pytest.raises(UserError) as raised:
        SharedStore("ftp://host/loras")
    assert str(raised.value) == "what shared_store names on ftp:// cannot be opened: ConnectionRefusedError"
