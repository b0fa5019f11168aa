"""Keys: what a file of them may say, who a key is, and files that change or break while the server runs."""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
import time

import pytest

from specserve.cli.main import exit_code_of
from specserve.config import ServeConfig
from specserve.errors import RateLimitedError, UserError
from specserve.server.access import key_file as key_file_module
from specserve.server.access import keys as keys_module
from specserve.server.access.caller import Caller
from specserve.server.access.key_file import digest_of, entry_text, read_keys
from specserve.server.access.keys import KeyRing
from specserve.server.access.limits import Allowance, Limits

# The same in every process of a test run, since cases are named by them.
KEY, OTHER = (f"sk-specserve-{letter * 43}" for letter in "ab")


@pytest.fixture(autouse=True)
def files_need_not_settle(monkeypatch):
    monkeypatch.setattr(key_file_module, "SETTLE_S", 0.0)


@pytest.fixture
def file(tmp_path):
    file = tmp_path / "keys.yaml"
    file.write_text(entry_text("team", KEY, {"adapters": ["team-*"], "max_concurrent": 2}))
    return file


def hash_of(key: str) -> str:
    return digest_of(key.encode()).hex()


async def ring_of(file=None, **config) -> KeyRing:
    ring = KeyRing(ServeConfig(api_keys_file=None if file is None else str(file), **config))
    await ring.reload()
    return ring


def name_of(ring: KeyRing, key: str) -> str | None:
    caller = ring.authenticate(f"Bearer {key}")
    return None if caller is None else caller.name


async def test_a_key_is_found_by_its_hash_and_may_what_its_entry_says(file):
    caller = (await ring_of(file)).authenticate(f"bearer {KEY}")
    assert (caller.name, caller.scopes, caller.may_prioritize) == ("team", {"generate"}, False)
    assert caller.may_use("team-a") and not caller.may_use("other") and not caller.may_use("x-team-a")
    with pytest.raises(UserError, match="'other' does not exist"):
        caller.check_adapter("other")
    caller.check_priority(0)
    with pytest.raises(UserError, match="may not set one"):
        caller.check_priority(-1)


async def test_every_hash_is_compared_in_constant_time_whichever_key_is_sent(file, monkeypatch):
    file.write_text(file.read_text() + entry_text("other", OTHER, {}))
    ring, compared = await ring_of(file), []

    def compare(known, sent):
        compared.append(known)
        return hmac.compare_digest(known, sent)

    monkeypatch.setattr(keys_module, "hmac", type("Hmac", (), {"compare_digest": staticmethod(compare)}))
    for key in (KEY, OTHER, "wrong", ""):
        compared.clear()
        name_of(ring, key)
        assert compared == [digest_of(KEY.encode()), digest_of(OTHER.encode())]


@pytest.mark.parametrize("sent", ["", "Bearer", "Bearer ", f"Basic {KEY}", KEY, f"Bearer {KEY}x", "Bearer \udcff"])
async def test_what_is_no_key_is_nobody(file, sent):
    assert (await ring_of(file)).authenticate(sent) is None


async def test_keys_of_the_settings_keep_their_meaning_beside_the_file(file):
    assert KeyRing(ServeConfig()).authenticate("").scopes == {"generate", "admin", "metrics"}
    only = await ring_of(api_key="k")
    assert only.authenticate("Bearer k").scopes == {"generate", "admin", "metrics"} and only.authenticate("") is None
    both = await ring_of(file, api_key="k", admin_api_key="a")
    assert both.authenticate("Bearer k").scopes == {"generate", "metrics"}
    assert both.authenticate("Bearer a").scopes == {"admin", "metrics"}
    assert name_of(both, KEY) == "team"
    same = await ring_of(api_key="k", admin_api_key="k")
    assert same.authenticate("Bearer k").scopes == {"generate", "admin", "metrics"}
    admin_only = await ring_of(admin_api_key="a")
    assert admin_only.authenticate("").scopes == admin_only.authenticate("Bearer x").scopes == {"generate", "metrics"}
    assert (await ring_of(file)).anonymous.scopes == set()  # a file without an admin's key opens nothing


async def test_an_entry_may_have_two_keys_while_one_replaces_the_other(file):
    file.write_text(f"team:\n  sha256: [{hash_of(KEY)}, {hash_of(OTHER)}]\n")
    ring = await ring_of(file)
    assert name_of(ring, KEY) == name_of(ring, OTHER) == "team"


async def test_reading_again_takes_keys_away_and_keeps_what_is_used_of_limits(file):
    file.write_text(file.read_text() + entry_text("other", OTHER, {"requests_per_minute": 2}))
    ring = await ring_of(file)
    caller = ring.authenticate(f"Bearer {OTHER}")
    with caller.allowance.running():
        file.write_text(entry_text("other", OTHER, {"requests_per_minute": 1}))
        await ring.reload()
    assert name_of(ring, KEY) is None
    again = ring.authenticate(f"Bearer {OTHER}")
    with pytest.raises(RateLimitedError), again.allowance.running():
        pass


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("team: [", "not valid YAML"),
        ("- team", "must hold"),
        ("team: 3", "'team' is 3; write its fields under it, such as sha256: HASH"),
        (f"team: {KEY}", "'team' is text; write"),
        ("defaults: []", "'defaults' is a list; write its fields under it, such as max_concurrent: 8"),
        ("team: {}", "'team' has no sha256; `specserve keys new team` makes a key"),
        (f"team: {{sha256: {{a: {KEY}}}}}", "'team' has sha256: a mapping; it may be 64 hexadecimal digits"),
        (
            f"team: {{sha256: {hash_of(OTHER)}, scopes: [{KEY}]}}",
            "scopes: a list of something else; it may be a list of",
        ),
        (f"team: {{sha256: {hash_of(OTHER)}, adapters: a}}", "'team' has adapters: text; it may be a list of names"),
        (f"team: {{sha256: {hash_of(OTHER)}, priority: 1}}", "'team' has priority: 1; it may be true or false"),
        (f"team: {{sha256: {hash_of(OTHER)}, max_concurrent: 1.5}}", "max_concurrent: 1.5; it may be a whole number"),
        (f"team: {{sha256: {KEY}}}", "64 hexadecimal digits"),
        ("team: {sha256: []}", "64 hexadecimal digits"),
        (
            f"team: {{sha256: {hash_of(OTHER)}, scopes: [root]}}",
            "'team' has scopes: root; it may be a list of generate, admin, metrics",
        ),
        (
            f"team: {{sha256: {hash_of(OTHER)}, scope: [admin]}}",
            "'team' has an unknown field 'scope'; there are requests_per_minute,",
        ),
        (f"team: {{sha256: {hash_of(OTHER)}, scopes: [admin], adapters: [a]}}", "leave out one of both"),
        (
            f"team: {{sha256: {hash_of(OTHER)}, tokens_per_minute: 0}}",
            "tokens_per_minute: 0; it may be a whole number, 1 or",
        ),
        (f"a/b: {{sha256: {hash_of(OTHER)}}}", "is no name"),
        (f"a: {{sha256: {hash_of(OTHER)}}}\nb: {{sha256: {hash_of(OTHER)}}}", "have the same key"),
        (f"a: {{sha256: {hash_of(OTHER)}}}\na: {{sha256: {hash_of(KEY)}}}", "stands twice"),
        (f"api-key: {{sha256: {hash_of(OTHER)}}}", "the name 'api-key' is the server's own"),
        ("defaults: {requests: 3}", "'defaults' has an unknown field 'requests'"),
        (None, "cannot read"),
    ],
)
async def test_a_broken_file_says_why_and_changes_nothing(file, text, reason):
    ring = await ring_of(file, api_key="k")
    file.unlink() if text is None else file.write_text(text)
    with pytest.raises(UserError, match=reason) as refusal:
        await ring.reload()
    assert name_of(ring, KEY) == "team" and KEY not in str(refusal.value)


async def test_a_file_that_is_being_written_is_read_when_it_is_complete(file, monkeypatch):
    """Cut after an entry, or just opened for writing, it is a valid file of fewer keys."""
    ring = await ring_of(file)
    monkeypatch.setattr(key_file_module, "SETTLE_S", 1.0)  # far more than the writer's pauses
    whole = file.read_text() + entry_text("other", OTHER, {})
    with open(file, "w") as stream:
        reload = asyncio.ensure_future(ring.reload())
        for part in (whole[: len(whole) // 3], whole[len(whole) // 3 :]):
            await asyncio.sleep(0.05)
            assert name_of(ring, KEY) == "team"
            stream.write(part)
            stream.flush()
    await reload
    assert (name_of(ring, KEY), name_of(ring, OTHER)) == ("team", "other")


async def test_a_file_that_never_rests_and_a_pipe_are_refused(file, monkeypatch):
    ring = await ring_of(file)
    monkeypatch.setattr(key_file_module, "SETTLE_S", 0.01)
    monkeypatch.setattr(key_file_module, "_MAX_SETTLE_S", 0.1)
    monkeypatch.setattr(key_file_module, "read_keys", lambda path: os.utime(path))
    with pytest.raises(UserError, match="changes all the time"):
        await ring.reload()
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match="not a regular file"):
        await ring.reload()
    assert name_of(ring, KEY) == "team"


async def test_defaults_hold_where_an_entry_says_nothing_and_null_is_no_limit(file):
    file.write_text(
        "defaults: {requests_per_minute: 5, max_concurrent: 3}\n"
        f"a: {{sha256: {hash_of(KEY)}, max_concurrent: null}}\nb: {{sha256: {hash_of(OTHER)}, tokens_per_minute: 9}}\n"
    )
    a, b = (entry.limits for entry in read_keys(file))
    assert (a.requests_per_minute, a.max_concurrent, a.tokens_per_minute) == (5, None, None)
    assert (b.requests_per_minute, b.max_concurrent, b.tokens_per_minute) == (5, 3, 9)


def test_no_tenant_can_name_anothers_salt():
    allowance = Allowance("", Limits(), time.monotonic)

    def salt(tenant, sent):
        return Caller("key", frozenset(), None, False, tenant, allowance).cache_salt(sent)

    salts = {salt(tenant, sent) for tenant in ("a", "a:", "1:a", "b") for sent in (None, "a", ":a", "1:a:", "1:b:")}
    assert len(salts) == 20
    assert salt(None, "x") == "x" and salt(None, None) == ""


async def test_isolation_is_on_with_a_file_unless_it_is_switched_off(file):
    for ring, tenant in (
        (await ring_of(file), "team"),
        (await ring_of(file, isolate_keys=False), None),
    ):
        assert ring.authenticate(f"Bearer {KEY}").tenant == tenant
    assert (await ring_of(api_key="k")).authenticate("Bearer k").tenant is None


def test_keys_new_prints_a_key_once_and_keeps_its_hash(capsys, tmp_path):
    file = tmp_path / "keys.yaml"
    arguments = ["--scope", "generate", "--scope", "metrics", "--adapter", "a-*", "--tokens-per-minute", "90"]
    assert exit_code_of(["keys", "new", "team", "--file", str(file), *arguments]) == 0
    key = capsys.readouterr().out.strip()
    assert exit_code_of(["keys", "new", "other", "--file", str(file)]) == 0
    assert file.stat().st_mode & 0o777 == 0o600 and key not in file.read_text()
    team, other = read_keys(file)
    assert team.digests == (digest_of(key.encode()),) and team.adapters == ("a-*",)
    assert team.scopes == {"generate", "metrics"} and team.limits.tokens_per_minute == 90
    assert other.scopes == {"generate"} and other.adapters is None
    before = file.read_text()
    capsys.readouterr()
    for name in ("team", "defaults", "a/b"):
        assert exit_code_of(["keys", "new", name, "--file", str(file)]) == 2
        assert "sk-" not in capsys.readouterr().out
    assert file.read_text() == before


async def test_the_log_names_no_key(file, caplog):
    with caplog.at_level(logging.DEBUG):
        ring = await ring_of(file, api_key=OTHER)
        ring.authenticate(f"Bearer {KEY}")
    assert caplog.text and KEY not in caplog.text and OTHER not in caplog.text
