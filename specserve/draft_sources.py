"""Who may have guessed a token, as people see it: names, sentences, colours; the same on a page and in a report.

The server's page has its own copy (server/page/sources.js, base.css), which a test holds to this one. Colours are after
Okabe and Ito, to be told apart by the colour-blind; each has an underline of its own beside.
"""

from __future__ import annotations

from dataclasses import dataclass

from .messages import TARGET


@dataclass(frozen=True, slots=True)
class Source:
    """One source of drafts. Colours are (behind the token, its underline), on light and on dark pages."""

    name: str
    what: str
    light: tuple[str, str]
    dark: tuple[str, str]
    underline: str  # of CSS


SOURCES = {
    "head": Source(
        "lookahead head", "guessed by the network that was trained with the LoRA",
        ("#d9e6ff", "#1f5fd0"), ("#1d3768", "#84acff"), "solid",
    ),
    "history": Source(
        "task history", "guessed from what the adapter wrote before",
        ("#d0f2e4", "#007a5a"), ("#104438", "#4fd0a5"), "double",
    ),
    "ngram": Source(
        "n-gram", "guessed from what stands before in prompt and output",
        ("#fdeac2", "#a66300"), ("#4a3710", "#f0b850"), "dotted",
    ),
    "prediction": Source(
        "prediction", "taken from the expected output",
        ("#f8dcec", "#ad3379"), ("#4e2241", "#f08cc5"), "wavy",
    ),
    "grammar": Source(
        "grammar", "all that the grammar leaves room for",
        ("#e6e6e3", "#565a66"), ("#3a3d47", "#b9bdca"), "dashed",
    ),
}  # fmt: skip


def source_name(source: str) -> str:
    """Of drafts, or of the model; an unknown one's is its own."""
    if source == TARGET:
        return "model"
    return SOURCES[source].name if source in SOURCES else source
