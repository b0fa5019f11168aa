"""What is kept between runs: two programs at once, entries that cannot be read, and files that are no cache."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading

import pytest
from places import ROOT

from specserve.errors import UserError
from specserve.teachers.answer_cache import FILE, AnswerCache, KeptOf
from specserve.teachers.asks import Answer, Ask, Reading, Reply, TokenLogprob

REPLY = Reply((Answer("text", "stop", 3, None, "thought", (TokenLogprob(b"\xc3", -0.5, ((b"a", -1.0),)),)),), 3, 2)


def test_a_reply_comes_back_as_it_was(tmp_path):
    cache = AnswerCache(tmp_path / "new" / "folder")
    cache.put("hash", "teacher", REPLY)
    cache.close()
    cache = AnswerCache(tmp_path / "new" / "folder")
    assert cache.get("hash", Reply) == REPLY and cache.get("other", Reply) is None


def test_an_entry_that_cannot_be_read_is_asked_for_again(tmp_path):
    cache = AnswerCache(tmp_path)
    assert not (tmp_path / FILE).stat().st_mode & 0o077  # whose folder others may read
    cache.put("hash", "teacher", REPLY)
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("UPDATE replies SET reply = ?", (b'{"answers": [{"text"',))
    assert cache.get("hash", Reply) is None
    cache.put("hash", "teacher", REPLY)
    assert cache.get("hash", Reply) == REPLY


def test_programs_share_a_cache(tmp_path):
    def fill(number):
        cache = AnswerCache(tmp_path)
        for idx in range(30):
            cache.put(f"{number} {idx}", "teacher", REPLY)
        cache.close()

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache = AnswerCache(tmp_path)
    assert all(cache.get(f"{number} {idx}", Reply) == REPLY for number in range(4) for idx in range(30))


def test_a_file_of_before_there_was_a_limit_is_read(tmp_path):
    with sqlite3.connect(tmp_path / FILE) as older:
        older.execute("CREATE TABLE replies (hash TEXT PRIMARY KEY, teacher TEXT, reply BLOB)")
        data = b'{"answers": [], "prompt_tokens": 1, "completion_tokens": 2}'
        older.execute("INSERT INTO replies VALUES ('hash', 'teacher', ?)", (data,))
    cache = AnswerCache(tmp_path)
    assert cache.get("hash", Reply) == Reply((), 1, 2) and cache.kept() == [KeptOf("teacher", 1, len(data), 0.0)]
    assert cache.clear() == 1 and cache.num_bytes < 40_000


LONG = Reply((Answer("x" * 10_000, "stop", 1, 1),), 1, 1)


def left(path):
    cache = AnswerCache(path)
    try:
        return [number for number in range(60) if cache.get(str(number), Reply) is not None]
    finally:
        cache.close()


def test_what_was_used_longest_ago_goes_and_nothing_of_the_run_that_ends(tmp_path):
    cache = AnswerCache(tmp_path)
    for number in range(40):
        cache.put(str(number), "teacher", LONG)
    cache.close()
    cache = AnswerCache(tmp_path)
    assert all(cache.get(str(number), Reply) == LONG for number in range(5))
    cache.close()
    cache = AnswerCache(tmp_path, max_bytes=300_000)
    for number in range(40, 50):
        cache.put(str(number), "teacher", LONG)
    assert cache.get("20", Reply) == LONG and cache.num_bytes > 500_000
    cache.close()
    assert (tmp_path / FILE).stat().st_size < 330_000
    found = left(tmp_path)
    assert set(range(5)) | {20} | set(range(40, 50)) < set(found) and 20 < len(found) < 30
    assert [number for number in found if 5 <= number < 40 and number != 20] == list(range(40 - (len(found) - 16), 40))
    cache = AnswerCache(tmp_path, max_bytes=0)
    cache.put("50", "teacher", LONG)
    cache.close()
    assert left(tmp_path) == [50]


def test_nothing_is_removed_under_another_program(tmp_path):
    other, cache = AnswerCache(tmp_path), AnswerCache(tmp_path, max_bytes=0)
    other.put("1", "teacher", LONG)
    with pytest.raises(UserError, match="a teacher is being asked with"):
        cache.clear()
    cache._opened_at += 1e6
    cache.close()
    assert other.get("1", Reply) == LONG
    other.close()
    assert left(tmp_path) == [1]


def test_a_file_that_cannot_be_held_to_its_size_costs_no_run(tmp_path):
    cache = AnswerCache(tmp_path, max_bytes=0)
    cache.put("1", "teacher", LONG)
    assert cache.get("1", Reply) == LONG
    with sqlite3.connect(tmp_path / FILE) as other:
        other.execute("DROP TABLE replies")
    cache.close()


def test_answers_are_cleared_by_teacher_and_by_age(tmp_path):
    cache = AnswerCache(tmp_path)
    for number in range(4):
        cache.put(str(number), "even" if number % 2 == 0 else "odd", LONG)
    cache.agree("even")
    size = (tmp_path / FILE).stat().st_size + (tmp_path / f"{FILE}-wal").stat().st_size
    assert cache.clear(unused_s=60.0) == 0 and cache.clear("even") == 2
    assert [(one.teacher, one.num) for one in cache.kept()] == [("odd", 2)] and cache.has_terms("even")
    assert cache.clear() == 2 and cache.kept() == [] and cache.num_bytes < size / 2
    cache.close()


HOLDER = """
import sys, time
from pathlib import Path
from specserve.teachers.answer_cache import AnswerCache
print(AnswerCache(Path(sys.argv[1])).take("ab" * 32), flush=True)
time.sleep(600)
"""


def test_who_asks_is_one_program_and_a_killed_one_asks_no_more(tmp_path):
    mine, same, other = (AnswerCache(tmp_path) for _ in range(3))
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"True\n"
    assert not mine.take("ab" * 32) and mine.take("cd" * 32) and not same.take("cd" * 32)
    process.kill()
    process.communicate()
    assert mine.take("ab" * 32)
    other.close()
    assert not same.take("ab" * 32), "another handle that is closed gives nothing back"
    mine.give_back("ab" * 32)
    assert same.take("ab" * 32)


def test_what_is_no_cache_is_named(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot be used: .*file"):
        AnswerCache(tmp_path / "file")
    (tmp_path / FILE).write_bytes(b"not a database, but long enough to be one " * 100)
    with pytest.raises(UserError, match=r"file is not a database; .*--teacher-cache"):
        AnswerCache(tmp_path)


def test_every_part_of_an_ask_is_in_its_hash():
    base = {"messages": ({"role": "user", "content": "q"},), "max_tokens": 5}
    changes = {
        "messages": ({"role": "user", "content": "r"},),
        "max_tokens": 6,
        "temperature": 0.5,
        "top_p": 0.5,
        "n": 2,
        "seed": 1,
        "stop": ("x",),
        "schema": {"type": "object"},
        "top_logprobs": 1,
    }
    assert set(changes) == set(Ask.__dataclass_fields__)
    hashes = [Ask(**{**base, name: value}).digest("t") for name, value in changes.items()]
    hashes += [Ask(**base).digest("t"), Ask(**base).digest("u"), Reading((1, 2), 1, 3).digest("t")]
    assert len(set(hashes)) == len(hashes) and hashes[-3] == Ask(**base).digest("t")
