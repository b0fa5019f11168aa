"""The tensors of an adapter, held against its configuration and the base model: names, dtypes, shapes.

Every tensor is accounted for, every module that the configuration selects is looked up. What PEFT would ignore, make up
or compute otherwise is refused by name. LoRA's values are judged as they will be served, by `stored_pairs`.
"""

from __future__ import annotations

import functools
import logging
import re

import torch

from ..adapter_kinds import AdapterType
from ..errors import AdapterError
from ..model.config import ModelConfig
from ..model.shapes import JOINED, PARENT, head_rows, is_of_images, rows_of, stored_parents, stored_shapes
from .config_json import shown
from .peft_config import CONFIG_FILE, LoraConfig, ModuleLora
from .peft_matching import DEFAULT_TARGETS
from .pooling_config import SCORE, SCORED
from .served_base import ServedBase
from .stored_pairs import StoredPair
from .weights_file import StoredTensor, WeightsFile

logger = logging.getLogger(__name__)

EMBED, LM_HEAD = "model.embed_tokens", "lm_head"
# What torch casts value by value, as PEFT does when it loads them.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # fmt: skip
_PREFIX = "base_model.model."
# What the model that LoRA was trained on has its layers in: the causal one and the one with a score head, a model that
# sees (as transformers 5 has it, and before 4.52), or none.
_CAUSAL, _SEES, _BARE = "model.", ("model.language_model.", "language_model.model."), ""
_INNER = r"(?:(?:model|language_model)\.)*"
_COPY_NAME = re.compile(re.escape(_PREFIX) + rf"(?P<module>{_INNER}(?:embed_tokens|lm_head))\.(?:base_layer\.)?weight")
_LAYER_NAME = re.compile(re.escape(_PREFIX) + _INNER + r"layers\.(?P<layer>[0-9]{1,9})\..*\.lora_[AB]\.weight")
_LORA_NAME = re.compile(re.escape(_PREFIX) + r"(?P<module>.*)\.lora_[AB]\.weight")

Sides = dict[str, StoredTensor]  # "A", "B"


def module_names(model: ModelConfig) -> list[str]:
    """Every module that a LoRA may target, as PEFT names it in a causal model."""
    linears = [f"{parent}.{name}" for name, parent in stored_parents(model).items()]
    return [EMBED, *(f"model.layers.{idx}.{linear}" for idx in range(model.num_layers) for linear in linears), LM_HEAD]


@functools.cache
def _places(modules: tuple[str, ...], inner: str) -> dict[str, tuple[str, str]]:
    """PEFT's name of a tensor -> its module, and its side there."""
    named = {module: _PREFIX + _in_peft(module, inner) for module in modules}
    places = {f"{named[module]}.lora_{side}.weight": (module, side) for module in modules for side in "AB"}
    places |= {f"{named[EMBED]}.lora_embedding_{side}": (EMBED, side) for side in "AB"}
    for side in "AB":
        del places[f"{named[EMBED]}.lora_{side}.weight"]
    return places


def _in_peft(module: str, inner: str) -> str:
    """PEFT's name of it in a model that has its layers in `inner`."""
    if module == LM_HEAD:
        return inner.removesuffix(_CAUSAL) + module if inner == _SEES[1] else module
    return inner + module.removeprefix(_CAUSAL)


def _inner_of(file: WeightsFile, kind: AdapterType) -> str:
    """What the adapter's model had its layers in, by the names of its tensors."""
    for inner in (*_SEES, *([_BARE] if kind == "embed" else [])):
        if any(
            name.startswith((f"{_PREFIX}{inner}layers.", f"{_PREFIX}{inner}embed_tokens.")) for name in file.tensors
        ):
            return inner
    return _CAUSAL


def check_tensors(
    config: LoraConfig, file: WeightsFile, base: ServedBase, max_rank: int, kind: AdapterType = "generate"
) -> dict[str, StoredPair]:
    """module -> its weights, A [rank, in] and B [out, rank]; of a causal model, by that one's names, joined ones apart.

    An adapter that embeds may be of a model without lm_head, or of a causal one; one with a score head is of a model
    without lm_head; all of them may be of one that sees images, too. Raises `AdapterError`.
    """
    name, model = config.name, base.config
    inner = _inner_of(file, kind)
    modules = module_names(model)
    if inner == _BARE or kind in SCORED:
        modules.remove(LM_HEAD)
    sides = _sort(name, file, base, modules, inner, kind in SCORED)
    if not sides:
        raise AdapterError(f"adapter {name!r} holds no LoRA tensors")
    ties_embedding = model.tie_word_embeddings and LM_HEAD in modules
    resolved = config.resolve([_in_peft(module, inner) for module in modules], ties_embedding)
    wanted = {module: resolved[_in_peft(module, inner)] for module in modules}
    shapes = stored_shapes(model)
    pairs = {}
    for module in modules:
        said = wanted[module]
        if module not in sides:
            continue
        if isinstance(said, str):
            default = f"null, which is {' and '.join(DEFAULT_TARGETS)}"
            value = default if config.raw[said] is None else shown(config.raw[said])
            raise AdapterError(
                f"adapter {name!r}: {module} has weights, but {said} in {CONFIG_FILE} ({value}) leaves it out, and "
                "PEFT would ignore them; put back the configuration that it was saved with"
            )
        pairs[module] = _pair(name, module, sides[module], said, shapes, max_rank, base.lora_dtype)
    _check_missing(config, [module for module, said in wanted.items() if isinstance(said, ModuleLora)], pairs)
    if config.is_tied(ties_embedding) and (EMBED in pairs or LM_HEAD in pairs):
        _check_tied(name, file, pairs)
    return {part: pair for module, pair in pairs.items() for part, pair in _apart(model, module, pair)}


def _apart(model: ModelConfig, module: str, pair: StoredPair) -> list[tuple[str, StoredPair]]:
    """A LoRA of joined linears as one of each: all with its A, each with its own rows of B."""
    start, _, last = module.rpartition(".")
    if last not in PARENT and last not in JOINED:
        return [(module, pair)]
    layer, parts = start.rpartition(".")[0], rows_of(model, last) if last in JOINED else {last: None}
    return [
        (f"{layer}.{PARENT[name]}.{name}", pair.of_rows(rows, head_rows(model, name))) for name, rows in parts.items()
    ]


def _sort(
    name: str, file: WeightsFile, base: ServedBase, modules: list[str], inner: str, has_score: bool
) -> dict[str, Sides]:
    """module -> its sides; anything unexpected is an error that names it."""
    places = _places(tuple(modules), inner)
    copied = {_in_peft(module, inner): module for module in (EMBED, LM_HEAD)}
    sides: dict[str, Sides] = {}
    num_of_images = 0
    for key, tensor in file.tensors.items():
        if key in places:
            module, side = places[key]
            sides.setdefault(module, {})[side] = tensor
        elif (match := _COPY_NAME.fullmatch(key)) and match["module"] in copied:
            base.copies.check(name, key, copied[match["module"]], file.tensor(tensor))
        elif key == SCORE and has_score:
            continue  # `pooling.py` reads it
        elif (match := _LORA_NAME.fullmatch(key)) and is_of_images(match["module"]):
            num_of_images += 1
        elif (layer := _LAYER_NAME.fullmatch(key)) and int(layer["layer"]) >= base.config.num_layers:
            raise AdapterError(f"adapter {name!r}: {key!r} is beyond the model's {base.config.num_layers} layers")
        else:
            raise AdapterError(
                f"adapter {name!r}: tensor {shown(key)} is not a LoRA weight of a supported module "
                f"({', '.join(stored_parents(base.config))}, embed_tokens, lm_head) by PEFT's name, "
                f"{_PREFIX}MODULE.lora_A.weight"
            )
    if num_of_images:
        logger.info("adapter %r: %d tensors for images are left out; only text is served", name, num_of_images)
    return sides


def _pair(
    name: str,
    module: str,
    sides: Sides,
    said: ModuleLora,
    shapes: dict[str, tuple[int, int]],
    max_rank: int,
    dtype: torch.dtype,
) -> StoredPair:
    size_in, size_out = shapes[module.rpartition(".")[2]]
    if len(sides) < 2 and (missing := sorted({"A", "B"} - set(sides))):
        raise AdapterError(f"adapter {name!r}: {module} has no lora_{missing[0]} weight")
    for side, wanted_text in (("A", f"[rank, {size_in}]"), ("B", f"[{size_out}, rank]")):
        tensor = sides[side]
        if len(tensor.shape) != 2 or tensor.dtype not in FLOATS:
            raise AdapterError(
                f"adapter {name!r}: {module} lora_{side} is {tensor.dtype} {list(tensor.shape)}; "
                f"a matrix {wanted_text} of floating-point numbers (16 bits or more, or float8) is expected"
            )
    rank = sides["A"].shape[0]
    if not 1 <= rank <= max_rank:
        raise AdapterError(f"adapter {name!r}: {module} has rank {rank}; 1 to {max_rank} is served (--max-lora-rank)")
    for side, wanted in (("A", (rank, size_in)), ("B", (size_out, rank))):
        if sides[side].shape != wanted:
            raise AdapterError(
                f"adapter {name!r}: {module} lora_{side} has shape {list(sides[side].shape)}, the base model wants "
                f"{list(wanted)}; was it trained for another base?"
            )
    if said.rank != rank:
        raise AdapterError(
            f"adapter {name!r}: {module} has rank {rank} but {CONFIG_FILE} says {shown(said.rank)} (r, rank_pattern)"
        )
    if not _is_finite(said.scale, dtype):
        raise AdapterError(
            f"adapter {name!r}: {module} has lora_alpha {shown(said.alpha)} over rank {rank}, a factor beyond the "
            f"range of {_short(dtype)}, which it would be served in"
        )
    return StoredPair(sides["A"], sides["B"], said.scale)


@functools.lru_cache(maxsize=1024)
def _is_finite(scale: float, dtype: torch.dtype) -> bool:
    """Whether it is still once it is rounded to `dtype`."""
    return bool(torch.isfinite(torch.tensor(scale, dtype=torch.float64).to(dtype)))


def _check_missing(config: LoraConfig, selected: list[str], pairs: dict[str, StoredPair]) -> None:
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


def _check_tied(name: str, file: WeightsFile, pairs: dict[str, StoredPair]) -> None:
    """PEFT holds one LoRA for both; it writes it twice."""
    embed, head = pairs.get(EMBED), pairs.get(LM_HEAD)
    if embed is None or head is None or not (_is_turned(file, embed.a, head.b) and _is_turned(file, embed.b, head.a)):
        raise AdapterError(
            f"adapter {name!r}: ensure_weight_tying is set, but {EMBED} and {LM_HEAD} do not have the same LoRA; "
            "set it to false if they shall differ"
        )


def _is_turned(file: WeightsFile, one: StoredTensor, other: StoredTensor) -> bool:
    return one.dtype == other.dtype and torch.equal(file.tensor(one).T, file.tensor(other))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
