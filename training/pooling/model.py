"""The base model with a LoRA that pools, and its score matrix where it has one: transformers and peft.

What is saved is what PEFT makes of `AutoModel` (FEATURE_EXTRACTION) and of `AutoModelForSequenceClassification`
(SEQ_CLS, `score` in modules_to_save). Rows are padded on the right without a mask: under causal attention no real token
sees the padding, and pooling leaves it out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...adapter_kinds import PoolingType
from ..lora_model import in_bf16, load_base, quiet_transformers, save_lora, trained_parameters, with_lora
from ..run_config import LoraConfig

FEATURE_EXTRACTION, SEQ_CLS = "FEATURE_EXTRACTION", "SEQ_CLS"


class PoolingModel:
    """`num_outputs` rows of a score matrix; None: there is none, the vectors themselves are the result."""

    def __init__(
        self,
        model_dir: Path,
        lora: LoraConfig,
        pooling: PoolingType,
        num_outputs: int | None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        from transformers import AutoModel, AutoModelForSequenceClassification

        self.device, self._pooling, self._dtype = device or torch.device("cpu"), pooling, dtype
        if num_outputs is None:
            base = load_base(AutoModel, model_dir, dtype, self.device)
            self.peft: Any = with_lora(base, lora, FEATURE_EXTRACTION)
            self._inner, self._score = self.peft.base_model.model, None
        else:
            kind = AutoModelForSequenceClassification
            with quiet_transformers():  # the score matrix is new
                base = load_base(kind, model_dir, dtype, self.device, num_labels=num_outputs)
            base.score.to(torch.float32)
            self.peft = with_lora(base, lora, SEQ_CLS)
            self._inner = self.peft.base_model.model.model
            self._score = self.peft.base_model.model.score

        self.peft.train()  # whether it has been measured before or not

    @property
    def parameters(self) -> list[nn.Parameter]:
        return trained_parameters(self.peft)

    def pooled(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Vectors [N, H] of `texts`, in fp32 and of any length, from one padded forward."""
        width = max(map(len, texts))
        ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=self.device)
        with in_bf16(self.device, self._dtype):
            hidden = self._inner(input_ids=ids, use_cache=False).last_hidden_state.float()  # [N, W, H]
        lens = torch.tensor([len(text) for text in texts], device=self.device)
        if self._pooling == "last":
            return hidden[torch.arange(len(texts), device=self.device), lens - 1]
        places = torch.arange(width, device=self.device)
        weights = (places < lens[:, None]).float()  # [N, W]
        if self._pooling == "weighted_mean":
            weights = weights * (places + 1)
        return torch.einsum("nw,nwh->nh", weights / weights.sum(dim=1, keepdim=True), hidden)

    def outputs(self, texts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Outputs [N, num_outputs] of the score matrix, in fp32."""
        assert self._score is not None
        scores: torch.Tensor = self._score(self.pooled(texts))
        return scores

    @torch.no_grad()
    def for_all(self, texts: Sequence[Sequence[int]], batch_tokens: int, *, scored: bool) -> torch.Tensor:
        """The same for any number of texts, in batches of similar lengths; without dropout, on the CPU."""
        order = sorted(range(len(texts)), key=lambda idx: len(texts[idx]))
        results: list[torch.Tensor | None] = [None] * len(texts)
        with self.evaluating():
            while order:
                batch = [order.pop()]  # the longest
                while order and (len(batch) + 1) * len(texts[batch[0]]) <= batch_tokens:
                    batch.append(order.pop())
                rows = (self.outputs if scored else self.pooled)([texts[idx] for idx in batch]).cpu()
                for idx, row in zip(batch, rows, strict=True):
                    results[idx] = row
        return torch.stack([row for row in results if row is not None])

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        was_training = self.peft.training
        self.peft.eval()
        try:
            yield
        finally:
            self.peft.train(was_training)

    @torch.no_grad()
    def round_as_saved(self) -> None:
        """Weights as the files will hold them, so that what is measured is what is served."""
        for name, parameter in self.peft.named_parameters():
            if parameter.requires_grad and "lora_" in name:
                parameter.copy_(parameter.bfloat16())

    def save(self, directory: Path, base_name: str) -> None:
        save_lora(self.peft, directory, base_name)
