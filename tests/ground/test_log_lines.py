"""Log lines with text from outside in them."""

import logging

import pytest

from specserve.log_lines import LineFormatter, OriginFormatter, one_line


@pytest.fixture
def formatted():
    formatter = LineFormatter("%(levelname)s %(message)s")

    def of(message: str, *args: object, exc_info=None) -> str:
        return formatter.format(logging.LogRecord("x", logging.INFO, "x.py", 1, message, args, exc_info))

    return of


@pytest.mark.parametrize(
    "char", ["\n", "\r", "\0", "\x1b[31m", "\x9b31m", "\x7f", "\u2028", "\u202e", "\ud800", "\x85"]
)
def test_nothing_in_a_message_begins_a_line_or_steers_a_terminal(formatted, char):
    line = formatted("adapter %s", f"a{char}ERROR forged")
    assert len(line.splitlines()) == 1 and line.isprintable() and line.endswith("ERROR forged")


def test_other_text_stays_as_it_is(formatted):
    assert formatted("é 漢字 🙂 %s", "\\n") == "INFO é 漢字 🙂 \\n"
    assert one_line("plain") == "plain"


def test_a_traceback_keeps_its_lines_and_forges_none(formatted):
    try:
        raise ValueError("a\nERROR forged\x1b[0m")
    except ValueError as error:
        text = formatted("failed", exc_info=(type(error), error, error.__traceback__))
    first, *rest = text.splitlines()
    assert first == "INFO failed" and "\x1b" not in text
    assert len(rest) > 3 and all(line.startswith(("Traceback", "    ")) for line in rest)


def test_a_line_names_its_module_where_something_is_wrong_or_it_is_not_ours():
    def line(name: str, level: int) -> str:
        return (
            OriginFormatter("engine")
            .format(logging.LogRecord(name, level, "x.py", 1, "text", (), None))
            .split(" ", 2)[2]
        )

    assert line("specserve.compute.loader", logging.INFO) == "INFO engine: text"
    assert line("specserve.compute.loader", logging.WARNING) == "WARNING engine specserve.compute.loader: text"
    assert line("torch", logging.INFO) == "INFO engine torch: text"
