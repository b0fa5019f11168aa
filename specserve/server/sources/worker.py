"""A process that fetches one adapter: it can be ended at any time, whatever the library that it waits in is doing.

Reads one `FetchJob` from standard input and answers with a `Fetched` or a `FetchFailed` on standard output. It writes
into the folder of the job alone, which is its parent's to remove, and ends itself when its standard input closes: it
outlives no server.
"""

from __future__ import annotations

import logging
import os
import resource
import sys
import threading
import traceback
from pathlib import Path

import msgspec

from ...errors import ErrorInfo, UserError
from .fetching import FetchedFile, FileState, fetch
from .locations import HUB, AllowedSources, Location

MAX_MESSAGE_BYTES = 1 << 20


class FetchJob(msgspec.Struct, frozen=True):
    location: Location
    allowed: AllowedSources
    folder: str  # where `target` is made
    known: dict[str, FileState]  # what the source said when the cached copy was made
    max_bytes: int


class Fetched(msgspec.Struct, frozen=True, tag="fetched"):
    states: dict[str, FileState]
    files: dict[str, FetchedFile] | None  # None: what is known is there still


class FetchFailed(msgspec.Struct, frozen=True, tag="failed"):
    error: ErrorInfo


def run(job: FetchJob) -> Fetched:
    """Fetch into `job.folder`/files. Raises `UserError`."""
    target = Path(job.folder) / "files"
    target.mkdir()
    if job.location.scheme in ("http", "https"):
        from .http_source import HttpSource

        with HttpSource(job.location, job.allowed) as source:
            return Fetched(*fetch(source, target, job.known, job.max_bytes))
    from .other_sources import FsspecSource, HubSource

    other = HubSource(job.location) if job.location.scheme == HUB else FsspecSource(job.location)
    return Fetched(*fetch(other, target, job.known, job.max_bytes))


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    log = logging.StreamHandler(os.fdopen(os.dup(2), "w"))
    for fd in (1, 2):  # what libraries print has what hostile servers say in it, and may have what is secret
        os.dup2(os.open(os.devnull, os.O_WRONLY), fd)
    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=FetchJob)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    resource.setrlimit(resource.RLIMIT_FSIZE, (job.max_bytes, job.max_bytes))  # also of a library's own files
    try:
        answer: Fetched | FetchFailed = run(job)
    except UserError as error:
        answer = FetchFailed(error.info())
    except OSError as error:
        answer = FetchFailed(cannot_keep(error).info())
    except Exception as error:  # a bug of ours: where it is, and not what its text says
        frames = traceback.extract_tb(error.__traceback__)[-3:]
        where = ", ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames)
        log.handle(logging.makeLogRecord({"msg": f"fetching an adapter failed: {type(error).__name__} at {where}"}))
        info = ErrorInfo("fetching failed; the server's log says where", 500, "server_error", None, "internal_error")
        answer = FetchFailed(info)
    answers.write(msgspec.json.encode(answer) + b"\n")
    answers.flush()
    os._exit(0)  # threads of libraries may wait for what never comes


def cannot_keep(error: OSError) -> UserError:
    problem = error.strerror or type(error).__name__
    return UserError(f"the adapter cannot be kept (--adapter-cache-dir): {problem}", status=503, code="fetch_failed")


def _end_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


if __name__ == "__main__":
    main()
