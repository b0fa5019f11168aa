"""What is kept between runs: two programs at once, entries that cannot be read, and files that are no cache."""

from __future__ import annotations

import sqlite3
import threading

import pytest

from specserve.errors import UserError
from specserve.teachers.answer_cache import FILE, AnswerCache
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
