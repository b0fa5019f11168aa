"""Whom the page reaches: everybody (axe finds nothing, the keyboard is enough, a phone shows it), and no other host."""

import pytest
from page_driver import PATIENCE_MS, Playground, figure_of, violations

VIEWS = ("playground", "board", "adapters")
MAX_BYTES = 300_000
MAX_PAINT_MS = 1000


@pytest.mark.parametrize(
    ("theme", "device"),
    [
        ("light", "desk"),
        ("dark", "phone"),
        pytest.param("dark", "desk", marks=pytest.mark.slow),
        pytest.param("light", "phone", marks=pytest.mark.slow),
    ],
)
def test_axe_finds_nothing(server, open_page, theme, device, phone):
    page = open_page(server.url, color_scheme=theme, **(phone if device == "phone" else {}))
    assert violations(page) == []
    play = Playground(page)
    text = server.complete("Hello", max_tokens=20, ignore_eos=False)["text"]
    fields = {"max_tokens": 20, "mode": "fixed", "prediction": text[:12] + " else", "beside": " race"}
    play.ask("Hello", kind="completion", **fields)
    play.page.locator(".output .struck").first.click()
    page.locator("#card").wait_for()
    assert violations(page) == []
    page.keyboard.press("Escape")
    play.answers()[0].get_by_role("button", name="curl").click()
    assert violations(page) == []
    page.locator("#code-close").click()
    page.evaluate("location.hash = '#board'")
    page.locator("tr[data-by]").first.wait_for()
    assert violations(page) == []
    page.evaluate("location.hash = '#adapters'")
    page.locator("#view-adapters article").first.wait_for()
    assert violations(page) == []


def test_nothing_is_wider_than_a_phone(server, open_page, phone):
    page = open_page(server.url, **phone)
    assert not page.locator("#settings").is_visible()  # folded up
    play = Playground(page)
    play.ask("Hello", max_tokens=60, beside=" race")
    for view in VIEWS:
        page.evaluate("view => { location.hash = view; }", view)
        page.locator(f"#view-{view}").wait_for()
        if view == "board":
            page.locator("tr[data-model]").first.wait_for()
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= phone["viewport"]["width"], view


def test_the_keyboard_is_enough(server, open_page):
    page = open_page(server.url)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to content"
    page.keyboard.press("Enter")
    page.locator("#prompt").focus()
    page.keyboard.type("Hello")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("there")
    page.keyboard.press("Enter")
    page.locator(".answer .actions").wait_for()
    assert page.locator(".user").text_content() == "Hello\nthere"
    assert page.evaluate("document.activeElement.id") == "prompt"


def test_a_chosen_theme_stays(server, open_page):
    page = open_page(server.url, color_scheme="light")
    ground = "getComputedStyle(document.body).backgroundColor"
    light, button = page.evaluate(ground), page.locator("#theme-button")
    button.click()
    button.click()
    assert button.text_content() == "Theme: dark"
    dark = page.evaluate(ground)
    page.reload()
    assert page.evaluate(ground) == dark != light
    button.click()
    assert page.evaluate(ground) == light  # the system's
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"dark => {ground} === dark", arg=dark)
    page.reload()
    assert page.evaluate(ground) == dark


def test_the_page_is_small_and_asks_nobody_else(server, browser):
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    page, bodies = context.new_page(), {}
    page.on("response", lambda response: bodies.update({response.url: response}))
    page.goto(server.url)
    for view in VIEWS:
        page.evaluate("view => { location.hash = view; }", view)
        page.locator(f"#view-{view}").wait_for()
        if view == "board":
            page.locator("#board-engine").filter(has_text="running").wait_for()
    assert all(url.startswith(server.url) for url in bodies)
    files = [response.body() for url, response in list(bodies.items()) if "/ui/" in url or url == server.url + "/"]
    assert len(files) > 10 and sum(map(len, files)) < MAX_BYTES
    page.goto(server.url)
    assert figure_of(Playground(page).ask("Hello", max_tokens=3)[0], "tokens") == "3"
    context.close()


def test_the_first_paint_takes_less_than_a_second(server, browser):
    """The fastest of some loads with nothing cached: another process may hold the cores in any single one."""
    paints = []
    while len(paints) < 10 and min(paints, default=MAX_PAINT_MS) >= MAX_PAINT_MS:
        context = browser.new_context()
        page = context.new_page()
        page.goto(server.url)
        found = page.wait_for_function("performance.getEntriesByName('first-contentful-paint')[0]?.startTime")
        paints.append(found.json_value())
        context.close()
    assert min(paints) < MAX_PAINT_MS, paints
