"""The leaderboard's pages in Chromium: readable in both themes, and all of them reached by the keyboard alone."""

import pytest
from page_driver import PATIENCE_MS, PHONE, violations
from server_fixture import ServerProcess

from specserve.leaderboard.entries import Cell, KeptAnswer, Model, Task, TaskRow
from specserve.leaderboard.site import export
from specserve.leaderboard.store import LeaderboardStore


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """Made by hand: what is on the pages is tested elsewhere."""
    root = tmp_path_factory.mktemp("board")
    store = LeaderboardStore(root / "board.sqlite3", create=True)
    rows = [TaskRow(f"p{idx}", f"user: question {idx}", "wanted") for idx in range(26)]
    store.put_task("words", Task(kind="generate", data="/x/rows.jsonl", metric="rouge_l"), "hash", rows)
    (task,) = store.tasks()
    for name in ("base", "tuned"):
        store.put_model(name, Model(base=""))
        model = store.models()[-1]
        for row in rows:
            text = "wanted" if name == "tuned" else "something else"
            store.put_answer(name, row.prompt_hash, KeptAnswer(text, "stop", 5, 2, 4, 0.1, "here"))
        cell = Cell(
            score=0.5,
            row_scores=(1.0 if name == "tuned" else 0.0,) * 26,
            metrics={},
            num_rows=26,
            tokens_per_s=9.0,
            tokens_per_verification=2.0,
            hardware="here",
        )
        store.put_cell(task, model.number, name, cell)
    store.put_model("missing", Model(base=""))
    store.close()
    export(root / "board.sqlite3", root / "pages")
    return root / "pages"


def test_behind_a_key_it_asks_for_one_and_its_links_lead_on_and_back(browser, board, model_dir):
    server = ServerProcess(model_dir, "--api-key", "secret", "--leaderboard", str(board.parent / "board.sqlite3"))
    try:
        server.wait_ready()
        with browser.new_context() as context:
            page = context.new_page()
            page.set_default_timeout(PATIENCE_MS)
            page.goto(server.url + "/leaderboard/")
            page.locator("#key-input").fill("wrong")
            page.keyboard.press("Enter")
            page.get_by_text("does not take this key").wait_for()
            page.locator("#key-input").fill("secret")
            page.keyboard.press("Enter")
            shown = page.frame_locator("#shown")
            shown.get_by_role("heading", name="Ratings by the tasks' metrics").wait_for()
            assert shown.locator("html").evaluate("() => document.styleSheets[0].cssRules.length")  # not refused
            shown.get_by_role("link", name="words").click()
            shown.get_by_role("heading", name="tuned: 1.000").first.wait_for()
            assert page.url.endswith("/leaderboard/#words.answers-1.html") and page.title() == "words: answers"
            page.go_back()
            shown.get_by_role("heading", name="Ratings by the tasks' metrics").wait_for()
            page.goto(server.url + "/leaderboard/words.answers-2.html")  # the tab has the key
            shown.get_by_role("heading", name="Row 26").wait_for()
            page.goto(server.url + "/")
            page.get_by_role("button", name="API key").click()
            page.get_by_text("A key is in use").wait_for()
            page.keyboard.press("Escape")
            page.set_viewport_size(PHONE)
            assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
            page.get_by_role("link", name="Leaderboard").click()
            shown.get_by_role("heading", name="Ratings by the tasks' metrics").wait_for()
    finally:
        assert server.stop() == 0


@pytest.mark.parametrize("scheme, name", [("light", "index.html"), ("dark", "words.answers-2.html")])
def test_axe_finds_nothing(browser, board, scheme, name):
    with browser.new_context(color_scheme=scheme, viewport={"width": 400, "height": 800}) as context:
        page = context.new_page()
        page.goto(f"file://{board / name}")
        assert violations(page) == []
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"), name


def test_answers_are_reached_and_left_by_the_keyboard(browser, board):
    with browser.new_context() as context:
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.goto(f"file://{board / 'index.html'}")
        go_to(page, "words")
        page.keyboard.press("Enter")
        page.wait_for_url("**/words.answers-1.html")
        assert page.get_by_role("heading", name="tuned: 1.000").count() == 25
        go_to(page, "Prompt")
        page.keyboard.press("Enter")
        assert page.get_by_text("user: question 0", exact=True).is_visible()
        page.goto(f"file://{board / 'words.answers-1.html'}")
        go_to(page, "2")
        page.keyboard.press("Enter")
        page.wait_for_url("**/words.answers-2.html")
        go_to(page, "All tasks")
        page.keyboard.press("Enter")
        page.wait_for_url("**/index.html")


def go_to(page, text):
    """By Tab, as far as it takes."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent").strip() == text:
            return
    raise AssertionError(f"Tab does not reach {text!r}")
