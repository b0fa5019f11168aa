"""Of a model that sees images, what concerns the language model in it, which is the one that is served.

Owns where its configuration stands in config.json. How its tensors are called in the whole is in `shapes.py`.
"""

from __future__ import annotations

from typing import Any

# The model_type of its language model where text_config does not say, and whether the whole ties lm_head and embedding
# where it does not say.
LANGUAGE_MODELS = {
    "Gemma3ForConditionalGeneration": ("gemma3_text", True),
    "Mistral3ForConditionalGeneration": ("mistral", True),
    "LlavaForConditionalGeneration": ("llama", False),
}


def language_part(raw: dict[str, Any], architecture: str) -> dict[str, Any]:
    """Its own part of config.json, with what the whole says for it as well. Raises `KeyError`."""
    model_type, is_tied = LANGUAGE_MODELS[architecture]
    part = {"model_type": model_type, **raw["text_config"]}
    if raw.get("tie_word_embeddings", is_tied):  # which of both says so changed between versions of transformers
        part["tie_word_embeddings"] = True
    if raw.get("quantization_config"):
        part["quantization_config"] = raw["quantization_config"]
    return part
