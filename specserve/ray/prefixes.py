"""Which replica has computed which starts of prompts, as far as requests that went there tell.

A replica's own prefix cache decides what it still has; a guess that is wrong costs a prefill and no token. Keys are of
chunks of tokens, each over all that came before it, within one adapter and cache salt, as the engine's own.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from hashlib import blake2b

CHUNK = 64  # tokens
MAX_CHUNKS = 64  # of a prompt: what is behind 4,096 equal tokens decides nothing
MAX_KEYS = 1 << 16


def prefix_keys(token_ids: Sequence[int], adapter: str | None, cache_salt: str) -> list[bytes]:
    """Of each whole chunk at the start of a prompt, 64 tokens each; the last token is always computed."""
    keys, key = [], blake2b(f"{adapter or ''}\0{cache_salt}".encode(), digest_size=16).digest()
    for start in range(0, min(len(token_ids) - 1, CHUNK * MAX_CHUNKS) - CHUNK + 1, CHUNK):
        chunk = array("q", token_ids[start : start + CHUNK]).tobytes()
        key = blake2b(chunk, key=key, digest_size=16).digest()
        keys.append(key)
    return keys


class PrefixMap:
    """By key, who was sent a prompt that begins so; the keys that were used last."""

    def __init__(self) -> None:
        self._having: dict[bytes, set[str]] = {}  # used last last

    def matched_tokens(self, keys: Sequence[bytes]) -> dict[str, int]:
        """Tokens at the start of a prompt that a replica has been sent before."""
        matched: dict[str, int] = {}
        still: set[str] | None = None
        for num, key in enumerate(keys, start=1):
            having = self._having.get(key, set())
            still = having if still is None else still & having
            if not still:
                break
            for replica in still:
                matched[replica] = num * CHUNK
        return matched

    def note(self, keys: Sequence[bytes], replica: str) -> None:
        """A prompt with these keys goes to `replica`."""
        for key in reversed(keys):  # the longest are forgotten first
            having = self._having.pop(key, set())
            having.add(replica)
            self._having[key] = having
        while len(self._having) > MAX_KEYS:
            del self._having[next(iter(self._having))]

    def forget(self, replica: str) -> None:
        """It has gone, with what it had."""
        for having in self._having.values():
            having.discard(replica)
        self._having = {key: having for key, having in self._having.items() if having}
