"""Headers that say how an answer may be used: on every kind of answer."""

import socket

import requests

TEXT = "/v1/completions"


def head_of(server, data: bytes) -> str:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(data)
        return b"".join(iter(lambda: connection.recv(65536), b"")).decode().partition("\r\n\r\n")[0]


def test_answers_are_not_sniffed_and_name_no_versions(server):
    body = {"prompt": "a", "max_tokens": 1}
    answers = [
        *(server.get(path) for path in ("/health", "/metrics", "/v1/models", "/nowhere")),
        server.post(TEXT, body),
        server.post(TEXT, {**body, "stream": True}, stream=True),
        server.post(TEXT, {**body, "max_tokens": -1}),
        requests.options(server.url + TEXT, headers={"Origin": server.url}, timeout=60),
    ]
    heads = ["\n".join(f"{name}: {value}" for name, value in answer.headers.items()) for answer in answers]
    heads.append(head_of(server, b"no HTTP\r\n\r\n"))
    for head in heads:
        assert "X-Content-Type-Options: nosniff" in head and "Server: specserve" in head, head
        assert "aiohttp" not in head and "ython" not in head, head


def test_a_browser_may_send_its_key_and_read_what_is_left_of_its_limits(server):
    asked = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    preflight = requests.options(server.url + TEXT, headers={"Origin": server.url, **asked}, timeout=60)
    assert "Authorization" in preflight.headers["Access-Control-Allow-Headers"]  # which no * includes
    assert preflight.headers["Access-Control-Allow-Methods"] == "GET, POST, DELETE"
    answer = server.post(TEXT, {"prompt": "a", "max_tokens": 1}, headers={"Origin": server.url})
    assert answer.headers["Access-Control-Expose-Headers"] == "*"
