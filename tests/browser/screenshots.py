"""Takes the pictures of docs/images from a server of the default model with the demo adapters; the machine be quiet.

make serve                                                     # in another terminal
PYTHONPATH=tests/fixtures:. .venv/bin/python tests/browser/screenshots.py
"""

import json
import threading
from pathlib import Path

import click
import requests
from page_driver import PATIENCE_MS, Playground, chromium
from places import EXAMPLES, ROOT
from playwright.sync_api import sync_playwright

ADAPTERS = ("debtags", "control2json", "summary", "debtags")
BOARD_S = 60  # of load before the board's picture
SIZE = {"width": 1280, "height": 940}


def messages_of(adapter: str) -> list[list[dict]]:
    """Held-out prompts of its task."""
    rows = map(json.loads, (EXAMPLES / "data" / f"{adapter}.dev.jsonl").read_text().splitlines())
    return [row["messages"][:1] if "messages" in row else [{"role": "user", "content": row["prompt"]}] for row in rows]


def load(url: str, adapter: str, stop: threading.Event) -> None:
    while not stop.is_set():
        for messages in messages_of(adapter):
            if stop.is_set():
                return
            body = {"model": adapter, "messages": messages, "temperature": 0, "max_tokens": 200}
            requests.post(f"{url}/v1/chat/completions", json=body, timeout=600).raise_for_status()


def playground(page, path: Path) -> None:
    play = Playground(page).set(model="debtags", beside=" race")
    page.evaluate("document.querySelector('#settings .more').open = false")
    page.get_by_role("button", name="libsox-fmt-alsa").click()
    play.send(page.locator("#prompt").input_value())
    page.locator(".verdict").wait_for()
    page.evaluate("scrollTo(0, 0)")
    if (struck := page.locator(".output .struck")).count():
        struck.nth(min(1, struck.count() - 1)).hover()
        page.locator("#card del").first.wait_for()
    page.screenshot(path=path)


def board(page, url: str, path: Path) -> None:
    stop = threading.Event()
    threads = [threading.Thread(target=load, args=(url, adapter, stop)) for adapter in ADAPTERS]
    for thread in threads:
        thread.start()
    page.evaluate("location.hash = '#board'")
    page.wait_for_timeout(1000 * BOARD_S)
    page.screenshot(path=path, full_page=True)
    stop.set()
    for thread in threads:
        thread.join()


@click.command()
@click.option("--url", default="http://127.0.0.1:8000", show_default=True)
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "docs" / "images")
def main(url: str, out: Path) -> None:
    out.mkdir(exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for theme, suffix in (("light", ""), ("dark", "-dark")):
            page = browser.new_page(viewport=SIZE, color_scheme=theme)
            page.set_default_timeout(4 * PATIENCE_MS)
            page.goto(url)
            page.locator("[name=model] option[value=debtags]").wait_for(state="attached")
            playground(page, out / f"playground{suffix}.png")
            board(page, url, out / f"board{suffix}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
