"""What tells one base model and tokenizer from another, without reading gigabytes.

A lookahead head only works with the weights that it was trained with, in whatever dtype they are stored. The hash
covers the shape of the model, every norm, and a slice of one projection of every layer: any full fine-tune changes it.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import safetensors
from tokenizers import Tokenizer

_SHAPE_KEYS = ("architectures", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size")
_SLICED = ("mlp.down_proj.weight", "shared_mlp.output_linear.weight")  # the latter is Granite 4's name of it
_NUM_ROWS = 4


def base_fingerprint(model_dir: Path) -> str:
    """SHA-256 of a Hugging Face directory's model; equal for equal weights up to bf16's precision."""
    config = json.loads((Path(model_dir) / "config.json").read_bytes())
    digest = hashlib.sha256(json.dumps({key: config.get(key) for key in _SHAPE_KEYS}).encode())
    values = {}
    for path in sorted(Path(model_dir).glob("*.safetensors")):
        with safetensors.safe_open(path, framework="pt") as file:
            for name in file.keys():  # not a dict: it has no iterator
                if name.endswith("norm.weight"):
                    values[name] = file.get_tensor(name)
                elif name.endswith(_SLICED):
                    values[name] = file.get_slice(name)[:_NUM_ROWS]
    for name in sorted(values):
        digest.update(name.encode())
        digest.update(values[name].bfloat16().float().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(model_dir: Path) -> str:
    """SHA-256 of which text each token id stands for; how tokenizer.json is written does not matter."""
    vocab = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json")).get_vocab(with_added_tokens=True)
    digest = hashlib.sha256()
    for token, idx in sorted(vocab.items(), key=lambda item: item[1]):
        digest.update(f"{idx}\0{token}\0".encode())
    return digest.hexdigest()
