"""The names and sizes of a model's matrices, stated once: for files of a directory, and for LoRAs on its modules."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .config import ModelConfig  # which needs torch; commands that only read a run file do without

EMBEDDING, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Of a model that sees, whose language model is served: the parts for images, and the names of what that model is in, as
# transformers saves them (regular expressions), with what they are in the language model alone.
IMAGE_PARTS = ("vision_tower", "multi_modal_projector")
LANGUAGE_MODEL_NAMES = {r"^language_model\.": "", r"^model\.language_model\.": "model."}
# The linears of a layer, each with the part of the layer that it stands in, by their names on the hub.
PARENT = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "self_attn") | dict.fromkeys(
    ("gate_proj", "up_proj", "down_proj"), "mlp"
)
# Phi 3, GLM and Granite 4 have some of them under other names, or as one matrix of the rows of several: in their files,
# and where PEFT puts a LoRA. The names are those of `ModelConfig.joined`.
JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "input_linear": ("gate_proj", "up_proj"),
    "output_linear": ("down_proj",),
}
_OTHER_PARENT = dict.fromkeys(("input_linear", "output_linear"), "shared_mlp")
_PRE_NORMS, _POST_NORMS = ("input_norm", "mlp_norm"), ("post_attention_norm", "post_mlp_norm")
_QK_NORMS = ("q_norm", "k_norm")
LINEARS = tuple(PARENT)  # in the order in which kernels/cpu/decoder.cpp has a layer's matrices, too


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every module that a LoRA may target: the linears, the lm_head and the embedding."""
    hidden, inner = config.hidden_size, config.intermediate_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    return {
        "q_proj": (hidden, q_size),
        "k_proj": (hidden, kv_size),
        "v_proj": (hidden, kv_size),
        "o_proj": (q_size, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
        "lm_head": (hidden, config.vocab_size),
        "embed_tokens": (config.vocab_size, hidden),
    }


def stored_parents(config: ModelConfig) -> dict[str, str]:
    """The linears of a layer as the model's files have them, each with the part of the layer that it stands in."""
    return {name: _OTHER_PARENT.get(name, parent) for name, parent in _stored(config).values()}


def stored_name(config: ModelConfig, module: str) -> tuple[str, slice | None]:
    """What a linear is called within its layer in the model's files, and which rows of that it has; None: all."""
    name, parent = _stored(config)[module]
    return f"{_OTHER_PARENT.get(name, parent)}.{name}", rows_of(config, name)[module] if name in JOINED else None


def _stored(config: ModelConfig) -> dict[str, tuple[str, str]]:
    """The linears of a layer: what each is in the model's files, and the part of the layer that it stands in here."""
    joined = {module: name for name in config.joined for module in JOINED[name]}
    return {module: (joined.get(module, module), parent) for module, parent in PARENT.items()}


def stored_shapes(config: ModelConfig) -> dict[str, tuple[int, int]]:
    """(in, out) of every module as the model's files have it."""
    shapes = module_shapes(config)
    return shapes | {
        name: (shapes[modules[0]][0], sum(shapes[module][1] for module in modules)) for name, modules in JOINED.items()
    }


def rows_of(config: ModelConfig, joined: str) -> dict[str, slice]:
    """Which rows of a joined matrix each of its linears has."""
    shapes, rows, start = module_shapes(config), {}, 0
    for module in JOINED[joined]:
        rows[module] = slice(start, start + shapes[module][1])
        start += shapes[module][1]
    return rows


def head_rows(config: ModelConfig, module: str) -> tuple[int, ...]:
    """The rows of a linear of the model's files in the order in which they are served; none: as they are.

    Positions turn pairs of dimensions that lie half a head apart. Where they turn a part of each head alone, its pairs
    lie half of that part apart, and GLM's side by side; so the dimensions of queries and keys change places, which
    changes no product of both.
    """
    size, turned = config.head_dim, config.rotary_dim
    if (turned == size and not config.turns_neighbours) or module not in ("q_proj", "k_proj"):
        return ()
    rest, part = (turned + size) // 2, list(range(turned))
    first, second = (part[::2], part[1::2]) if config.turns_neighbours else (part[: turned // 2], part[turned // 2 :])
    order = [*first, *range(turned, rest), *second, *range(rest, size)]
    num_heads = config.num_heads if module == "q_proj" else config.num_kv_heads
    return tuple(head * size + place for head in range(num_heads) for place in order)


def has_bias(config: ModelConfig, module: str) -> bool:
    """Whether a linear of a layer has a bias."""
    if module == "o_proj":
        return config.o_bias
    return config.qkv_bias if PARENT[module] == "self_attn" else config.mlp_bias


def layer_norms(config: ModelConfig) -> dict[str, tuple[str, int]]:
    """The norms of a layer by their names in `Layer`: each with its name in a layer on the hub, and its size."""
    names = [*zip(_PRE_NORMS, config.pre_norms, strict=False), *zip(_POST_NORMS, config.post_norms, strict=False)]
    norms = {name: (hub_name, config.hidden_size) for name, hub_name in names}
    nums = (config.num_heads, config.num_kv_heads) if config.qk_norm_whole else (1, 1)
    for name, hub_name, num in zip(_QK_NORMS, config.qk_norm, nums, strict=False):
        norms[name] = (f"self_attn.{hub_name}", num * config.head_dim)
    return norms


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a model directory, by its name on the hub, with its shape."""
    sizes = stored_shapes(config)
    layer: dict[str, tuple[int, ...]] = {f"{name}.weight": (size,) for name, size in layer_norms(config).values()}
    for module, parent in stored_parents(config).items():
        layer[f"{parent}.{module}.weight"] = sizes[module][::-1]  # [out, in]
        if module in PARENT and has_bias(config, module):
            layer[f"{parent}.{module}.bias"] = sizes[module][1:]
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: sizes["embed_tokens"], "model.norm.weight": (config.hidden_size,)}
    for idx in range(config.num_layers):
        shapes |= {f"model.layers.{idx}.{name}": shape for name, shape in layer.items()}
    if not config.tie_word_embeddings:
        shapes[LM_HEAD] = sizes["lm_head"][::-1]
    return shapes


def text_name(name: str) -> str:
    """A tensor's name in the language model alone."""
    for around, inner in LANGUAGE_MODEL_NAMES.items():
        name, num = re.subn(around, inner, name)
        if num:
            break
    return name


def is_of_images(name: str) -> bool:
    """Whether a tensor is of the part of a model that sees, which no text goes through."""
    return name.removeprefix("model.").startswith(tuple(f"{part}." for part in IMAGE_PARTS))
