"""Takes the pictures of docs/images: `make pictures`, on a quiet machine.

A server of the default model with the demo adapters, as `make serve` starts it; each view in both themes. The report is
that of the adapter whose answers the playground shows.
"""

import json
import threading
from collections.abc import Sequence
from pathlib import Path

import click
import requests
from page_driver import PATIENCE_MS, Playground, chromium
from places import EXAMPLES, ROOT
from playwright.sync_api import Page, sync_playwright
from server_fixture import ServerProcess

from specserve.model.store import resolve_model

SHOWN = "debtags"
ADAPTERS = (SHOWN, "control2json", "summary", SHOWN)
VIEWS = ("playground", "board", "adapters", "report")
SIZE = {"width": 1280, "height": 940}
ADAPTERS_SIZE = {"width": 1280, "height": 520}
REPORT_SIZE = {"width": 1280, "height": 1640}  # down to the first plots


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


def playground(page: Page, path: Path) -> None:
    """A race on the first example in which the card of a rejected draft does not hide who has won."""
    play = Playground(page).set(model=SHOWN, beside=" race")
    page.evaluate("document.querySelector('#settings .more').open = false")
    examples = page.locator("#examples button")
    for idx in range(examples.count()):
        page.get_by_role("button", name="New conversation").click()
        examples.nth(idx).click()
        play.send(page.locator("#prompt").input_value())
        page.locator(".verdict").wait_for()
        page.evaluate("scrollTo(0, 0)")
        if shows_card(page, page.locator(".verdict").bounding_box()["y"]):
            break
        page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    page.screenshot(path=path)


def shows_card(page: Page, bottom: float) -> bool:
    """Point at a rejected draft whose card ends above `bottom`."""
    struck, card = page.locator(".output .struck"), page.locator("#card")
    for idx in range(struck.count()):
        page.mouse.move(0, 0)  # the card of the one before may lie over this one
        card.wait_for(state="hidden")
        struck.nth(idx).hover()
        card.locator("del").first.wait_for()
        box = card.bounding_box()
        if box["y"] + box["height"] < bottom:
            return True
    return False


def board(page: Page, url: str, path: Path, load_s: float) -> None:
    stop = threading.Event()
    threads = [threading.Thread(target=load, args=(url, adapter, stop)) for adapter in ADAPTERS]
    for thread in threads:
        thread.start()
    page.evaluate("location.hash = '#board'")
    page.wait_for_timeout(1000 * load_s)
    page.screenshot(path=path, full_page=True)
    stop.set()
    for thread in threads:
        thread.join()


def adapters(page: Page, path: Path) -> None:
    page.set_viewport_size(ADAPTERS_SIZE)
    page.evaluate("location.hash = '#adapters'")
    page.locator("#view-adapters article").nth(len(set(ADAPTERS)) - 1).wait_for()
    page.screenshot(path=path)


def report(page: Page, url: str, path: Path) -> None:
    page.set_viewport_size(REPORT_SIZE)
    response = page.goto(f"{url}/v1/adapters/{SHOWN}/report")
    if response is None or not response.ok:
        raise click.ClickException(f"{SHOWN} has no report.html: specserve eval writes it")
    page.screenshot(path=path)


@click.command(help=__doc__.partition("\n")[0])
@click.option("--adapters-dir", type=click.Path(exists=True, file_okay=False), default=str(EXAMPLES / "adapters"))
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default=ROOT / "docs" / "images")
@click.option("--only", multiple=True, type=click.Choice(VIEWS), help="Take no other; may be repeated.")
@click.option("--load-s", type=float, default=60, help="Seconds of load before the board's picture.")
def main(adapters_dir: str, out: Path, only: tuple[str, ...], load_s: float) -> None:
    out.mkdir(exist_ok=True)
    flags = ("--dtype", "auto", "--kv-cache-gib", "0.5", "--num-threads", "2", "--adapters-dir", adapters_dir)
    server = ServerProcess(resolve_model(""), *flags).wait_ready()
    try:
        take(server.url, out, only or VIEWS, load_s)
    finally:
        server.stop()


def take(url: str, out: Path, views: Sequence[str], load_s: float) -> None:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=["--no-sandbox"])
        for theme, suffix in (("light", ""), ("dark", "-dark")):
            page = browser.new_page(viewport=SIZE, color_scheme=theme)
            page.set_default_timeout(4 * PATIENCE_MS)
            page.goto(url)
            page.locator(f"[name=model] option[value={SHOWN}]").wait_for(state="attached")
            if "playground" in views:
                playground(page, out / f"playground{suffix}.png")
            if "board" in views:
                board(page, url, out / f"board{suffix}.png", load_s)
            if "adapters" in views:  # it tells of requests that the board's load made
                adapters(page, out / f"adapters{suffix}.png")
            if "report" in views:
                report(page, url, out / f"report{suffix}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
