"""One llama GGUF file -> a Hugging Face directory with bf16 safetensors.

Owns the conversion only; where files come from and where the result is kept is `store`. The tensors equal what
transformers reads from the same file (q and k rows are stored pair by pair and are put back half by half), rounded once
to bf16. Reading and writing directly takes a few seconds for 135 M parameters where the detour through transformers'
model and tokenizer classes takes forty. Only what is known to come out right is converted: another architecture, a
scaled rope or an unknown pre-tokenizer is an error that asks for the Hugging Face directory instead.
"""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ModelError

BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4  # gguf.TokenType
INSTEAD = "give a Hugging Face directory or hub id instead"


def convert_gguf(source: Path, out_dir: Path, *, progress: bool = True) -> None:
    """Write config, tokenizer and weights of `source` into the existing, empty `out_dir`; raises `ModelError`."""
    import gguf

    if progress:
        print(f"reading {source.name}", file=sys.stderr)
    try:
        reader = gguf.GGUFReader(source)
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise ModelError(f"{source} is not a readable GGUF file ({error}); download it again") from None
    # The tokenizer's arrays hold some 100,000 strings: read them once.
    metadata = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    architecture = metadata.get("general.architecture")
    if architecture != "llama":
        raise ModelError(f"{source} holds a {architecture!r} model; only llama GGUF files are converted: {INSTEAD}")
    shapes = {tensor.name: tuple(int(n) for n in reversed(tensor.shape)) for tensor in reader.tensors}
    config = hf_config(metadata, shapes, source)
    write_tokenizer(metadata, config, out_dir, source)
    write_weights(reader, config, out_dir, source, progress=progress)
    _write_json(out_dir / "config.json", config)
    generation: dict[str, Any] = {"_from_model_config": True}
    generation |= {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if key in config}
    _write_json(out_dir / "generation_config.json", generation)


def hf_config(metadata: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], source: Path) -> dict[str, Any]:
    """The `config.json` of a llama GGUF. `shapes` maps GGUF tensor names to [rows, columns]."""

    def get(key: str) -> Any:
        if key not in metadata:
            raise ModelError(f"{source} lacks the metadata key {key}; {INSTEAD}")
        return metadata[key]

    if metadata.get("llama.rope.scaling.type", "none") != "none" or "rope_freqs.weight" in shapes:
        raise ModelError(f"{source} uses a scaled rope, whose parameters GGUF does not keep; {INSTEAD}")
    if metadata.get("llama.expert_count", 0):
        raise ModelError(f"{source} is a mixture of experts, which is not converted; {INSTEAD}")
    if "token_embd.weight" not in shapes:
        raise ModelError(f"{source} lacks the tensor token_embd.weight; download it again")
    num_heads, hidden_size = get("llama.attention.head_count"), get("llama.embedding_length")
    head_dim = metadata.get("llama.attention.key_length", hidden_size // num_heads)
    if metadata.get("llama.rope.dimension_count", head_dim) != head_dim:
        raise ModelError(f"{source} rotates only a part of each head, which is not converted; {INSTEAD}")
    rope_theta = metadata.get("llama.rope.freq_base", 10000.0)
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden_size,
        "intermediate_size": get("llama.feed_forward_length"),
        "num_hidden_layers": get("llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata.get("llama.attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "max_position_embeddings": get("llama.context_length"),
        # GGUF keeps it as float32: 9.999999747378752e-06 is what became of 1e-05.
        "rms_norm_eps": float(f"{get('llama.attention.layer_norm_rms_epsilon'):.7g}"),
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "tie_word_embeddings": "output.weight" not in shapes,
        "use_cache": True,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            config[f"{name}_token_id"] = metadata[f"tokenizer.ggml.{key}_token_id"]
    return config


def write_weights(reader: Any, config: Mapping[str, Any], out_dir: Path, source: Path, *, progress: bool) -> None:
    """Dequantise every tensor, undo llama.cpp's row order of q and k, round to bf16, write `model.safetensors`."""
    import gguf
    import torch
    from safetensors.torch import save_file
    from tqdm import tqdm

    tensors: dict[str, torch.Tensor] = {}
    total = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    with tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar:
        for tensor in reader.tensors:
            name = hf_tensor_name(tensor.name)
            if name is None:
                raise ModelError(f"{source} holds the tensor {tensor.name}, which a plain llama has not; {INSTEAD}")
            try:
                values = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())  # [N, K], [N]
            except NotImplementedError:
                raise ModelError(f"{source}: {tensor.tensor_type.name} tensors cannot be read; {INSTEAD}") from None
            if ".attn_q." in tensor.name:
                values = halves_from_pairs(values, config["num_attention_heads"])
            elif ".attn_k." in tensor.name:
                values = halves_from_pairs(values, config["num_key_value_heads"])
            tensors[name] = values.to(torch.bfloat16).contiguous()
            bar.update(int(tensor.n_bytes))
    missing = sorted(_expected_names(config) - tensors.keys())
    if missing:
        raise ModelError(f"{source} lacks {len(missing)} tensors, the first is {missing[0]}; download it again")
    save_file(tensors, out_dir / "model.safetensors", metadata={"format": "pt"})


def halves_from_pairs(rows: Any, num_heads: int) -> Any:
    """Put a head's rows from rope's interleaved order (x0 y0 x1 y1 ...) into the order of halves (x0 x1 ... y0 y1 ...).

    `rows` is [num_heads * head_dim, ...]; the same shape comes back.
    """
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def hf_tensor_name(name: str) -> str | None:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; None when a llama has no such tensor."""
    if name in TOP_NAMES:
        return TOP_NAMES[name]
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in BLOCK_NAMES:
        return None
    return f"model.layers.{match[1]}.{BLOCK_NAMES[match[2]]}.{match[3]}"


def write_tokenizer(metadata: Mapping[str, Any], config: Mapping[str, Any], out_dir: Path, source: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja (where the file holds a template)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

    if metadata.get("tokenizer.ggml.model") != "gpt2":
        kind = metadata.get("tokenizer.ggml.model")
        raise ModelError(f"{source} has a {kind!r} tokenizer; only byte-level BPE ('gpt2') is converted: {INSTEAD}")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    known = {
        "gpt-2": byte_level,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]),
    }
    pre = metadata.get("tokenizer.ggml.pre", "missing")
    if pre not in known:
        raise ModelError(f"{source} splits text in the way {pre!r}; known are {', '.join(known)}: {INSTEAD}")

    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    types: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = known[pre]
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL_TOKEN]
    user_defined = [token for token, kind in zip(tokens, types, strict=False) if kind == USER_DEFINED_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in user_defined])
    if metadata.get("tokenizer.ggml.add_bos_token", False):
        bos = tokens[config["bos_token_id"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, config["bos_token_id"])]
        )
    tokenizer.save(str(out_dir / "tokenizer.json"))

    tokenizer_config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config["max_position_embeddings"],
        "clean_up_tokenization_spaces": False,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
        if f"tokenizer.ggml.{key}_token_id" in metadata:
            tokenizer_config[f"{name}_token"] = tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
    _write_json(out_dir / "tokenizer_config.json", tokenizer_config)
    if "tokenizer.chat_template" in metadata:
        (out_dir / "chat_template.jinja").write_text(metadata["tokenizer.chat_template"], encoding="utf-8")


def _expected_names(config: Mapping[str, Any]) -> set[str]:
    blocks = {
        f"model.layers.{i}.{name}.weight" for i in range(config["num_hidden_layers"]) for name in BLOCK_NAMES.values()
    }
    return blocks | {"model.embed_tokens.weight", "model.norm.weight"}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
