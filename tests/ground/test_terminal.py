"""Colours are for terminals that show them."""

import io

from specserve.terminal import wants_colour


def test_colours_are_for_terminals_that_take_them():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    assert wants_colour(Terminal(), {"TERM": "xterm"})
    assert not wants_colour(io.StringIO(), {})
    assert not wants_colour(Terminal(), {"NO_COLOR": "1"})
    assert not wants_colour(Terminal(), {"TERM": "dumb"})
    assert wants_colour(io.StringIO(), {"NO_COLOR": "1"}, "always")
    assert not wants_colour(Terminal(), {}, "never")


def test_a_stream_that_is_closed_gets_no_colours():
    closed = io.StringIO()
    closed.close()
    assert not wants_colour(closed, {"TERM": "xterm"})
