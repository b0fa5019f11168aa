"""Many clients at once, and clients that take their time: the others are served as if they were not there.

After each case the golden requests give the same tokens, and blocks, references and handles are back.
"""

import http.client
import json
import random
import resource
import shutil
import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress

import pytest
import requests
from golden import Golden, resident_mib
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file, save_file
from server_fixture import ServerProcess, assert_error
from waiting import wait_until

from specserve.drafting.served_history import MAX_TABLES

TEXT = "/v1/completions"
MAX_ADAPTERS = 4
LONG = {"prompt": "The quick brown", "max_tokens": 4000, "temperature": 0, "ignore_eos": True}
SLOW = {**LONG, "speculation": {"mode": "off"}}
USED = {"max_tokens": 240, "speculation": {"mode": "off"}}


@pytest.fixture(scope="module")
def histories(tmp_path_factory):
    return tmp_path_factory.mktemp("histories")


@pytest.fixture(scope="module")
def server(patient_model_dir, adapters_dir, histories):
    """On the torch path: the native one answers before anything could happen to it."""
    server = ServerProcess(
        patient_model_dir,
        *("--kernels", "torch", "--adapters-dir", str(adapters_dir), "--max-adapters", str(MAX_ADAPTERS)),
        *("--max-num-seqs", "4", "--max-waiting", "16", "--max-concurrent-requests", "64", "--read-timeout-s", "2"),
        *("--write-timeout-s", "2"),
        *("--learn-history", "--history-dir", str(histories)),
    ).wait_ready()
    yield server
    assert server.stop() == 0


@pytest.fixture(scope="module")
def baseline(server):
    texts = [server.complete(model=name)["text"] for name in ("tiny", "good")]
    return texts, Golden(server, ("tiny", "good"))


@pytest.fixture(autouse=True)
def golden(baseline):
    """Texts of the golden requests, which are asked again afterwards."""
    yield baseline[0]
    baseline[1].check()


def connect(server, data: bytes = b"", receive_buffer: int | None = None) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    connection.sendall(data)
    return connection


def post_bytes(path: str, body) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    return head.encode() + f"Content-Length: {len(data)}\r\n\r\n".encode() + data


def load(server) -> tuple[int, int]:
    m = server.metrics()
    return int(m["num_requests_running"]), int(m["num_requests_waiting"])


# 6: slow headers and bodies
def test_clients_that_send_a_byte_a_second_hold_up_nobody(server, golden):
    whole = post_bytes(TEXT, LONG)
    connections = [connect(server, whole[: 20 if n % 2 else -20]) for n in range(50)]
    try:
        slowest = 0.0
        for _ in range(5):
            before = time.monotonic()
            assert server.complete(model="good")["text"] == golden[1]
            slowest = max(slowest, time.monotonic() - before)
            for connection in connections:
                with suppress(ConnectionError):  # the server has given it up
                    connection.send(b"x")
        assert slowest < 30, slowest  # one after the other they would hold it up for 2 s each
        for connection in connections:
            connection.settimeout(60)
            answer = b"".join(iter(lambda c=connection: receive(c), b""))
            assert answer == b"" or b" 408 " in answer.split(b"\r\n")[0] or b" 400 " in answer.split(b"\r\n")[0]
    finally:
        for connection in connections:
            connection.close()


def receive(connection) -> bytes:
    """What comes next; nothing at the end, after a reset, or when the socket's own patience ends."""
    try:
        return connection.recv(65536)
    except (ConnectionError, TimeoutError):
        return b""


# 41: clients that leave at every point of a request's life
def test_clients_that_leave_while_queued_in_prefill_or_decoding_free_everything_at_once(server):
    before = server.metrics()["engine_generated_tokens"]
    running = [connect(server, post_bytes(TEXT, {**SLOW, "stream": True})) for _ in range(4)]
    wait_until(lambda: load(server)[0] == 4)
    queued = [connect(server, post_bytes(TEXT, {**SLOW, "stream": n % 2 == 0})) for n in range(8)]
    wait_until(lambda: load(server)[1] == 8)
    for connection in queued:
        connection.close()
    wait_until(lambda: load(server)[1] == 0)
    assert load(server)[0] == 4, "those that decode were to go on"
    for connection in running:
        connection.close()
    wait_until(lambda: load(server) == (0, 0))
    assert server.metrics()["engine_generated_tokens"] - before < 4 * SLOW["max_tokens"], "they ended by themselves"
    prompt = [random.Random(0).randrange(3, 300) for _ in range(500)]
    before = server.metrics()["engine_generated_tokens"]
    for n in range(20):  # 500 rows of prompt are some milliseconds of forwards
        connection = connect(server, post_bytes(TEXT, {"prompt": [*prompt[n:], *prompt[:n]], "max_tokens": 12}))
        time.sleep(0.002 * n)
        connection.close()
    wait_until(lambda: load(server) == (0, 0))
    server.wait_baseline()
    assert server.metrics()["engine_generated_tokens"] - before <= 20 * 12


# 43: more requests than there is room for
def check_crowd(server, num: int, text: str) -> None:
    """`num` requests, all of them sent before an answer is read."""
    data = post_bytes(TEXT, {**LONG, "max_tokens": 12})
    with ExitStack() as stack:
        connections = [stack.enter_context(connect(server, data)) for _ in range(num)]
        answers = [http.client.HTTPResponse(connection) for connection in connections]
        for connection, answer in zip(connections, answers, strict=True):
            connection.settimeout(600)
            answer.begin()
        bodies = [answer.read() for answer in answers]
    statuses = [answer.status for answer in answers]
    # At least as many as may wait: an engine that has no core meanwhile gives nobody a seat until all have come.
    assert set(statuses) == {200, 429} and statuses.count(200) >= 16, Counter(statuses)
    for answer, body in zip(answers, bodies, strict=True):
        if answer.status == 200:
            assert json.loads(body)["choices"][0]["text"] == text
        else:
            assert int(answer.headers["Retry-After"]) >= 1 and answer.headers["x-should-retry"] == "true"


def test_a_crowd_is_answered_429_and_the_admitted_are_served_as_ever(server, golden):
    check_crowd(server, 300, golden[0])


@pytest.mark.slow
def test_a_crowd_of_ten_thousand(model_dir, golden):
    server = ServerProcess(model_dir, "--max-waiting", "16", "--max-concurrent-requests", "64").wait_ready()
    try:
        check_crowd(server, 10_000, server.complete()["text"])
        server.wait_baseline()
    finally:
        assert server.stop() == 0


# 36: an adapter that is replaced and unloaded while it is in use
def test_an_adapter_that_is_replaced_and_unloaded_in_use_finishes_on_its_own_weights(server, adapters_dir, model_dir):
    folder = shutil.copytree(adapters_dir / "good", adapters_dir / "moving")
    other = make_peft_adapter(model_dir, adapters_dir / ".other" / "weights", r=4, std=0.3, seed=7)
    try:
        texts = {}
        for name, source in (("old", adapters_dir / "good"), ("new", other)):
            shutil.copyfile(source / "adapter_model.safetensors", folder / "fresh")
            (folder / "fresh").replace(folder / "adapter_model.safetensors")
            texts[name] = server.complete(model="moving", **USED)["text"]
        assert texts["old"] != texts["new"]
        shutil.copyfile(adapters_dir / "good" / "adapter_model.safetensors", folder / "fresh")
        (folder / "fresh").replace(folder / "adapter_model.safetensors")
        streams = [stream_text(server, {**SLOW, **USED, "model": "moving", "stream": True}) for _ in range(2)]
        parts = [next(stream) for stream in streams]
        shutil.copyfile(other / "adapter_model.safetensors", folder / "fresh")
        (folder / "fresh").replace(folder / "adapter_model.safetensors")
        with ThreadPoolExecutor(2) as pool:  # the new content runs beside the old one
            newer = pool.submit(server.complete, model="moving", **USED)
            assert newer.result()["text"] == texts["new"]
        assert server.post("/v1/unload_lora_adapter", {"lora_name": "moving"}).status_code == 200
        assert_error(server.post(TEXT, {**SLOW, "model": "moving"}), 404, "moving")
        for part, stream in zip(parts, streams, strict=True):
            assert part + "".join(stream) == texts["old"]
        body = {"lora_name": "moving", "lora_path": "moving"}
        assert server.post("/v1/load_lora_adapter", body).status_code == 200
        assert texts["new"].startswith(server.complete(model="moving")["text"])
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(adapters_dir / ".other")


def stream_text(server, body):
    """The texts of a stream's events, as they come; fails on an error."""
    lines = server.post(TEXT, body, stream=True).iter_lines()
    for line in lines:
        if line and line != b"data: [DONE]":
            yield json.loads(line[6:])["choices"][0]["text"]


# 37, 51: many adapters over few places, and their labels
@pytest.fixture
def many_adapters(adapters_dir, request):
    """`request.param` folders with weights of their own."""
    weights = load_file(adapters_dir / "good" / "adapter_model.safetensors")
    names = [f"many-{n}" for n in range(request.param)]
    for n, name in enumerate(names):
        folder = adapters_dir / name
        folder.mkdir()
        shutil.copyfile(adapters_dir / "good" / "adapter_config.json", folder / "adapter_config.json")
        scaled = {key: value * (1 + 0.001 * n) for key, value in weights.items()}
        save_file(scaled, folder / "adapter_model.safetensors")
    yield names
    for name in names:
        shutil.rmtree(adapters_dir / name)


@pytest.mark.parametrize("many_adapters", [24, pytest.param(1000, marks=pytest.mark.slow)], indirect=True)
def test_more_adapters_than_places_take_turns_and_their_labels_are_capped(server, many_adapters):
    want = server.complete(model=many_adapters[3])["text"]
    before = resident_mib(server.engine_pid())
    statuses = []

    def ask(name):
        reply = server.post(TEXT, {**LONG, "model": name, "max_tokens": 12})
        if reply.status_code != 200:
            assert_error(reply, reply.status_code, "retry")
            assert reply.status_code in (429, 503) and int(reply.headers["Retry-After"]) >= 1
        statuses.append(reply.status_code)

    with ThreadPoolExecutor(3) as pool:  # fewer than places: everybody finds one
        list(pool.map(ask, many_adapters))
    assert statuses.count(200) == len(many_adapters)
    with ThreadPoolExecutor(12) as pool:  # more than places
        list(pool.map(ask, many_adapters))
    m = server.metrics()
    assert m["engine_num_adapters"] <= MAX_ADAPTERS
    labels = {key for key in m if key.startswith("generation_tokens_total{")}
    assert len(labels) <= 201
    assert resident_mib(server.engine_pid()) < before + 30
    assert server.complete(model=many_adapters[3])["text"] == want


def test_names_and_paths_that_do_not_exist_make_no_labels(server):
    num_lines = len(server.get("/metrics").text.splitlines())
    for n in range(60):
        assert requests.post(server.url + TEXT, json={**LONG, "model": f"nobody-{n}"}, timeout=60).status_code == 404
        assert requests.get(f"{server.url}/nowhere-{n}", timeout=60).status_code == 404
    assert len(server.get("/metrics").text.splitlines()) < num_lines + 20


# 48: nothing can be written any more
def test_a_full_disk_for_served_histories_ends_no_request_and_keeps_the_old_files(server, golden, histories):
    def ask(salt):
        body = {**LONG, "model": "good", "max_tokens": 12, "cache_salt": salt}
        assert server.post(TEXT, body).json()["choices"][0]["text"] == golden[1]

    for n in range(MAX_TABLES + 8):  # more than are kept in memory: the oldest are written
        ask(f"tenant {n}")
    wait_until(lambda: len(list(histories.glob("*.history"))) >= 8)
    before = {path.name: path.read_bytes() for path in histories.glob("*.history")}
    limits = resource.prlimit(server.engine_pid(), resource.RLIMIT_FSIZE)
    resource.prlimit(server.engine_pid(), resource.RLIMIT_FSIZE, (0, limits[1]))  # as on a full disk: no write succeeds
    try:
        for n in range(MAX_TABLES + 8):
            ask(f"other tenant {n}")
        server.wait_log("task history not saved")
        assert {name: (histories / name).read_bytes() for name in before} == before
    finally:
        resource.prlimit(server.engine_pid(), resource.RLIMIT_FSIZE, limits)


# 52: cancel and retry
def test_cancel_and_retry_leaves_memory_handles_and_blocks_flat(server):
    soak(server, 1)
    before = resident_mib(server.process.pid), resident_mib(server.engine_pid())
    soak(server, 1)
    after = resident_mib(server.process.pid), resident_mib(server.engine_pid())
    assert after[0] < before[0] + 15 and after[1] < before[1] + 15, (before, after)


@pytest.mark.slow
def test_cancel_and_retry_for_minutes_leaves_memory_flat(server):
    soak(server, 60)
    before = resident_mib(server.process.pid), resident_mib(server.engine_pid())
    soak(server, 240)
    after = resident_mib(server.process.pid), resident_mib(server.engine_pid())
    assert after[0] < before[0] + 15 and after[1] < before[1] + 15, (before, after)


def soak(server, seconds: float) -> None:
    """Three clients that leave their streams and whole answers at random and ask again."""
    deadline = time.monotonic() + seconds

    def client(seed):
        rng = random.Random(seed)
        while time.monotonic() < deadline:
            body = {
                **LONG,
                "model": rng.choice(["tiny", "good"]),
                "stream": rng.random() < 0.7,
                "n": rng.randrange(1, 4),
            }
            connection = connect(server, post_bytes(TEXT, {**body, "temperature": 1, "logprobs": 5}))
            connection.settimeout(rng.uniform(0.01, 0.2))
            for _ in range(rng.randrange(4)):
                receive(connection)
            connection.close()

    threads = [threading.Thread(target=client, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    server.wait_baseline()


# 42: a reader that takes nothing
def test_a_reader_that_takes_nothing_costs_little_holds_up_nobody_and_is_cut_visibly(server, golden):
    body = {**LONG, "max_tokens": 250, "n": 16, "logprobs": 20, "stream": True, "temperature": 1}  # some 6 MB of events
    before, num_left = resident_mib(server.process.pid), num_who_left(server)
    frozen = connect(server, post_bytes(TEXT, body), receive_buffer=4096)
    try:
        wait_until(lambda: load(server)[0] > 0)
        while server.num_in_flight():
            start = time.monotonic()
            assert server.complete(model="good")["text"] == golden[1]
            assert time.monotonic() - start < 120  # it waits for a seat behind twelve others, for the reader never
        assert resident_mib(server.process.pid) < before + 60
        server.wait_baseline()
        frozen.settimeout(60)
        received = b"".join(iter(lambda: receive(frozen), b""))
        assert len(received) > 1000 and b"data: [DONE]" not in received
        assert not received.endswith(b"0\r\n\r\n"), "text that looks complete"
        assert num_who_left(server) == num_left + 1
    finally:
        frozen.close()


def num_who_left(server) -> float:
    return server.metrics().get(f'http_requests_total{{route="{TEXT}",status="499"}}', 0)
