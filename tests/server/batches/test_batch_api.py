"""/v1/files and /v1/batches of a real server: through the openai client, for each key its own, and over a kill -9."""

from __future__ import annotations

import json
import os
import signal
import time

import openai
import pytest
import requests
from server_fixture import ServerProcess, assert_error
from waiting import wait_until

from specserve.cli.main import exit_code_of
from specserve.server.access.key_file import entry_text, new_key

KEYS = {name: new_key() for name in ("red", "blue")}
CHAT, TEXT, ANSWERS = "/v1/chat/completions", "/v1/completions", "/v1/responses"
ENDED = ("completed", "failed", "cancelled", "expired")


class KeyedServer(ServerProcess):
    def get(self, path, name="red", **kwargs):
        return super().get(path, headers={"Authorization": f"Bearer {KEYS[name]}"}, **kwargs)

    def post(self, path, body, name="red", **kwargs):
        return super().post(path, body, headers={"Authorization": f"Bearer {KEYS[name]}"}, **kwargs)

    def client(self, name="red"):
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEYS[name], max_retries=0)


@pytest.fixture(scope="module")
def start(patient_model_dir, alpha_dir, tmp_path_factory):
    """Starts servers over one folder of batches, one after the other."""
    root = tmp_path_factory.mktemp("batches")
    keys = root / "keys.yaml"
    fields = {"red": {"scopes": ["generate", "metrics"]}, "blue": {}}
    keys.write_text("".join(entry_text(name, KEYS[name], fields[name]) for name in KEYS))
    flags = ("--adapters-dir", str(alpha_dir.parent), "--api-keys-file", str(keys), "--batch-dir", str(root / "state"))
    flags += ("--batch-max-file-mib", "1", "--batch-max-rows", "300", "--max-num-seqs", "8")
    flags += ("--batch-key-gib", "0.002")
    servers = []

    def start():
        servers.append(server := KeyedServer(patient_model_dir, *flags).wait_ready())
        return server

    start.state = root / "state"
    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(start):
    return start()


def row(custom_id, url=CHAT, **fields):
    body = {"model": "tiny", "temperature": 0, **fields}
    if url == CHAT:
        body = {"messages": [{"role": "user", "content": f"Say {custom_id}"}], "max_tokens": 6, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def upload(client, rows):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in rows)
    return client.files.create(file=("rows.jsonl", text.encode()), purpose="batch")


def begin(client, rows, endpoint=CHAT):
    file = upload(client, rows)
    return client.batches.create(input_file_id=file.id, endpoint=endpoint, completion_window="24h")


def finished(client, batch):
    wait_until(lambda: client.batches.retrieve(batch.id).status in ENDED)
    return client.batches.retrieve(batch.id)


def lines_of(client, file_id):
    return [] if file_id is None else [json.loads(line) for line in client.files.content(file_id).text.splitlines()]


def run(client, rows, endpoint=CHAT):
    """The batch when it has ended, its answers by custom_id, and its errors."""
    batch = finished(client, begin(client, rows, endpoint))
    answers, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    return batch, {line["custom_id"]: line for line in answers}, {line["custom_id"]: line for line in errors}


def text_of(line):
    return line["response"]["body"]["choices"][0]["message"]["content"]


def test_rows_are_answered_as_requests_are_by_the_model_that_each_names(server):
    client, before = server.client(), server.metrics()
    rows = [row("base"), row("lora", model="alpha"), row("two", n=2, temperature=0.9, seed=3)]
    batch, answers, errors = run(client, rows)
    assert (batch.status, batch.request_counts.to_dict(), errors) == (
        "completed",
        {"total": 3, "completed": 3, "failed": 0},
        {},
    )
    assert list(answers) == ["base", "lora", "two"]
    metrics, total = server.metrics(), 0
    name = 'e2e_request_latency_seconds_count{model="alpha"}'
    assert metrics.get(name, 0) == before.get(name, 0)  # nobody waited for it
    name = 'generation_tokens_total{model="alpha"}'
    assert metrics[name] - before.get(name, 0) == 6
    for sent in rows:
        direct = server.post(CHAT, sent["body"]).json()
        line = answers[sent["custom_id"]]
        assert line["error"] is None and line["response"]["status_code"] == 200
        assert [choice["message"] for choice in line["response"]["body"]["choices"]] == [
            choice["message"] for choice in direct["choices"]
        ]
        assert line["response"]["body"]["model"] == sent["body"]["model"]
        total += direct["usage"]["total_tokens"]
    assert batch.usage.total_tokens == total and batch.expires_at - batch.created_at == 86400
    assert text_of(answers["base"]) != text_of(answers["lora"])


def test_completions_responses_and_embeddings_have_batches_too(server):
    client = server.client()
    _, answers, _ = run(client, [row("a", TEXT, prompt="The", max_tokens=4)], TEXT)
    want = server.complete("The", max_tokens=4, ignore_eos=False, model="tiny")
    assert answers["a"]["response"]["body"]["choices"][0]["text"] == want["text"]
    batch, answers, _ = run(client, [row("a", ANSWERS, input="Hello", max_output_tokens=16)], ANSWERS)
    assert answers["a"]["response"]["body"]["object"] == "response" and batch.usage.output_tokens > 0
    sent = row("a", "/v1/embeddings", input=["one", "two"], encoding_format="float")
    del sent["body"]["temperature"]
    batch, answers, _ = run(client, [sent], "/v1/embeddings")
    want = server.post("/v1/embeddings", sent["body"]).json()
    assert answers["a"]["response"]["body"]["data"] == want["data"] and len(want["data"]) == 2
    assert batch.usage.input_tokens == want["usage"]["prompt_tokens"] and batch.usage.output_tokens == 0


def test_rows_that_cannot_be_served_are_lines_of_the_error_file_and_the_others_go_on(server):
    bad = {
        "model": (404, row("model", model="nobody"), "model"),
        "field": (400, row("field", temprature=1), "temprature"),
        "type": (400, row("type", messages="Hello"), "messages"),
        "long": (400, row("long", messages=[{"role": "user", "content": "word " * 6000}]), None),
        "stream": (400, row("stream", stream=True), "stream"),
        "priority": (403, row("priority", priority=5), "priority"),
        "twice": (400, json.dumps(row("twice"))[:-2] + ', "model": "tiny"}}', "model"),
    }
    batch, answers, errors = run(server.client(), [row("good"), *(line for _, line, _ in bad.values()), row("last")])
    assert set(answers) == {"good", "last"} and set(errors) == set(bad)
    assert batch.request_counts.to_dict() == {"total": len(bad) + 2, "completed": 2, "failed": len(bad)}
    for name, (status, _, param) in bad.items():
        response = errors[name]["response"]
        assert response["status_code"] == status and errors[name]["error"] is None, response
        error = response["body"]["error"]
        assert set(error) == {"message", "type", "param", "code"} and param in (None, error["param"]), error


BAD_FILES = {
    "json": ([row("a"), "{", row("b")], "invalid_json_line", 2),
    "nested": ([row("a"), '{"custom_id": "b", "body": ' + "[" * 5000 + "]" * 5000 + "}"], "invalid_json_line", 2),
    "order mark": (["\ufeff" + json.dumps(row("a"))], "invalid_json_line", 1),
    "no object": (["[]"], "invalid_request", 1),
    "field": (['{"custom_id": "a", "url": "/v1/completions"}'], "invalid_request", 1),
    "unknown": ([row("a") | {"extra": 1}], "invalid_request", 1),
    "method": ([row("a") | {"method": "GET"}], "invalid_request", 1),
    "body": ([row("a") | {"body": []}], "invalid_request", 1),
    "id": ([row("")], "invalid_request", 1),
    "same id": ([row("a"), row("b"), "", row("a")], "duplicate_custom_id", 4),
    "url": ([row("a"), row("b", TEXT)], "url_mismatch", 2),
    "other url": ([row("a", "/v1/unknown")], "url_mismatch", 1),
    "empty": (["", " "], "empty_file", None),
    "many": ([row(str(idx)) for idx in range(301)], "too_many_tasks", None),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_list_of_requests_fails_with_the_line(server, name):
    rows, code, line = BAD_FILES[name]
    batch, answers, _ = run(server.client(), rows)
    assert batch.status == "failed" and batch.failed_at and not answers
    (error,) = batch.errors.data
    assert (error.code, error.line) == (code, line) and error.message


def test_a_key_sees_only_its_own_files_and_batches(server):
    red, blue = server.client("red"), server.client("blue")
    before = {found.id for found in (*blue.files.list(), *blue.batches.list())}
    batch, answers, errors = run(blue, [row("mine", model="alpha"), row("base", model="tiny")])
    assert set(answers) == {"mine", "base"}
    assert {file.id for file in blue.files.list()} - before == {batch.input_file_id, batch.output_file_id}
    assert [found.id for found in blue.batches.list() if found.id not in before] == [batch.id]
    for file_id in (batch.input_file_id, batch.output_file_id):
        for call in (red.files.retrieve, red.files.content, red.files.delete):
            with pytest.raises(openai.NotFoundError):
                call(file_id)
        assert file_id not in {file.id for file in red.files.list()}
    for call in (red.batches.retrieve, red.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call(batch.id)
    with pytest.raises(openai.NotFoundError, match="input_file_id|of this key"):
        red.batches.create(input_file_id=batch.input_file_id, endpoint=CHAT, completion_window="24h")
    assert batch.id not in {found.id for found in red.batches.list()}


def test_lists_go_on_from_where_they_were_left(server):
    client = server.client()
    ids = [upload(client, [row("a")]).id for _ in range(3)]
    pages = [server.get(f"/v1/files?limit=2&order=desc{after}").json() for after in ("", f"&after={ids[1]}")]
    assert [file["id"] for file in pages[0]["data"]] == ids[:0:-1] and pages[0]["has_more"]
    assert pages[1]["data"][0]["id"] == ids[0]
    assert [file.id for file in client.files.list(order="asc", after=ids[1])] == [ids[2]]
    assert all(file.purpose == "batch" for file in client.files.list(purpose="batch"))
    assert len(list(client.batches.list(limit=1))) == len(list(client.batches.list()))
    for query in ("limit=0", "limit=x", "order=up", "purpose=vision", "page=1"):
        assert_error(server.get(f"/v1/files?{query}"), 400)
    assert_error(server.get("/v1/batches?after=batch_none"), 404, "batch_none")


def test_uploads_that_are_none_are_refused_and_leave_nothing(server):
    files = len(list(server.client().files.list()))

    def send(parts, name="red", **kwargs):
        headers = {"Authorization": f"Bearer {KEYS[name]}"}
        return requests.post(f"{server.url}/v1/files", files=parts, headers=headers, timeout=60, **kwargs)

    file = ("rows.jsonl", b"{}")
    assert_error(send({"purpose": (None, "batch")}), 400, "file", param="file")
    assert_error(send({"file": file}), 400, "purpose", param="purpose")
    assert_error(send({"file": file, "purpose": (None, "vision")}), 400, "'batch'", param="purpose")
    assert_error(send({"file": file, "purpose": (None, "batch"), "more": (None, "1")}), 400, "'more'")
    assert_error(send([("file", file), ("file", file), ("purpose", (None, "batch"))]), 400, "twice")
    seconds = {"expires_after[anchor]": (None, "created_at"), "expires_after[seconds]": (None, "5")}
    assert_error(send({"file": file, "purpose": (None, "batch"), **seconds}), 400, "3600")
    big = {"purpose": (None, "batch"), "file": ("rows.jsonl", b"x" * (1 << 20) + b"y")}
    assert_error(send(big), 413, "--batch-max-file-mib")
    assert_error(server.post("/v1/files", {}), 415, "multipart/form-data")
    for name in (b'name="mo\xffre"', b'name="' + b"x" * 5000 + b'"'):
        body = b"--x\r\nContent-Disposition: form-data; " + name + b"\r\n\r\n1\r\n--x--\r\n"
        headers = {"Authorization": f"Bearer {KEYS['red']}", "Content-Type": "multipart/form-data; boundary=x"}
        refused = requests.post(f"{server.url}/v1/files", data=body, headers=headers, timeout=60)
        assert_error(refused, 400, "is unknown")
        assert len(refused.content) < 1000
    broken = {"Authorization": f"Bearer {KEYS['red']}", "Content-Type": "multipart/form-data; boundary=x"}
    no_header, long_header, odd = b"\r\n-4279--x--\r\n", b"\r\na: " + b"b" * 9000 + b"\r\n\r\n", b"\r\n\rx: y\r\n\r\n"
    for body in (b"--y\r\n", *(b"--x" + rest for rest in (no_header, long_header, odd))):
        refused = requests.post(f"{server.url}/v1/files", data=body, headers=broken, timeout=60)
        assert "\n" not in assert_error(refused, 400, "no valid multipart/form-data")["message"]
    assert len(list(server.client().files.list())) == files


def test_an_upload_while_the_folder_is_away_is_told_so(server, start):
    state = start.state
    (state / "incoming").rename(state / "elsewhere")
    try:
        with pytest.raises(openai.InternalServerError, match="--batch-dir cannot be used: No such file") as told:
            upload(server.client(), [row("a")])
        assert told.value.status_code == 503 and str(state) not in str(told.value)
    finally:
        (state / "elsewhere").rename(state / "incoming")
    assert server.client().files.delete(upload(server.client(), [row("a")]).id).deleted


def test_a_folder_that_is_taken_away_is_503_without_a_trace_and_serves_again_when_it_is_back(start, server):
    client, since = server.client(), len(server.log)
    file = upload(client, [row("a")])
    batch = finished(client, client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"))
    start.state.rename(start.state.with_name("elsewhere"))
    try:
        for ask in (
            lambda: upload(client, [row("b")]),
            client.files.list,
            lambda: client.files.retrieve(file.id),
            lambda: client.files.content(batch.output_file_id),
            lambda: client.files.delete(file.id),
            client.batches.list,
            lambda: client.batches.retrieve(batch.id),
            lambda: client.batches.cancel(batch.id),
            lambda: client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h"),
        ):
            with pytest.raises(openai.InternalServerError) as caught:
                ask()
            assert (caught.value.status_code, caught.value.code) == (503, "storage_unavailable")
            assert "--batch-dir" in str(caught.value) and "elsewhere" not in str(caught.value)
            assert int(caught.value.response.headers["Retry-After"]) >= 1
        assert not start.state.exists()
    finally:
        start.state.with_name("elsewhere").rename(start.state)
    assert client.batches.retrieve(batch.id) == batch and lines_of(client, batch.output_file_id)
    assert finished(client, begin(client, [row("c")])).status == "completed"
    assert not any("Traceback" in line for line in server.log[since:])


def test_a_key_that_has_its_share_of_the_disk_is_told_how_to_make_room_and_others_have_theirs(server):
    red, blue = server.client("red"), server.client("blue")
    with pytest.raises(openai.PermissionDeniedError, match="--batch-key-gib.*DELETE /v1/files/ID") as refused:
        for _ in range(3):
            upload(red, ["x" * 900_000])
    assert refused.value.code == "storage_quota_exceeded"
    sent = [file for file in red.files.list() if file.bytes == 900_000]
    assert len(sent) == 2
    with pytest.raises(openai.PermissionDeniedError):
        upload(red, ["x" * 900_000])
    assert blue.files.delete(upload(blue, ["x" * 900_000]).id).deleted
    for file in sent:
        red.files.delete(file.id)
    assert red.files.delete(upload(red, ["x" * 900_000]).id).deleted


def test_the_name_of_a_file_may_be_any_bytes(server):
    body = b'--x\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    body += b'--x\r\nContent-Disposition: form-data; name="file"; filename="r\xe9sum\xe9.jsonl"\r\n\r\n{}\r\n--x--\r\n'
    headers = {"Authorization": f"Bearer {KEYS['red']}", "Content-Type": "multipart/form-data; boundary=x"}
    answer = requests.post(f"{server.url}/v1/files", data=body, headers=headers, timeout=60)
    assert answer.status_code == 200 and answer.json()["filename"].endswith(".jsonl"), answer.text
    assert server.client().files.delete(answer.json()["id"]).deleted


def test_batches_that_cannot_be_are_refused(server):
    client = server.client()
    file = upload(client, [row("a")])
    body = {"input_file_id": file.id, "endpoint": CHAT, "completion_window": "24h"}
    assert_error(server.post("/v1/batches", body | {"endpoint": "/v1/moderations"}), 400, CHAT, param="endpoint")
    assert_error(server.post("/v1/batches", body | {"completion_window": "31d"}), 400, param="completion_window")
    assert_error(server.post("/v1/batches", body | {"metadata": {"a": "b" * 513}}), 400, "512")
    assert_error(server.post("/v1/batches", body | {"input_file_id": "file-none"}), 404, param="input_file_id")
    batch = client.batches.create(**body)
    done = finished(client, batch)
    assert_error(server.post("/v1/batches", body | {"input_file_id": done.output_file_id}), 400, "purpose")
    assert_error(server.post(f"/v1/batches/{batch.id}/cancel", {}), 409, "completed")


def test_a_cancelled_batch_keeps_what_was_answered_and_names_the_rest(server):
    client = server.client()
    rows = [row(f"quick {i}", max_tokens=1) for i in range(6)]
    rows += [row(f"long {i}", max_tokens=3000, ignore_eos=True) for i in range(20)]
    batch = begin(client, rows)
    wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed)
    with pytest.raises(openai.ConflictError, match=batch.id):
        client.files.delete(batch.input_file_id)
    assert client.batches.cancel(batch.id).status == "cancelling"
    batch = finished(client, batch)
    assert batch.status == "cancelled" and batch.cancelling_at and batch.cancelled_at
    answers, errors = lines_of(client, batch.output_file_id), lines_of(client, batch.error_file_id)
    assert len(answers) + len(errors) == len(rows) and answers
    assert {line["custom_id"] for line in answers} <= {sent["custom_id"] for sent in rows}
    assert {line["error"]["code"] for line in errors} == {"batch_cancelled"}
    counts = batch.request_counts
    assert (counts.completed, counts.failed, counts.total) == (len(answers), len(errors), len(rows))
    assert client.files.delete(batch.input_file_id).deleted
    server.wait_baseline()


def test_the_command_runs_a_file_on_the_server_and_finds_its_batches_again(server, tmp_path, capsys, monkeypatch):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows = [row(f"row {idx}", **({"model": "nobody"} if idx == 3 else {})) for idx in range(7)]
    source.write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr("specserve.cli.batch_remote.MAX_ROWS", 3)  # three batches
    monkeypatch.setattr("specserve.cli.batch_remote.POLL_S", 0.05)
    monkeypatch.setattr("specserve.cli.batch_remote.PAGE", 1)  # its last batch is not on the first page
    command = ["batch", str(source), str(target), "--url", server.url, "--api-key", KEYS["blue"]]
    before = len(list(server.client("blue").batches.list()))
    forget, state = [], tmp_path / "out.jsonl.progress" / "run.json"

    async def stop(*_):
        run = json.loads(state.read_text())
        forget.append(run["parts"][0].pop("batch_id"))  # the oldest of three
        state.write_text(json.dumps(run))  # as if the command had ended before it was noted
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("specserve.cli.batch_remote._wait", stop)
        assert exit_code_of(command) == 130
    assert "goes on" in capsys.readouterr().err and forget
    assert exit_code_of(command) == 1
    assert "7 rows, 1 of them failed" in capsys.readouterr().err
    lines = [json.loads(line) for line in target.open()]
    assert [line["custom_id"] for line in lines] == [sent["custom_id"] for sent in rows]
    assert [line["response"]["status_code"] for line in lines] == [200] * 3 + [404] + [200] * 3
    assert not state.parent.exists() and len(list(server.client("blue").batches.list())) == before + 3
    source.write_text("\n".join(json.dumps(row(str(idx), "/v1/none")) for idx in range(2)))
    target.unlink()
    assert exit_code_of(command) == 2 and "/v1/none" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_server_goes_on_and_answers_each_row_once(server, start):
    client, num = server.client(), 120
    rows = [row(f"row {idx}", max_tokens=24, ignore_eos=True) for idx in range(num)]
    batch = begin(client, rows)
    wait_until(lambda: client.batches.retrieve(batch.id).request_counts.completed >= 10)
    engine = server.engine_pid()
    server.process.kill()
    server.process.wait()
    wait_until(lambda: not os.path.exists(f"/proc/{engine}"))
    again = start()
    client = again.client()
    before = client.batches.retrieve(batch.id)
    assert before.status == "in_progress" and 10 <= before.request_counts.completed
    batch = finished(client, batch)
    assert (batch.status, batch.request_counts.to_dict()) == (
        "completed",
        {"total": num, "completed": num, "failed": 0},
    )
    lines = lines_of(client, batch.output_file_id)
    assert [line["custom_id"] for line in lines] == [sent["custom_id"] for sent in rows]
    sample = rows[:: num // 6]
    for sent in sample:
        direct = again.post(CHAT, sent["body"]).json()["choices"][0]["message"]["content"]
        assert direct == text_of(next(line for line in lines if line["custom_id"] == sent["custom_id"]))
    assert time.time() - batch.created_at < 600 and again.stop(signal.SIGTERM) == 0
