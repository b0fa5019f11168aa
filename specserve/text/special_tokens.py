"""What the engine needs of a tokenizer: the fast backend that decodes, and the ids that end a sequence."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from tokenizers import Tokenizer

from ..errors import ModelError

logger = logging.getLogger(__name__)


def load_backend_tokenizer(model_dir: Path) -> Tokenizer:
    """The Rust tokenizer of a model directory. Raises `ModelError` when there is none."""
    path = Path(model_dir) / "tokenizer.json"
    if not path.is_file():
        raise ModelError(f"{model_dir} has no tokenizer.json; save the model's fast tokenizer there")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the bindings raise bare Exception
        raise ModelError(f"{path} is not readable: {error}") from None


def eos_token_ids(model_dir: Path) -> frozenset[int]:
    """Every id at which serving stops: generation_config.json's or, without any, config.json's, and the tokenizer's.

    Raises `ModelError` for a file that cannot be read or says something else than ids.
    """
    model_dir = Path(model_dir)
    ids: set[int] = set()
    for name in ("generation_config.json", "config.json"):
        if not ids and (model_dir / name).is_file():
            ids = _named_ids(model_dir / name)
    return frozenset(ids | _tokenizer_eos(model_dir))


def ids_within(eos: frozenset[int], vocab_size: int) -> frozenset[int]:
    """Those of `eos` that the model can draw; the log names the others, which files made for another model have."""
    if beyond := sorted(token for token in eos if token >= vocab_size):
        logger.warning("no output ends with eos_token_id %s: the model has %d tokens", beyond, vocab_size)
    return frozenset(token for token in eos if token < vocab_size)


def _named_ids(path: Path) -> set[int]:
    """What a configuration's eos_token_id names: nothing, an id, or a list of them."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds no JSON object; eos_token_id is read from it")
    found = content.get("eos_token_id")
    ids = found if isinstance(found, list) else [] if found is None else [found]
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise ModelError(f"{path}: eos_token_id {found!r} holds {token!r}; an id or a list of ids from 0 is wanted")
    return set(ids)


def _tokenizer_eos(model_dir: Path) -> set[int]:
    """The id of the tokenizer's own eos_token: chat models tuned from a base model often name their end only there."""
    config, tokenizer = model_dir / "tokenizer_config.json", model_dir / "tokenizer.json"
    if not config.is_file() or not tokenizer.is_file():
        return set()
    token = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    # Only the list of added tokens, which stands first: the whole file can take seconds.
    text = tokenizer.read_text(encoding="utf-8")
    start = re.search(r'"added_tokens"\s*:\s*', text)
    added = json.JSONDecoder().raw_decode(text, start.end())[0] if start is not None else []
    found = {item["id"] for item in added if item["content"] == content}
    if not found and content is not None:  # InternLM 2's has it in its vocabulary alone
        token = load_backend_tokenizer(model_dir).token_to_id(content)
        found = set() if token is None else {token}
    return found
