"""pooling_config.json, which may stand beside a PEFT LoRA: what it is for, how it pools, what its outputs mean.

Owns the file's format, and what PEFT's `task_type` means where there is none: SEQ_CLS classifies, or re-ranks where its
score matrix has one row, by the last token, as transformers does; FEATURE_EXTRACTION embeds by the last token, to
length 1, as vLLM does; anything else generates. File, task type and weights must agree; whatever does not is refused
with one sentence. The file counts into the adapter's content hash. The trainer writes it by `PoolingConfig`.
"""

from __future__ import annotations

import msgspec

from ..adapter_kinds import AdapterType, PoolingType, Question

FORMAT_VERSION = 1


class PoolingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The file as it is written; `PoolingInfo` says what the fields mean."""

    adapter_type: AdapterType
    format_version: int = FORMAT_VERSION
    pooling: PoolingType = "last"
    normalize: bool | None = None  # embed; None: true
    dimensions: tuple[int, ...] = ()  # embed
    questions: tuple[Question, ...] = ()  # classify; none: one of multi_class, labels LABEL_0, LABEL_1 ...
    query_prefix: str = ""  # embed, rerank
    document_prefix: str = ""  # embed, rerank
    suffix: str = ""
    append_eos: bool = False
    max_tokens: int | None = None
