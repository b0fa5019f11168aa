"""Files and batches as msgspec types: bodies, queries, answers, and the lines of output files.

Names and fields are OpenAI's; the OpenAPI document shows them, and tests hold answers to them and to the openai
client's own models.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

Status = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]  # fmt: skip
Purpose = Literal["batch", "batch_output"]

MIN_KEEP_S, MAX_KEEP_S = 3600, 30 * 86400
MAX_FILES, MAX_BATCHES = 10_000, 100  # of a list


class ExpiresAfter(msgspec.Struct, forbid_unknown_fields=True):
    """When a file goes: so many seconds after it was made."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=MIN_KEEP_S, le=MAX_KEEP_S)]


class FileUpload(msgspec.Struct, forbid_unknown_fields=True):
    """The parts of an upload; also `expires_after[anchor]` and `expires_after[seconds]`."""

    file: Annotated[bytes, Meta(extra_json_schema={"format": "binary", "contentEncoding": "binary"})]
    purpose: Literal["batch"]


class FileObject(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int
    filename: str
    purpose: Purpose
    status: Literal["processed"] = "processed"


class FileList(msgspec.Struct, forbid_unknown_fields=True):
    data: list[FileObject]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class FileDeleted(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


class FileQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which files are listed; newest first, unless `order` is asc."""

    after: str | None = None
    limit: str = str(MAX_FILES)
    order: Literal["asc", "desc"] = "desc"
    purpose: Purpose | None = None


class BatchQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which batches are listed, newest first."""

    after: str | None = None
    limit: str = "20"


Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]


class BatchRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    input_file_id: str
    endpoint: str
    completion_window: str  # "24h", or other minutes, hours or days
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class BatchError(msgspec.Struct, forbid_unknown_fields=True):
    """Why a batch failed, or goes on later; `line` counts from 1."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct, forbid_unknown_fields=True):
    data: list[BatchError]
    object: Literal["list"] = "list"


class RequestCounts(msgspec.Struct, forbid_unknown_fields=True):
    total: int = 0
    completed: int = 0
    failed: int = 0


class InputDetails(msgspec.Struct, forbid_unknown_fields=True):
    cached_tokens: int = 0


class OutputDetails(msgspec.Struct, forbid_unknown_fields=True):
    reasoning_tokens: int = 0


class BatchUsage(msgspec.Struct, forbid_unknown_fields=True):
    """Tokens of all rows that were answered."""

    input_tokens: int = 0
    input_tokens_details: InputDetails = msgspec.field(default_factory=InputDetails)
    output_tokens: int = 0
    output_tokens_details: OutputDetails = msgspec.field(default_factory=OutputDetails)
    total_tokens: int = 0


class Batch(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: str
    status: Status
    errors: BatchErrors | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts = msgspec.field(default_factory=RequestCounts)
    usage: BatchUsage = msgspec.field(default_factory=BatchUsage)
    metadata: Metadata | None = None


class BatchList(msgspec.Struct, forbid_unknown_fields=True):
    data: list[Batch]
    first_id: str | None
    last_id: str | None
    has_more: bool
    object: Literal["list"] = "list"


class RowResponse(msgspec.Struct):
    """What the row's request was answered, as over HTTP."""

    status_code: int
    request_id: str
    body: Any


class RowError(msgspec.Struct):
    """Why there was no answer."""

    code: Literal["batch_expired", "batch_cancelled"]
    message: str


class OutputLine(msgspec.Struct):
    """A line of an output or error file."""

    id: str
    custom_id: str
    response: RowResponse | None
    error: RowError | None
