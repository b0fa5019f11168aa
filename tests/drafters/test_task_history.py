"""The task history finds what a brute-force search finds, votes and advances as promised, and refuses damaged files.

Texts are random over small alphabets, so that contexts repeat, tie and end at separators all the time.
"""

from __future__ import annotations

import os
import random
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from waiting import wait_until

from specserve.drafters import learning_history, task_history
from specserve.drafters.history_file import MAX_FILE_TOKENS, MAX_TRAINED_TOKENS, HistoryError, PackedHistory
from specserve.drafters.learning_history import LearningHistory
from specserve.drafters.task_history import MAX_CANDIDATES, MAX_CONTEXT, HistoryCursor, TaskHistory, expected_bytes
from specserve.file_lock import FileLock


def random_completions(rng: random.Random, alphabet: int, count: int, longest: int) -> list[list[int]]:
    return [[7 * rng.randrange(alphabet) for _ in range(rng.randrange(1, longest + 1))] for _ in range(count)]


def brute_force(completions: Sequence[Sequence[int]], context: Sequence[int]) -> tuple[list[int], int] | None:
    best: list[int] = []
    best_len = 0
    base = 0
    for completion in completions:
        for index in range(len(completion)):
            length = 0
            while (
                length < min(index, len(context), MAX_CONTEXT)
                and completion[index - 1 - length] == context[-1 - length]
            ):
                length += 1
            if length > best_len:
                best, best_len = [], length
            if length == best_len:
                best.append(base + index)
        base += len(completion) + 1
    return (best[::-1][:MAX_CANDIDATES], best_len) if best_len else None


def as_lists(history: TaskHistory) -> list[list[int]]:
    return [completion.tolist() for completion in history.completions()]


@pytest.mark.parametrize(("alphabet", "count", "longest"), [(1, 5, 60), (2, 30, 40), (4, 60, 20), (30, 40, 30)])
@pytest.mark.parametrize("partition_limit", [64, 4096])
def test_match_agrees_with_brute_force(
    alphabet: int, count: int, longest: int, partition_limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(task_history, "_PARTITION_LIMIT", partition_limit)
    rng = random.Random(alphabet)
    completions = random_completions(rng, alphabet, count, longest)
    history = TaskHistory.build(completions, 10_000)
    for _ in range(150):
        context = [7 * rng.randrange(alphabet + 1) for _ in range(rng.randrange(6))]  # one token is unknown
        if rng.random() < 0.7:
            source = rng.choice(completions)
            context += source[: rng.randrange(len(source) + 1)]
        assert history.match(context) == brute_force(completions, context), context


def test_wide_local_ids_match_as_well() -> None:
    completions = [list(range(start, start + 700)) for start in range(0, 70_000, 700)]
    history = TaskHistory.build(completions, 100_000)
    assert history._packed.text.dtype == np.uint32
    for start in (0, 65_100, 69_300):
        context = list(range(start, start + 40))
        found = history.match(context)
        assert found is not None and found[1] == MAX_CONTEXT
        assert [history.token_at(position) for position in found[0]] == [start + 40]


def test_token_at_and_separators() -> None:
    history = TaskHistory.build([[5, 9], [], [9, 1]], 100)
    assert [history.token_at(position) for position in range(6)] == [5, 9, None, 9, 1, None]
    assert history.match([1]) is None  # only at the end of a completion: nothing continues it
    assert history.match([5, 9]) == ([4], 1)  # 5 9 ends a completion, so only the other 9 goes on
    assert history.match([9, 9]) == ([4], 1)  # not across the separator
    assert history.match([]) is None
    assert history.match([1, 77]) is None
    assert as_lists(history) == [[5, 9], [9, 1]]


def test_an_empty_history_proposes_nothing() -> None:
    history = TaskHistory.build([], 100)
    assert history.match([1]) is None and history.completions() == []
    cursor = HistoryCursor(history)
    cursor.begin([])
    assert cursor.peek() is None
    cursor.follow(3)
    assert cursor.peek() is None


def test_negative_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="outside"):
        TaskHistory.build([[1, -1]], 10)


def test_the_newest_completions_are_kept() -> None:
    completions = [[number] * 10 for number in range(20)]
    history = TaskHistory.build(completions, 35)
    assert as_lists(history) == completions[-3:]
    assert history.num_tokens == 30
    assert as_lists(TaskHistory.build([[1, 2], [3] * 50, [4]], 10)) == [[1, 2], [4]]


def test_majority_and_ties() -> None:
    cursor = HistoryCursor(TaskHistory.build([[1, 2, 5], [1, 2, 6], [1, 2, 5], [1, 2, 7]], 100))
    cursor.begin([1, 2])
    assert cursor.peek() == (5, 2, 2, 4)
    cursor = HistoryCursor(TaskHistory.build([[1, 2, 5], [1, 2, 6], [1, 2, 5], [1, 2, 6]], 100))
    cursor.begin([1, 2])
    assert cursor.peek() == (6, 2, 2, 4)
    cursor = HistoryCursor(TaskHistory.build([[1, 6], [1, 5]], 100))
    cursor.begin([])
    assert cursor.peek() == (1, 0, 2, 2)


def test_an_empty_output_stands_at_the_newest_starts() -> None:
    history = TaskHistory.build([[1, 2]] * 70 + [[3, 4]] * 34, 1000)
    cursor = HistoryCursor(history)
    cursor.begin([])
    assert cursor.peek() == (3, 0, 34, MAX_CANDIDATES)
    cursor.follow(3)
    assert cursor.peek() == (4, 1, 34, 34)
    cursor.begin([])  # following did not disturb the shared starts
    assert cursor.peek() == (3, 0, 34, MAX_CANDIDATES)


def test_follow_narrows_and_matches_again() -> None:
    history = TaskHistory.build([[1, 2, 3, 4, 5], [1, 2, 8, 9, 9], [7, 8, 1, 6]], 100)
    cursor = HistoryCursor(history)
    cursor.begin([1])
    assert cursor.peek() == (2, 1, 2, 3)
    cursor.follow(2)
    assert cursor.peek() == (8, 2, 1, 2)
    cursor.follow(3)
    assert cursor.peek() == (4, 3, 1, 1)
    cursor.follow(8)  # nothing goes 1 2 3 8: the longest match is the 8 alone
    assert cursor.peek() == (1, 1, 1, 2)
    cursor.follow(77)
    assert cursor.peek() is None
    cursor.follow(2)
    assert cursor.peek() == (8, 1, 1, 2)


def test_follow_ends_with_the_completion() -> None:
    cursor = HistoryCursor(TaskHistory.build([[1, 2], [3, 4]], 100))
    cursor.begin([1])
    cursor.follow(2)
    assert cursor.peek() is None  # 3 starts another completion


def test_a_followed_cursor_agrees_with_its_output() -> None:
    rng = random.Random(4)
    completions = random_completions(rng, 3, 40, 60)
    history = TaskHistory.build(completions, 10_000)
    text = [token for completion in completions for token in [*completion, None]]
    cursor = HistoryCursor(history)
    cursor.begin([])
    output: list[int] = []
    for _ in range(500):
        token = 7 * rng.randrange(3)
        cursor.follow(token)
        output.append(token)
        peeked = cursor.peek()
        assert peeked is not None
        length = peeked[1]
        assert cursor._candidates == sorted(cursor._candidates, reverse=True)
        for position in cursor._candidates:
            assert text[position] is not None
            assert text[position - length : position] == output[len(output) - length :]


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    completions = random_completions(random.Random(1), 9, 50, 40)
    history = TaskHistory.build(completions, 10_000)
    path = tmp_path / "history.bin"
    history.save(path)
    loaded = TaskHistory.load(path, 100)
    assert as_lists(loaded) == completions
    assert loaded.match([7, 14]) == history.match([7, 14])
    assert [entry.name for entry in tmp_path.iterdir()] == ["history.bin"]
    TaskHistory.build([], 10).save(path)
    assert TaskHistory.load(path, 1).completions() == []


def test_a_large_file_stays_small(tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 150_000, 400_000)
    TaskHistory.build(list(tokens.reshape(-1, 400)), 400_000).save(tmp_path / "history.bin")
    assert (tmp_path / "history.bin").stat().st_size <= 2_000_000


def file_bytes(ids: list[int], text: list[int], *, magic: bytes = b"SPECHIST", version: int = 1) -> bytes:
    body = zlib.compress(np.array(ids, "<u4").tobytes() + np.array(text, "<u2").tobytes())
    return struct.pack("<8sIIIII", magic, version, len(ids), len(text), len(body), zlib.crc32(body)) + body


GOOD = file_bytes([3, 8], [1, 2, 0, 2, 0])


def test_a_small_file_that_inflates_counts_as_what_it_takes_and_has_a_limit(tmp_path) -> None:
    path, text = tmp_path / "history.bin", np.tile(np.array([1, 0], "<u2"), MAX_FILE_TOKENS // 2)
    path.write_bytes(file_bytes([3], text))
    assert path.stat().st_size < 31_000 and expected_bytes(path) > 60 * MAX_FILE_TOKENS
    path.write_bytes(file_bytes([3], np.append(text, np.array([1, 0], "<u2"))))
    with pytest.raises(HistoryError, match="2000002 tokens .* of which at most 2000000"):
        TaskHistory.load(path, 10)


@pytest.mark.parametrize(("num_tokens", "num_kinds", "length"), [(200_000, 1000, 40), (150_000, 70_000, 50)])
def test_what_reading_a_file_takes_is_known_from_its_header(num_tokens, num_kinds, length, tmp_path) -> None:
    path, rng = tmp_path / "history.bin", np.random.default_rng(0)
    completions = [*rng.integers(0, num_kinds, (num_tokens // length, length)), np.arange(num_kinds)]
    TaskHistory.build(completions, MAX_TRAINED_TOKENS).save(path)
    tracemalloc.start()
    try:
        history = TaskHistory.load(path, num_kinds)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert history.num_bytes < peak <= expected_bytes(path) <= 1.6 * peak


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a task history"),
        (file_bytes([3], [1, 0], magic=b"SPECHEAD"), "not a task history"),
        (file_bytes([3], [1, 0], version=2), "version 2"),
        (GOOD[:-1], "the header says"),
        (GOOD[:20], "not a task history"),
        (GOOD + b"x", "the header says"),
        (GOOD[:-6] + bytes([GOOD[-6] ^ 1]) + GOOD[-5:], "checksum"),
        (struct.pack("<8sIIIII", b"SPECHIST", 1, 1, 2**31, 0, 0), "of which at most 2000000 are read; train it with"),
        (struct.pack("<8sIIIII", b"SPECHIST", 1, 3, 2, 0, 0), "2 tokens of 3 kinds"),
        (struct.pack("<8sIIIII", b"SPECHIST", 1, 1, 2, 3, zlib.crc32(b"abc")) + b"abc", "decompressed"),
        (GOOD[:16] + struct.pack("<I", 4) + GOOD[20:], "promises"),
        (GOOD[:16] + struct.pack("<I", 6) + GOOD[20:], "promises"),
        (file_bytes([8, 3], [1, 2, 0]), "in order"),
        (file_bytes([3, 3], [1, 2, 0]), "in order"),
        (file_bytes([3, 10], [1, 2, 0]), "outside the vocabulary of 10"),
        (file_bytes([3], [1, 2, 0]), "does not list"),
        (file_bytes([3], [1]), "separated"),
        (file_bytes([3], [0, 1, 0]), "separated"),
        (file_bytes([3], [1, 0, 0]), "separated"),
    ],
)
def test_damaged_files_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "history.bin"
    path.write_bytes(GOOD)
    assert as_lists(TaskHistory.load(path, 10)) == [[3, 8], [8]]
    path.write_bytes(content)
    with pytest.raises(HistoryError, match=message):
        TaskHistory.load(path, 10)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "history.bin"
    TaskHistory.build([[1, 2]], 10).save(path)

    def fail(descriptor: int) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        TaskHistory.build([[3, 4]], 10).save(path)
    assert as_lists(TaskHistory.load(path, 10)) == [[1, 2]]
    assert [entry.name for entry in tmp_path.iterdir()] == ["history.bin"]


def test_learning_improves_later_peeks_and_survives_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "tenant" / "history.bin"
    base = TaskHistory.build([[1, 2, 3], [1, 2, 3]], 100)
    learning = LearningHistory(base, path=path)
    learned_before = learning.current
    cursor = HistoryCursor(learned_before)
    cursor.begin([1, 2])
    assert cursor.peek() == (3, 2, 2, 2)
    for _ in range(3):
        learning.learn([1, 2, 4])
    assert learning.current is learned_before  # nothing is rebuilt before it is worth it
    learning.flush()
    for history in (learning.current, LearningHistory(base, path=path).current):
        cursor = HistoryCursor(history)
        cursor.begin([1, 2])
        assert cursor.peek() == (4, 2, 3, 5)
        assert as_lists(history) == [[1, 2, 3]] * 2 + [[1, 2, 4]] * 3


def test_a_rebuild_runs_once_enough_is_pending() -> None:
    learning = LearningHistory(None, rebuild_every=6)
    learning.learn([1, 2, 3])
    assert learning.current.num_tokens == 0
    learning.learn([4, 5, 6])
    wait_until(lambda: learning.current.num_tokens == 6)


def test_learning_is_bounded_and_prefers_what_was_served() -> None:
    learning = LearningHistory(TaskHistory.build([[1] * 10, [2] * 10], 100), max_tokens=35)
    assert as_lists(learning.current) == [[1] * 10, [2] * 10]
    for token in (3, 4):
        learning.learn([token] * 10)
    learning.learn([9] * 36)  # cannot fit
    learning.learn([])
    learning.flush()
    assert as_lists(learning.current) == [[2] * 10, [3] * 10, [4] * 10]
    for token in range(5, 9):
        learning.learn([token] * 10)
    learning.flush()
    assert as_lists(learning.current) == [[6] * 10, [7] * 10, [8] * 10]
    assert learning._num_served == 30


@pytest.mark.parametrize("content", [b"rubbish", file_bytes([3, 10], [1, 2, 0])])
def test_a_damaged_file_is_logged_and_ignored(content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "history.bin"
    path.write_bytes(content)
    learning = LearningHistory(None, path=path, vocab_size=10)
    assert learning.current.num_tokens == 0
    assert "task history not loaded" in caplog.text
    learning.learn([1, 2])
    learning.flush()
    assert as_lists(LearningHistory(None, path=path, vocab_size=10).current) == [[1, 2]]


def test_every_rebuild_is_saved_without_waiting_for_the_end(tmp_path: Path) -> None:
    path = tmp_path / "learned.history"
    learning = LearningHistory(None, rebuild_every=6, path=path)
    learning.learn([1, 2, 3])
    assert not path.exists()
    learning.learn([4, 5, 6])
    wait_until(path.exists)
    assert LearningHistory(None, path=path).current.num_tokens > 0


def fill_a_disk(*_: object) -> None:
    with open("/dev/full", "wb", buffering=0) as file:
        file.write(b"x")


def test_a_full_disk_costs_the_file_and_one_line_of_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "learned.history"
    learning = LearningHistory(None, path=path)
    learning.learn([1, 2, 3])
    with monkeypatch.context() as patch:
        patch.setattr(PackedHistory, "write", fill_a_disk)
        learning.flush()
    assert as_lists(learning.current) == [[1, 2, 3]] and not path.exists()
    assert [(record.levelname, record.exc_info) for record in caplog.records] == [("WARNING", None)]
    assert f"task history not saved, kept in memory: {path}: No space left on device" in caplog.text
    learning.flush()
    assert path.exists()


def test_engines_that_share_a_folder_never_leave_half_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The lock is the folder's, so what writes meanwhile waits, as another process would."""
    path = tmp_path / "learned.history"
    learning = LearningHistory(None, path=path)
    learning.learn([1, 2, 3])
    with FileLock(tmp_path) as lock:
        assert lock.take()
        thread = threading.Thread(target=learning.flush)
        thread.start()
        wait_until(lambda: len(learning.current.completions()) == 1)
        assert thread.is_alive() and not list(tmp_path.iterdir())
    thread.join()
    with FileLock(tmp_path) as lock:
        assert lock.take()
        monkeypatch.setattr(learning_history, "LOCK_S", 0.1)
        learning.learn([4, 5])
        learning.flush()
    assert as_lists(LearningHistory(None, path=path).current) == [[1, 2, 3]]
    assert f"not saved, kept in memory: {path}: another process has the folder locked" in caplog.text
    assert len(learning.current.completions()) == 2


def test_threads_learn_together_and_one_rebuild_runs_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    build = TaskHistory.build
    running = 0
    most = 0

    def counted(completions, max_tokens):
        nonlocal running, most
        running += 1
        most = max(most, running)
        time.sleep(0.002)
        try:
            return build(completions, max_tokens)
        finally:
            running -= 1

    learning = LearningHistory(None, rebuild_every=10)
    monkeypatch.setattr(TaskHistory, "build", counted)

    def learn(token: int) -> None:
        for _ in range(50):
            learning.learn([token] * 5)
        learning.flush()

    threads = [threading.Thread(target=learn, args=(token,)) for token in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    learning.flush()
    wait_until(lambda: not learning._worker_running)
    assert most == 1
    assert sorted(as_lists(learning.current)) == sorted([token] * 5 for token in range(4) for _ in range(50))


def test_a_failed_rebuild_is_logged_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    learning = LearningHistory(None, rebuild_every=3)
    with monkeypatch.context() as patch:
        patch.setattr(TaskHistory, "build", lambda completions, max_tokens: 1 / 0)
        learning.learn([1, 2, 3])
        wait_until(lambda: not learning._worker_running)
    assert "rebuild failed" in caplog.text
    learning.learn([4, 5, 6])
    wait_until(lambda: as_lists(learning.current) == [[1, 2, 3], [4, 5, 6]])


def test_a_large_table_builds_in_bounded_memory() -> None:
    rng = np.random.default_rng(0)
    templates = rng.integers(0, 30_000, (40, 300))
    texts = [np.where(rng.random(300) < 0.1, rng.integers(0, 30_000, 300), templates[i % 40]) for i in range(1000)]
    tracemalloc.start()
    history = TaskHistory.build(texts, 300_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert history.num_tokens == 300_000
    assert peak < 200e6
    found = history.match(texts[-1][:100].tolist())
    assert found is not None and found[1] == MAX_CONTEXT and history.token_at(found[0][0]) == texts[-1][100]
