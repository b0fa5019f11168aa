"""How many tokens a text has at least, from its bytes alone: what is too long is refused before it is tokenised.

Owns a lower bound that holds for every text, or none: a tokenizer with a part that may drop text, or put any amount of
it into one token (an unknown-word token, stripped white space), has no bound, and 0 is said.
"""

from __future__ import annotations

from typing import Any

import msgspec
from tokenizers import Tokenizer

NFC_SHRINK = 4  # composing a character saves two thirds of its bytes at most (unicode.org/faq/normalization), and room
NEVER_IN_UTF8 = {0xC0, 0xC1, *range(0xF5, 0x100)}


class _Parts(msgspec.Struct):
    """The parts of a tokenizer.json that the bound rests on; unknown fields, the merges above all, are skipped."""

    model: dict[str, Any] | None
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    truncation: dict[str, Any] | None = None
    added_tokens: list[dict[str, Any]] = []


class TokenBound:
    """The bound of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        parts = msgspec.json.decode(tokenizer.to_str(), type=_Parts)
        vocab = tokenizer.get_vocab(with_added_tokens=False)
        added = max((len(token["content"].encode()) for token in parts.added_tokens), default=0)
        shrink = _normalizer_shrink(parts.normalizer)
        self._longest = 0  # bytes of a text that one token may stand for; 0: any number
        # An added token may take the white space beside it along, however much.
        self._skip_space = any(token["lstrip"] or token["rstrip"] for token in parts.added_tokens)
        self._dropped = b""  # bytes that the vocabulary has not: they become no token
        if not _keeps_text(parts.pre_tokenizer) or parts.truncation or (parts.model or {}).get("type", "BPE") != "BPE":
            return
        if (parts.model or {}).get("byte_fallback"):
            if all(f"<0x{byte:02X}>" in vocab for byte in range(256)):
                self._longest = shrink * max(added, *(len(token.encode()) for token in vocab))
        elif _is_byte_level(parts.pre_tokenizer):
            self._dropped = bytes(sorted(byte for char, byte in BYTE_OF.items() if char not in vocab))
            if shrink <= 1 or set(self._dropped) <= NEVER_IN_UTF8:
                self._longest = shrink * max(added, *map(len, vocab))

    @property
    def longest(self) -> int:
        """Characters that one token may stand for; 0: any number."""
        return 0 if self._skip_space or self._dropped else self._longest

    def min_num_tokens(self, text: str) -> int:
        """No encoding of `text` has fewer tokens."""
        if not self._longest:
            return 0
        if self._skip_space:
            text = "".join(text.split())
        return -(-len(text.encode("utf-8", "replace").translate(None, self._dropped)) // self._longest)


def _normalizer_shrink(part: dict[str, Any] | None) -> int:
    """How many bytes become one at most; 0 when that is not known."""
    if part is None:
        return 1
    kind = part["type"]
    if kind == "Sequence":
        shrink = 1
        for inner in part["normalizers"]:
            shrink *= _normalizer_shrink(inner)
        return shrink
    if kind == "Replace":
        found = part["pattern"].get("String")
        return 1 if found is not None and len(part["content"].encode()) >= len(found.encode()) else 0
    return {"NFC": NFC_SHRINK, "NFD": NFC_SHRINK, "Prepend": 1, "ByteLevel": 1}.get(kind, 0)


def _keeps_text(part: dict[str, Any] | None) -> bool:
    """Whether all text reaches the model."""
    if part is None:
        return True
    kind = part["type"]
    if kind == "Sequence":
        return all(_keeps_text(inner) for inner in part["pretokenizers"])
    if kind in ("Split", "Punctuation"):
        return bool(part["behavior"] != "Removed")
    return kind in ("ByteLevel", "Metaspace", "Digits", "UnicodeScripts", "FixedLength")


def _is_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether each letter of the vocabulary stands for one byte."""
    steps = [pre_tokenizer, *(pre_tokenizer or {}).get("pretokenizers", ())]
    return any(step is not None and step["type"] == "ByteLevel" for step in steps)


def _byte_level_alphabet() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character (Radford et al. 2019); this is the way back."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + idx): byte for idx, byte in enumerate(others)}


BYTE_OF = _byte_level_alphabet()
