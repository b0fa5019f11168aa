"""The pages: nothing of theirs is executed, all of the board is on them, and a server follows the file."""

import asyncio
import json
import os
import re
import shutil
import sqlite3
import tempfile
from pathlib import Path

import pytest
from aiohttp.test_utils import TestClient, TestServer
from html_page import Page
from training_fixture import write_rows

from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.leaderboard.pages import ROWS_PER_PAGE, Pages
from specserve.leaderboard.pairs import asked_hash, asks_of
from specserve.leaderboard.site import LeaderboardSite, application
from specserve.leaderboard.standings import answered_of, standings
from specserve.leaderboard.store import LeaderboardStore
from specserve.server.app import Server
from specserve.text.tokenizer import TextTokenizer


@pytest.fixture(scope="module")
def exported(ran, tmp_path_factory):
    directory = tmp_path_factory.mktemp("export")
    assert ran.cli("export", directory) == 0
    return directory


def test_an_export_holds_the_board_and_all_answers(exported, ran, capsys):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "index.html",
        "board.json",
        *(f"{name}.html" for name in ("json.answers-1", "json.answers-2", "text.answers-1")),
    }
    index = Page((exported / "index.html").read_text())
    addresses = {attrs["href"] for tag, attrs in index.tags if tag == "a"}
    assert addresses == {"json.answers-1.html", "text.answers-1.html", "board.json"}
    for name in ("base", "first", "second", "missing", "field_match", "Ratings by the tasks' metrics", "5 of 6 cells"):
        assert name in index.text
    assert sum(tag == "svg" for tag, _ in index.tags) == 2
    board = json.loads((exported / "board.json").read_text())
    assert len(board["models"]) == 3 and str(ran.root) not in (exported / "board.json").read_text()
    second = Page((exported / "json.answers-2.html").read_text())
    assert f"Row {ROWS_PER_PAGE + 1}" in second.text and "Row 30" in second.text and "Row 1\n" not in second.text
    assert second.text.count("first: ") == 30 - ROWS_PER_PAGE
    assert ran.cli("export", exported) == 0  # over an earlier one


def test_what_rows_and_models_say_is_text(exported):
    for path in exported.glob("*.html"):
        page, source = Page(path.read_text()), path.read_text()
        assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "object", "link", "img")]
        assert not [attrs for _, attrs in page.tags if any(name.startswith("on") for name in attrs)]
        assert "http" not in re.sub(r"http://www\.w3\.org\S*", "", source)
    assert "<script>alert(1)</script>" in Page((exported / "text.answers-1.html").read_text()).text


def test_a_server_follows_the_file_and_knows_its_pages_alone(begun, tmp_path):
    async def look():
        async with TestClient(TestServer(application(begun.path))) as client:
            first = await client.get("/", allow_redirects=True)
            assert str(first.url).endswith("/leaderboard/") and first.status == 200
            assert "default-src 'none'" in first.headers["Content-Security-Policy"]
            text, etag = await first.text(), first.headers["ETag"]
            assert "0 of 1 cells" in text
            same = await client.get("/leaderboard/", headers={"If-None-Match": etag})
            assert same.status == 304
            write_rows(tmp_path / "more.jsonl", 2)
            assert await asyncio.to_thread(begun.cli, "add", "more", "--data", tmp_path / "more.jsonl") == 0
            assert "0 of 2 cells" in await (await client.get("/leaderboard")).text()
            assert (await client.get("/leaderboard/board.json")).content_type == "application/json"
            for name in ("nothing.html", "../board.sqlite3", "%2e%2e/board.sqlite3", "json.answers-2.html", "<script>"):
                missing = await client.get(f"/leaderboard/{name}")
                assert missing.status == 404 and missing.content_type == "text/plain", name

    asyncio.run(look())


def test_a_server_of_models_shows_it_too(ran, model_dir, tmp_path):
    """Where keys are asked for, to those who have one: rows and answers stand in it."""
    board = tmp_path / "board.sqlite3"
    with sqlite3.connect(ran.path) as source, sqlite3.connect(board) as copy:
        source.backup(copy)

    async def look():
        config = ServeConfig(model=str(model_dir), api_key="secret")
        server = Server(config, model_dir, leaderboard=LeaderboardSite(board).page)
        async with TestClient(TestServer(server.application(TextTokenizer(model_dir)))) as client:
            key = {"Authorization": "Bearer secret"}
            assert (await client.get("/leaderboard/")).status == 401
            for name in ("", "index.html", "board.json", "json.answers-2.html"):
                assert (await client.get(f"/leaderboard/{name}", headers=key)).status == 200
            page = await client.get("/leaderboard/", headers=key)
            assert "Ratings by" in await page.text() and "default-src 'none'" in page.headers["Content-Security-Policy"]
            home = Page(await (await client.get("/", headers={"Accept": "text/html"})).text())
            assert ("a", {"href": "/leaderboard/"}) in home.tags
            missing = await client.get("/leaderboard/none", headers=key)
            assert missing.status == 404 and "no such page" in await missing.text()
            board.write_bytes(b"no board")
            broken = await client.get("/leaderboard/", headers=key)
            assert broken.status == 503 and "cannot be used" in await broken.text()

    asyncio.run(look())


def test_an_empty_board_has_a_page(tmp_path):
    store = LeaderboardStore(tmp_path / "empty.sqlite3", create=True)
    assert b"0 models, 0 tasks" in Pages(store).file("index.html")
    assert list(Pages(store).names()) == ["index.html", "board.json"]
    store.close()


def test_a_page_is_of_one_moment(begun, tmp_path):
    store = LeaderboardStore(begun.path)
    try:
        with store.snapshot():
            before = store.rows(store.tasks()[0])
            write_rows(tmp_path / "dev.jsonl", 9, seed=2)
            assert begun.cli("add", "json", "--data", tmp_path / "dev.jsonl") == 0
            assert store.rows(store.tasks()[0]) == before
        assert len(store.rows(store.tasks()[0])) == 9
    finally:
        store.close()


def test_names_that_mean_nothing_cost_no_ratings(ran, monkeypatch):
    monkeypatch.setattr("specserve.leaderboard.pages.standings", lambda store: pytest.fail("the board was made"))
    store = LeaderboardStore(ran.path)
    try:
        assert Pages(store).file("nothing.html") is None and b"Row 1" in Pages(store).file("json.answers-1.html")
    finally:
        store.close()


def test_a_board_on_a_disk_that_cannot_be_written_is_shown(ran):
    """By another user, as the tests may run as one who may write anything."""
    root = Path(tempfile.mkdtemp())
    try:
        with sqlite3.connect(ran.path) as source, sqlite3.connect(root / "board.sqlite3") as copy:
            source.backup(copy)
        (root / "board.sqlite3").chmod(0o444)
        root.chmod(0o555)
        os.seteuid(65534 if os.geteuid() == 0 else os.geteuid())
        try:
            store = LeaderboardStore(root / "board.sqlite3", read_only=True)
            assert b'"by": "the tasks' in Pages(store).file("board.json")
            store.close()
            LeaderboardSite(root / "board.sqlite3")
            with pytest.raises(UserError, match="cannot be used: attempt to write a readonly database"):
                LeaderboardStore(root / "board.sqlite3")
        finally:
            os.seteuid(os.getuid())
        assert [path.name for path in root.iterdir()] == ["board.sqlite3"]
    finally:
        root.chmod(0o755)
        shutil.rmtree(root)


def test_an_export_that_cannot_be_written_is_one_line(begun, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert begun.cli("export", tmp_path / "file" / "site") == 2
    assert capsys.readouterr().err.endswith("site: Not a directory\n")


def test_an_export_holds_nothing_of_a_task_that_was_removed(begun, tmp_path):
    assert begun.cli("export", tmp_path / "site") == 0 and (tmp_path / "site" / "json.answers-1.html").is_file()
    assert begun.cli("remove", "json") == 0 and begun.cli("export", tmp_path / "site") == 0
    assert {path.name for path in (tmp_path / "site").iterdir()} == {"index.html", "board.json"}


def test_a_judge_that_is_a_path_is_shown_by_its_name(copied):
    store = LeaderboardStore(copied.path)
    judge = f"default+{copied.root}/adapters/stern"
    with store.transaction():
        for answered in answered_of(store, store.tasks()[0]):
            texts = answered.answers["base"].text, answered.answers["first"].text
            for ask in asks_of(answered.row, *texts):
                store.put_judgment("hash", asked_hash(ask), "A")
        store.put_judge(judge, "hash")
    assert any(one["by"] == judge for one in standings(store)["ratings"])
    board = Pages(store).file("board.json").decode()
    assert '"default+stern"' in board and str(copied.root) not in board
    store.close()
