"""The page at `/` over HTTP: who gets it, with which policy, and that it is small and asks nobody else for anything."""

import re

import pytest
import requests
from server_fixture import assert_error

from specserve.server.page_files import PAGE_DIR, TYPES, PageFiles

BROWSER = {"Accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
MAX_PAGE_BYTES = 300_000
FILES = sorted(PageFiles().files)


def test_a_browser_gets_the_page_and_everybody_else_the_state(server):
    page = server.get("/", headers=BROWSER)
    assert page.status_code == 200 and page.text.lower().startswith("<!doctype html>")
    for accept in ("*/*", "application/json", "", "text/html;q=0, */*", "text/html; Q=0.0", "text/htmlx"):
        state = server.get("/", headers={"Accept": accept})
        assert state.json() == {"status": "ok"}
    assert "Accept" in page.headers["Vary"]
    assert requests.head(server.url + "/", headers=BROWSER).headers["Content-Type"].startswith("text/html")


def test_the_page_runs_nothing_but_its_own_files(server):
    for path in ("/", *(f"/ui/{name}" for name in FILES)):
        headers = server.get(path, headers=BROWSER).headers
        policy = dict(part.split(maxsplit=1) for part in headers["Content-Security-Policy"].split("; "))
        assert policy["default-src"] == policy["base-uri"] == policy["frame-ancestors"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["require-trusted-types-for"] == "'script'"
        assert headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_served_as_what_it_is_and_only_sent_again_when_it_has_changed(server, name):
    reply = server.get(f"/ui/{name}")
    assert reply.content == PageFiles().files[name].body
    assert name == "index.html" or reply.content == (PAGE_DIR / name).read_bytes()
    assert reply.headers["Content-Type"] == f"{TYPES[name[name.rindex('.') :]]}; charset=utf-8"
    assert reply.headers["Cache-Control"] == "no-cache"
    again = requests.get(server.url + f"/ui/{name}", headers={"If-None-Match": reply.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    other = requests.get(server.url + f"/ui/{name}", headers={"If-None-Match": '"other"'})
    assert other.content == reply.content


@pytest.mark.parametrize(
    "path", ["none.js", "../page_files.py", "..%2fpage_files.py", "%2e%2e/app.py", "vendor", "vendor/", "/etc/passwd"]
)
def test_what_is_no_file_of_the_page_is_not_there(server, path):
    """Sent as it is written: clients tidy paths up."""
    prepared = requests.Request("GET", server.url).prepare()
    prepared.url = f"{server.url}/ui/{path}"
    with requests.Session() as session:
        assert_error(session.send(prepared), 404, "the page has no such file")


def test_a_server_without_a_leaderboard_says_so(server, locked_server):
    assert_error(server.get("/leaderboard/"), 404, "--leaderboard FILE")
    root = requests.get(server.url + "/leaderboard", allow_redirects=False)
    assert (root.status_code, root.headers["Location"]) == (301, "/leaderboard/")
    assert locked_server.get("/leaderboard/").status_code == 401
    for path in ("/", "/ui/index.html"):
        assert "leaderboard" not in server.get(path, headers=BROWSER).text.lower()


def test_a_browser_at_the_leaderboard_is_asked_for_the_key_that_it_does_not_send(locked_server):
    for path in ("/leaderboard", "/leaderboard/", "/leaderboard/words.answers-1.html"):
        page = locked_server.get(path, headers=BROWSER)
        assert page.status_code == 200 and page.content == (PAGE_DIR / "leaderboard.html").read_bytes()
        assert "script-src 'self'" in page.headers["Content-Security-Policy"]
        assert page.headers["Content-Security-Policy"].endswith("frame-src blob:")
        wrong = locked_server.get(path, headers={"Authorization": "Bearer wrong"})
        assert wrong.status_code == 401 and wrong.headers["Content-Type"].startswith("application/json")
    assert requests.post(locked_server.url + "/leaderboard/", headers=BROWSER).status_code == 401
    assert requests.get(locked_server.url + "/leaderboards", headers=BROWSER).status_code == 401


def test_no_key_is_needed_for_the_page_and_for_nothing_else_under_its_name(locked_server):
    assert locked_server.get("/", headers=BROWSER).status_code == 200
    assert locked_server.get(f"/ui/{FILES[0]}").status_code == 200
    assert_error(locked_server.get("/ui/none"), 404)
    for method, path in (("GET", "/ui"), ("POST", "/ui/index.html"), ("GET", "/uix"), ("GET", "/v1/models")):
        reply = requests.request(method, locked_server.url + path, headers=BROWSER)
        assert reply.status_code == 401, (method, path)
    prepared = requests.Request("GET", locked_server.url).prepare()
    prepared.url = f"{locked_server.url}/ui/../v1/models"
    with requests.Session() as session:
        assert session.send(prepared).status_code in (401, 404)


def test_the_page_is_small_and_names_no_other_host():
    assert sum(len(file.body) for file in PageFiles().files.values()) < MAX_PAGE_BYTES
    for name, file in PageFiles().files.items():
        if not name.startswith("vendor/"):
            hosts = set(re.findall(rb"https?://[\w.-]+", file.body))
            assert hosts <= {b"http://www.w3.org"}, name  # namespaces are names


def test_our_scripts_make_no_html_of_text():
    """The policy would refuse it too; here it is found before anybody runs it."""
    for name, file in PageFiles().files.items():
        if name.endswith(".js") and not name.startswith("vendor/"):
            makers = rb"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function"
            found = re.search(makers, file.body)
            assert found is None, (name, found)
