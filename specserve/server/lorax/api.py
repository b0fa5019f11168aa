"""LoRAX's routes: generate, generate_stream, both behind POST /, and info.

A body becomes the same `CompletionRequest` as on /v1/completions (conversion.py), so that limits, sampling, adapters
and speculation are one code. Decided here is what LoRAX says of the prompt: all the room by default, cut at the front,
in a chat template if so asked.
"""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from functools import partial

from aiohttp import web

from ... import __version__
from ...errors import UserError
from ...text.tokenizer import TextTokenizer
from ..access.caller import Caller, caller_of
from ..generation.generator import Generator, before_deadline
from ..generation.job import Job
from ..generation.prompts import check_same_texts
from ..http_body import convert, json_response, read_body
from ..openai.conversion import MAX_CHOICES, MAX_STOPS, priority_of
from ..openai.prompt_ids import check_prompt_ids
from ..route import Handler
from ..sse import EventStream, stream_events
from .conversion import check_parameters, completion_request
from .responses import LoraxBuilder, Timer
from .types import LoraxInfo, LoraxParameters, LoraxRequest

BASE_MODEL = "__base_model__"  # how LoRAX spells that no adapter is meant
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
        return await self._whole(request, body, Timer(), as_list=False)

    async def generate_stream(self, request: web.Request) -> web.StreamResponse:
        return await self._stream(request, await self._body(request))

    async def compat(self, request: web.Request) -> web.StreamResponse:
        body = await self._body(request)
        return await (self._stream(request, body) if body.stream else self._whole(request, body, Timer(), as_list=True))

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
        return convert(await read_body(request, self._generator.config), LoraxRequest)

    async def _whole(self, request: web.Request, body: LoraxRequest, timer: Timer, as_list: bool) -> web.Response:
        job, builder = await self._prepare(body, caller_of(request), stream=False)
        timer.validated()
        async with aclosing(self._generator.deltas(job)) as deltas:
            async for idx, delta in deltas:
                timer.token()
                builder.add(idx, delta)
        answer = await asyncio.to_thread(builder.whole)
        headers = self._headers(body, job) | timer.headers(builder.answers)
        return json_response([answer] if as_list else answer, headers=headers)

    async def _stream(self, request: web.Request, body: LoraxRequest) -> web.StreamResponse:
        job, builder = await self._prepare(body, caller_of(request), stream=True)
        stream = EventStream(request, self._headers(body, job), mark=b"data:")
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

    async def _prepare(self, body: LoraxRequest, caller: Caller, stream: bool) -> tuple[Job, LoraxBuilder]:
        parameters = body.parameters or LoraxParameters()
        check_parameters(body.inputs, parameters, stream)
        caller.check_priority(parameters.priority)
        priority = priority_of(parameters, self._generator.config)
        caller.allowance.check_tokens()  # before an adapter is loaded and a text is read
        async with before_deadline(parameters) as deadline:
            job = await self._job(body.inputs, parameters, caller, stream, priority, deadline)
        job.names_limit = parameters.max_new_tokens is not None
        sampling = job.requests[0].sampling
        seed = sampling.seed if sampling.temperature else None
        prefix = body.inputs if parameters.return_full_text else ""
        eos = next(iter(self._generator.engine.info.eos_token_ids), 0)
        return job, LoraxBuilder(job, parameters, prefix, seed, eos)

    async def _job(
        self,
        inputs: str,
        parameters: LoraxParameters,
        caller: Caller,
        stream: bool,
        priority: int,
        deadline: float | None,
    ) -> Job:
        info, adapter = await self._generator.engine.first_info(), parameters.adapter_id
        adapter = None if adapter == BASE_MODEL else adapter or None
        named = self._generator.adapter_name(caller, None, adapter)
        tokenizer, prompted = await self._generator.prompts.tokenizer_for(named, priority)
        ids = await self._prompt_ids(inputs, parameters, tokenizer)
        check_prompt_ids(ids, info, tokenizer)
        room = info.max_model_len - len(ids)
        max_tokens = parameters.max_new_tokens if parameters.max_new_tokens is not None else max(1, room)
        if not 1 <= max_tokens <= room:
            raise UserError(
                f"the inputs have {len(ids)} tokens and max_new_tokens is {max_tokens}; with a context of "
                f"{info.max_model_len} tokens 1 to {max(room, 0)} are possible",
                param="max_new_tokens",
                code="context_length_exceeded",
            )
        request = completion_request(parameters, adapter, ids, max_tokens, stream)
        job = await self._generator.prepare_until(deadline, request, caller)
        check_same_texts(named, prompted, job.adapter_info)  # it is looked up again, and may be another by now
        return job

    async def _prompt_ids(self, inputs: str, parameters: LoraxParameters, tokenizer: TextTokenizer) -> list[int]:
        """Token ids of the inputs, as a user's message if so asked, cut at the front to `truncate` tokens."""
        generator, length = self._generator, parameters.truncate
        limit = generator.engine.info.max_model_len if length is None else None
        if parameters.apply_chat_template:
            message = {"role": "user", "content": inputs}
            hidden = partial(tokenizer.template.hidden_chat, [message])
            ids = await generator.prompts.rendered_ids(tokenizer, hidden, limit, len(inputs))
        else:
            if limit is not None:
                tokenizer.check_len([inputs], limit, "inputs")
            ids = await generator.prompts.read(tokenizer, len(inputs), tokenizer.encode, inputs)
        return ids if length is None else ids[-length:]
