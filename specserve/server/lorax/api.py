"""LoRAX's routes: generate, generate_stream, both behind POST /, and info.

A body becomes the same `CompletionRequest` as on /v1/completions, so that limits, sampling, adapters and speculation
are one code. Only what LoRAX means otherwise is decided here: greedy unless sampling is asked for, all the room by
default, stop strings kept in the text.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial
from typing import Any

from aiohttp import web

from ... import __version__
from ...errors import UserError
from ...text.tokenizer import TextTokenizer
from ..generation.generator import Generator
from ..generation.job import Job
from ..http_body import convert, json_response, read_json
from ..openai.conversion import MAX_CHOICES, MAX_LOGPROBS, MAX_STOPS, check_prompt_ids
from ..openai.request_types import CompletionRequest
from ..routes import Handler
from ..sse import EventStream, stream_events
from .responses import LoraxBuilder, Timer
from .types import LoraxInfo, LoraxParameters, LoraxRequest

BASE_MODEL = "__base_model__"  # how LoRAX spells that no adapter is meant
# Field -> values that ask for nothing; anything else is refused as not supported.
REFUSED: dict[str, tuple[float, ...]] = {
    "merged_adapters": (),
    "typical_p": (1.0,),
    "watermark": (False,),
    "top_n_tokens": (),
}
TORCH_DTYPES = ("float32", "bfloat16", "float16")


class LoraxRoutes:
    """Handlers over one `Generator`."""

    def __init__(self, generator: Generator):
        self._generator = generator

    def handlers(self) -> dict[str, Handler]:
        """Handlers by the names that the route table gives them."""
        return {
            "lorax_generate": self.generate,
            "lorax_generate_stream": self.generate_stream,
            "lorax_compat": self.compat,
            "lorax_info": self.info,
        }

    async def generate(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        if body.stream:
            raise UserError("stream is true; POST /generate_stream streams", param="stream")
        return await self._whole(body, Timer(), as_list=False)

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        return await self._stream(request, await self._body(request))

    async def compat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await (self._stream(request, body) if body.stream else self._whole(body, Timer(), as_list=True))

    async def info(self, request: web.Request) -> web.Response:
        config, engine = self._generator.config, self._generator.engine.info
        info = LoraxInfo(
            model_id=self._generator.model_name,
            model_sha=config.revision,
            model_dtype=f"torch.{engine.dtype}" if engine.dtype in TORCH_DTYPES else engine.dtype,
            model_device_type=engine.device,
            model_pipeline_tag="text-generation",
            max_concurrent_requests=config.max_concurrent_requests,
            max_best_of=MAX_CHOICES,
            max_stop_sequences=MAX_STOPS,
            max_input_length=engine.max_model_len - 1,
            max_total_tokens=engine.max_model_len,
            waiting_served_ratio=0.0,
            max_batch_total_tokens=engine.num_kv_blocks * engine.block_size,
            max_waiting_tokens=0,
            validation_workers=1,
            eager_prefill=True,
            version=__version__,
            sha=None,
            docker_label=None,
            request_logger_url=None,
        )
        return json_response(info)

    async def _body(self, request: web.Request) -> LoraxRequest:
        config = self._generator.config
        value = await read_json(request, int(config.max_body_mib * 2**20), config.read_timeout_s)
        return convert(value, LoraxRequest)

    async def _whole(self, body: LoraxRequest, timer: Timer, as_list: bool) -> web.Response:
        job, builder = await self._prepare(body, stream=False)
        timer.validated()
        async with aclosing(self._generator.deltas(job)) as deltas:
            async for idx, delta in deltas:
                timer.token()
                builder.add(idx, delta)
        answer = await asyncio.to_thread(builder.whole)
        headers = self._headers(body, job) | timer.headers(builder.answers)
        return json_response([answer] if as_list else answer, headers=headers)

    async def _stream(self, request: web.Request, body: LoraxRequest) -> web.StreamResponse:
        job, builder = await self._prepare(body, stream=True)
        timeout_s, headers = self._generator.config.write_timeout_s, self._headers(body, job)
        stream = EventStream(request, timeout_s, headers, mark=b"data:")
        return await stream_events(stream, self._generator.deltas(job), builder)

    def _headers(self, body: LoraxRequest, job: Job) -> dict[str, str]:
        device = self._generator.engine.info.device
        headers = {
            "x-compute-type": "cpu" if device.startswith("cpu") else "gpu",
            "x-compute-characters": str(len(body.inputs)),
            "x-model-id": self._generator.model_name,
        }
        if job.adapter is not None:
            headers |= {"x-adapter-id": job.adapter, "x-adapter-source": "local"}
        return headers

    async def _prepare(self, body: LoraxRequest, stream: bool) -> tuple[Job, LoraxBuilder]:
        parameters = body.parameters or LoraxParameters()
        check_parameters(body.inputs, parameters, stream)
        info, adapter = self._generator.engine.info, parameters.adapter_id
        adapter = None if adapter == BASE_MODEL else adapter or None
        tokenizer, _ = await self._generator.prompts.tokenizer_for(self._generator.adapter_name(None, adapter))
        ids = await self._prompt_ids(body.inputs, parameters, tokenizer)
        check_prompt_ids(ids, info)
        room = info.max_model_len - len(ids)
        max_tokens = parameters.max_new_tokens if parameters.max_new_tokens is not None else max(1, room)
        if not 1 <= max_tokens <= room:
            raise UserError(
                f"the inputs have {len(ids)} tokens and max_new_tokens is {max_tokens}; with a context of "
                f"{info.max_model_len} tokens 1 to {max(room, 0)} are possible",
                param="max_new_tokens",
                code="context_length_exceeded",
            )
        job = await self._generator.prepare(completion_request(parameters, adapter, ids, max_tokens, stream))
        sampling = job.requests[0].sampling
        seed = sampling.seed if sampling.temperature else None
        prefix = body.inputs if parameters.return_full_text else ""
        eos = next(iter(info.eos_token_ids), 0)
        return job, LoraxBuilder(job, parameters, prefix, seed, eos)

    async def _prompt_ids(self, inputs: str, parameters: LoraxParameters, tokenizer: TextTokenizer) -> list[int]:
        """Token ids of the inputs, as a user's message if so asked, cut at the front to `truncate` tokens."""
        generator, length = self._generator, parameters.truncate
        limit = generator.engine.info.max_model_len if length is None else None
        if parameters.apply_chat_template:
            message = {"role": "user", "content": inputs}
            hidden = partial(tokenizer.template.hidden_chat, [message])
            ids = await generator.prompts.rendered_ids(tokenizer, hidden, limit)
        else:
            if limit is not None:
                tokenizer.check_len([inputs], limit, "inputs")
            ids = await generator.prompts.off_loop(len(inputs), tokenizer.encode, inputs)
        return ids if length is None else ids[-length:]


def samples(parameters: LoraxParameters) -> bool:
    """LoRAX samples when it is told to or when a sampling parameter is set; temperature 0 is greedy either way."""
    if parameters.temperature == 0:
        return False
    return bool(
        parameters.do_sample
        or parameters.temperature not in (None, 1.0)
        or parameters.top_k
        or (parameters.top_p is not None and parameters.top_p < 1.0)
    )


def check_parameters(inputs: str, parameters: LoraxParameters, stream: bool) -> None:
    """Refuse, by name, what LoRAX has and this server has not, and what LoRAX refuses itself. Raises `UserError`."""
    if not inputs:
        raise UserError("inputs is empty; send a text", param="inputs")
    for name, neutral in REFUSED.items():
        value = getattr(parameters, name)
        if value is not None and value not in neutral:
            raise UserError(f"{name!r} is not supported by this server; leave it out", param=name, code="unsupported")
    if parameters.adapter_source not in (None, "", "local"):
        raise UserError(
            f"adapter_source is {parameters.adapter_source[:64]!r}; adapters come from the server's folder: send local",
            param="adapter_source",
        )
    for name, low, high in (
        ("best_of", 1, MAX_CHOICES),
        ("return_k_alternatives", 1, MAX_LOGPROBS),
        ("truncate", 1, None),
        ("max_new_tokens", 1, None),
        ("top_k", 1, None),
        ("seed", 0, 2**64 - 1),
    ):
        value = getattr(parameters, name)
        if value is not None and (value < low or (high is not None and value > high)):
            bounds = f"at least {low}" if high is None else f"{low} to {high}"
            raise UserError(f"{name} is {value}; {bounds} is allowed", param=name)
    if (parameters.best_of or 1) > 1:
        if stream:
            raise UserError("best_of above 1 cannot be streamed: the best is known at the end", param="best_of")
        if not samples(parameters):
            raise UserError("best_of above 1 needs sampling: set do_sample or temperature", param="best_of")
    if stream and parameters.decoder_input_details:
        raise UserError(
            "decoder_input_details is not part of a stream; POST /generate has it", param="decoder_input_details"
        )


def completion_request(
    parameters: LoraxParameters, adapter: str | None, ids: list[int], max_tokens: int, stream: bool
) -> CompletionRequest:
    """The same request in the words of /v1/completions."""
    temperature = (1.0 if parameters.temperature is None else parameters.temperature) if samples(parameters) else 0.0
    needs_logprobs = stream or parameters.details or parameters.decoder_input_details
    seed = parameters.seed
    return CompletionRequest(
        prompt=ids,
        adapter_id=adapter,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=parameters.top_k,
        top_p=parameters.top_p,
        repetition_penalty=parameters.repetition_penalty,
        frequency_penalty=parameters.frequency_penalty,
        presence_penalty=parameters.presence_penalty,
        seed=seed - 2**64 if seed is not None and seed >= 2**63 else seed,
        stop=parameters.stop,
        include_stop_str_in_output=True,
        ignore_eos=parameters.ignore_eos_token,
        best_of=parameters.best_of,
        logprobs=(parameters.return_k_alternatives or 0) if needs_logprobs else None,
        echo=parameters.decoder_input_details,
        speculation=parameters.speculation,
        cache_salt=parameters.cache_salt,
        **_grammar(parameters),
    )


def _grammar(parameters: LoraxParameters) -> dict[str, Any]:
    """Structured output in the fields of /v1; several at once are refused."""
    found: dict[str, dict[str, Any]] = {}
    if parameters.response_format is not None:
        found["response_format"] = {"response_format": parameters.response_format}
    if parameters.schema is not None:
        found["schema"] = {"response_format": {"type": "json_object", "schema": parameters.schema}}
    if (grammar := parameters.grammar) is not None:
        kind = "regex" if grammar.type == "regex" else "json"
        found["grammar"] = {"structured_outputs": {kind: grammar.value}}
    if len(found) > 1:
        raise UserError(f"{' and '.join(found)} ask for one grammar each; send one of them", param=next(iter(found)))
    return next(iter(found.values()), {})
