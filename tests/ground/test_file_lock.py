"""Locks: one holder at a time, in this process or another; what a lock is on; file systems without."""

import errno
import fcntl
import os
import subprocess
import sys
import threading

import pytest

from specserve.errors import UserError
from specserve.file_lock import FileLock


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


@pytest.mark.parametrize("is_folder", [False, True])
def test_one_at_a_time(path, is_folder):
    if is_folder:
        path.mkdir()
    with FileLock(path) as first, FileLock(path) as second:
        assert first.take() and not second.take()
        first.close()
        assert second.take()
        first.close()  # not the handle that has its number now
        assert second.is_in_place and not first.is_in_place
    assert FileLock(path).take()


def test_waiting_ends_with_the_holder(path):
    with FileLock(path) as first, FileLock(path) as second:
        assert first.take()
        waits = threading.Thread(target=second.wait)
        waits.start()
        waits.join(0.05)
        assert waits.is_alive()
        first.close()
        waits.join(10)
        assert not waits.is_alive()


def test_a_process_that_was_given_the_handle_holds_the_lock_and_no_other_does(path):
    program = [sys.executable, "-S", "-c", "print(flush=True); input()"]
    with FileLock(path) as first, FileLock(path) as second:
        assert first.take()
        given = subprocess.Popen(program, stdin=subprocess.PIPE, pass_fds=[first.fileno()])
        other = subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False)
        try:
            assert other.stdout.readline() == b"\n"  # only now is it certain that it has closed what it inherits
            first.close()
            assert not second.take()
            given.kill()
            given.wait()
            assert second.take()
        finally:
            for process in (given, other):
                process.kill()
                process.communicate()


def test_a_lock_is_on_a_file_not_on_its_name(path):
    with FileLock(path) as first:
        assert first.take() and first.is_in_place
        path.unlink()
        assert not first.is_in_place
        with FileLock(path) as second:
            assert second.take() and second.is_in_place and not first.is_in_place


def test_who_holds_it(path):
    path.write_text("123456789 of somebody long gone")
    with FileLock(path) as lock:
        lock.sign()
        assert path.read_text() == lock.holder == str(os.getpid())
        lock.unsign()
        assert path.read_text() == "" and lock.holder == "unknown"


def test_a_file_system_without_locks_is_said(path, monkeypatch):
    def flock(fd, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    for act in (FileLock.take, FileLock.wait):
        with FileLock(path) as lock, pytest.raises(UserError, match=f"{path} cannot be locked: No locks available"):
            act(lock)
        assert lock.fileno() < 0
