"""Which KV blocks belong to whom; integers only, no tensors.

Owns reference counts, the prefix cache and the free list. A sequence's block table only grows through `reserve`, before
the forward that writes it; `commit` publishes its full blocks to the prefix cache once their tokens are final;
`release` gives everything back. Invariant (`check_integrity`): each block is either free or referenced by exactly
`refs` tables.

A prefix-cache key is a SHA-256 chain over (adapter content hash, cache_salt) and the tokens of each full block, so two
adapters, or two salts, can never share a block, and a collision is out of reach for a client.

Blocks are handed out in contiguous runs where possible: a new sequence claims a run long enough for its whole life, and
others avoid claimed blocks until nothing else is left. CPU attention reads a contiguous run without copying it.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence


def root_key(adapter_hash: str | None, cache_salt: str) -> bytes:
    """Start of the key chain: what must be equal for two sequences to share KV, besides their tokens."""
    adapter = (adapter_hash or "").encode()
    salt = cache_salt.encode()
    return hashlib.sha256(len(adapter).to_bytes(8, "little") + adapter + salt).digest()


def next_key(parent: bytes, tokens: Sequence[int]) -> bytes:
    return hashlib.sha256(parent + array("q", tokens).tobytes()).digest()


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens each."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_caching = prefix_caching
        self._refs = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))  # least recently used first
        self._cached: dict[bytes, int] = {}
        self._key_of: list[bytes | None] = [None] * num_blocks
        self._claims: dict[int, int] = {}  # free block -> id of the table that wants it
        self._claimed_by: dict[int, list[int]] = {}  # id -> what it claimed, some of which is taken since
        self._open = bytearray(b"\1") * num_blocks  # 1: free and unclaimed
        self._clean = bytearray(b"\1") * num_blocks  # 1: free, unclaimed and holding no cached prefix

    @property
    def num_free(self) -> int:
        return len(self._free)

    def num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    # -- prefix cache

    def prompt_keys(self, root: bytes, tokens: Sequence[int]) -> list[bytes]:
        """The keys of the full blocks of `tokens`: what takes long of `match_prefix` and `commit`, before its time."""
        if not self.prefix_caching:
            return []
        size, key, keys = self.block_size, root, []
        for start in range(0, len(tokens) - size + 1, size):
            key = next_key(key, tokens[start : start + size])
            keys.append(key)
        return keys

    def match_prefix(
        self, root: bytes, tokens: Sequence[int], known: Sequence[bytes] = ()
    ) -> tuple[list[int], list[bytes]]:
        """Take references on the longest cached prefix of whole blocks, leaving at least one token to compute.

        Returns the blocks and their keys; both are empty when nothing matches. `known` are the first blocks' keys.
        """
        blocks: list[int] = []
        keys: list[bytes] = []
        if not self.prefix_caching:
            return blocks, keys
        size, key = self.block_size, root
        for idx, start in enumerate(range(0, len(tokens) - size, size)):
            key = known[idx] if idx < len(known) else next_key(key, tokens[start : start + size])
            block = self._cached.get(key)
            if block is None:
                break
            blocks.append(block)
            keys.append(key)
        for block in blocks:
            self._take(block, keep_content=True)
        return blocks, keys

    def commit(
        self,
        table: Sequence[int],
        keys: list[bytes],
        root: bytes,
        tokens: Sequence[int],
        num_final: int,
        known: Sequence[bytes] = (),
    ) -> None:
        """Publish the full blocks among the first `num_final` tokens; extends `keys`, one per published block.

        `known` are the first blocks' keys.
        """
        if not self.prefix_caching:
            return
        size = self.block_size
        while (len(keys) + 1) * size <= num_final:
            idx = len(keys)
            if idx < len(known):
                key = known[idx]
            else:
                key = next_key(keys[-1] if keys else root, tokens[idx * size : (idx + 1) * size])
            keys.append(key)
            block = table[idx]
            # Two sequences may compute the same prefix side by side: the first one published serves the cache.
            if key not in self._cached and self._key_of[block] is None:
                self._cached[key] = block
                self._key_of[block] = key

    # -- tables

    def reserve(self, table: list[int], num_tokens: int, claim_tokens: int = 0, owner: int = 0) -> bool:
        """Grow `table` to hold `num_tokens`; False, and nothing changed, when there are not enough free blocks.

        `claim_tokens` is the length the sequence may reach, `owner` its id; both only steer where blocks lie.
        """
        need = self.num_blocks_for(num_tokens) - len(table)
        if need <= 0:
            return True
        if need > len(self._free):
            return False
        for _ in range(need):
            block = self._pick(table, self.num_blocks_for(claim_tokens) - len(table), owner)
            self._take(block, keep_content=False)
            table.append(block)
        return True

    def release(self, table: list[int], owner: int = 0) -> None:
        """Drop the references of `table` and empty it; contents stay reusable until the block is needed."""
        for block in reversed(table):  # a prefix's tail is evicted before its head
            self._refs[block] -= 1
            assert self._refs[block] >= 0, f"block {block} released twice"
            if self._refs[block] == 0:
                self._free[block] = None
                if self._key_of[block] is None:
                    self._free.move_to_end(block, last=False)
                self._mark(block)
        table.clear()
        for block in self._claimed_by.pop(owner, ()):
            if self._claims.get(block) == owner:
                del self._claims[block]
                self._mark(block)

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> str | None:
        """What is wrong, given the tables of every live sequence; None when all is well."""
        counts = [0] * self.num_blocks
        for table in tables:
            for block in table:
                counts[block] += 1
        for block, count in enumerate(counts):
            if count != self._refs[block]:
                return f"block {block} has {self._refs[block]} references but stands in {count} tables"
            if (count == 0) != (block in self._free):
                return f"block {block} has {count} references and free={block in self._free}"
        for key, block in self._cached.items():
            if self._key_of[block] != key:
                return f"block {block} is cached under a key that it does not hold"
        return None

    # -- placement

    def _pick(self, table: list[int], life_blocks: int, owner: int) -> int:
        if table:
            block = table[-1] + 1
            if block < self.num_blocks and block in self._free and self._claims.get(block, owner) == owner:
                return block
        want = max(1, life_blocks)
        for bits in (self._clean, self._open):
            start = bits.find(b"\1" * want)
            if start >= 0:
                own = range(start, start + want)
                self._claimed_by.setdefault(owner, []).extend(own)
                for block in own:
                    self._claims[block] = owner
                    self._mark(block)
                return start
        for block in self._free:
            if block not in self._claims:
                return block
        return next(iter(self._free))

    def _take(self, block: int, keep_content: bool) -> None:
        self._free.pop(block, None)
        self._claims.pop(block, None)
        self._refs[block] += 1
        if not keep_content:
            key = self._key_of[block]
            if key is not None:
                del self._cached[key]
                self._key_of[block] = None
        self._mark(block)

    def _mark(self, block: int) -> None:
        is_open = block in self._free and block not in self._claims
        self._open[block] = is_open
        self._clean[block] = is_open and self._key_of[block] is None
