"""A server that takes its adapters from a shared store, while they are pushed and removed."""

from __future__ import annotations

import pytest
import requests
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess
from waiting import wait_until

from specserve.server.shared_store.store import SharedStore

pytestmark = pytest.mark.slow


def test_names_are_served_as_they_are_pushed(model_dir, tmp_path):
    store = SharedStore(str(tmp_path / "store"))
    adapters = [
        make_peft_adapter(model_dir, tmp_path / name, r=4, std=0.3, seed=seed) for seed, name in enumerate("ab")
    ]
    store.push(adapters[0], "mine")
    flags = (
        "--shared-store",
        store.url,
        "--shared-store-refresh-s",
        "0.2",
        "--adapter-cache-dir",
        str(tmp_path / "cache"),
    )
    server = ServerProcess(model_dir, *flags).wait_ready()

    def answer(name="mine"):
        body = {"model": name, "prompt": "The quick", "max_tokens": 8, "temperature": 0, "ignore_eos": True}
        return server.post("/v1/completions", body)

    def text(name="mine"):
        return answer(name).json()["choices"][0]["text"]

    try:
        names = [model["id"] for model in requests.get(server.url + "/v1/models", timeout=60).json()["data"]]
        assert names == ["tiny", "mine"]
        first = text()
        store.push(adapters[1], "other")
        second = text("other")
        assert first != second
        store.push(adapters[1], "mine")
        seen = []
        wait_until(lambda: seen.append(text()) or seen[-1] == second)
        assert set(seen) <= {first, second} and text() == second
        store.remove("other")
        wait_until(lambda: answer("other").status_code == 404)
        assert requests.get(server.url + "/v1/models/mine", timeout=60).status_code == 200
        assert text() == second
    finally:
        assert server.stop() == 0
