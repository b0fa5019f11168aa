"""Sections of a run file that are of embed, rerank or classify alone; `run_config` puts them beside all others.

Every field stands here once, with its default and limits.
"""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from ..section import Section


class PoolingSettings(Section, frozen=True):
    """How a text becomes one vector; all of it goes into pooling_config.json. Of embed, rerank and classify."""

    type: (
        Annotated[
            Literal["last", "mean", "weighted_mean"],
            Meta(description="hidden states of the last token, or their mean; default: mean to embed, else last"),
        ]
        | None
    ) = None
    query_prefix: (
        Annotated[str, Meta(description="before a text that is searched with; default: none, to rerank 'Query: '")]
        | None
    ) = None
    document_prefix: (
        Annotated[
            str, Meta(description="before one that is found; default: none, to rerank a line break and 'Document: '")
        ]
        | None
    ) = None
    suffix: Annotated[str, Meta(description="behind every text; it is never cut")] = ""
    append_eos: Annotated[bool, Meta(description="the tokenizer's eos token behind that")] = False


class EmbedConfig(Section, frozen=True):
    """InfoNCE over the documents of a step."""

    temperature: Annotated[float, Meta(gt=0, le=1, description="cosines are divided by it")] = 0.05
    symmetric: Annotated[bool, Meta(description="documents find their queries, too, as half of the loss")] = False
    mined_negatives: Annotated[
        int,
        Meta(
            ge=0,
            le=32,
            description="hard negatives of a query, found by the model itself before each epoch but the first",
        ),
    ] = 0
    mining_margin: Annotated[
        float,
        Meta(gt=0, le=1, description="no hard negative scores more than this share of the query's own document"),
    ] = 0.95
    dimensions: Annotated[
        tuple[int, ...], Meta(description="shorter embeddings that are trained too (Matryoshka), as in [64, 128, 256]")
    ] = ()


class RerankConfig(Section, frozen=True):
    loss: Annotated[
        Literal["listwise", "pairwise"], Meta(description="over all documents of a query (ListNet), or pairs (RankNet)")
    ] = "listwise"


class ClassifyConfig(Section, frozen=True):
    class_weights: Annotated[
        Literal["none", "balanced"], Meta(description="balanced: rare labels count as much as frequent ones")
    ] = "none"
    min_label_rows: Annotated[int, Meta(ge=1, description="labels of fewer training rows are left out")] = 5
    calibration_share: Annotated[
        float,
        Meta(ge=0, le=0.5, description="share of the training rows that only calibrate probabilities and thresholds"),
    ] = 0.1
