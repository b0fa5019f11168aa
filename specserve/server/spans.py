"""OpenTelemetry spans of requests, by the conventions for generative AI; imported only where they are asked for.

Asked for by --otlp-traces-endpoint, or by OpenTelemetry's own variables. A span covers a request from admission to its
last token, and is a child of the one that the client's `traceparent` names. It holds counts, times and settings.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from .. import __version__
from ..errors import UserError
from ..messages import SamplingParams
from .job_counts import JobCounts

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

logger = logging.getLogger(__name__)

# That ask for spans, as the exporter itself reads them.
VARIABLES = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
CLOSE_TIMEOUT_S = 3.0  # the exporter would try again for a minute where no collector answers
HEADERS = ("traceparent", "tracestate")
_carrier: ContextVar[Mapping[str, str] | None] = ContextVar("trace_headers", default=None)


def remember_context(headers: Mapping[str, str]) -> None:
    """Of the request that this task answers, for the spans that are begun in it; a task may answer several in turn."""
    _carrier.set({name: headers[name] for name in HEADERS if name in headers})


class Traced(Protocol):
    """A request that may have a span."""

    @property
    def id(self) -> str: ...
    @property
    def model(self) -> str: ...  # as the client named it
    @property
    def operation(self) -> str: ...  # of the conventions, where they have one for it
    @property
    def generates(self) -> bool: ...  # or its sequences are texts that are pooled
    @property
    def span_settings(self) -> Mapping[str, Any]: ...  # attributes that are its own
    @property
    def prompt_lens(self) -> Sequence[int]: ...  # of its sequences
    @property
    def num_prompt_tokens(self) -> int: ...


class Spans:
    """Spans for one server; without a `tracer` there are none, and nothing is done for them."""

    def __init__(self, tracer: Tracer | None = None, provider: Any = None):
        self._tracer, self._provider = tracer, provider

    @classmethod
    def of(cls, endpoint: str | None, environ: Mapping[str, str]) -> Spans:
        """As the setting or the variables ask for. Raises `UserError` where what it takes is not installed."""
        if endpoint is None and not any(environ.get(name) for name in VARIABLES):
            return cls()
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
        except ImportError as error:
            if endpoint is None:
                logger.warning("a variable of OpenTelemetry names an endpoint, but there are no spans: %s", error)
                return cls()
            raise UserError(
                f"otlp_traces_endpoint is {endpoint!r}, but OpenTelemetry is not installed ({error}); "
                "pip install 'specserve[otel]'",
                param="otlp_traces_endpoint",
            ) from None
        resource = Resource.create({"service.name": "specserve"})  # OTEL_SERVICE_NAME wins
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)  # `close` does it, and within a time
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider.get_tracer("specserve", __version__), provider)

    def begin(self, job: Traced) -> Span | None:
        """The span of a job, from now on."""
        return Span(self._tracer, job) if self._tracer is not None else None

    def close(self) -> None:
        """Send what is left, within `CLOSE_TIMEOUT_S`; the rest is lost where nobody listens."""
        if self._provider is None:
            return
        sending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        sending.start()
        sending.join(CLOSE_TIMEOUT_S)
        if sending.is_alive():
            logger.warning("the last spans are dropped: no collector took them within %g s", CLOSE_TIMEOUT_S)


class Span:
    """Of one job; `ended` must be called."""

    def __init__(self, tracer: Tracer, job: Traced):
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        attributes: dict[str, Any] = {
            "gen_ai.operation.name": job.operation,
            "gen_ai.provider.name": "specserve",
            "gen_ai.request.model": job.model,
            "gen_ai.response.model": job.model,
            "gen_ai.response.id": job.id,
            **job.span_settings,
        }
        self._span = tracer.start_span(
            f"{job.operation} {job.model}",
            context=TraceContextTextMapPropagator().extract(_carrier.get() or {}),
            kind=SpanKind.SERVER,
            attributes=attributes,
        )
        self._generates = job.generates
        self._num_prompt_tokens = job.num_prompt_tokens

    def ended(self, counts: JobCounts, failure: str | None) -> None:
        """`failure`: why, if it has failed; else it is complete, or its client has left."""
        from opentelemetry.trace import Status, StatusCode

        if failure is None and not counts.is_whole:
            failure = "client_disconnected"
        span, usages, pooled = self._span, counts.usages, counts.pooled
        span.set_attribute("gen_ai.usage.input_tokens", self._num_prompt_tokens)
        if self._generates:
            span.set_attribute("gen_ai.usage.output_tokens", counts.num_generated)
        if usages or pooled:
            span.set_attribute("gen_ai.usage.cache_read.input_tokens", counts.num_cached_tokens)
            span.set_attribute(
                "specserve.queue_s", max([usage.queue_s for usage in usages] + [each.queue_s for each in pooled])
            )
        if counts.finishes:
            span.set_attribute("gen_ai.response.finish_reasons", counts.finishes)
        if usages:
            span.set_attribute("specserve.draft_tokens", sum(usage.draft_tokens for usage in usages))
            span.set_attribute("specserve.accepted_draft_tokens", sum(u.accepted_draft_tokens for u in usages))
            span.set_attribute("specserve.num_forwards", sum(usage.num_forwards for usage in usages))
        if counts.first_s is not None:
            span.set_attribute("specserve.time_to_first_token_s", counts.first_s)
        if failure is not None:
            span.set_attribute("error.type", failure)
            span.set_status(Status(StatusCode.ERROR, failure))
        span.end()


def sampling_settings(sampling: SamplingParams, n: int) -> dict[str, Any]:
    """Attributes of a generation of `n` sequences a prompt."""
    settings: dict[str, Any] = {
        "gen_ai.request.max_tokens": sampling.max_tokens,
        "gen_ai.request.temperature": sampling.temperature,
        "gen_ai.request.top_p": sampling.top_p,
        "gen_ai.request.choice.count": n,
        "gen_ai.request.frequency_penalty": sampling.frequency_penalty,
        "gen_ai.request.presence_penalty": sampling.presence_penalty,
    }
    if sampling.top_k:
        settings["gen_ai.request.top_k"] = sampling.top_k
    return settings
