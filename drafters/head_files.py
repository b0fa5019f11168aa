"""The lookahead half of an adapter directory: lookahead_config.json, lookahead.safetensors, lookahead_history.bin.

Owns the format, its version and every check that needs no model: fields, vocabulary, tensor names, shapes, finiteness.
Whoever loads a head compares the hashes with the base model and the LoRA that it has. A head that fails any of this is
refused with the reason; its LoRA is served without it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import msgspec
import safetensors
import torch
from msgspec import Meta
from safetensors.torch import save_file

from ..adapter_files import HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE
from ..errors import shortened
from ..file_hash import file_hash
from ..whole_files import replace_file
from .head import WEIGHT_NAMES, HeadWeights, head_shapes

FORMAT_VERSION = 1
BARE_BASE = ""  # in the place of a LoRA's hash: the head is of the base model itself
VOCAB_STEP = 1024  # a head's vocabulary is padded to a multiple in memory

Count = Annotated[int, Meta(ge=0, le=1 << 20)]
Positive = Annotated[int, Meta(ge=1, le=1 << 20)]


class HeadError(ValueError):
    """This head cannot be used, and why."""

    def __init__(self, message: str):
        super().__init__(shortened(message))


class LookaheadConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What lookahead_config.json says."""

    format_version: int
    base_hash: str  # of the base model: `specserve.model.fingerprint`
    tokenizer_hash: str
    lora_hash: str  # SHA-256 of adapter_model.safetensors; BARE_BASE without a LoRA
    hidden_size: Positive
    state_size: Positive
    tap_layer: Count  # the head reads the output of this layer and the last normed hidden state
    draft_len: Annotated[int, Meta(ge=1, le=64)]
    copy_window: Annotated[int, Meta(ge=0, le=64)]
    copy_start: Count  # prompt tokens before the first that may be copied
    copy_jumps: bool = False  # whether a token that is not in the window moves it to where that stands in the prompt
    vocab: list[int]  # token ids of the task vocabulary, ascending
    head_hash: str = ""  # SHA-256 of lookahead.safetensors; of older ones nothing
    acceptance: dict[str, list[tuple[float, float]]] = {}  # source -> (right, seen) by class of confidence


@dataclass(frozen=True, slots=True)
class LookaheadHeadFile:
    """A head as read: its configuration and its weights [1, ...] in fp32, the vocabulary padded to `VOCAB_STEP`."""

    config: LookaheadConfig
    weights: HeadWeights
    index_of: dict[int, int] = field(init=False, repr=False)  # token id -> index in the head's vocabulary

    def __post_init__(self) -> None:
        object.__setattr__(self, "index_of", {token: idx for idx, token in enumerate(self.config.vocab)})

    @property
    def num_bytes(self) -> int:
        """Memory that it takes, about: its weights, and 128 bytes for each token of the vocabulary."""
        return sum(getattr(self.weights, name).nbytes for name in WEIGHT_NAMES) + 128 * len(self.config.vocab)

    def copied(self, copy: Callable[[torch.Tensor], torch.Tensor]) -> LookaheadHeadFile:
        """The same head with its weights where `copy` puts them."""
        return replace(self, weights=HeadWeights(*(copy(getattr(self.weights, name)) for name in WEIGHT_NAMES)))


def write_head(directory: Path, config: LookaheadConfig, tensors: dict[str, torch.Tensor]) -> None:
    """Write both files, weights as bf16, and their hash; an end in between leaves a pair that is refused by it."""
    stored = {name: tensors[name][0].to(torch.bfloat16).contiguous() for name in WEIGHT_NAMES}
    replace_file(directory / HEAD_WEIGHTS_FILE, lambda path: save_file(stored, path, metadata={"format": "pt"}))
    text = msgspec.json.encode(msgspec.structs.replace(config, head_hash=file_hash(directory / HEAD_WEIGHTS_FILE)))
    replace_file(directory / HEAD_CONFIG_FILE, lambda path: path.write_bytes(text))


def read_config(path: Path) -> LookaheadConfig:
    """Parse and check a lookahead_config.json. Raises `HeadError`."""
    text = path.read_bytes()
    try:
        version = msgspec.json.decode(text, type=dict).get("format_version")
        if version != FORMAT_VERSION:
            raise HeadError(f"{HEAD_CONFIG_FILE} has format_version {version!r}; this version reads {FORMAT_VERSION}")
        config = msgspec.json.decode(text, type=LookaheadConfig)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise HeadError(f"{HEAD_CONFIG_FILE}: {error}") from None
    vocab = config.vocab
    if not vocab or any(a >= b for a, b in zip(vocab, vocab[1:], strict=False)) or vocab[0] < 0:
        raise HeadError(f"{HEAD_CONFIG_FILE}: vocab is not a list of ascending token ids")
    return config


def read_head(
    config_path: Path,
    weights_path: Path,
    *,
    weights_hash: str,
    lora_hash: str,
    base_hash: str,
    tokenizer_hash: str,
    hidden_size: int,
    num_layers: int,
    vocab_size: int,
    device: torch.device | str = "cpu",
) -> LookaheadHeadFile:
    """Read a head and check that it belongs to this base model and to the LoRA of this hash. Raises `HeadError`.

    weights_hash: of the file `weights_path`.
    The weights are mapped while they are read: nobody may write to `weights_path` meanwhile.
    """
    config = read_config(config_path)
    for name, found, want, whose in (
        ("base_hash", config.base_hash, base_hash, "another base model"),
        ("tokenizer_hash", config.tokenizer_hash, tokenizer_hash, "another tokenizer"),
        ("lora_hash", config.lora_hash, lora_hash, _other_lora(config.lora_hash, lora_hash)),
    ):
        if found != want:
            raise HeadError(f"it was trained with {whose} ({name} {found[:12]!r}, here {want[:12]!r})")
    if config.hidden_size != hidden_size:
        raise HeadError(f"hidden_size is {config.hidden_size}, the base model's is {hidden_size}")
    if config.tap_layer >= num_layers:
        raise HeadError(f"tap_layer is {config.tap_layer}, the base model has {num_layers} layers")
    if config.vocab[-1] >= vocab_size:
        raise HeadError(f"vocab holds token {config.vocab[-1]}, the base model has {vocab_size}")
    shapes = head_shapes(hidden_size, config.state_size, len(config.vocab), config.copy_window)
    try:
        with safetensors.safe_open(weights_path, framework="pt") as file:
            names = set(file.keys())
            if names != set(shapes):
                odd = sorted(names ^ set(shapes))[0]
                raise HeadError(f"{HEAD_WEIGHTS_FILE}: tensor {odd!r} is {'unknown' if odd in names else 'missing'}")
            tensors = {}
            for name, shape in shapes.items():
                found_shape = tuple(file.get_slice(name).get_shape())
                if found_shape != shape:
                    raise HeadError(f"{HEAD_WEIGHTS_FILE}: {name} is {list(found_shape)}, wanted is {list(shape)}")
                tensor = file.get_tensor(name)
                if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
                    raise HeadError(f"{HEAD_WEIGHTS_FILE}: {name} holds values that are not finite numbers")
                tensors[name] = tensor.float().to(device)[None]
    except (safetensors.SafetensorError, OSError) as error:
        raise HeadError(f"{HEAD_WEIGHTS_FILE} is not readable as safetensors: {error}") from None
    if config.head_hash not in ("", weights_hash):
        raise HeadError(f"{HEAD_WEIGHTS_FILE} is not the file that {HEAD_CONFIG_FILE} belongs to; write both again")
    return LookaheadHeadFile(config, HeadWeights(**pad_vocab(tensors)))


def _other_lora(found: str, want: str) -> str:
    if found == BARE_BASE:
        return "the bare base model, not this LoRA"
    return "a LoRA, not the bare base model" if want == BARE_BASE else "another LoRA than the one beside it"


def pad_vocab(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add rows that are never chosen before "another token", so that heads of similar vocabularies stack."""
    embed, bias = tensors["embed"], tensors["out_bias"]  # [1, U, d] and [1, 1, U]
    last = embed.shape[1] - 1
    padding = -last % VOCAB_STEP
    zeros, never = embed.new_zeros(1, padding, embed.shape[2]), bias.new_full((1, 1, padding), float("-inf"))
    embed = torch.cat([embed[:, :last], zeros, embed[:, last:]], dim=1)
    bias = torch.cat([bias[..., :last], never, bias[..., last:]], dim=-1)
    return tensors | {"embed": embed, "out_bias": bias}
