"""Rows that are nearly others: found within a file and across two, counted, and shown where they begin to differ."""

import sys

import pytest
from places import ROOT

from specserve.errors import UserError
from specserve.training.data import near_duplicates
from specserve.training.data import near_rows as module
from specserve.training.data.near_rows import NearPair, lines_of, near_rows, text_of
from specserve.training.data.rows import parse_row
from specserve.training.data.text_identity import common_shingles, shingles, similarity

TASK = "Summarize the description of the package in one line."
TEXTS = (
    "A daemon that serves files to printers of an office, with quotas for each user and a log.",
    "Fonts of the eighteenth century, drawn anew for screens of low resolution.",
    "A puzzle in which a penguin pushes blocks of ice until all coins are reached.",
    "Reads thermometers on a serial line and draws a curve of every hour.",
)


def rows(*texts):
    return {line: f"{TASK}\n{text}" for line, text in enumerate(texts, 1)}


def test_near_rows_are_found_once_and_shown_where_they_differ():
    near = TEXTS[0].replace("office", "school")
    train, held_out = rows(*TEXTS, near, near + "!"), rows("Nothing like it.", TEXTS[2] + " And a bear.")
    found = near_rows(train, held_out)
    assert [(pair.line, pair.other) for pair in found.within] == [(5, 1), (6, 1)]
    assert [(pair.line, pair.other) for pair in found.held_out] == [(3, 2)]
    assert all(0.7 <= pair.similarity < 1 for pair in (*found.within, *found.held_out))
    lines = list(lines_of(found, train, held_out))
    assert lines[0].endswith("earlier one (similarity from 0.7 on): 2") and lines[5].endswith("from 0.7 on): 1")
    assert lines[1].endswith("line 5: ...erves files to printers of an school, with quotas for each user and a log.")
    assert lines[2].endswith("line 1: ...erves files to printers of an office, with quotas for each user and a log.")
    assert "held-out line 2: ..." in lines[7] and lines[7].endswith("And a bear.")


def test_what_is_near_among_real_rows_is_found_and_each_row_is_looked_at_once(monkeypatch):
    """Against all pairs, compared by their letters."""
    train = real_rows("train")
    train, held_out = [*train[:20], *train[180:230]], real_rows("dev")[:30]
    parts = [shingles(text) for text in train]
    common = common_shingles(parts)
    parts, others = [part - common for part in parts], [shingles(text) - common for text in held_out]
    within, near_held_out, first = [], [], []  # `first` are not near an earlier one
    for idx, part in enumerate(parts):
        near_held_out += nearest(idx, part, dict(enumerate(others)))
        found = nearest(idx, part, {other: parts[other] for other in first})
        within += found
        first += [] if found else [idx]
    looked_at = []
    monkeypatch.setattr(module, "shingles", lambda text: looked_at.append(text) or shingles(text))
    monkeypatch.setattr(near_duplicates, "shingles", module.shingles)
    found = near_rows(dict(enumerate(train)), dict(enumerate(held_out)))
    assert (found.within, found.held_out) == (within, near_held_out) and len(within) == 2
    assert sorted(looked_at) == sorted([*train, *held_out])


def real_rows(split):
    lines = (ROOT / f"examples/data/full/control2json.{split}.jsonl").read_text().splitlines()
    return [text_of(parse_row(line, number, split).conversation) for number, line in enumerate(lines, 1)]


def nearest(idx, part, others):
    values = {other: similarity(part, compared) for other, compared in others.items()}
    best = max(values, key=values.get, default=None)
    return [NearPair(idx, best, values[best])] if best is not None and values[best] >= 0.7 else []


def test_rows_of_one_instruction_are_not_near_for_that():
    assert near_rows(rows("a fox", "a dog", "a jug"), {}).within == []


def test_many_copies_are_as_many_pairs_and_large_files_are_looked_at_in_part(monkeypatch):
    copies = rows(*TEXTS, *[TEXTS[1]] * 20)
    assert [pair.other for pair in near_rows(copies, {}).within] == [2] * 20
    monkeypatch.setattr(module, "MAX_ROWS", 6)
    found = near_rows(copies, {})
    assert found.within == [NearPair(5, 2, 1.0), NearPair(6, 2, 1.0)]
    assert "of the first 6: 2" in next(lines_of(found, copies, {}))


def test_what_is_compared_of_a_row():
    row = '{"messages": [{"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Ho."}]}'
    assert text_of(parse_row(row, 1, "here").conversation) == "Hi.\nHo."


def test_without_datasketch_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(UserError, match=r"not installed: pip install 'specserve\[synthesis\]'"):
        near_rows(rows("a"), {})
