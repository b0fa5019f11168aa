"""The whole server in this process, over HTTP, with a stand-in for its engine."""

from __future__ import annotations

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from pooling_stand_in import Client, Engine, Store

from specserve.config import ServeConfig
from specserve.server.app import Server
from specserve.text.tokenizer import TextTokenizer


@pytest.fixture(scope="session")
def tokenizer(model_dir):
    return TextTokenizer(model_dir)


@pytest.fixture
async def make_client(model_dir, tokenizer):
    """A server with these settings and its client."""
    clients = []

    async def make(**settings) -> Client:
        server = Server(msgspec.structs.replace(ServeConfig(), **settings), model_dir)
        engine, store = Engine(), Store()
        server.engine, server.store, server.model_name = engine, store, "base"
        await server.keys.reload()
        http = TestClient(TestServer(server.application(tokenizer), handler_cancellation=True))
        await http.start_server()
        clients.append(http)
        client = Client(http, engine, store, tokenizer)
        client.server = server
        return client

    yield make
    for http in clients:
        await http.close()


@pytest.fixture
async def client(make_client):
    return await make_client()
