"""Real PEFT adapters with random weights, for tests.

The directory is written by peft's own `save_pretrained`, so that our reader is tested against what users have and not
against what we believe the format to be. B is not zero: an adapter that changes nothing would hide every mistake.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

ATTENTION_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP_MODULES = ("gate_proj", "up_proj", "down_proj")
ALL_MODULES = ATTENTION_MODULES + MLP_MODULES


def make_peft_adapter(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    r: int = 8,
    lora_alpha: int = 16,
    target_modules: str | Sequence[str] = ALL_MODULES,
    use_rslora: bool = False,
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, int] | None = None,
    layers_to_transform: Sequence[int] | None = None,
    embed: bool = False,
    lm_head: bool = False,
    use_dora: bool = False,
    bias: str = "none",
    seed: int = 0,
    std: float = 0.05,
) -> Path:
    """Save an adapter for the model in `model_dir` to `out_dir`, equal for equal arguments, and return `out_dir`.

    `target_modules` is what PEFT takes: module names, or one string that is a regular expression. `embed` and `lm_head`
    add LoRA on the input embedding and the output layer. `std` is the deviation of A and B; PEFT's rank_pattern and
    alpha_pattern keys are module name suffixes or regular expressions. Files are fp32, as PEFT writes them.
    """
    out_dir = Path(out_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    targets: str | list[str]
    if isinstance(target_modules, str):
        if embed or lm_head:
            raise ValueError("embed and lm_head cannot be combined with a regular expression in target_modules")
        targets = target_modules
    else:
        targets = [*target_modules, *(["embed_tokens"] if embed else []), *(["lm_head"] if lm_head else [])]
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=r,
        lora_alpha=lora_alpha,
        target_modules=targets,
        use_rslora=use_rslora,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        layers_to_transform=list(layers_to_transform) if layers_to_transform is not None else None,
        use_dora=use_dora,
        bias=bias,  # type: ignore[arg-type]
    )
    peft_model = get_peft_model(model, config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(peft_model.named_parameters()):
            if "lora_magnitude_vector" in name:  # DoRA: near the norms that PEFT computed from the base weights
                parameter.mul_(1 + std * torch.randn(parameter.shape, generator=generator))
            elif "lora_" in name:
                parameter.copy_(std * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad:  # biases, when `bias` is not "none"
                parameter.add_(std * torch.randn(parameter.shape, generator=generator))
    peft_model.save_pretrained(str(out_dir), save_embedding_layers=False)
    return out_dir
