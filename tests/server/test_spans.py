"""OpenTelemetry spans: what they say of a request, whose children they are; nothing is imported without them."""

from __future__ import annotations

import subprocess
import sys
import threading

import msgspec
import pytest
from test_generation import Engine, Store

from specserve.config import ServeConfig
from specserve.errors import UserError
from specserve.messages import Delta, Usage
from specserve.pooling_messages import Pooled
from specserve.server import spans as spans_module
from specserve.server.access.keys import KeyRing
from specserve.server.generation.generator import Generator
from specserve.server.metrics.metrics import Metrics
from specserve.server.openai.request_types import CompletionRequest
from specserve.server.pooling.api import PoolingRoutes
from specserve.server.pooling.pooler import Pooler
from specserve.server.pooling.request_types import EmbeddingRequest
from specserve.server.pooling.tei_api import TeiRoutes
from specserve.server.spans import VARIABLES, Spans, remember_context
from specserve.text.tokenizer import TextTokenizer

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Answering(Engine):
    async def generate(self, request):
        yield Delta(request.request_id, [7])
        usage = Usage(5, 3, 2, 2, 4, 1, 0, 0, queue_s=0.25)
        yield Delta(request.request_id, [8, 9], finish_reason="length", usage=usage)


class Failing(Engine):
    async def generate(self, request):
        raise UserError("no", code="engine_unavailable")
        yield


async def prepare(generator, **fields):
    request = CompletionRequest(model="a", prompt=[5, 6, 7, 8, 9], **fields)
    return await generator.prepare(request, KeyRing(ServeConfig()).anonymous)


@pytest.fixture
def spans():
    sdk = pytest.importorskip("opentelemetry.sdk.trace")
    export = pytest.importorskip("opentelemetry.sdk.trace.export")
    memory = pytest.importorskip("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
    provider = sdk.TracerProvider()
    provider.add_span_processor(export.SimpleSpanProcessor(memory))
    return memory, Spans(provider.get_tracer("test"), provider)


@pytest.fixture
def generator_of(model_dir, spans):
    def make(engine):
        return Generator(ServeConfig(), engine, Store(), TextTokenizer(model_dir), "base", Metrics(), spans[1])

    return make


async def test_a_span_has_the_conventions_names_and_the_clients_parent(spans, generator_of):
    remember_context({"traceparent": f"00-{TRACE}-{PARENT}-01", "other": "header"})
    generator = generator_of(Answering())
    job = await prepare(generator, max_tokens=9, temperature=0.5, top_k=3, n=2)
    [_ async for _ in generator.deltas(job)]
    await generator.close()
    (span,) = spans[0].get_finished_spans()
    assert span.name == "text_completion a" and span.kind.name == "SERVER" and span.status.is_unset
    assert format(span.context.trace_id, "032x") == TRACE and format(span.parent.span_id, "016x") == PARENT
    found = dict(span.attributes)
    assert found.pop("specserve.time_to_first_token_s") >= 0
    assert (
        found.items()
        >= {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.provider.name": "specserve",
            "gen_ai.request.model": "a",
            "gen_ai.response.id": job.id,
            "gen_ai.request.max_tokens": 9,
            "gen_ai.request.temperature": 0.5,
            "gen_ai.request.top_k": 3,
            "gen_ai.request.choice.count": 2,
            "gen_ai.usage.input_tokens": 5,
            "gen_ai.usage.output_tokens": 6,
            "gen_ai.usage.cache_read.input_tokens": 4,
            "gen_ai.response.finish_reasons": ("length", "length"),
            "specserve.accepted_draft_tokens": 2,
            "specserve.queue_s": 0.25,
        }.items()
    )


async def test_failures_and_clients_that_leave_are_errors(spans, generator_of):
    failing, answering = generator_of(Failing()), generator_of(Answering())
    with pytest.raises(UserError):
        [_ async for _ in failing.deltas(await prepare(failing))]
    left = answering.deltas(await prepare(answering))
    await anext(left)
    await left.aclose()
    await failing.close()
    await answering.close()
    errors = [span.attributes["error.type"] for span in spans[0].get_finished_spans()]
    assert errors == ["engine_unavailable", "client_disconnected"]


def test_nothing_is_imported_unless_an_endpoint_is_named():
    code = (
        "import sys; from specserve.server import app; from specserve.server.spans import Spans; "
        "assert Spans.of(None, {}).begin(None) is None; print([m for m in sys.modules if 'opentelemetry' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_missing_is_said_where_it_was_asked_for(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)  # as if it were not installed
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UserError, match=r"pip install 'specserve\[otel\]'"):
        Spans.of("http://localhost:4318/v1/traces", {})
    assert Spans.of(None, {VARIABLES[1]: "http://localhost:4318"}).begin(None) is None
    assert "no spans" in caplog.text


@pytest.mark.parametrize("answers", [True, False])
def test_a_collector_that_is_away_does_not_hold_up_the_end(monkeypatch, caplog, answers):
    class Provider:
        collector, has_sent = threading.Event(), False

        def shutdown(self):
            self.collector.wait(30)
            self.has_sent = True

    provider = Provider()
    monkeypatch.setattr(spans_module, "CLOSE_TIMEOUT_S", 30 if answers else 0.01)
    if answers:
        provider.collector.set()
    Spans(provider=provider).close()
    assert provider.has_sent is answers and ("dropped" in caplog.text) is not answers
    provider.collector.set()


async def test_a_span_of_texts_that_are_pooled_has_no_output_tokens(spans, generator_of):
    class Pooling(Engine):
        async def pool(self, request):
            yield Pooled(request.request_id, b"\0\0\x80?", 1, len(request.prompt_token_ids), 2, 0.25)

    generator = generator_of(Pooling())
    body = EmbeddingRequest(input=[[5, 6, 7], [8]], dimensions=1)
    generator.engine.info = msgspec.structs.replace(generator.engine.info, hidden_size=1)
    await PoolingRoutes(Pooler(generator), TeiRoutes(Pooler(generator))).embeddings(
        msgspec.to_builtins(body), KeyRing(ServeConfig()).anonymous
    )
    await generator.close()
    (span,) = spans[0].get_finished_spans()
    assert span.name == "embeddings base" and span.status.is_unset
    found = dict(span.attributes)
    assert found["gen_ai.operation.name"] == "embeddings" and found["gen_ai.embeddings.dimension.count"] == 1
    assert found["gen_ai.usage.input_tokens"] == 4 and found["gen_ai.usage.cache_read.input_tokens"] == 4
    assert "gen_ai.usage.output_tokens" not in found and found["specserve.queue_s"] == 0.25
