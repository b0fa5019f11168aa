"""The tensors of an adapter, held against its configuration and the base model: names, dtypes, shapes, values.

Every tensor is accounted for, every module that the configuration selects is looked up, and values are judged as they
will be served: after the cast. What PEFT would ignore, make up or compute otherwise is refused by name.
"""

from __future__ import annotations

import logging
import math
import re

import torch

from ..errors import AdapterError
from ..kernels.lora import LoraPair
from ..model.config import ModelConfig
from ..model.shapes import PARENT, module_shapes
from .peft_config import CONFIG_FILE, LoraConfig, ModuleLora, shown
from .served_base import ServedBase

logger = logging.getLogger(__name__)

EMBED, LM_HEAD = "model.embed_tokens", "lm_head"
# What torch casts value by value, as PEFT does when it loads them.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # fmt: skip
_PREFIX = "base_model.model."
_COPY_NAME = re.compile(re.escape(_PREFIX) + r"(?P<module>model\.embed_tokens|lm_head)\.(?:base_layer\.)?weight")
_LAYER_NAME = re.compile(re.escape(_PREFIX) + r"model\.layers\.(?P<layer>[0-9]{1,9})\..*\.lora_[AB]\.weight")

Sides = dict[str, torch.Tensor]  # "A", "B"


def module_names(model: ModelConfig) -> list[str]:
    """Every module that a LoRA may target, as PEFT names it."""
    layers = (f"model.layers.{idx}" for idx in range(model.num_layers))
    return [EMBED, *(f"{layer}.{parent}.{name}" for layer in layers for name, parent in PARENT.items()), LM_HEAD]


def check_tensors(
    config: LoraConfig, tensors: dict[str, torch.Tensor], base: ServedBase, max_rank: int
) -> dict[str, LoraPair]:
    """module -> its weights in `base.lora_dtype`, A [rank, in] and B [out, rank]. Raises `AdapterError`."""
    name, model = config.name, base.config
    modules = module_names(model)
    sides = _sort(name, tensors, base, modules)
    if not sides:
        raise AdapterError(f"adapter {name!r} holds no LoRA tensors")
    wanted, shapes = config.resolve(modules, model.tie_word_embeddings), module_shapes(model)
    pairs = {}
    for module in modules:
        said = wanted[module]
        if module not in sides:
            continue
        if isinstance(said, str):
            value = "null, which is q_proj and v_proj" if config.raw[said] is None else shown(config.raw[said])
            raise AdapterError(
                f"adapter {name!r}: {module} has weights, but {said} in {CONFIG_FILE} ({value}) leaves it out, and "
                "PEFT would ignore them; put back the configuration that it was saved with"
            )
        pairs[module] = _pair(name, module, sides[module], said, shapes, max_rank, base.lora_dtype)
    _check_missing(config, [module for module, said in wanted.items() if isinstance(said, ModuleLora)], pairs)
    if config.is_tied(model.tie_word_embeddings) and (EMBED in pairs or LM_HEAD in pairs):
        _check_tied(name, pairs)
    return pairs


def _sort(name: str, tensors: dict[str, torch.Tensor], base: ServedBase, modules: list[str]) -> dict[str, Sides]:
    """module -> its sides; anything unexpected is an error that names it."""
    places = {f"{_PREFIX}{module}.lora_{side}.weight": (module, side) for module in modules for side in "AB"}
    places |= {f"{_PREFIX}{EMBED}.lora_embedding_{side}": (EMBED, side) for side in "AB"}
    for side in "AB":
        del places[f"{_PREFIX}{EMBED}.lora_{side}.weight"]
    sides: dict[str, Sides] = {}
    for key, tensor in tensors.items():
        if match := _COPY_NAME.fullmatch(key):
            base.copies.check(name, key, match["module"], tensor)
        elif key in places:
            module, side = places[key]
            sides.setdefault(module, {})[side] = tensor
        elif (layer := _LAYER_NAME.fullmatch(key)) and int(layer["layer"]) >= base.config.num_layers:
            raise AdapterError(f"adapter {name!r}: {key!r} is beyond the model's {base.config.num_layers} layers")
        else:
            raise AdapterError(
                f"adapter {name!r}: tensor {shown(key)} is not a LoRA weight of a supported module "
                f"({', '.join(PARENT)}, embed_tokens, lm_head) by PEFT's name, {_PREFIX}MODULE.lora_A.weight"
            )
    return sides


def _pair(
    name: str,
    module: str,
    sides: Sides,
    said: ModuleLora,
    shapes: dict[str, tuple[int, int]],
    max_rank: int,
    dtype: torch.dtype,
) -> LoraPair:
    size_in, size_out = shapes[module.rpartition(".")[2]]
    if missing := sorted({"A", "B"} - set(sides)):
        raise AdapterError(f"adapter {name!r}: {module} has no lora_{missing[0]} weight")
    for side, wanted_text in (("A", f"[rank, {size_in}]"), ("B", f"[{size_out}, rank]")):
        tensor = sides[side]
        if tensor.dim() != 2 or tensor.dtype not in FLOATS:
            raise AdapterError(
                f"adapter {name!r}: {module} lora_{side} is {tensor.dtype} {list(tensor.shape)}; "
                f"a matrix {wanted_text} of floating-point numbers (16 bits or more, or float8) is expected"
            )
    rank = sides["A"].shape[0]
    if not 1 <= rank <= max_rank:
        raise AdapterError(f"adapter {name!r}: {module} has rank {rank}; 1 to {max_rank} is served (--max-lora-rank)")
    for side, wanted in (("A", (rank, size_in)), ("B", (size_out, rank))):
        if tuple(sides[side].shape) != wanted:
            raise AdapterError(
                f"adapter {name!r}: {module} lora_{side} has shape {list(sides[side].shape)}, the base model wants "
                f"{list(wanted)}; was it trained for another base?"
            )
    if said.rank != rank:
        raise AdapterError(
            f"adapter {name!r}: {module} has rank {rank} but {CONFIG_FILE} says {shown(said.rank)} (r, rank_pattern)"
        )
    if not bool(torch.isfinite(torch.tensor(said.scale, dtype=torch.float64).to(dtype))):
        raise AdapterError(
            f"adapter {name!r}: {module} has lora_alpha {shown(said.alpha)} over rank {rank}, a factor beyond the "
            f"range of {_short(dtype)}, which it would be served in"
        )
    a, b = (_cast(name, f"{module} lora_{side}", sides[side], dtype) for side in "AB")
    return LoraPair(a, b, said.scale)


def _cast(name: str, place: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor as it is served; every value is finite."""
    cast = tensor.to(dtype)
    # A sum is finite only if all is, and takes a tenth of the time; where it is not, it may have overflowed.
    if math.isfinite(float(cast.sum())) or bool(torch.isfinite(cast).all()):
        return cast
    values = tensor.double()
    if not bool(torch.isfinite(values).all()):
        raise AdapterError(f"adapter {name!r}: {place} holds NaN or infinite values")
    raise AdapterError(
        f"adapter {name!r}: {place} holds {values.abs().max():.3g}, beyond the range of {_short(dtype)} "
        f"({torch.finfo(dtype).max:.3g}), which it would be served in"
    )


def _check_missing(config: LoraConfig, selected: list[str], pairs: dict[str, LoraPair]) -> None:
    missing = [module for module in selected if module not in pairs]
    if not missing:
        return
    some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
    if not config.is_empty_untrained:
        init = shown(config.raw["init_lora_weights"])
        raise AdapterError(
            f"adapter {config.name!r}: {CONFIG_FILE} selects {some}, which have no weights; with init_lora_weights "
            f"{init} PEFT would make them up. Narrow target_modules to what was saved, or save it again"
        )
    logger.warning("adapter %r selects modules without weights, served as the base has them: %s", config.name, some)


def _check_tied(name: str, pairs: dict[str, LoraPair]) -> None:
    """PEFT holds one LoRA for both; it writes it twice."""
    embed, head = pairs.get(EMBED), pairs.get(LM_HEAD)
    if embed is None or head is None or not (torch.equal(embed.a.T, head.b) and torch.equal(embed.b.T, head.a)):
        raise AdapterError(
            f"adapter {name!r}: ensure_weight_tying is set, but {EMBED} and {LM_HEAD} do not have the same LoRA; "
            "set it to false if they shall differ"
        )


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
