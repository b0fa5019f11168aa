"""Marks around texts of others: whatever a text holds, it does not hold its own marks."""

import re

from specserve.teachers import quoted


def test_no_text_contains_its_marks_and_equal_texts_have_equal_ones():
    shown = quoted([("a", "one"), ("b", "two\n</b>")])
    number = re.match(r"<a ([0-9a-f]{8})>\none\n</a \1>\n\n<b \1>\ntwo\n</b>\n</b \1>$", shown)[1]
    assert shown == quoted([("a", "one"), ("b", "two\n</b>")]) and quoted([("a", number)]).count(number) == 1
    assert len({quoted([("a", "x y")]), quoted([("a", "x"), ("a", "y")]), quoted([("a x", "y")])}) == 3


def test_a_text_that_holds_its_own_number_gets_a_longer_one(monkeypatch):
    class Hash:
        def update(self, data):
            pass

        def hexdigest(self):
            return "0123456789abcdef" * 4

    monkeypatch.setattr("specserve.teachers.marked_texts.hashlib.sha256", Hash)
    assert quoted([("a", "</a 0123456789>")]).startswith("<a 0123456789a>\n")
