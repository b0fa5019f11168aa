"""A causal model, bare or with a trainable LoRA: transformers and peft, and a forward that computes what losses need.

Logits are made only for rows with loss. Rows are padded on the right without a mask: under causal attention no real
token sees the padding, and its outputs are never read.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapter_files import WEIGHTS_FILE
from ..kernels.linear import has_native_bf16
from ..model.config import ModelConfig
from ..model.shapes import JOINED, LANGUAGE_MODEL_NAMES, LINEARS
from .causal_attention import attention_for
from .data.dataset import Example
from .run_config import LoraConfig


def arithmetic(setting: str, device: torch.device) -> torch.dtype:
    """What the setting `dtype` means on `device`."""
    is_bf16 = setting == "bf16" or (setting == "auto" and (device.type == "cuda" or has_native_bf16()))
    return torch.bfloat16 if is_bf16 else torch.float32


def load_base(auto_class: Any, model_dir: Path, dtype: torch.dtype, device: torch.device, **settings: Any) -> Any:
    """The base model of `model_dir` as a class of transformers; of one that sees images, its language model."""
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    config = AutoConfig.from_pretrained(model_dir)
    text = config.get_text_config()
    for name, value in settings.items():
        setattr(text, name, value)
    is_part = text is not config
    if is_part:  # as its files have it: the whole may say otherwise
        text.tie_word_embeddings = ModelConfig.from_dir(model_dir).tie_word_embeddings
    # What is for images would all be listed as unexpected.
    with quiet_transformers() if is_part else nullcontext():
        base = auto_class.from_pretrained(
            model_dir,
            config=text,
            key_mapping=LANGUAGE_MODEL_NAMES if is_part else None,
            dtype=dtype,
            attn_implementation=attention_for(text, device, dtype),
        )
    return base.to(device)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within, transformers tells of errors only, not of weights that are new or left out as they should be."""
    from transformers.utils import logging as transformers_logging

    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)


def with_lora(base: Any, config: LoraConfig, task_type: str) -> Any:
    """The peft model that trains a LoRA of `base`: a new one, or the one that `config.adapter` holds."""
    import peft

    with quiet_peft():
        if config.adapter:
            saved = peft.LoraConfig.from_pretrained(config.adapter)
            saved.lora_dropout = config.dropout  # of this run, not of the one that made it
            return peft.PeftModel.from_pretrained(base, config.adapter, is_trainable=True, config=saved)
        modules = {name.rpartition(".")[2] for name, _ in base.named_modules()}
        all_linear = [name for name in (*LINEARS, *JOINED) if name in modules]
        targets = all_linear if config.target_modules == "all-linear" else list(config.target_modules)
        lora = peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.dropout,
            target_modules=targets,
            task_type=task_type,
        )
        return peft.get_peft_model(base, lora)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Within, peft may ask for an attribute that transformers has renamed; nothing for the user to act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
        yield


def trained_parameters(peft_model: Any) -> list[nn.Parameter]:
    return [parameter for parameter in peft_model.parameters() if parameter.requires_grad]


def save_lora(peft_model: Any, directory: Path, base_name: str) -> None:
    """Write what is trained as plain PEFT files, the LoRA's weights in bf16; `base_name` is what they call the base."""
    from safetensors.torch import load_file, save_file

    peft_model.peft_config["default"].base_model_name_or_path = base_name
    # Only the LoRA, also of embeddings; by default peft looks on the hub for whether the vocabulary has grown.
    peft_model.save_pretrained(
        directory, safe_serialization=True, save_embedding_layers=False, selected_adapters=["default"]
    )
    (directory / "README.md").unlink(missing_ok=True)  # peft's empty model card; ours is written at the end
    path = directory / WEIGHTS_FILE
    tensors = {
        name: tensor.to(torch.bfloat16) if "lora_" in name else tensor for name, tensor in load_file(path).items()
    }
    save_file(tensors, path, metadata={"format": "pt"})


def in_bf16(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Within, a LoRA is multiplied in `dtype` if that is bf16.

    peft holds it in fp32 and would cast each linear's input up to it: a step took 1.3 to 1.4 times as long (CPU).
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Hidden:
    """Hidden states of the rows whose next token carries loss, example by example."""

    last: torch.Tensor  # [L, H], after the final norm
    tapped: torch.Tensor  # [L, H], output of the tapped layer
    targets: torch.Tensor  # [L] int64, the next token


class CausalModel:
    """A model that answers, frozen; `tap_layer` is the layer whose output the head reads, None: the middle one."""

    def __init__(self, model_dir: Path, dtype: torch.dtype, device: torch.device, tap_layer: int | None = None):
        from transformers import AutoModelForCausalLM

        causal = load_base(AutoModelForCausalLM, model_dir, dtype, device).requires_grad_(False)
        self.device, self.dtype = device, dtype
        self.num_layers: int = causal.config.num_hidden_layers
        self.hidden_size: int = causal.config.hidden_size
        self._divisor: float = getattr(causal.config, "logits_scaling", 1.0)  # Granite's
        self._softcap: float | None = getattr(causal.config, "final_logit_softcapping", None)
        self.tap_layer = self.num_layers // 2 if tap_layer is None else tap_layer
        self._causal: Any = causal
        self._tapped: torch.Tensor | None = None
        causal.model.layers[self.tap_layer].register_forward_hook(self._tap)

    def train(self, mode: bool = True) -> None:
        """As of a module: whether dropout is on."""
        self._causal.train(mode)

    @contextmanager
    def without_dropout(self) -> Iterator[None]:
        """Within, the model is in evaluation mode."""
        training = [module for module in self._causal.modules() if module.training]
        self.train(False)
        try:
            yield
        finally:
            for module in training:
                module.training = True

    def hidden(self, examples: Sequence[Example]) -> Hidden:
        """Forward of a padded batch; rows are those before each token with loss."""
        width = max(len(example.tokens) for example in examples)
        ids = torch.tensor([example.tokens + [0] * (width - len(example.tokens)) for example in examples])
        rows, targets = [], []
        for idx, example in enumerate(examples):
            positions = [p for p in range(1, len(example.tokens)) if example.loss_mask[p]]
            rows += [idx * width + p - 1 for p in positions]
            targets += [example.tokens[p] for p in positions]
        with in_bf16(self.device, self.dtype):
            last = self._causal.model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
        assert self._tapped is not None
        index = torch.tensor(rows, device=self.device)
        size = last.shape[-1]
        tapped = self._tapped.reshape(-1, size)[index]
        self._tapped = None
        return Hidden(last.reshape(-1, size)[index], tapped, torch.tensor(targets, device=self.device))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [L, V] of final hidden states [L, H], divided (Granite) and capped (Gemma) as the model has them."""
        logits: torch.Tensor = self._causal.lm_head(hidden)
        if self._divisor != 1:
            logits = logits / self._divisor
        return logits if not self._softcap else self._softcap * torch.tanh(logits.float() / self._softcap)

    @torch.no_grad()
    def words(self, vocab: Sequence[int]) -> torch.Tensor:
        """What the base model knows of the tokens `vocab`: rows of its output embedding, normalised, [U, H] in fp32."""
        table = next(weight for name, weight in self._causal.lm_head.named_parameters() if "lora_" not in name)
        rows = table[torch.tensor(vocab, device=table.device)].float()
        return torch.nn.functional.rms_norm(rows, rows.shape[-1:])

    def _tap(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self._tapped = output[0] if isinstance(output, tuple) else output


class LoraModel(CausalModel):
    """The same with a LoRA that is trained."""

    def __init__(
        self, model_dir: Path, config: LoraConfig, dtype: torch.dtype, device: torch.device, tap_layer: int | None
    ):
        super().__init__(model_dir, dtype, device, tap_layer)
        self.peft: Any = with_lora(self._causal, config, "CAUSAL_LM")
        self._causal = self.peft.base_model.model  # an embedding or lm_head with a LoRA is another module

    @property
    def parameters(self) -> list[nn.Parameter]:
        return trained_parameters(self.peft)

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """Within, the model is the base model alone."""
        with self.peft.disable_adapter():
            yield

    def save(self, directory: Path, base_name: str) -> None:
        """Write the LoRA as plain PEFT files; `base_name` is what they call the base model."""
        save_lora(self.peft, directory, base_name)
