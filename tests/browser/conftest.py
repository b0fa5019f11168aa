"""A real Chromium, and a server with a tiny model whose adapter has a head, examples and a report.

Without Chromium or playwright the tests are skipped, with what is missing; `make browser` installs both. A page's test
fails on any error in its console.
"""

import json

import pytest
from lookahead_adapters import make_lookahead_adapter
from page_driver import PATIENCE_MS, PHONE, Playground, chromium, why_not
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess
from tiny_models import make_tiny_model

EXAMPLES = [
    {"title": "<b>bold</b> title", "messages": [{"role": "user", "content": "The quick <i>brown</i>"}]},
    {"title": "a text", "prompt": "Pack my box"},
]
REPORT = "<!doctype html><title>How alpha was trained</title><h1>Report</h1><script>document.title = 'run'</script>"


def pytest_collection_modifyitems(items):
    if reason := why_not():
        for item in items:
            if "/browser/" in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096)


@pytest.fixture(scope="session")
def adapters_dir(model_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    make_lookahead_adapter(model_dir, root / "alpha")
    (root / "alpha" / "examples.json").write_text(json.dumps(EXAMPLES))
    (root / "alpha" / "report.html").write_text(REPORT)
    make_peft_adapter(model_dir, root / "beta", r=4, seed=1, std=0.3)
    return root


@pytest.fixture(scope="session")
def server(model_dir, adapters_dir):
    server = ServerProcess(model_dir, "--adapters-dir", str(adapters_dir)).wait_ready()
    yield server
    server.wait_baseline()
    assert server.stop() == 0


@pytest.fixture(scope="module")
def browser():
    """It ends with its module: playwright's loop runs in this thread, and no other can meanwhile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Tests run as root in containers, where Chromium's sandbox cannot.
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def errors():
    """What the console said that is an error; a test that causes some takes them out."""
    found = []
    yield found
    assert found == []


@pytest.fixture
def open_page(browser, errors):
    """Opens an address in a context of its own."""
    contexts = []

    def open_at(url, **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        context.set_default_timeout(PATIENCE_MS)
        page = context.new_page()
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.locator("#settings [name=model] option").first.wait_for(state="attached")
        return page

    yield open_at
    for context in contexts:
        context.close()


@pytest.fixture
def play(server, open_page):
    return Playground(open_page(server.url))


@pytest.fixture
def phone():
    return {"viewport": PHONE, "has_touch": True, "is_mobile": True}
