"""Adapters that come, go, change and are broken under traffic: each name's own text, or a clear error, never another's.

After each case the golden requests give the same tokens, and everything is given back.
"""

import itertools
import json
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from adapter_edits import complete, garbage, overlap
from golden import Golden
from lookahead_adapters import make_lookahead_adapter
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file, save_file
from server_fixture import assert_error

TEXT, LOAD, UNLOAD = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
LONG = {"prompt": "The quick brown", "max_tokens": 400, "temperature": 0, "ignore_eos": True}
SHARED = "Pack my box with five dozen liquor jugs, and print 0123456789. " * 8  # a prefix of many blocks
WAIT = 1.1  # until files that were just written count as complete


@pytest.fixture(scope="module")
def baseline(server):
    return Golden(server, ("tiny", "alpha"))


@pytest.fixture(autouse=True)
def golden(baseline):
    yield baseline
    baseline.check()


@pytest.fixture(scope="module")
def root(alpha_dir):
    return alpha_dir.parent


@pytest.fixture(scope="module")
def weights(model_dir, tmp_path_factory):
    """Two directories that differ in their weights."""
    folder = tmp_path_factory.mktemp("weights")
    return [make_peft_adapter(model_dir, folder / str(seed), r=4, std=0.3, seed=seed) for seed in (21, 22)]


@pytest.fixture
def put(root):
    """Puts a directory into the folder under a name, and takes all of them away in the end."""
    names = []

    def put(source, name):
        names.append(name)
        return shutil.copytree(source, root / name)

    yield put
    for name in names:
        shutil.rmtree(root / name, ignore_errors=True)


def load(server, name, path, **fields):
    return server.post(LOAD, {"lora_name": name, "lora_path": str(path), **fields})


def stream_of(server, **fields):
    """A stream that has begun: its first text, and an iterator of the others."""
    lines = server.post(TEXT, {**LONG, **fields, "stream": True}, stream=True).iter_lines()
    events = (json.loads(line[6:]) for line in lines if line and line != b"data: [DONE]")
    texts = (event["choices"][0]["text"] for event in events)
    return next(texts), texts


@pytest.mark.parametrize("spoil", [overlap, garbage(2**60), garbage(40)], ids=["overlap", "huge header", "header"])
def test_a_broken_safetensors_header_is_refused(server, put, weights, spoil):
    path = put(weights[0], "broken")
    spoil(path)
    complete(path)
    assert_error(server.post(TEXT, {**LONG, "model": "broken"}), 400, "safetensors")


def test_a_head_that_does_not_fit_changes_no_token(server, root, model_dir, put, tmp_path):
    good = make_lookahead_adapter(model_dir, tmp_path / "head", seed=3)
    plain = shutil.copytree(good, tmp_path / "plain", ignore=shutil.ignore_patterns("lookahead*"))
    put(plain, "plain")
    want = server.complete(model="plain", max_tokens=60)["text"]

    def nan(path):
        tensors = load_file(path / "lookahead.safetensors")
        tensors["gates_x"].view(-1)[0] = float("nan")
        save_file(tensors, path / "lookahead.safetensors")

    def configure(**changes):
        def spoil(path):
            config = json.loads((path / "lookahead_config.json").read_text())
            (path / "lookahead_config.json").write_text(json.dumps({**config, **changes}))

        return spoil

    cases = {
        "good": (lambda path: None, None),
        "vocabulary": (configure(vocab=list(range(300, 400))), "token 399"),
        "base": (configure(base_hash="0" * 64), "another base model"),
        "missing": (lambda path: (path / "lookahead.safetensors").unlink(), "lookahead.safetensors"),
        "nan": (nan, "not finite"),
    }
    for name, (spoil, reason) in cases.items():
        path = put(good, f"head-{name}")
        spoil(path)
        complete(path)
        reply = load(server, f"head-{name}", path)
        assert reply.status_code == 200, reply.text
        error = reply.json()["adapter"]["lookahead"]["error"]
        assert error is None if reason is None else reason in error
        for mode in ("auto", "fixed"):
            assert server.complete(model=f"head-{name}", max_tokens=60, speculation={"mode": mode})["text"] == want
        assert server.post(UNLOAD, {"lora_name": f"head-{name}"}).status_code == 200


def test_reloaded_weights_use_no_cache_of_the_old_ones(server, put, weights):
    """Under one long prefix; equal to the new weights under a name that never had others."""
    put(weights[0], "before")
    put(weights[1], "after")
    put(weights[1], "fresh")
    want = [server.complete(SHARED, model=name)["text"] for name in ("before", "fresh")]
    assert want[0] != want[1]
    for source, expected in [(1, want[1]), (0, want[0]), (1, want[1])]:
        folder = put(weights[source], f"next-{time.monotonic_ns()}")
        reply = load(server, "before", folder, load_inplace=True)
        assert reply.status_code == 200, reply.text
        assert server.complete(SHARED, model="before")["text"] == expected


def test_a_directory_that_is_removed_is_404_and_its_running_requests_finish(server, put, weights):
    folder = put(weights[0], "leaving")
    want = server.complete(model="leaving", max_tokens=400)["text"]
    first, rest = stream_of(server, model="leaving", speculation={"mode": "off"})
    shutil.rmtree(folder)
    num_lines = len(server.log)
    for _ in range(3):
        assert_error(server.post(TEXT, {**LONG, "model": "leaving"}), 404, "leaving")
    assert first + "".join(rest) == want
    assert not any("leaving" in line and "load" in line for line in server.log[num_lines:]), "it was read again"


def test_loads_and_unloads_of_others_change_no_stream(server, put, weights):
    names = ["alpha", "tiny", "other-0", "other-1"]
    for n in range(2):
        put(weights[n], f"other-{n}")
    fields = {"speculation": {"mode": "off"}}
    want = [server.complete(model=name, max_tokens=400, **fields)["text"] for name in names]
    put(weights[0], "coming")
    with ThreadPoolExecutor(4) as pool:
        done = threading.Event()

        def read(name):
            texts = []
            while not texts or not done.is_set():
                first, rest = stream_of(server, model=name, **fields)
                texts.append(first + "".join(rest))
            return texts

        streams = [pool.submit(read, name) for name in names]
        for _ in range(50):
            assert load(server, "coming-and-going", "coming").status_code == 200
            assert server.post(UNLOAD, {"lora_name": "coming-and-going"}).status_code == 200
        done.set()
        for stream, text in zip(streams, want, strict=True):
            assert set(stream.result()) == {text}


@pytest.mark.parametrize("seconds", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_a_name_that_is_loaded_unloaded_and_asked_for_is_never_the_base(server, put, weights, seconds):
    put(weights[0], "source")
    base, text = server.complete()["text"], server.complete(model="source")["text"]
    assert base != text
    deadline, seen = time.monotonic() + seconds, []

    def goes_on():
        """Until the name has answered, too, which it need not on a machine that is busy."""
        return time.monotonic() < deadline or (200 not in dict(seen) and time.monotonic() < deadline + 60)

    def ask(_):
        while goes_on():
            reply = server.post(TEXT, {**LONG, "max_tokens": 12, "model": "contested"})
            seen.append((reply.status_code, reply.json()["choices"][0]["text"] if reply.status_code == 200 else ""))

    def change(seed):
        rng = random.Random(seed)
        while goes_on():
            if rng.random() < 0.5:
                reply = load(server, "contested", "source", load_inplace=rng.random() < 0.5)
                assert reply.status_code in (200, 409), reply.text
            else:
                assert server.post(UNLOAD, {"lora_name": "contested"}).status_code in (200, 404)

    with ThreadPoolExecutor(6) as pool:
        for work in [*(pool.submit(ask, n) for n in range(4)), *(pool.submit(change, n) for n in range(2))]:
            work.result()
    assert {answer for status, answer in seen if status == 200} == {text}
    assert {status for status, _ in seen} <= {200, 404, 409}
    server.post(UNLOAD, {"lora_name": "contested"})


def test_names_that_look_alike_are_told_apart_and_the_base_keeps_its_own(server, put, weights, model_dir):
    names = ["a.b", "a_b", "a-b", "A.b"]
    for name, source in zip(names, itertools.cycle(weights), strict=False):
        put(source, name)
    of_weights = [server.complete(model=name)["text"] for name in names[:2]]
    assert of_weights[0] != of_weights[1]
    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(lambda name: server.complete(model=name)["text"], names * 3))
    assert texts == [of_weights[n % 2] for n in range(12)]
    base = server.complete()["text"]
    put(weights[0], "tiny")  # the base's name
    for bad in ("with space", "ünicode", "..dots", "dots..dots"):
        put(weights[0], bad)
        assert_error(server.post(TEXT, {**LONG, "model": bad}), 400, "not a valid name")
    time.sleep(WAIT)
    assert server.complete(model="tiny")["text"] == base
    listed = [model["id"] for model in server.get("/v1/models").json()["data"]]
    assert listed.count("tiny") == 1 and not {"with space", "ünicode", "..dots"} & {*listed}
    assert_error(load(server, "tiny", "a.b"), 409, "base model's name")
