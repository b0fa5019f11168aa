"""What a training run is: one struct, read from YAML, flags and `--set`, and saved as it was resolved.

Every field stands here once, or in the settings of the task that it is for, with its default and limits. Knows nothing
of data, models or devices.
"""

from __future__ import annotations

import datetime
from typing import Annotated, Literal

from msgspec import Meta

from ..drafters.history_file import MAX_TRAINED_TOKENS
from ..model.shapes import JOINED, LINEARS
from ..routing_profile import DEFAULT_PROMPTS, MAX_PROMPTS
from .pooling.settings import ClassifyConfig, EmbedConfig, PoolingSettings, RerankConfig
from .section import Section

ALL_LINEAR = "all-linear"
TARGETS = (*LINEARS, *JOINED, "embed_tokens", "lm_head")  # the last two are not part of "all-linear"


class DataConfig(Section, frozen=True):
    """Rows of a narrow task. Paths are relative to the run file's folder, or to the working directory for flags."""

    train: Annotated[str, Meta(description="JSONL of training rows")] = ""
    eval: Annotated[str | None, Meta(description="JSONL of held-out rows")] = None
    max_rows: Annotated[int, Meta(ge=1, description="use only the first so many training rows")] | None = None
    max_len: (
        Annotated[
            int,
            Meta(
                ge=16,
                description="tokens of prompt and completion; longer rows are left out; of other tasks tokens of a "
                "text, which is cut; default: 1024, of other tasks 512, or the base model's positions if it has fewer",
            ),
        ]
        | None
    ) = None
    system: Annotated[str | None, Meta(description="system message put before each row's; default: the template's")] = (
        None
    )
    date: (
        Annotated[
            datetime.date,
            Meta(description="today, for chat templates that write it, as in 2026-11-28; default: when the run begins"),
        ]
        | None
    ) = None


class LoraConfig(Section, frozen=True):
    enabled: Annotated[
        bool, Meta(description="false: no LoRA, but a head of the bare base model (--head-only --base)")
    ] = True
    r: Annotated[int, Meta(ge=1, le=256, description="rank")] = 16
    alpha: Annotated[int, Meta(ge=1, description="scale times rank")] = 32
    dropout: Annotated[float, Meta(ge=0, lt=1, description="dropout of the LoRA's input")] = 0.0
    target_modules: Annotated[
        str | tuple[str, ...],
        Meta(description="'all-linear', or names such as [q_proj, v_proj, embed_tokens, lm_head]"),
    ] = "all-linear"
    adapter: Annotated[str | None, Meta(description="existing PEFT directory to start from")] = None
    frozen: Annotated[
        bool, Meta(description="leave that LoRA's files as they are and train only a head for it (--head-only)")
    ] = False

    @property
    def is_trained(self) -> bool:
        """Else the run is of a head alone."""
        return self.enabled and not self.frozen


class HeadConfig(Section, frozen=True):
    enabled: Annotated[bool, Meta(description="train a lookahead head")] = True
    hidden_size: Annotated[int, Meta(ge=16, le=2048, description="width of the recurrent state")] = 192
    vocab_size: Annotated[int, Meta(ge=64, le=65536, description="most tokens that it can name")] = 2048
    draft_len: Annotated[int, Meta(ge=1, le=32, description="tokens drafted at most")] = 12
    train_steps_ahead: Annotated[int, Meta(ge=1, le=32, description="steps that the loss looks ahead")] = 12
    tap_layer: Annotated[int, Meta(ge=0, description="layer whose output is tapped; default: the middle")] | None = None
    copy_window: Annotated[int, Meta(ge=0, le=32, description="prompt tokens that it can copy from; 0: no copying")] = 8
    copy_jumps: (
        Annotated[
            bool,
            Meta(
                description="an output token that is not among those moves on to where it stands in the prompt; "
                "default: where that stands before many more of the answers' tokens"
            ),
        ]
        | None
    ) = None
    base_words: Annotated[
        bool, Meta(description="its words begin as the base model's embeddings of them, through one learned matrix")
    ] = True
    step_decay: Annotated[float, Meta(gt=0, le=1, description="weight of a step ahead against the one before")] = 0.9
    loss: Annotated[
        Literal["ce", "kl", "lk"],
        Meta(description="cross-entropy, KL to the adapter's own distribution, or KL with total variation"),
    ] = "ce"
    lr: Annotated[float, Meta(gt=0, le=1, description="learning rate of the head")] = 3e-3


class KlConfig(Section, frozen=True):
    """How the LoRA learns from a teacher's probabilities; of loss kl and mixed."""

    weight: Annotated[float, Meta(gt=0, lt=1, description="mixed: share of KL, the rest is cross-entropy")] = 0.5
    temperature: Annotated[
        float, Meta(ge=0.1, le=20, description="both distributions are softened by it, the loss times its square")
    ] = 1.0


class JointConfig(Section, frozen=True):
    """How far the head's loss may reach into the LoRA."""

    start: Annotated[float, Meta(ge=0, le=1, description="share of steps with the LoRA alone")] = 0.5
    head_weight: Annotated[float, Meta(ge=0, description="weight of the head's loss")] = 0.2
    warmup: Annotated[float, Meta(ge=0, le=1, description="share of steps over which that weight rises")] = 0.1
    detach_prob: Annotated[
        float, Meta(ge=0, le=1, description="chance that a step's head gradient stops at the head")
    ] = 0.5


class OptimizerConfig(Section, frozen=True):
    lr: Annotated[float, Meta(gt=0, le=1, description="peak learning rate of the LoRA")] = 1e-3
    weight_decay: Annotated[float, Meta(ge=0, description="of the LoRA; the head has none")] = 0.0
    warmup: Annotated[
        float, Meta(ge=0, le=1, description="share of steps over which the rate rises; at least 4 steps unless it is 0")
    ] = 0.05
    epochs: (
        Annotated[
            float,
            Meta(
                gt=0,
                description="how often each row is seen; default: once, or until min_steps and min_rows hold",
            ),
        ]
        | None
    ) = None
    min_steps: Annotated[
        int, Meta(ge=1, description="least steps of the default epochs; a run of fewer ends with a warning")
    ] = 24
    min_rows: Annotated[
        int, Meta(ge=0, description="least rows that the default epochs go over, repetitions counted")
    ] = 360
    max_steps: Annotated[int, Meta(ge=1, description="stop after so many steps")] | None = None
    batch_tokens: Annotated[int, Meta(ge=16, description="tokens of one step, padding included")] = 2048
    grad_clip: Annotated[float, Meta(gt=0, description="largest norm of a gradient, LoRA and head apart")] = 1.0


class DistillConfig(Section, frozen=True):
    """The head is fitted again to what the finished adapter itself writes."""

    rows: (
        Annotated[
            int,
            Meta(
                ge=0,
                description="training prompts that are answered; 0: none; default: 150, for the base's head nearly all",
            ),
        ]
        | None
    ) = None
    epochs: Annotated[int, Meta(ge=1, description="how often the head sees each answer")] = 8
    max_tokens: Annotated[int, Meta(ge=1, description="longest answer")] = 512
    temperature: Annotated[
        float, Meta(ge=0, le=2, description="of these answers; above 0 where the greedy ones of free text loop")
    ] = 0.0


class HistoryConfig(Section, frozen=True):
    max_tokens: Annotated[
        int, Meta(ge=0, le=MAX_TRAINED_TOKENS, description="completion tokens kept as task history; 0: none")
    ] = 400_000


class CheckpointConfig(Section, frozen=True):
    every_steps: Annotated[
        int, Meta(ge=1, description="steps between checkpoints; one is written once the loss after it was good")
    ] = 50


class EvalConfig(Section, frozen=True):
    rows: (
        Annotated[
            int,
            Meta(ge=0, description="held-out rows measured after training; 0: none; default: 40, of other tasks all"),
        ]
        | None
    ) = None
    max_tokens: Annotated[int, Meta(ge=1, description="longest answer")] = 512
    corpus_rows: Annotated[
        int, Meta(ge=0, description="embed: documents of so many training rows are searched beside the held-out ones")
    ] = 1000


class RoutingConfig(Section, frozen=True):
    prompts: Annotated[
        int,
        Meta(
            ge=0,
            le=MAX_PROMPTS,
            description="training prompts in routing.json, by which model auto finds the adapter; 0: no file",
        ),
    ] = DEFAULT_PROMPTS


class RunConfig(Section, frozen=True):
    """A whole run; see examples/*.yaml."""

    task: Annotated[Literal["generate", "embed", "rerank", "classify"], Meta(description="what the adapter is for")] = (
        "generate"
    )
    output: Annotated[str, Meta(description="directory of the adapter")] = ""
    model: Annotated[str, Meta(description="base model; empty is the default model")] = ""
    seed: Annotated[int, Meta(ge=0, description="of the first weights, the order of the rows and dropout")] = 0
    loss: Annotated[
        Literal["ce", "kl", "mixed"],
        Meta(description="of answers: cross-entropy, KL to a teacher's probabilities, or both"),
    ] = "ce"
    teacher: Annotated[
        str | None,
        Meta(
            description="local directory of a model or adapter whose probabilities are computed in the run; default: "
            "those beside data.train, in a .logits.safetensors"
        ),
    ] = None
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], Meta(description="arithmetic; auto: bf16 where the device multiplies it")
    ] = "auto"
    data: DataConfig = DataConfig()
    lora: LoraConfig = LoraConfig()
    head: HeadConfig = HeadConfig()
    kl: KlConfig = KlConfig()
    joint: JointConfig = JointConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    distill: DistillConfig = DistillConfig()
    history: HistoryConfig = HistoryConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    routing: RoutingConfig = RoutingConfig()
    pooling: PoolingSettings = PoolingSettings()
    embed: EmbedConfig = EmbedConfig()
    rerank: RerankConfig = RerankConfig()
    classify: ClassifyConfig = ClassifyConfig()
