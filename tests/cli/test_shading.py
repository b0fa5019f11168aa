"""Shaded answers: all of the text is there, no shade outlasts its line, and nothing in it commands a terminal."""

import re

import pytest

from specserve.cli.shading import Shading
from specserve.messages import RejectedDraft, TokenTrace

REJECTED = [RejectedDraft(5, " ran\n", "ngram", 0.4), RejectedDraft(6, ".", "head", 0.8)]
TRACE = [
    TokenTrace(1, "The", "target", None, 0),
    TokenTrace(2, " cat", "head", 0.9, 1),
    TokenTrace(3, "\n\n", "head", 0.5, 1),
    TokenTrace(4, " sat", "target", None, 1, rejected=REJECTED),
]
STYLE = re.compile(r"\x1b\[[0-9;]*m")


def test_without_colour_the_text_is_what_the_model_wrote():
    assert Shading(False, shows_rejected=True).text(TRACE) == "The cat\n\n sat"


def test_shades_are_closed_before_each_line_ends():
    text = Shading(True).text(TRACE)
    assert STYLE.sub("", text) == "The cat\n\n sat"
    assert "\x1b[38;5;16;48;5;117m cat\x1b[0m\n\n sat" in text  # an empty line has no shade that could fill it
    assert text.startswith("The")  # what the model gave alone has none


def test_rejected_drafts_stand_struck_through_before_what_took_their_place():
    text = Shading(True, shows_rejected=True).text(TRACE)
    assert text.endswith("\x1b[9;38;5;167m ran\u21b5.\x1b[0m sat")


def test_control_characters_are_shown_and_not_sent():
    evil = "\x1b]0;title\x07 a\tb\r\x9b2J\x7f"
    text = Shading(True, shows_rejected=True).text(
        [TokenTrace(1, evil, "target", None, 0, [RejectedDraft(2, evil, "head", 0.1)])]
    )
    assert not set(STYLE.sub("", text)) & {chr(code) for code in (*range(9), *range(11, 32), *range(0x7F, 0xA0))}
    assert "\u241b]0;title\u2407 a\tb\u240d" in text


@pytest.mark.parametrize("has_colour", [False, True])
def test_the_legend_counts_tokens_by_source(has_colour):
    shading = Shading(has_colour)
    for entry in TRACE:
        shading.text([entry])
    shading.text([TokenTrace(9, "!", "of an extension", 0.25, 2)])
    assert " ".join(STYLE.sub("", shading.legend()).split()) == (
        "5 tokens in 3 forwards · lookahead head 2 (expected 70% right) · of an extension 1 (expected 25% right) · "
        "model 2 · 2 rejected"
    )
    assert has_colour == ("\x1b[" in shading.legend())
