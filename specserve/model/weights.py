"""The tensors of a model directory: held against what there must be (`shapes.py`), and taken one by one.

A missing, unexpected or mis-shaped tensor is an error that names it, with the shape found and the shape wanted; names,
shapes and dtypes are checked by the files' headers before anything is read.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import safetensors
import torch

from ..errors import ModelError
from .config import ModelConfig
from .shapes import EMBEDDING, LM_HEAD, has_bias, head_rows, is_of_images, layer_norms, stored_name, tensor_shapes
from .stored_rows import MAX_NAMED, STORED, StoredTensor, stored_tensors, weight_files

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class TensorSource:
    """The tensors of a directory's safetensors files."""

    def __init__(self, path: Path):
        self._path = path
        self._tensors: dict[str, StoredTensor] = {}
        for file in weight_files(path):
            try:
                with safetensors.safe_open(file, framework="pt"):  # checks that offsets and sizes fit the file
                    self._tensors |= stored_tensors(file)
            except (safetensors.SafetensorError, OSError) as error:
                raise ModelError(f"{path}: the weights are not readable as safetensors: {error}") from None

    def check(self, shapes: dict[str, tuple[int, ...]], is_ignored: Callable[[str], bool]) -> None:
        """Raise unless the files hold exactly `shapes`, by their headers: nothing is read, nothing is allocated."""
        problems = []
        for name, shape in shapes.items():
            if name not in self._tensors:
                problems.append(f"{name} {list(shape)} is missing")
                continue
            tensor = self._tensors[name]
            if tensor.shape != shape:
                problems.append(f"{name} has shape {list(tensor.shape)}, wanted {list(shape)}")
            elif tensor.dtype not in STORED:
                problems.append(f"{name} has dtype {tensor.dtype}, wanted {', '.join(STORED)}")
        unexpected = sorted(name for name in self._tensors.keys() - shapes.keys() if not is_ignored(name))
        problems += [f"{name} is not part of this architecture" for name in unexpected]
        if problems:
            more = f"; and {len(problems) - MAX_NAMED} more" if len(problems) > MAX_NAMED else ""
            raise ModelError(f"{self._path} does not fit its config.json: {'; '.join(problems[:MAX_NAMED])}{more}")

    def dtype(self) -> torch.dtype:
        """The dtype of the embedding: what the checkpoint was saved in."""
        return STORED[self._tensors[EMBEDDING].dtype]

    def take(self, name: str, rows: slice | None = None) -> torch.Tensor:
        tensor = self._tensors[name]
        return (tensor if rows is None else tensor.rows(rows)).read()


def checked_source(path: Path, config: ModelConfig) -> TensorSource:
    """The tensors of a directory, which are those of `config`. Raises `ModelError`."""
    source = TensorSource(path)
    # Old checkpoints carry their rotary buffers; a tied model may carry its embedding twice.
    ignored = ("rotary_emb.inv_freq", *((LM_HEAD,) if config.tie_word_embeddings else ()))
    source.check(
        tensor_shapes(config), lambda name: name.endswith(ignored) or (config.sees_images and is_of_images(name))
    )
    return source


class StoredWeights:
    """Tensors of a checked directory by their names on the hub, on `device` in `dtype`."""

    def __init__(self, config: ModelConfig, source: TensorSource, device: torch.device, dtype: torch.dtype):
        self._config, self._source, self.device, self.dtype = config, source, device, dtype

    def weight(self, name: str) -> torch.Tensor:
        return self._source.take(name).to(self.device, self.dtype)

    def norm(self, name: str) -> torch.Tensor:
        """The factors of a norm, in fp32."""
        return (self._source.take(f"{name}.weight").float() + self._config.norm_offset).to(self.device)

    def linear(self, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        layer, _, module = name.rsplit(".", 2)
        order = list(head_rows(self._config, module))
        stored, rows = stored_name(self._config, module)

        def take(kind: str) -> torch.Tensor:
            tensor = self._source.take(f"{layer}.{stored}.{kind}", rows).to(self.device, self.dtype)
            return tensor[order] if order else tensor

        return take("weight"), take("bias") if has_bias(self._config, module) else None

    def layer_norms(self, idx: int) -> dict[str, torch.Tensor]:
        """The norms of a layer, by their names in `Layer`."""
        names = layer_norms(self._config)
        return {name: self.norm(f"model.layers.{idx}.{hub_name}") for name, (hub_name, _) in names.items()}

    def final_norm(self) -> torch.Tensor:
        return self.norm("model.norm") / self._config.logits_divisor

    def embed(self) -> torch.Tensor:
        return self.weight(EMBEDDING)

    def lm_head(self, embed: torch.Tensor) -> torch.Tensor:
        return embed if self._config.tie_word_embeddings else self.weight(LM_HEAD)
