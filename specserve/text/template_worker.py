"""A process that renders chat templates which came with adapters: what hangs or grows in it is killed with it.

Reads one `TemplateJob` after another from standard input and answers each with a `Rendered` on standard output. It
limits its own memory, and ends itself when a job takes longer than its time: it outlives no server that is gone.
"""

from __future__ import annotations

import os
import resource
import signal
import struct
import sys
from typing import Any, BinaryIO

import msgspec

MAX_RENDERED_BYTES = 32 * 2**20
MEMORY_BYTES = 2**30
_LENGTH = struct.Struct("<I")


class TemplateJob(msgspec.Struct, frozen=True):
    """A template and what it is given; an empty template asks whether the process is ready."""

    template: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    add_generation_prompt: bool
    variables: dict[str, Any]
    timeout_s: float


class Rendered(msgspec.Struct, frozen=True):
    """The text, or why there is none."""

    text: str = ""
    error: str | None = None


def pack(value: TemplateJob | Rendered) -> bytes:
    payload = msgspec.json.encode(value)  # not msgpack, which has no integers beyond 64 bits
    return _LENGTH.pack(len(payload)) + payload


def payload_len(head: bytes) -> int:
    return int(_LENGTH.unpack(head)[0])


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server's terminal is not asking this process
    os.environ["OPENBLAS_NUM_THREADS"] = "1"  # its threads' stacks count as memory
    # Standard output is the answers': what a library prints goes to the log.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    from transformers.utils.chat_template_utils import render_jinja_template  # a second to import

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    jobs = sys.stdin.buffer
    while (head := jobs.read(_LENGTH.size)) and (payload := jobs.read(payload_len(head))):
        job = msgspec.json.decode(payload, type=TemplateJob)
        signal.setitimer(signal.ITIMER_REAL, job.timeout_s + 1)  # ends this process, whatever it is doing
        answer(answers, _render(render_jinja_template, job) if job.template else Rendered())
        signal.setitimer(signal.ITIMER_REAL, 0)


def answer(answers: BinaryIO, rendered: Rendered) -> None:
    answers.write(pack(rendered))
    answers.flush()


def _render(render: Any, job: TemplateJob) -> Rendered:
    try:
        (text,), _ = render(
            [job.messages],
            tools=job.tools,
            chat_template=job.template,
            add_generation_prompt=job.add_generation_prompt,
            **job.variables,
        )
        num_bytes = len(text.encode())
    except MemoryError:
        return Rendered(error=f"it needs more than {MEMORY_BYTES >> 20} MiB of memory")
    except Exception as error:  # a template is a program of its own: it may raise anything
        return Rendered(error=str(error)[:1000] or type(error).__name__)
    if num_bytes > MAX_RENDERED_BYTES:
        return Rendered(error=f"it makes {num_bytes} bytes of text; at most {MAX_RENDERED_BYTES} are allowed")
    return Rendered(text)


if __name__ == "__main__":
    main()
