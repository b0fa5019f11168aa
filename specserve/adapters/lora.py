"""Reads a PEFT LoRA directory and checks all of it before anything is served with it.

Owns the PEFT directory: safetensors only, everything that PEFT writes for plain LoRA on the linears, the embedding and
the lm_head; `peft_config.py` has what the configuration may say, `tensors.py` what the tensors may be, `pooling.py`
what makes one that does not generate. What we
cannot serve exactly is refused with one sentence. A `LoraAdapter` is immutable; its content hash, over configuration
and weights, is its identity.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..adapter_files import CONFIG_FILE, WEIGHTS_FILE, AdapterFiles, check_complete, open_adapter
from ..adapter_kinds import AdapterType
from ..adapter_messages import AdapterInfo
from ..errors import AdapterError
from ..kernels.lora import LoraPair
from ..model.config import ModelConfig
from ..model.shapes import module_shapes
from .lookahead import Lookahead, read_lookahead
from .peft_config import parse_config
from .pooling import Pooling, read_pooling
from .pooling_config import MAX_OUTPUTS, read_pooling_config
from .served_base import ServedBase
from .slab import as_in_peft, copied
from .stored_pairs import LayOut, lay_out_pairs
from .tensors import EMBED, LM_HEAD, check_tensors
from .weights_file import WeightsFile, WeightsFileError


@dataclass(frozen=True, slots=True)
class LoraAdapter:
    """One adapter's weights, and alpha / rank as `scale`.

    In PEFT orientation, A [R, in] and B [out, R]; those of layers as the decoder's `lay_out_lora` has them.
    """

    name: str
    content_hash: str
    layers: dict[tuple[int, str], LoraPair]  # (layer, module) -> weights; untargeted modules are absent
    embed: LoraPair | None  # A [R, V], B [H, R]
    lm_head: LoraPair | None
    max_rank: int
    text_hash: str | None  # of the chat template and tokenizer that it brings
    lookahead: Lookahead | None = None  # what drafts for it; None for a plain LoRA
    pooling: Pooling | None = None  # None for one that generates
    lora_hash: str = ""  # SHA-256 of the LoRA's weights alone, which stays when its head is another one

    @property
    def adapter_type(self) -> AdapterType:
        return self.pooling.adapter_type if self.pooling is not None else "generate"

    @property
    def pairs(self) -> list[LoraPair]:
        return [*self.layers.values(), *(pair for pair in (self.embed, self.lm_head) if pair is not None)]

    def _keys(self) -> list[Hashable]:
        """Of `pairs`."""
        others = ((EMBED, self.embed), (LM_HEAD, self.lm_head))
        return [*self.layers, *(key for key, pair in others if pair is not None)]

    @property
    def num_bytes(self) -> int:
        """Memory that the LoRA and what stands beside it take."""
        lora = sum(pair.a.nbytes + pair.b.nbytes for pair in self.pairs)
        return lora + sum(part.num_bytes for part in (self.lookahead, self.pooling) if part is not None)

    def copied(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> LoraAdapter:
        """The same adapter with the weights of LoRA and head where `copy` puts them; what one learns, both have."""
        there = dict(zip(self._keys(), copied(self.pairs, copy), strict=True))
        return replace(
            self,
            layers={key: there[key] for key in self.layers},
            embed=there.get(EMBED),
            lm_head=there.get(LM_HEAD),
            lookahead=self.lookahead.copied(copy) if self.lookahead is not None else None,
        )

    def info(self) -> AdapterInfo:
        modules = sorted({module for _, module in self.layers})
        modules += [name for name, pair in (("embed_tokens", self.embed), ("lm_head", self.lm_head)) if pair]
        return AdapterInfo(
            content_hash=self.content_hash,
            max_rank=self.max_rank,
            num_modules=len(self.pairs),
            target_modules=modules,
            size_bytes=self.num_bytes,
            text_hash=self.text_hash,
            lookahead=self.lookahead.info() if self.lookahead is not None else None,
            adapter_type=self.adapter_type,
            pooling=self.pooling.info if self.pooling is not None else None,
        )


def read_adapter(
    path: str | Path,
    base: ServedBase,
    *,
    name: str | None = None,
    max_rank: int = 256,
    lay_out: LayOut = as_in_peft,
    turn: AbstractContextManager[object] | None = None,
    roots: Sequence[Path] = (),
) -> LoraAdapter:
    """Read and check the PEFT directory `path`, in one of `roots` if there are any, for the base model `base`.

    Weights are in main memory, those of layers held as `lay_out` has them. Where lookahead files beside the LoRA do not
    fit, the LoRA is served without them. `turn` is held for what needs a core, not the disk. Raises `AdapterError`.
    """
    path = Path(path)
    name = name or path.name
    max_bytes = _max_weights_bytes(base.config, max_rank)
    with open_adapter(path, name, max_weights_bytes=max_bytes, roots=roots) as files:
        check_complete(files, path, name)
        with turn or nullcontext():
            return _read_files(files, name, base, max_rank, lay_out)


def _read_files(
    files: AdapterFiles,
    name: str,
    base: ServedBase,
    max_rank: int,
    lay_out: LayOut,
) -> LoraAdapter:
    pooling_config = read_pooling_config(name, files.paths)
    peft = parse_config(name, files.paths[CONFIG_FILE].read_bytes(), pooling_config)
    try:
        file = WeightsFile(files.paths[WEIGHTS_FILE])
    except (WeightsFileError, OSError) as error:
        text = f"adapter {name!r}: {WEIGHTS_FILE} is not readable as safetensors: {error}"
        raise AdapterError(text) from None
    pooling = read_pooling(name, peft.task_type, pooling_config, file, base.config.hidden_size)
    pairs = check_tensors(peft, file, base, max_rank, pooling.adapter_type if pooling is not None else "generate")
    by_module = lay_out_pairs(name, file, pairs, base.lora_dtype, lay_out)
    embed, lm_head = by_module.pop(EMBED, None), by_module.pop(LM_HEAD, None)
    layers = {_layer_and_module(module): pair for module, pair in by_module.items()}
    highest = max(pair.a.shape[0] for pair in pairs.values())
    lookahead, lora_hash = None, files.digests[WEIGHTS_FILE].hex()
    if base.identity is not None:
        lookahead = read_lookahead(files, lora_hash, name, base.config, base.identity)
    return LoraAdapter(
        name, files.content_hash, layers, embed, lm_head, highest, files.text_hash, lookahead, pooling, lora_hash
    )


def _layer_and_module(name: str) -> tuple[int, str]:
    """model.layers.3.self_attn.q_proj -> 3, q_proj"""
    parts = name.split(".")
    return int(parts[2]), parts[-1]


def _max_weights_bytes(config: ModelConfig, max_rank: int) -> int:
    """What the largest adapter takes in fp64, with copies of the embeddings, a score head and room for the header."""
    shapes = module_shapes(config)
    num_values = sum((size_in + size_out) * max_rank for size_in, size_out in shapes.values()) * config.num_layers
    num_values += (2 * config.vocab_size + MAX_OUTPUTS) * config.hidden_size
    return 8 * num_values + 100_000_000
