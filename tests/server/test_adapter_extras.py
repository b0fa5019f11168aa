"""Examples and reports that adapters' folders bring: untrusted files, read within limits, harmless in a browser."""

import json
import os
import shutil
import time

import pytest
from server_fixture import assert_error

from specserve.adapter_files import MAX_EXAMPLES, MAX_EXAMPLES_BYTES, content_hash
from specserve.server.adapter_extras import MAX_REPORT_BYTES

REPORT = "<!doctype html><title>Report</title><script>alert(1)</script>"
GOOD = {"title": "short", "messages": [{"role": "user", "content": "<b>Hi</b>"}]}
TEXT = {"title": "text", "prompt": "Package: a\n"}


@pytest.fixture(scope="module")
def adapters_dir(open_dir):
    return open_dir


@pytest.fixture(scope="module")
def server(open_server):
    return open_server


@pytest.fixture
def folder(adapters_dir):
    """Of the adapter `good`, with nothing in it but the adapter afterwards."""
    folder = adapters_dir / "good"
    yield folder
    for name in ("examples.json", "report.html"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def examples(server, name="good"):
    reply = server.get(f"/v1/adapters/{name}/examples")
    assert reply.status_code == 200, reply.text
    return reply.json()["data"]


def logged(server, since, words, num):
    """The `num` lines with `words` that the log has from line `since` on, which another thread reads."""
    deadline = time.monotonic() + 60
    while len(lines := [line for line in server.log[since:] if words in line]) < num:
        assert time.monotonic() < deadline, server.log[since:]
        time.sleep(0.01)
    return lines


def entry(server, name="good"):
    (found,) = [entry for entry in server.get("/v1/adapters").json()["data"] if entry["id"] == name]
    return found["has_report"], found["has_examples"]


def test_an_adapter_without_either_has_no_examples_and_no_report(server, folder):
    assert entry(server) == (False, False) and examples(server) == []
    assert_error(server.get("/v1/adapters/good/report"), 404, "'good'", "specserve train")


def test_both_are_served_and_are_no_part_of_the_adapter(server, folder):
    before = content_hash(folder)
    loaded = server.complete(model="good", max_tokens=2)
    (folder / "examples.json").write_text(json.dumps([GOOD, TEXT]))
    (folder / "report.html").write_text(REPORT)
    assert content_hash(folder) == before
    assert examples(server) == [GOOD, TEXT] and entry(server) == (True, True)
    report = server.get("/v1/adapters/good/report")
    assert report.text == REPORT and report.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = report.headers["Content-Security-Policy"].split("; ")
    assert policy == ["sandbox", "default-src 'none'", "style-src 'unsafe-inline'", "img-src data:"]
    assert report.headers["X-Content-Type-Options"] == "nosniff"
    assert server.complete(model="good", max_tokens=2) == loaded


def test_an_adapter_that_was_given_its_name_brings_them_too(server, folder, adapters_dir):
    (folder / "report.html").write_text(REPORT)
    loaded = server.post("/v1/load_lora_adapter", {"lora_name": "other", "lora_path": "good"})
    assert loaded.status_code == 200
    assert entry(server, "other") == (True, False)
    assert server.get("/v1/adapters/other/report").text == REPORT
    assert server.post("/v1/unload_lora_adapter", {"lora_name": "other"}).status_code == 200
    assert_error(server.get("/v1/adapters/other/report"), 404, "other")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "{}",
        "7",
        "null",
        '"text"',
        "[" * 100_000,
        "\ufeff[]",
        '[{"title": "a", "title": "b", "prompt": "c"}]',
        json.dumps([{"title": "a", "prompt": "b" * MAX_EXAMPLES_BYTES}]),
    ],
    ids=lambda content: f"{content[:12]!r}-{len(content)}",
)
def test_what_is_no_list_of_examples_is_none_and_the_log_says_so(server, folder, content):
    (folder / "examples.json").write_text(content)
    num_lines = len(server.log)
    assert examples(server) == []
    (line,) = logged(server, num_lines, "examples are shown", 1)
    assert "examples.json" in line and line.count("adapter 'good'") == 1 and "request" not in line


def test_bad_entries_are_left_out_and_good_ones_stay(server, folder):
    bad = [
        {"title": "both", "prompt": "a", **{"messages": GOOD["messages"]}},
        {"title": "neither"},
        {"title": "no messages", "messages": []},
        {"title": "both, one empty", "prompt": "a", "messages": []},
        {"title": "", "prompt": "a"},
        {"title": "x" * 201, "prompt": "a"},
        {"title": "role", "messages": [{"role": "root", "content": "a"}]},
    ]
    (folder / "examples.json").write_text(json.dumps(bad))
    num_lines = len(server.log)
    assert examples(server) == []
    lines = logged(server, num_lines, "is not shown", len(bad))
    assert all("of examples.json of adapter 'good' is" in line for line in lines)
    (folder / "examples.json").write_text(json.dumps([*bad[:6], GOOD, {**TEXT, "more": 1}, TEXT]))
    assert examples(server) == [GOOD, TEXT]  # of the first eight
    (folder / "examples.json").write_text(json.dumps([7, None, GOOD] + [TEXT] * 1000))
    assert examples(server) == [GOOD] + [TEXT] * (MAX_EXAMPLES - 3)


@pytest.mark.parametrize("name", ["examples.json", "report.html"])
def test_nothing_is_read_from_outside_of_the_adapters_folder(server, folder, name, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text(json.dumps([GOOD]))
    (folder / name).symlink_to(secret)
    for what in ("examples", "report"):
        assert_error(server.get(f"/v1/adapters/good/{what}"), 403, name, "link")


def test_a_report_that_is_too_large_or_no_file_is_an_error_that_says_so(server, folder):
    report = folder / "report.html"
    with open(report, "wb") as stream:
        stream.truncate(MAX_REPORT_BYTES + 1)
    assert_error(server.get("/v1/adapters/good/report"), 400, str(MAX_REPORT_BYTES), "report.html")
    report.unlink()
    os.mkfifo(report)
    assert_error(server.get("/v1/adapters/good/report"), 400, "named pipe")
    report.unlink()
    report.mkdir()
    assert_error(server.get("/v1/adapters/good/report"), 400, "report.html")
    assert entry(server) == (False, False)


@pytest.mark.parametrize("name", ["none", "tiny", "<b>", "..", "%2e%2e", "a%2fb", "good%00"])
def test_a_name_that_is_no_adapter_is_an_error_without_a_file(server, name):
    for what in ("examples", "report"):
        reply = server.get(f"/v1/adapters/{name}/{what}")
        assert reply.status_code in (400, 404), reply.text
        assert "<b>" not in reply.headers["Content-Type"] and reply.json()["error"]["message"]
