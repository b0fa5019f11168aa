"""The live board, the list of adapters, keys, and a server that goes away and comes back under an open page."""

import json
import os
import signal
import time

import pytest
from page_driver import PATIENCE_MS, Playground, figure_of
from ports import quiet_port
from server_fixture import ServerProcess

from specserve.server.access.key_file import entry_text

KEY = "open sesame"


@pytest.fixture
def restarted(model_dir, adapters_dir):
    """A server's flags with a port that stays; a list of the processes that a test starts."""
    flags, processes = ("--adapters-dir", str(adapters_dir), "--port", str(quiet_port())), []

    def start():
        processes.append(ServerProcess(model_dir, *flags).wait_ready())
        return processes[-1]

    yield start
    for process in processes:
        assert process.stop() == 0


def tile(page, name: str) -> str:
    return page.locator(f"[data-tile={name}]").text_content()


def wait_for_text(page, selector: str, text: str) -> None:
    page.locator(selector).filter(has_text=text).first.wait_for()


def test_the_board_follows_what_the_server_does(server, open_page):
    page = open_page(server.url + "/#board")
    wait_for_text(page, "#board-engine", "tiny, running on cpu")
    before = int(tile(page, "done").replace(",", ""))
    for _ in range(3):
        server.complete(model="alpha", max_tokens=30, speculation={"mode": "fixed"})
    page.wait_for_function(
        "num => Number(document.querySelector('[data-tile=done]').textContent.replace(',', '')) >= num", arg=before + 3
    )
    page.locator("tr[data-model=alpha]").wait_for()
    page.locator("tr[data-by]").first.wait_for()
    assert tile(page, "kept").endswith("%") and page.locator(".plot canvas").count() == 5
    said = page.locator(".plot").first.get_attribute("aria-label")
    assert said.startswith("Tokens a second: ")
    page.get_by_role("link", name="Playground").click()
    page.get_by_role("link", name="Live board").click()  # opens its stream again
    server.complete(max_tokens=5)
    page.wait_for_function(
        "num => Number(document.querySelector('[data-tile=done]').textContent.replace(',', '')) >= num", arg=before + 4
    )


def test_tokens_per_verification_are_those_of_the_metrics(server, open_page):
    stats = server.get("/v1/stats").json()
    model = {
        "model": "x",
        "running": 0,
        "waiting": 0,
        "row_price": 0.1,
        "drafted_per_pos": [9],
        "accepted_per_pos": [5],
    }
    # An end of the output within a draft: fewer tokens than verifications and kept drafts.
    stats["speculation"]["by_adapter"] = [
        {**model, "verifications": 10, "generated": 30, "drafted": 40, "accepted": 25}
    ]
    page = open_page(server.url)
    event = f"data: {json.dumps(stats)}\n\n"
    page.route("**/v1/stats?stream=true", lambda route: route.fulfill(body=event, content_type="text/event-stream"))
    page.get_by_role("link", name="Live board").click()
    cells = page.locator("tr[data-model=x] td")
    cells.first.wait_for()
    assert [text.replace("\xa0", " ") for text in cells.all_text_contents()] == ["30", "3.00", "63 %", "0.10", "50"]


def test_the_list_of_adapters_leads_to_the_playground_and_to_reports(server, open_page):
    page = open_page(server.url + "/#adapters")
    card = page.locator("#view-adapters article").filter(has_text="alpha")
    with page.expect_popup() as popup:
        card.get_by_role("link", name="Training report").click()
    report = popup.value
    report.locator("h1").wait_for()
    assert report.title() == "How alpha was trained"  # its script was not run
    report.close()
    assert "no training report" in page.locator("#view-adapters article").filter(has_text="beta").text_content()
    card.get_by_role("button", name="Try it").click()
    assert page.locator("[name=model]").input_value() == "alpha" and page.locator("#prompt").is_visible()


def test_a_page_outlives_engines_and_servers(restarted, open_page, errors):
    server = restarted()
    page = open_page(server.url + "/#board")
    wait_for_text(page, "#board-engine", "running")
    os.kill(server.engine_pid(), signal.SIGKILL)
    wait_for_text(page, "#board-engine", "1 restarts")
    assert server.stop() == 0
    wait_for_text(page, "#state", "not reached")
    page.locator("#view-board .error").wait_for()
    server = restarted()
    wait_for_text(page, "#state", "serving")
    page.locator("#view-board .error").wait_for(state="hidden")
    num_done = tile(page, "done")
    server.complete(max_tokens=5)
    deadline = time.monotonic() + 60
    while tile(page, "done") == num_done:
        assert time.monotonic() < deadline
        page.wait_for_timeout(100)
    page.get_by_role("link", name="Playground").click()
    (answer,) = Playground(page).ask("Hello", max_tokens=5)
    assert figure_of(answer, "tokens") == "5"
    network = ("Failed to load resource", "net::ERR_")  # the browser's own lines while nobody answered
    errors[:] = [line for line in errors if not line.startswith(network)]


def test_a_stream_that_breaks_off_says_so_and_keeps_its_text(restarted, open_page, errors):
    server = restarted()
    play = Playground(open_page(server.url))
    with play.set(max_tokens=3500, model="alpha").held_answer(server):  # given output cannot be made again
        os.kill(server.engine_pid(), signal.SIGKILL)
    play.wait_done()
    (answer,) = play.answers()
    assert "engine" in answer.locator("[role=alert]").text_content()
    assert int(figure_of(answer, "tokens").replace(",", "")) > 0
    (answer,) = play.ask("Again", max_tokens=5)
    assert figure_of(answer, "tokens") == "5"
    errors[:] = [line for line in errors if not line.startswith("Failed to load resource")]  # /health was 503


@pytest.fixture(scope="module")
def keyed_server(model_dir, adapters_dir, tmp_path_factory):
    """A server that wants a key for all, the stats too."""
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    file.write_text(
        entry_text("all", KEY, {"scopes": ["generate", "metrics"]})
        + entry_text("talker", "only words", {"scopes": ["generate"]})
    )
    server = ServerProcess(model_dir, "--adapters-dir", str(adapters_dir), "--api-keys-file", str(file)).wait_ready()
    yield server
    assert server.stop() == 0


@pytest.fixture
def context(browser):
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    yield context
    context.close()


def give_key(page, key: str) -> None:
    page.locator("#key-input").fill(key)
    page.get_by_role("button", name="Use it").click()


def test_a_board_without_a_key_asks_for_it_once(keyed_server, context):
    page = context.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url) if "/v1/stats" in request.url else None)
    page.clock.install()
    page.goto(keyed_server.url + "/#board")
    dialog = page.locator("#key-dialog")
    dialog.wait_for()
    wait_for_text(page, "#view-board .error", "API key is needed")
    page.get_by_role("button", name="Cancel").click()
    assert len(asked) == 1
    with page.expect_response("**/health"):
        page.clock.run_for(20_000)
    assert len(asked) == 1 and not dialog.is_visible()
    page.locator("#key-button").click()
    give_key(page, "only words")
    wait_for_text(page, "#view-board .error", "has not the scope metrics")
    with page.expect_response("**/health"):
        page.clock.run_for(20_000)
    assert len(asked) == 2 and not dialog.is_visible()
    page.locator("#key-button").click()
    page.keyboard.press("Escape")
    assert page.evaluate("sessionStorage.getItem('specserve-key')") == "only words"
    page.locator("#key-button").click()
    give_key(page, KEY)
    wait_for_text(page, "#board-engine", "running")
    assert len(asked) == 3


def test_a_key_is_asked_for_kept_in_the_tab_and_sent(keyed_server, adapters_dir, context, tmp_path):
    server = keyed_server
    page = context.new_page()
    page.goto(server.url)
    dialog = page.locator("#key-dialog")
    dialog.wait_for()
    give_key(page, "wrong")
    wait_for_text(page, "#key-reason", "does not take this key")
    give_key(page, KEY)
    page.locator("[name=model] option").first.wait_for(state="attached")
    page.reload()
    page.locator("[name=model] option").first.wait_for(state="attached")
    assert not dialog.is_visible()
    (answer,) = Playground(page).ask("Hello", max_tokens=5)
    assert figure_of(answer, "tokens") == "5"
    answer.get_by_role("button", name="curl").click()
    assert "$SPECSERVE_API_KEY" in page.locator("#code-text").text_content()
    assert "sesame" not in page.content() and "sesame" not in page.url
    page.locator("#code-close").click()
    page.get_by_role("link", name="Adapters").click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save training report").click()
    assert download.value.suggested_filename == "alpha-report.html"
    saved = context.new_page()
    download.value.save_as(tmp_path / "saved.html")
    saved.goto((tmp_path / "saved.html").as_uri())
    assert saved.locator("h1").text_content() == "Report"
    assert saved.title() == "How alpha was trained"  # its script was not run
    report = adapters_dir / "alpha" / "report.html"
    report.rename(tmp_path / "report.html")
    try:
        page.get_by_role("button", name="Save training report").click()
        wait_for_text(page, "#view-adapters [role=alert]", "has no report.html")
    finally:
        (tmp_path / "report.html").rename(report)
    page.get_by_role("link", name="Live board").click()
    wait_for_text(page, "#board-engine", "running")
    other = context.new_page()  # another tab asks anew
    other.goto(server.url)
    other.locator("#key-dialog").wait_for()
