"""The block manager: references, the prefix cache, placement and integrity under random use."""

import random

from specserve.schedule.block_manager import BlockManager, next_key, root_key


def make_table(blocks: BlockManager, tokens: list[int], root: bytes, owner: int = 1) -> tuple[list[int], list[bytes]]:
    table, keys = blocks.match_prefix(root, tokens)
    assert blocks.reserve(table, len(tokens), owner=owner)
    blocks.commit(table, keys, root, tokens, len(tokens))
    return table, keys


def test_reserve_changes_nothing_when_blocks_are_short():
    blocks = BlockManager(4, 16)
    table: list[int] = []
    assert blocks.reserve(table, 40)
    other: list[int] = []
    assert not blocks.reserve(other, 33)
    assert other == [] and blocks.num_free == 1
    blocks.release(table)
    assert blocks.num_free == 4 and blocks.check_integrity([]) is None


def test_equal_prefix_shares_blocks_and_leaves_one_token_to_compute():
    blocks = BlockManager(8, 4)
    root = root_key(None, "")
    tokens = list(range(8))
    table, _ = make_table(blocks, tokens, root)
    shared, keys = blocks.match_prefix(root, tokens)
    assert shared == table[:1] and len(keys) == 1  # 8 tokens are two blocks, but the last token must be computed
    longer, _ = blocks.match_prefix(root, [*tokens, 9])
    assert longer == table
    assert blocks.check_integrity([table, shared, longer]) is None


def test_other_adapter_or_salt_shares_nothing():
    blocks = BlockManager(8, 4)
    tokens = list(range(9))
    make_table(blocks, tokens, root_key("a", ""))
    for root in (root_key(None, ""), root_key("b", ""), root_key("a", "salt"), root_key("as", "alt")):
        assert blocks.match_prefix(root, tokens) == ([], [])
    assert root_key("ab", "c") != root_key("a", "bc")
    assert next_key(root_key("a", ""), [1, 2]) != next_key(root_key("a", ""), [2, 1])


def test_released_prefix_survives_until_its_blocks_are_needed():
    blocks = BlockManager(4, 4)
    root = root_key(None, "")
    tokens = list(range(9))
    table, _ = make_table(blocks, tokens, root)
    blocks.release(table, owner=1)
    again, _ = blocks.match_prefix(root, tokens)
    assert len(again) == 2
    blocks.release(again)
    everything: list[int] = []
    assert blocks.reserve(everything, 16)
    assert blocks.match_prefix(root, tokens) == ([], [])
    assert blocks.check_integrity([everything]) is None


def test_sequences_that_grow_side_by_side_stay_contiguous():
    blocks = BlockManager(64, 4)
    tables: list[list[int]] = [[], [], []]
    for num_tokens in range(1, 41):
        for owner, table in enumerate(tables):
            assert blocks.reserve(table, num_tokens, claim_tokens=40, owner=owner)
    for table in tables:
        assert table == list(range(table[0], table[0] + len(table)))


def test_integrity_holds_under_random_use():
    rng = random.Random(0)
    blocks = BlockManager(24, 4)
    live: dict[int, tuple[list[int], list[bytes], bytes, list[int]]] = {}
    for owner in range(2000):
        if live and rng.random() < 0.5:
            victim = rng.choice(list(live))
            blocks.release(live.pop(victim)[0], owner=victim)
        root = root_key(rng.choice([None, "a"]), "")
        tokens = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
        known = blocks.prompt_keys(root, tokens[: rng.randrange(len(tokens) + 1)])
        table, keys = blocks.match_prefix(root, tokens, known)
        if blocks.reserve(table, len(tokens), claim_tokens=len(tokens) + rng.randrange(20), owner=owner):
            blocks.commit(table, keys, root, tokens, rng.randrange(len(tokens) + 1), known)
            assert keys == blocks.prompt_keys(root, tokens)[: len(keys)]
            live[owner] = (table, keys, root, tokens)
        else:
            blocks.release(table, owner=owner)
        error = blocks.check_integrity(entry[0] for entry in live.values())
        assert error is None, error
    for owner, entry in live.items():
        blocks.release(entry[0], owner=owner)
    assert blocks.num_free == 24
