"""Answers on a terminal, each token shaded by where it came from, and the legend of the shades.

Owns the colours and what a terminal must not be sent: control characters of a model's text are shown, never obeyed.
Entries are those of a trace, as the engine's deltas and the HTTP API (`msgspec.convert(entries, list[TokenTrace])`)
have them.
"""

from __future__ import annotations

from collections.abc import Iterable

from ..draft_sources import source_name
from ..messages import TARGET, RejectedDraft, TokenTrace

# Backgrounds of the 256 colours, under black: to be told apart on light and dark terminals and by the colour-blind.
_BACKGROUNDS = {"head": 117, "history": 222, "ngram": 151, "prediction": 218, "grammar": 250}
_OTHER = 189  # a source that has no colour here
_REJECTED = "\x1b[9;38;5;167m"  # struck through, red
_RESET = "\x1b[0m"

# As pictures: C0 but for line feed and tab, DEL, and C1, which some terminals obey as well.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if code not in (0x09, 0x0A)}
_VISIBLE |= {0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)}


def visible(text: str) -> str:
    """What a terminal may be sent of `text`: control characters are pictures of themselves."""
    return text.translate(_VISIBLE)


class Shading:
    """Of one answer; counts its tokens for the legend. `shows_rejected`: also the wrong drafts, before what came."""

    def __init__(self, has_colour: bool, shows_rejected: bool = False):
        self._has_colour, self._shows_rejected = has_colour, shows_rejected
        self._nums: dict[str, int] = {}
        self._chances: dict[str, float] = {}
        self._num_rejected = 0
        self._num_forwards = 0

    def text(self, entries: Iterable[TokenTrace]) -> str:
        """The next tokens of the answer, shaded."""
        return "".join([self._token(entry) for entry in entries])

    def legend(self) -> str:
        """One line: each shade with its source, tokens so far and their mean chance, the likeliest source first."""
        parts = []
        for source, num in sorted(self._nums.items(), key=lambda item: (item[0] == TARGET, -item[1])):
            name = source_name(source)
            sample = self._styled(source, f" {name} ") if self._has_colour else name
            chance = "" if source == TARGET else f" (expected {100 * self._chances[source] / num:.0f}% right)"
            parts.append(f"{sample} {num}{chance}")
        rejected = self._in_style(_REJECTED, f"{self._num_rejected} rejected") if self._num_rejected else ""
        num_tokens = sum(self._nums.values())
        whole = f"{num_tokens} tokens in {self._num_forwards} forwards"
        return " · ".join(part for part in (whole, *parts, rejected) if part)

    def _token(self, entry: TokenTrace) -> str:
        source = entry.source
        self._nums[source] = self._nums.get(source, 0) + 1
        self._chances[source] = self._chances.get(source, 0.0) + (entry.chance or 0.0)
        self._num_rejected += len(entry.rejected)
        self._num_forwards = max(self._num_forwards, entry.forward + 1)
        rejected = self._struck(entry.rejected) if self._shows_rejected and self._has_colour else ""
        return rejected + self._styled(source, entry.text)

    def _styled(self, source: str, text: str) -> str:
        if source == TARGET:
            return self._in_style("", text)
        return self._in_style(f"\x1b[38;5;16;48;5;{_BACKGROUNDS.get(source, _OTHER)}m", text)

    def _struck(self, drafts: Iterable[RejectedDraft]) -> str:
        return self._in_style(_REJECTED, "".join([draft.text for draft in drafts]).replace("\n", "\u21b5"))

    def _in_style(self, style: str, text: str) -> str:
        """Each line for itself: a terminal fills the rest of a line with the background that a line feed finds."""
        if not self._has_colour:
            return text
        text = visible(text)
        if not style:
            return text
        return "\n".join([f"{style}{line}{_RESET}" if line else "" for line in text.split("\n")])
