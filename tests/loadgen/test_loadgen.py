"""The load generator: draws are functions of the seed, figures mean what they say, every failure has its name.

A server of the test's own behaves badly in known ways, so that each count is known beforehand; a real server shows
that the figures agree with the server's own.
"""

from __future__ import annotations

import asyncio
import json
import socket
import statistics
import threading
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web
from peft_adapters import make_peft_adapter
from server_fixture import ServerProcess
from tiny_models import make_tiny_model

from specserve.cli import main as cli
from specserve.loadgen.client import Chunk, Record, Usage
from specserve.loadgen.plan import make_plan, pick_models, poisson_arrivals
from specserve.loadgen.report import level_figures


def run(capsys, *argv: object) -> tuple[int, str, str]:
    code = cli.exit_code_of([str(value) for value in argv])
    out, err = capsys.readouterr()
    return code, out, err


def bench(capsys, url: str, folder: Path, *flags: object) -> tuple[int, list[dict], str]:
    """(exit code, levels of the JSON file, what was printed)."""
    file = folder / "out.json"
    code, out, err = run(capsys, "bench", "serve", "--url", url, "--output", file, *flags)
    assert "error" not in err, err
    return code, json.loads(file.read_text())["levels"], out


# -- draws


def test_poisson_arrivals_are_a_function_of_the_seed_and_have_the_rate():
    arrivals = poisson_arrivals(5.0, 4000, 1e9, "a")
    assert arrivals == poisson_arrivals(5.0, 4000, 1e9, "a") and arrivals != poisson_arrivals(5.0, 4000, 1e9, "b")
    gaps = [after - before for before, after in zip([0.0, *arrivals], arrivals, strict=False)]
    assert min(gaps) >= 0 and statistics.mean(gaps) == pytest.approx(0.2, rel=0.06)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.08)  # exponential: deviation = mean


def test_no_arrival_comes_after_the_duration():
    arrivals = poisson_arrivals(10.0, 100_000, 20.0, "a")
    assert max(arrivals) <= 20.0 and 140 < len(arrivals) < 260


def test_zipf_popularity_is_a_function_of_the_seed_and_follows_the_ranks():
    models = [f"m{idx}" for idx in range(4)]
    drawn = pick_models(models, 10_000, "zipf", 1.0, "a")
    assert drawn == pick_models(models, 10_000, "zipf", 1.0, "a") != pick_models(models, 10_000, "zipf", 1.0, "b")
    counts = Counter(drawn)
    total = 1 + 1 / 2 + 1 / 3 + 1 / 4
    for idx, model in enumerate(models):
        assert counts[model] == pytest.approx(10_000 / (idx + 1) / total, rel=0.1)


def test_other_popularities():
    models = ["a", "b", "c"]
    assert pick_models(models, 5, "distinct", 1.0, "s") == ["a", "b", "c", "a", "b"]
    assert pick_models(models, 5, "identical", 1.0, "s") == ["a"] * 5
    counts = Counter(pick_models(models, 9000, "uniform", 1.0, "s"))
    assert all(count == pytest.approx(3000, rel=0.08) for count in counts.values())


def plan(**changes):
    arguments = dict(
        num_requests=8, rate=None, duration_s=60.0, popularity="distinct", zipf_exponent=1.0, prompt_words=5, seed="s"
    )
    return make_plan(["a", "b"], changes.pop("prompts", {}), **{**arguments, **changes})


def test_prompts_of_each_model_take_turns_and_random_ones_differ():
    prompts = {"a": [[{"role": "user", "content": text}] for text in ("x", "y")]}
    requests = plan(prompts=prompts)
    assert Counter(r.messages[0]["content"] for r in requests if r.model == "a") == {"x": 2, "y": 2}
    random_ones = [r.messages[0]["content"] for r in requests if r.model == "b"]
    assert len(set(random_ones)) == 4 and all(len(text.split()) == 5 for text in random_ones)
    assert plan(prompts=prompts) == requests != plan(prompts=prompts, seed="t")


# -- figures


def record(chunks: list[tuple[float, int, int | None]], tokens: int, scheduled_s: float = 0.0) -> Record:
    made = [Chunk(*chunk) for chunk in chunks]
    usage = Usage(prompt_tokens=3, completion_tokens=tokens)
    return Record("m", scheduled_s, scheduled_s + 0.1, made[-1].at_s, made, True, usage)


def test_a_burst_is_one_gap_between_chunks_and_shared_by_its_tokens():
    figures = level_figures([record([(1.0, 4, 1), (1.4, 16, 4), (1.5, 4, 1)], tokens=6)], 1.0, None)
    assert figures.inter_chunk_ms.p50 == pytest.approx(100) and figures.inter_chunk_ms.max == pytest.approx(400)
    assert figures.inter_chunk_ms.mean == pytest.approx(250)
    # four tokens of 100 ms each and one of 100 ms: the burst is no stall for a token
    assert figures.inter_token_ms.max == pytest.approx(100) and figures.inter_token_ms.mean == pytest.approx(100)
    assert figures.tokens_per_chunk == 2.0


def test_without_token_counts_the_tokens_are_shared_out_by_characters():
    exact = level_figures([record([(1.0, 4, 1), (1.4, 16, 4), (1.5, 4, 1)], tokens=6)], 1.0, None)
    by_characters = level_figures([record([(1.0, 4, None), (1.4, 16, None), (1.5, 4, None)], tokens=6)], 1.0, None)
    assert by_characters.inter_token_ms == exact.inter_token_ms


def test_latencies_count_from_the_scheduled_arrival():
    figures = level_figures([record([(3.0, 1, 1), (4.0, 1, 1)], tokens=2, scheduled_s=0.5)], 1.0, None)
    assert figures.ttft_ms.p50 == pytest.approx(2500) and figures.end_to_end_ms.p50 == pytest.approx(3500)
    assert figures.send_lag_ms.p50 == pytest.approx(100)


def test_goodput_counts_the_requests_that_keep_to_every_target():
    fast, slow_start = [(0.2, 1, 1), (0.5, 1, 1)], [(2.0, 1, 1), (2.1, 1, 1)]
    records = [record(fast, tokens=4), record(fast, tokens=2), record(slow_start, tokens=2), record(fast, tokens=4)]
    records[-1].error = "truncated"
    figures = level_figures(records, 1.0, None, {"ttft": 1000, "tpot": 200})
    assert figures.good_share == 0.25 and figures.goodput == pytest.approx(1 / figures.duration_s, rel=1e-3)
    assert level_figures(records, 1.0, None, {"ttft": 1000}).good_share == 0.5
    assert level_figures(records, 1.0, None, {"e2el": 1}).goodput == 0
    assert level_figures(records, 1.0, None).goodput is None


def test_percentiles():
    records = [record([(float(idx), 1, 1)], tokens=1) for idx in range(1, 101)]
    ttft = level_figures(records, None, 1).ttft_ms
    assert (ttft.p50, ttft.p90, ttft.p99, ttft.max) == (50_000, 90_000, 99_000, 100_000)


# -- a server that misbehaves


class BadServer:
    """Answers by the model's name; counts what it got. Runs on a loop and a thread of its own."""

    def __init__(self) -> None:
        self.bodies: list[dict] = []
        self.in_flight = self.max_in_flight = 0
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._ready.wait(60)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.close()

    async def _start(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/chat/completions", self.complete)
        app.router.add_post("/v1/completions", self.complete)
        self._runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)

    async def models(self, request: web.Request) -> web.Response:
        if request.headers.get("Authorization") not in (None, "Bearer right"):
            return web.Response(status=401)
        return web.json_response({"data": [{"id": "good", "owned_by": "me"}, {"id": "slow", "owned_by": "me"}]})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        self.bodies.append(body)
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            return await self._answer(request, body)
        finally:
            self.in_flight -= 1

    async def _answer(self, request: web.Request, body: dict) -> web.StreamResponse:
        kind = body["model"]
        if kind == "full":
            return web.json_response({"error": {"message": "too many"}}, status=429)
        if kind == "hangs":
            await asyncio.sleep(30)
        if kind == "slow":
            await asyncio.sleep(0.3)
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)

        async def send(event: object) -> None:
            data = event if isinstance(event, bytes) else json.dumps(event).encode()
            await response.write(b"data: " + data + b"\n\n")

        def text(content: str, finish: str | None = None) -> dict:
            return {"choices": [{"index": 0, "delta": {"content": content}, "finish_reason": finish}]}

        await send(text("one "))
        await asyncio.sleep(0.02)
        if kind == "broken":
            request.transport.abort()
            return response
        if kind == "error":
            await send({"error": {"message": "the engine died"}})
        if kind == "not-json":
            await send(b"{nonsense")
        if kind not in ("truncated", "error"):
            await send(text("two three ", "length"))
            if kind != "no-usage":
                await send({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})
        await send(b"[DONE]")
        await response.write_eof()
        return response


@pytest.fixture
def bad_server():
    server = BadServer()
    yield server
    server.stop()


@pytest.mark.parametrize(
    ("model", "kind", "words"),
    [
        ("full", "http_429", "too many"),
        ("hangs", "timeout", "--timeout"),
        ("broken", "broken_stream", ""),
        ("error", "error_event", "the engine died"),
        ("not-json", "bad_event", "nonsense"),
        ("truncated", "truncated", "finish_reason"),
    ],
)
def test_every_failure_is_counted_once_under_its_name(capsys, bad_server, tmp_path, model, kind, words):
    flags = ["--adapters", f"good,{model}", "--popularity", "distinct", "--num-requests", 6, "--concurrency", 3]
    timeout_s = 3 if model == "hangs" else 60  # which a good answer may take on a busy machine
    code, levels, out = bench(capsys, bad_server.url, tmp_path, *flags, "--timeout", timeout_s)
    (level,) = levels
    assert code == 0 and len(bad_server.bodies) == 6
    assert (level["num_requests"], level["num_ok"], level["errors"]) == (6, 3, {kind: 3})
    assert words in level["error_examples"][kind] and f"3 failed with {kind}" in out
    assert (level["output_tokens"], level["prompt_tokens"]) == (9, 21)  # of those that succeeded
    assert level["adapters"][model]["num_ok"] == 0 and level["adapters"]["good"]["num_ok"] == 3


def test_exit_code_1_when_nothing_succeeded(capsys, bad_server, tmp_path):
    code, levels, out = bench(capsys, bad_server.url, tmp_path, "--adapters", "full", "--rate", 50, "--num-requests", 3)
    assert code == 1 and levels[0]["errors"] == {"http_429": 3} and levels[0]["ttft_ms"] is None


def test_a_server_that_went_away_is_a_connection_error(capsys, bad_server, tmp_path, monkeypatch):
    from specserve.loadgen import client

    async def listed(session, target):
        return [client.Model("good")]

    monkeypatch.setattr(client, "list_models", listed)
    with socket.socket() as unheard:  # held, so that nobody else gets the port, but not listened to
        unheard.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unheard.getsockname()[1]}"
        code, levels, _ = bench(capsys, url, tmp_path, "--concurrency", 1, "--num-requests", 2)
    assert code == 1 and levels[0]["errors"] == {"connection": 2}


def test_open_loop_sends_on_time_while_the_server_is_slow(capsys, bad_server, tmp_path):
    """Twenty requests a second at a server that takes 0.3 s: they overlap, and none waits for another."""
    flags = ["--adapters", "slow", "--rate", "20", "--num-requests", 20]
    code, (level,), _ = bench(capsys, bad_server.url, tmp_path, *flags)
    assert code == 0 and level["num_ok"] == 20 and bad_server.max_in_flight >= 3
    assert level["ttft_ms"]["p50"] >= 300 and level["rate_offered"] == 20
    assert level["rate_achieved"] == pytest.approx(20 / level["duration_s"], rel=0.01)


def test_closed_loop_keeps_its_concurrency_and_its_duration(capsys, bad_server, tmp_path):
    flags = ["--adapters", "slow", "--concurrency", "1,3", "--duration", 0.5]
    code, levels, _ = bench(capsys, bad_server.url, tmp_path, *flags)
    assert code == 0 and bad_server.max_in_flight == 3
    assert [level["concurrency"] for level in levels] == [1, 3]
    for level in levels:  # answers take 0.32 s: those started by 0.5 s
        assert 1 <= level["num_requests"] <= 2 * level["concurrency"] and level["duration_s"] < 60


def test_more_than_max_in_flight_are_not_sent_and_counted(capsys, bad_server, tmp_path):
    flags = ["--adapters", "hangs", "--rate", "1000", "--num-requests", 10, "--max-in-flight", 4, "--timeout", 3]
    code, (level,), _ = bench(capsys, bad_server.url, tmp_path, *flags)
    assert code == 1 and level["errors"] == {"timeout": 4, "not_sent": 6} and len(bad_server.bodies) == 4


def test_answers_without_usage_are_counted_by_chunks_and_reported(capsys, bad_server, tmp_path):
    flags = ["--adapters", "no-usage", "--concurrency", 1, "--num-requests", 2]
    _, (level,), out = bench(capsys, bad_server.url, tmp_path, *flags)
    assert level["num_without_usage"] == 2 and level["output_tokens"] == 4
    assert "2 answers had no usage" in out


def test_fields_that_only_some_servers_know_are_sent_only_when_asked_for(capsys, bad_server, tmp_path):
    bench(capsys, bad_server.url, tmp_path, "--concurrency", 1, "--num-requests", 1)
    assert set(bad_server.bodies[0]) == {
        "model", "messages", "max_tokens", "temperature", "seed", "stream", "stream_options"
    }  # fmt: skip
    flags = ["--ignore-eos", "--endpoint", "completions", "--token-counts", "--max-tokens", 5, "--temperature", 0.5]
    bench(capsys, bad_server.url, tmp_path, *flags, "--concurrency", 1, "--num-requests", 1)
    body = bad_server.bodies[1]
    assert body["ignore_eos"] is True and body["logprobs"] == 0 and body["max_tokens"] == 5
    assert len(body["prompt"].split()) == 64 and body["temperature"] == 0.5


def test_warmup_is_sent_and_not_counted(capsys, bad_server, tmp_path):
    flags = [
        "--concurrency",
        1,
        "--num-requests",
        2,
        "--warmup",
        3,
        "--goodput",
        "ttft:60000",
        "--goodput",
        "e2el:0.01",
    ]
    _, (level,), out = bench(capsys, bad_server.url, tmp_path, *flags)
    assert len(bad_server.bodies) == 5 and level["num_requests"] == 2
    assert (level["goodput"], level["good_share"]) == (0, 0) and "goodput" in out


def test_prompts_from_files_shared_and_of_one_adapter(capsys, bad_server, tmp_path):
    shared, own = tmp_path / "shared.jsonl", tmp_path / "own.jsonl"
    shared.write_text('{"prompt": "for all", "completion": "x"}\n')
    own.write_text('{"prompt": "for slow", "completion": "x"}\n')
    flags = ["--popularity", "distinct", "--concurrency", 1, "--num-requests", 2]
    bench(capsys, bad_server.url, tmp_path, *flags, "--data", shared, "--data", f"slow={own}")
    assert {body["model"]: body["messages"] for body in bad_server.bodies} == {
        "good": [{"role": "user", "content": "for all"}],
        "slow": [{"role": "user", "content": "for slow"}],
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([], "either --rate"),
        (["--rate", "1", "--concurrency", "1"], "either --rate"),
        (["--rate", "1,x"], "--rate '1,x' is not a list"),
        (["--rate", "nan"], "--rate 'nan' is not a list"),
        (["--rate", "0"], "above 0"),
        (["--rate", "inf"], "to 10000"),
        (["--concurrency", "1.5"], "whole numbers"),
        (["--concurrency", ",".join(["1"] * 33)], "at most 32"),
        (["--rate", "1", "--url", "localhost:8000"], "http://host:port"),
        (["--rate", "1", "--goodput", "itl:5"], "--goodput 'itl:5' is not NAME:MS"),
        (["--rate", "1", "--goodput", "ttft:0"], "milliseconds above 0 for one of ttft, tpot, e2el"),
        (["--rate", "1", "--output", "/no/such/folder/x.json"], "there is no directory"),
        (["--rate", "1", "--url", "http://127.0.0.1:1"], "is the server running"),
    ],
)
def test_mistakes_in_the_flags(capsys, flags, words):
    code, out, err = run(capsys, "bench", "serve", *flags)
    assert code == 2 and words in err and err.count("\n") == 1, err


def test_mistakes_that_need_the_server_to_be_seen(capsys, bad_server, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "p", "completion": "x"}\n')
    base = ["bench", "serve", "--url", bad_server.url, "--concurrency", "1"]
    for flags, words in (
        (["--api-key", "wrong"], "--api-key"),
        (["--data", f"other={file}"], "'other' is not among the models good, slow"),
        (["--data", f"slow={file}"], "no prompts for good"),
        (["--data", tmp_path / "missing.jsonl"], "cannot read"),
        (["--adapters", ","], "no model to ask for"),
    ):
        code, _, err = run(capsys, *base, *flags)
        assert code == 2 and words in err, err


# -- a real server


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load")
    model = make_tiny_model(folder / "tiny")
    for idx in range(3):
        make_peft_adapter(model, folder / "adapters" / f"lora-{idx}", r=4, seed=idx)
    process = ServerProcess(model, "--adapters-dir", str(folder / "adapters")).wait_ready()
    yield process
    process.stop()


@pytest.mark.parametrize("endpoint", ["chat", "completions"])
def test_a_real_server_under_open_load_agrees_with_its_own_counters(capsys, server, tmp_path, endpoint):
    before = server.metrics()
    flags = ["--rate", "20,40", "--num-requests", 12, "--max-tokens", 9, "--ignore-eos", "--prompt-words", 8]
    flags += ["--endpoint", endpoint, "--adapters", "lora-0,lora-1,lora-2", "--popularity", "distinct"]
    code, levels, out = bench(capsys, server.url, tmp_path, *flags, "--plot", tmp_path / "plots", "--token-counts")
    assert code == 0 and [level["rate_offered"] for level in levels] == [20, 40]
    for level in levels:
        assert (level["num_ok"], level["errors"], level["output_tokens"]) == (12, {}, 12 * 9)
        assert level["num_without_usage"] == 0
        # equal where an answer came in one read
        assert 0 < level["ttft_ms"]["p50"] <= level["end_to_end_ms"]["p50"] <= level["end_to_end_ms"]["max"]
        for figures in level["adapters"].values():
            assert (figures["num_ok"], figures["output_tokens"]) == (4, 36)
            assert figures["num_forwards"] + round(figures["draft_tokens"] * (figures["acceptance"] or 0)) == 36
            assert figures["mean_accepted_length"] == pytest.approx(36 / figures["num_forwards"], rel=1e-3)
    server.wait_baseline()
    after = server.metrics()
    name = "engine_generated_tokens"
    assert after[name] - before[name] == 2 * 12 * 9
    assert "tokens a forward" in out
    assert all((tmp_path / "plots" / f"{name}.png").stat().st_size > 5000 for name in ("latency", "throughput"))


def test_the_same_seed_sends_the_same_load_to_a_real_server(capsys, server, tmp_path):
    flags = ["--rate", "50", "--num-requests", 10, "--max-tokens", 4, "--popularity", "zipf"]
    runs = [bench(capsys, server.url, tmp_path, *flags, "--seed", seed)[1][0] for seed in (5, 5, 6)]
    shares = [{name: figures["num_requests"] for name, figures in level["adapters"].items()} for level in runs]
    assert shares[0] == shares[1]
    assert runs[0]["prompt_tokens"] == runs[1]["prompt_tokens"] != runs[2]["prompt_tokens"]
    assert runs[0]["rate_scheduled"] == pytest.approx(runs[1]["rate_scheduled"])
    assert runs[0]["rate_scheduled"] != runs[2]["rate_scheduled"]
