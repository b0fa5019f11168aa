"""Twelve adapters on a server with room for three, over HTTP: who lies where, pins, prefetches, limits."""

from __future__ import annotations

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft_adapters import make_peft_adapter
from safetensors.torch import load_file, save_file
from server_fixture import ServerProcess, assert_error
from waiting import wait_until

from specserve.adapter_files import WEIGHTS_FILE

NAMES = [f"a{idx}" for idx in range(12)]
MEMORY_GIB = 0.0005


@pytest.fixture(scope="module")
def root(model_dir, alpha_dir, tmp_path_factory):
    root = tmp_path_factory.mktemp("many")
    shapes = {name: tensor.shape for name, tensor in load_file(alpha_dir / WEIGHTS_FILE).items()}
    for seed, name in enumerate(NAMES):
        generator = torch.Generator().manual_seed(seed)
        shutil.copytree(alpha_dir, root / name)
        tensors = {key: 0.3 * torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        save_file(tensors, root / name / WEIGHTS_FILE)
    make_peft_adapter(model_dir, root / "huge", r=256, seed=1, embed=True, lm_head=True)
    return root


@pytest.fixture(scope="module")
def server(model_dir, root):
    flags = ("--adapters-dir", str(root), "--max-adapters", "3", "--adapter-memory-gib", str(MEMORY_GIB))
    server = ServerProcess(model_dir, *flags).wait_ready()
    yield server
    server.wait_baseline()
    assert server.stop() == 0


@pytest.fixture(scope="module", autouse=True)
def fresh(server):
    """Entries before anybody asks for anything."""
    return entries(server)


def post(server, verb, name):
    return server.post(f"/v1/{verb}_lora_adapter", {"lora_name": name})


def entries(server):
    return {entry["id"]: entry for entry in server.get("/v1/adapters").json()["data"]}


def in_memory(server):
    return {name for name, entry in entries(server).items() if entry["tier"] != "disk"}


def test_many_clients_get_every_adapters_own_text_while_adapters_take_turns(server, fresh):
    assert set(fresh) == {*NAMES, "huge"} and {entry["tier"] for entry in fresh.values()} == {"disk"}
    assert fresh["a0"]["size_bytes"] is None and fresh["a0"]["uses"] == 0 and fresh["a0"]["last_used"] is None
    before = {name: entry["uses"] for name, entry in entries(server).items()}
    counts = server.metrics()
    golden = {name: server.complete(model=name)["text"] for name in NAMES}
    assert len(set(golden.values())) == len(NAMES)
    with ThreadPoolExecutor(8) as clients:
        asked = [NAMES[idx * 5 % 12] for idx in range(60)]
        texts = list(clients.map(lambda name: server.complete(model=name)["text"], asked))
    assert texts == [golden[name] for name in asked]
    after = entries(server)
    assert sum(entry["uses"] - before[name] for name, entry in after.items()) == 12 + 60
    assert len(in_memory(server)) == 3
    one = after["a0"]
    assert one["uses"] - before["a0"] == 6 and abs(one["last_used"] - time.time()) < 600 and one["max_rank"] == 4
    assert one["size_bytes"] > 0 and one["running"] == 0 and one["acceptance"] is None and not one["pinned"]
    metrics = server.metrics()
    assert metrics["engine_num_adapters"] == 3 and metrics["engine_max_adapter_bytes"] == int(MEMORY_GIB * 2**30)
    assert metrics["engine_adapter_bytes"] == 3 * one["size_bytes"]
    loads, evictions, left = (metrics[f"engine_num_adapter{what}"] - counts[f"engine_num_adapter{what}"]
                              for what in ("_loads", "_evictions", "s_asked"))  # fmt: skip
    assert loads >= 9 and loads - evictions - left <= 3
    assert metrics["adapter_load_seconds_count"] >= metrics["engine_num_adapter_loads"]


def test_pins_survive_what_others_ask_for_and_go_with_their_name(server, root):
    pinned = post(server, "pin", "a1").json()
    assert pinned["adapter"]["content_hash"] == entries(server)["a1"]["content_hash"]
    for name in NAMES[2:9]:
        server.complete(model=name)
        assert "a1" in in_memory(server)
    assert entries(server)["a1"]["pinned"] and server.metrics()["engine_num_pinned_adapters"] == 1
    assert post(server, "pin", "a2").status_code == post(server, "pin", "a3").status_code == 200
    assert_error(server.post("/v1/completions", {"model": "a4", "prompt": "x"}), 503, "all 3 places are pinned")
    before = server.complete(model="a3")["text"]
    weights = load_file(root / "a3" / WEIGHTS_FILE)
    save_file({key: -tensor if "lora_B" in key else tensor for key, tensor in weights.items()}, root / "new")
    (root / "new").rename(root / "a3" / WEIGHTS_FILE)
    replaced = server.complete(model="a3")["text"]  # its own pin does not keep its new files out
    assert replaced != before and entries(server)["a3"]["pinned"]
    assert post(server, "unpin", "a3").status_code == post(server, "unpin", "a3").status_code == 200
    server.complete(model="a4")
    assert in_memory(server) == {"a1", "a2", "a4"}
    assert post(server, "unload", "a2").status_code == 200
    assert "a2" not in entries(server) and server.metrics()["engine_num_pinned_adapters"] == 1
    assert_error(post(server, "pin", "a2"), 404)
    assert_error(post(server, "unpin", "a2"), 404)
    assert post(server, "unpin", "a1").status_code == 200
    assert server.post("/v1/load_lora_adapter", {"lora_name": "a2", "lora_path": "a2"}).status_code == 200


def test_a_prefetched_adapter_is_there_before_its_request(server):
    (name, *_) = sorted(set(NAMES) - {"a2"} - in_memory(server))
    assert "being loaded" in post(server, "prefetch", name).json()["message"]
    wait_until(lambda: name in in_memory(server))
    wait_until(lambda: "is loaded" in post(server, "prefetch", name).json()["message"])
    loads = server.metrics()["engine_num_adapter_loads"]
    server.complete(model=name)
    assert server.metrics()["engine_num_adapter_loads"] == loads
    assert_error(post(server, "prefetch", "nobody"), 404)


def test_an_adapter_beyond_the_limit_is_refused_with_both_numbers_and_takes_nothing(server):
    held = server.metrics()["engine_adapter_bytes"]
    error = assert_error(
        server.post("/v1/completions", {"model": "huge", "prompt": "x"}), 400,
        "bytes in memory", f"the limit for all is {int(MEMORY_GIB * 2**30)}", "--adapter-memory-gib",
    )  # fmt: skip
    assert error["code"] == "adapter_too_large" and server.metrics()["engine_adapter_bytes"] == held


def test_pinned_adapters_are_there_again_when_a_new_engine_is(server):
    for name in ("a9", "a10"):
        post(server, "pin", name).raise_for_status()
    post(server, "unpin", "a10").raise_for_status()
    old = server.engine_pid()
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: server.engine_pids() - {old} and server.get("/health").status_code == 200, 120)
    wait_until(lambda: in_memory(server) == {"a9"}, 120)
    assert entries(server)["a9"]["pinned"] and server.metrics()["engine_num_pinned_adapters"] == 1
    post(server, "unpin", "a9").raise_for_status()
