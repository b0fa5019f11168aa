"""An OpenAI-compatible endpoint, asked over HTTP: one attempt at a time; who asks again is teacher.py.

The key is read from the environment when the teacher is opened, goes into one header, and is taken out of whatever an
endpoint sends back. Redirects are not followed, so that it reaches no other host.
"""

from __future__ import annotations

import email.utils
import os
import time
from collections.abc import Mapping

import aiohttp
import msgspec

from .asks import Ask, Reading, Reply, TopTokens
from .errors import TeacherError
from .hosted_body import Dialect, answers_of, body_of, error_code, error_text, read_completion, tokens_in
from .spec import TeacherSpec

DEFAULT_CONCURRENCY = 16
CONNECT_S = 15.0
MAX_ANSWER_BYTES = 64 << 20
# Of statuses that other attempts may not meet again; 529 is Anthropic's and others' for overload.
RETRYABLE = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 520, 521, 522, 523, 524, 529})
OUT_OF_TIME = frozenset({408, 504, 524})  # who said so gave up on a model that may have answered
FILTERED = "content_filter"  # Azure's code of a prompt that its filter refuses, which it charges for
_REASONS_TO_END = {401: "the key is refused", 402: "there is no credit", 404: "no such address or model"}


class HostedBackend:
    """Of a spec with `url`. Raises `TeacherError` where the key's variable is not set."""

    def __init__(self, spec: TeacherSpec, environ: Mapping[str, str] = os.environ):
        self._spec = spec
        self._key = self._key_of(environ)
        self.concurrency = spec.concurrency or DEFAULT_CONCURRENCY
        fields = msgspec.json.encode(spec.fields, order="deterministic").decode()
        self.identity = f"{spec.url}\n{spec.model}" + (f"\n{fields}" if spec.fields else "")
        self._dialect = Dialect()
        self._session: aiohttp.ClientSession | None = None

    async def start(self) -> None:
        headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        timeout = aiohttp.ClientTimeout(total=self._spec.timeout_s, sock_connect=min(CONNECT_S, self._spec.timeout_s))
        connector = aiohttp.TCPConnector(limit=self.concurrency)
        self._session = aiohttp.ClientSession(headers=headers, timeout=timeout, connector=connector)
        await self._find()

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def _find(self) -> None:
        """Raise `TeacherError` when nobody is there, or the key is refused: a run need not begin to find that out."""
        assert self._session is not None
        try:
            async with self._session.get(f"{self._spec.url}/models", allow_redirects=False) as response:
                if response.status == 401:
                    raise self._refused(response, await self._read(response))
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise TeacherError(f"the teacher's address {self._spec.url!r} is no address", ends_run=True) from None
        except aiohttp.ClientConnectorError as failure:
            raise TeacherError(
                f"cannot reach {self._spec.name}: {failure.strerror}; is it running, and is the address right?",
                ends_run=True,
                status=503,
            ) from None
        except (aiohttp.ClientError, OSError):
            return  # somebody is there, and an ask that fails is tried again

    async def ask(self, ask: Ask, num_there: int = 0) -> Reply:
        """What one request brings: some endpoints give fewer samples than they are asked for."""
        if not ask.messages:
            raise TeacherError(
                f"{self._spec.name} is an endpoint, which answers users and cannot be one", ends_run=True
            )
        missing = ask.n - num_there
        data = await self._post(ask, missing, ask.seed + num_there if ask.seed is not None else None)
        if isinstance(data, str):
            return Reply(refused=(data,) * missing, is_counted=False)
        try:
            completion = read_completion(data, self._spec)
            answers, refused = answers_of(completion, self._spec)
        except TeacherError as error:
            error.args = (self._hidden(str(error)),)
            error.may_be_billed, error.tokens = True, tokens_in(data)
            raise
        tokens = tokens_in(data)
        answers = answers[:missing]
        refused = [self._hidden(told) for told in refused[: missing - len(answers)]]
        return Reply(tuple(answers), *(tokens or (0, 0)), tuple(refused), is_counted=tokens is not None)

    async def read(self, reading: Reading) -> TopTokens:
        """An endpoint tells the probabilities of its own answers alone."""
        raise TeacherError(
            f"{self._spec.name} is an endpoint, which reads no texts of others; ask for top_logprobs with its answers",
            ends_run=True,
        )

    async def _post(self, ask: Ask, n: int, seed: int | None) -> bytes | str:
        """The body of an answer, or what the endpoint says where its filter refuses the prompt."""
        assert self._session is not None
        dialect = self._dialect
        body = body_of(ask, self._spec, n, seed, dialect)
        try:
            async with self._session.post(
                f"{self._spec.url}/chat/completions",
                data=msgspec.json.encode(body),
                headers={"Content-Type": "application/json"},
                allow_redirects=False,
            ) as response:
                data = await self._read(response)
                if response.status == 200:
                    return data
                if response.status == 400 and FILTERED in error_code(data):
                    return self._hidden(error_text(data))
                error = self._refused(response, data)
        except TimeoutError as failure:
            raise TeacherError(
                f"{self._spec.name} did not answer within {self._spec.timeout_s:g} s",
                retryable=True,
                status=504,
                may_be_billed=not isinstance(failure, aiohttp.ConnectionTimeoutError),
            ) from None
        except (aiohttp.ClientError, OSError) as failure:
            raise TeacherError(
                f"cannot reach {self._spec.name}: {self._hidden(str(failure) or type(failure).__name__)}",
                retryable=True,
                status=503,
                may_be_billed=not isinstance(failure, aiohttp.ClientConnectorError),
            ) from None
        other = dialect.after(str(error)) if error.status == 400 else None
        if other is None:
            raise error
        self._dialect = other
        return await self._post(ask, n, seed)

    async def _read(self, response: aiohttp.ClientResponse) -> bytes:
        data = bytearray()
        async for chunk in response.content.iter_chunked(1 << 16):
            data += chunk
            if len(data) > MAX_ANSWER_BYTES:
                raise TeacherError(
                    f"{self._spec.name} sent more than {MAX_ANSWER_BYTES} bytes in one answer", may_be_billed=True
                )
        return bytes(data)

    def _refused(self, response: aiohttp.ClientResponse, data: bytes) -> TeacherError:
        status, name = response.status, self._spec.name
        told = self._hidden(error_text(data)) or "nothing"
        if 300 <= status < 400:
            target = self._hidden(response.headers.get("Location", "nowhere"))[:200]
            return TeacherError(f"{name} redirects to {target!r}; give that address", ends_run=True)
        if status in _REASONS_TO_END or "insufficient_quota" in error_code(data):
            reason = _REASONS_TO_END.get(status, "the quota is used up")
            if status == 401:
                reason += f" (from ${self._spec.key_env})" if self._spec.key_env else "; name its variable as key"
            return TeacherError(f"{name}: {reason}: status {status}: {told}", ends_run=True, status=status)
        message = f"{name}: status {status}: {told}"
        if status in RETRYABLE or status >= 500:
            retry_after_s = retry_after(response.headers)
            may_be_billed = status in OUT_OF_TIME
            return TeacherError(
                message, retryable=True, retry_after_s=retry_after_s, status=status, may_be_billed=may_be_billed
            )
        return TeacherError(message, status=status)

    def _hidden(self, text: str) -> str:
        """`text` without the key, which some errors repeat."""
        return text.replace(self._key, "***") if self._key else text

    def _key_of(self, environ: Mapping[str, str]) -> str | None:
        if self._spec.key_env is None:
            return None
        key = environ.get(self._spec.key_env, "").strip()
        if not key:
            raise TeacherError(
                f"the environment variable {self._spec.key_env} is not set; it must have the key for {self._spec.name}",
                ends_run=True,
            )
        if not key.isascii() or not key.isprintable():
            raise TeacherError(f"the key in {self._spec.key_env} has characters that no header may have", ends_run=True)
        return key


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that an endpoint asks to wait: OpenAI's milliseconds, or HTTP's seconds or date."""
    for name, unit in (("retry-after-ms", 1e-3), ("Retry-After", 1.0)):
        value = headers.get(name, "").strip()
        try:
            return max(0.0, float(value) * unit)
        except ValueError:
            date = email.utils.parsedate_tz(value)
            if date is not None:
                return max(0.0, email.utils.mktime_tz(date) - time.time())
    return None
