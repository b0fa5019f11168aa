"""Adapter directories that others write to: what is read is one state of them, and its hash is of what was read."""

from __future__ import annotations

import os
import threading
import time

import pytest

from specserve import adapter_files
from specserve.adapter_files import (
    CONFIG_FILE,
    LOOKAHEAD_FILES,
    POOLING_FILE,
    WEIGHTS_FILE,
    ChangingError,
    content_hash,
    open_adapter,
    stamp_of,
)
from specserve.errors import AdapterError


@pytest.fixture
def adapter(tmp_path):
    path = tmp_path / "a"
    path.mkdir()
    (path / CONFIG_FILE).write_bytes(b"{}")
    (path / WEIGHTS_FILE).write_bytes(b"1" * 1000)
    return path


def read(path, **kwargs):
    with open_adapter(path, "a", **kwargs) as files:
        return {name: copy.read_bytes() for name, copy in files.paths.items()}, files


def test_what_was_read_stays_whatever_becomes_of_the_files(adapter):
    with open_adapter(adapter, "a") as files:
        os.truncate(adapter / WEIGHTS_FILE, 10)
        (adapter / CONFIG_FILE).unlink()
        assert files.paths[WEIGHTS_FILE].read_bytes() == b"1" * 1000 and files.paths[CONFIG_FILE].read_bytes() == b"{}"
        copy = files.paths[WEIGHTS_FILE]
    assert not copy.exists()


def test_a_change_between_two_files_is_noticed_and_all_is_read_again(adapter, monkeypatch):
    monkeypatch.setattr(adapter_files, "PAUSE_S", 0.0)
    copy_of, calls = adapter_files._private_copy, []

    def replace_once(path, *limits):
        copied = copy_of(path, *limits)
        calls.append(path.name)
        if len(calls) == 1:  # the configuration was read, the weights were not
            for name, text in ((CONFIG_FILE, b'{"r": 2}'), (WEIGHTS_FILE, b"2" * 1000)):
                (adapter / "new").write_bytes(text)
                os.replace(adapter / "new", adapter / name)
        return copied

    monkeypatch.setattr(adapter_files, "_private_copy", replace_once)
    found, files = read(adapter)
    assert found == {CONFIG_FILE: b'{"r": 2}', WEIGHTS_FILE: b"2" * 1000}
    assert files.content_hash == content_hash(adapter)


def test_files_that_never_hold_still_are_refused_and_nothing_is_kept_open(adapter, monkeypatch):
    monkeypatch.setattr(adapter_files, "PAUSE_S", 0.0)
    copy_of = adapter_files._private_copy
    num = iter(range(10**6))

    def always(path, *limits):
        (adapter / WEIGHTS_FILE).write_bytes(b"x" * (1 + next(num)))
        return copy_of(path, *limits)

    monkeypatch.setattr(adapter_files, "_private_copy", always)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ChangingError, match="changes while it is read"):
        read(adapter)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_stamp_changes_though_size_times_and_inode_are_set_back(adapter):
    before, status = stamp_of(adapter), os.stat(adapter / WEIGHTS_FILE)
    time.sleep(0.02)  # file systems' clocks are coarse
    (adapter / WEIGHTS_FILE).write_bytes(b"2" * 1000)
    os.utime(adapter / WEIGHTS_FILE, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = os.stat(adapter / WEIGHTS_FILE)
    assert (after.st_ino, after.st_size, after.st_mtime_ns) == (status.st_ino, status.st_size, status.st_mtime_ns)
    assert stamp_of(adapter) != before


def test_the_chat_template_is_no_part_of_the_content_but_has_a_hash(adapter):
    _, plain = read(adapter)
    (adapter / "chat_template.jinja").write_text("one")
    _, one = read(adapter)
    (adapter / "chat_template.jinja").write_text("two")
    _, two = read(adapter)
    assert plain.content_hash == one.content_hash == two.content_hash
    assert plain.text_hash is None and one.text_hash and two.text_hash and one.text_hash != two.text_hash


def test_the_same_bytes_under_another_name_are_another_adapter(adapter):
    hashes = set()
    for name in (POOLING_FILE, *LOOKAHEAD_FILES):
        (adapter / name).write_bytes(b"{}")
        hashes.add(read(adapter)[1].content_hash)
        (adapter / name).unlink()
    (adapter / CONFIG_FILE).rename(adapter / "kept")  # and where two swap theirs
    (adapter / WEIGHTS_FILE).rename(adapter / CONFIG_FILE)
    (adapter / "kept").rename(adapter / WEIGHTS_FILE)
    hashes.add(read(adapter)[1].content_hash)
    assert len(hashes) == 2 + len(LOOKAHEAD_FILES)


def test_what_is_no_file_is_refused_by_its_kind_and_not_kept_open(adapter):
    def pipe(path):
        os.mkfifo(path)

    def loop(path):
        path.symlink_to(path)

    before = len(os.listdir("/proc/self/fd"))
    for make, words in ((pipe, "named pipe"), (lambda path: path.mkdir(), "directory"), (loop, "leads back to itself")):
        path = adapter / "lookahead.safetensors"
        make(path)
        with pytest.raises(AdapterError, match=words):
            read(adapter)
        path.rmdir() if path.is_dir() else path.unlink()
    (adapter / WEIGHTS_FILE).unlink()
    (adapter / WEIGHTS_FILE).mkdir()
    with pytest.raises(AdapterError, match="directory"):
        content_hash(adapter)
    assert len(os.listdir("/proc/self/fd")) == before


def test_sizes_are_bounded_before_and_while_a_file_is_read(adapter):
    with pytest.raises(AdapterError, match=r"has 1000 bytes; at most 999"):
        read(adapter, max_weights_bytes=999)
    with open(adapter / CONFIG_FILE, "wb") as file:
        file.truncate(adapter_files.MAX_CONFIG_BYTES + 1)
    with pytest.raises(AdapterError, match=CONFIG_FILE):
        read(adapter)


def test_a_directory_that_is_removed_while_it_is_read_is_an_adapter_error(adapter, monkeypatch):
    monkeypatch.setattr(adapter_files, "PAUSE_S", 0.01)
    stop = threading.Event()

    def come_and_go():
        while not stop.is_set():
            for name in (CONFIG_FILE, WEIGHTS_FILE):
                (adapter / name).unlink(missing_ok=True)
                (adapter / name).write_bytes(b"y" * 1000)

    thread = threading.Thread(target=come_and_go)
    thread.start()
    try:
        for _ in range(20):
            try:
                found, _ = read(adapter)
            except AdapterError:
                continue
            assert set(found) <= {CONFIG_FILE, WEIGHTS_FILE}
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("where", ["file", "folder"])
def test_a_link_that_leaves_the_roots_after_they_were_checked_is_not_read(adapter, tmp_path, where):
    """What is checked is where the opened file lies, so that there is no time between the check and the reading."""
    outside = tmp_path / "outside"
    adapter.rename(outside)
    root = tmp_path / "root"
    root.mkdir()
    if where == "folder":
        (root / "a").symlink_to(outside)
    else:
        (root / "a").mkdir()
        for name in (CONFIG_FILE, WEIGHTS_FILE):
            (root / "a" / name).symlink_to(outside / name)
    with pytest.raises(AdapterError, match="leaves the folders of adapters") as refusal:
        read(root / "a", roots=[root])
    assert refusal.value.status == 403
    assert set(read(root / "a", roots=[root, outside])[0]) == {CONFIG_FILE, WEIGHTS_FILE}


def test_files_may_be_replaced_or_removed_while_they_are_read_from_within_the_roots(adapter, tmp_path, monkeypatch):
    place_of = adapter_files._place_of

    def remove(fd):
        (adapter / WEIGHTS_FILE).unlink(missing_ok=True)  # its place is then another text
        return place_of(fd)

    monkeypatch.setattr(adapter_files, "_place_of", remove)
    monkeypatch.setattr(adapter_files, "PAUSE_S", 0.0)
    assert set(read(adapter, roots=[tmp_path])[0]) == {CONFIG_FILE}
