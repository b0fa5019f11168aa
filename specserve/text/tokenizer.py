"""Text to token ids and back, for the server: prompts, rendered conversations, and the bytes of single tokens.

Owns one model's (or adapter's) tokenizer, with its chat template (chat_template.py). What a message spells of a special
token is encoded as the letters that it consists of.
"""

from __future__ import annotations

import copy
import datetime
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..adapter_files import read_texts
from ..errors import AdapterError, ModelError, OverloadedError, UserError
from ..memory import give_memory_back
from .chat_template import TEMPLATE_FAILED, ChatTemplate, named_texts
from .detokenizer import Detokenizer, TokenTexts
from .hidden_chat import HiddenChat, Marks
from .template_worker import MAX_RENDERED_BYTES
from .token_bound import BYTE_OF, TokenBound

_JOINT = "\ue000"  # shares a token with nothing
LONG_TEXT = 256 * 1024  # characters; tokenising a longer one leaves its memory behind unless it is asked back


class TextTokenizer:
    """The tokenizer of a Hugging Face directory. Thread-safe: it is never modified after construction."""

    def __init__(self, path: Path, *, trusted: bool = True):
        # Not AutoTokenizer: it imports torch and a model's classes (340 MB, 5 s) to find a class that reads the same
        # tokenizer.json, and Gemma's adds a token that the model does not have.
        from transformers import PreTrainedTokenizerFast  # half a second: not before the engine process has started

        try:
            self._tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
            self._backend: Tokenizer = self._tokenizer.backend_tokenizer
        except Exception as error:
            raise ModelError(f"{path} has no usable fast tokenizer: {error}") from None
        self._bound = TokenBound(self._backend)
        self._texts = TokenTexts(self._backend)
        self._literal = Tokenizer.from_str(self._backend.to_str())
        self._literal.encode_special_tokens = True  # special tokens in the text are encoded as letters
        added = self._tokenizer.added_tokens_decoder.items()  # made anew at each look
        self._added = {token.content: idx for idx, token in added}
        self._added_texts = {token.content: idx for idx, token in added if not token.special}
        self._special_ids = {idx for idx, token in added if token.special}
        self._specials = {token.content: idx for idx, token in added if token.special and token.content}
        self._ends_special = tuple(self._specials)
        self._opens_with_space = _opens_with_space(self._backend, "")
        self._opens_behind_special = any(_opens_with_space(self._backend, text) for text in self._ends_special[:1])
        text = self._tokenizer.chat_template
        self.template = ChatTemplate(self._tokenizer, text, self._specials, may_trust=trusted)

    def for_adapter_in(self, directory: Path) -> TextTokenizer:
        """The tokenizer that requests for the adapter in `directory` get."""
        text_hash, files = read_texts(directory, directory.name)
        return self if text_hash is None else self.for_adapter(directory.name, files)

    def for_adapter(self, name: str, files: Mapping[str, bytes]) -> TextTokenizer:
        """The tokenizer that the adapter `name` brings in `files`, or this one with its chat template."""
        if "tokenizer.json" in files:
            own = _brought(name, files)
            if own.vocab_size != self.vocab_size:
                raise UserError(
                    f"adapter {name!r} brings a tokenizer of {own.vocab_size} tokens, the base model has "
                    f"{self.vocab_size}; a resized vocabulary is not supported",
                    code="invalid_adapter",
                )
            own.template = own.template.of_adapter(own.template.text, name, self.template)
            return own
        template: str | dict[str, str] | None = None
        try:
            if "chat_template.jinja" in files:
                template = files["chat_template.jinja"].decode("utf-8")
            elif "tokenizer_config.json" in files:
                config = json.loads(files["tokenizer_config.json"])
                template = named_texts(config.get("chat_template")) if isinstance(config, dict) else None
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"adapter {name!r}: its chat template cannot be read: {error}") from None
        if not template:
            return self
        other = copy.copy(self)
        other.template = self.template.of_adapter(template, name, self.template)
        return other

    def on(self, day: datetime.date | None) -> TextTokenizer:
        """The same tokenizer, whose chat template takes `day` for today; None: today is."""
        other = copy.copy(self)
        other.template = self.template.on(day)
        return other

    def given(self, variables: Mapping[str, Any]) -> TextTokenizer:
        """The same tokenizer, whose chat template gets `variables` with every conversation. Raises `UserError`."""
        other = copy.copy(self)
        other.template = self.template.given(variables)
        return other

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    @property
    def eos_token_id(self) -> int | None:
        """Of the tokenizer's own eos_token; serving may stop at others, too."""
        found: int | None = self._tokenizer.eos_token_id
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens in it are recognised, as in a prompt written by hand."""
        return _ids(self._backend, text, add_special_tokens)

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of `text` with special tokens read as plain letters."""
        return _ids(self._literal, text, add_special_tokens=False)

    def encode_continued(self, text: str, chat_prompt: Sequence[int] = ()) -> list[int]:
        """Token ids of `text`, special tokens in it as letters, as a model would write it behind another one.

        chat_prompt: what it answers. Words of SentencePiece begin with a space; where the chat template ends within a
        line ("[/INST]"), so does an answer, whether the text has that space or not.
        """
        if chat_prompt and not text[:1].isspace() and not self.token_text(chat_prompt[-1]).endswith("\n"):
            return self.encode_literal(text)
        return self._continued(self._literal, text)

    def min_num_tokens(self, text: str) -> int:
        """How many tokens `text` has at least, by its bytes alone."""
        return self._bound.min_num_tokens(text)

    def check_len(self, texts: Sequence[str], max_tokens: int, param: str) -> None:
        """Refuse, by their bytes alone, texts that have more than `max_tokens` tokens however they are tokenised."""
        if (least := sum(map(self._bound.min_num_tokens, texts))) > max_tokens:
            num_bytes = sum(len(text.encode()) for text in texts)
            raise UserError(
                f"{param}: {num_bytes} bytes of text are at least {least} tokens; the context holds {max_tokens}",
                param=param,
                code="context_length_exceeded",
            )

    def beginning(self, text: str, num_tokens: int) -> str:
        """`text`, without most of what certainly stands behind its first `num_tokens` tokens."""
        longest = self._bound.longest
        return text[: 2 * num_tokens * longest] if longest else text  # twice: the last word of it is cut somewhere

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        return self._backend.decode_batch([list(ids)], skip_special_tokens=skip_special_tokens)[0]

    def encode_with_offsets(self, text: str, add_special_tokens: bool = True) -> list[tuple[int, str, int, int]]:
        """(id, vocabulary entry, first character, character after the last) of each token of `text`."""
        encoding = self._backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        entries = zip(encoding.ids, encoding.tokens, encoding.offsets, strict=True)
        tokens = [(token, entry, start, stop) for token, entry, (start, stop) in entries]
        del encoding, entries
        _give_memory_back(text)
        return tokens

    def detokenizer(self, prompt_ids: Sequence[int], skip_special_tokens: bool = False) -> Detokenizer:
        """The text that follows `prompt_ids`, a token at a time."""
        return Detokenizer(self._texts, prompt_ids, skip_special_tokens=skip_special_tokens)

    def added_tokens(self, texts: Collection[str]) -> tuple[dict[str, int], tuple[int, ...]]:
        """({text: id} of those of `texts` that are one added token each, the ids of others that are not special).

        An added token is never encoded or generated in pieces.
        """
        named = {text: self._added[text] for text in texts if text in self._added}
        return named, tuple(sorted(idx for text, idx in self._added_texts.items() if text not in texts))

    @property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the special tokens by their text."""
        return dict(self._specials)

    def is_special(self, token: int) -> bool:
        return token in self._special_ids

    def token_text(self, token: int) -> str:
        """A token as text; one that is no whole character is written as its bytes, the way OpenAI does."""
        text = self._backend.decode([token], skip_special_tokens=False)
        if "\ufffd" not in text:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.token_bytes(token))

    def token_texts(self, ids: Sequence[int]) -> list[str]:
        return [self.token_text(token) for token in ids]

    def token_bytes(self, token: int) -> list[int]:
        """The bytes that a token stands for, also where they are no whole character."""
        raw = self._backend.id_to_token(token) or ""
        if len(raw) == 6 and raw.startswith("<0x") and raw.endswith(">"):
            return [int(raw[3:5], 16)]
        if raw and all(char in BYTE_OF for char in raw):
            return [BYTE_OF[char] for char in raw]
        return list(self._backend.decode([token], skip_special_tokens=False).encode())

    def encode_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: list[dict[str, Any]] | None = None,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a conversation through the chat template. Raises `UserError` when the template refuses it.

        A text that is certain to have more than `max_tokens` is refused before it is tokenised. With `continue_final`
        the ids end with the last message's text instead of the template's end of that message.
        """
        chat = self.template.hidden_chat(messages, add_generation_prompt, continue_final, tools)
        return self.chat_ids(chat, self.template.render_chat(chat), max_tokens)

    def chat_ids(self, chat: HiddenChat, rendered: str, max_tokens: int | None = None) -> list[int]:
        """Token ids of what the template made of `chat`. Raises `UserError`, also for what must be too long."""
        if chat.last_mark is not None:
            head, found_mark, _ = rendered.rpartition(chat.last_mark)
            if not found_mark:
                raise UserError("the chat template leaves out the last message; it cannot go on", param="messages")
            rendered = head + chat.last_mark
        texts = [text for text, _ in chat.marks.parts(rendered)]
        if (num_chars := sum(map(len, texts))) > MAX_RENDERED_BYTES:  # each mark may stand for a long text
            raise UserError(
                f"{self.template.name} refuses these messages: it makes {num_chars} characters of text; at most "
                f"{MAX_RENDERED_BYTES} are allowed",
                param="messages",
                code=TEMPLATE_FAILED,
            )
        if max_tokens is not None:
            self.check_len(texts, max_tokens, "messages")
        return self.encode_marked(rendered, chat.marks)

    def encode_marked(self, rendered: str, marks: Marks, before: str = "") -> list[int]:
        """Token ids of a rendered template: its special tokens are tokens, what `marks` stand for are letters.

        before: what of it is encoded already.
        """
        ids: list[int] = []
        is_start, behind_special = not before, before.endswith(self._ends_special)
        for text, is_marked in marks.parts(rendered):
            if not text:
                continue
            backend = self._literal if is_marked else self._backend
            goes_on = not is_start and not (behind_special and self._opens_behind_special)
            ids += self._continued(backend, text) if goes_on else _ids(backend, text, add_special_tokens=False)
            is_start, behind_special = False, not is_marked and text.endswith(self._ends_special)
        return ids

    def _continued(self, backend: Tokenizer, text: str) -> list[int]:
        """Token ids of `text` without the space that SentencePiece puts before a text: it stands behind another."""
        if self._opens_with_space:
            joint, ids = (_ids(backend, begun, add_special_tokens=False) for begun in (_JOINT, _JOINT + text))
            if ids[: len(joint)] == joint:
                return ids[len(joint) :]
        return _ids(backend, text, add_special_tokens=False)


def _brought(name: str, files: Mapping[str, bytes]) -> TextTokenizer:
    """The tokenizer that the adapter `name` brings, read as transformers reads one: from a folder."""
    try:
        with tempfile.TemporaryDirectory() as directory:
            for file, content in files.items():
                (Path(directory) / file).write_bytes(content)
            try:
                return TextTokenizer(Path(directory), trusted=False)
            except ModelError as error:
                raise AdapterError(f"adapter {name!r}: {str(error).replace(directory, 'it')}") from None
    except OSError as error:
        raise OverloadedError(
            f"adapter {name!r}: there is no room for its tokenizer among temporary files ({error.strerror}); make "
            "some, or name another folder for them in TMPDIR at the server's start",
            status=503,
        ) from None


def _opens_with_space(backend: Tokenizer, before: str) -> bool:
    """Whether a text, behind a special token `before` or at the beginning, gets a space that it does not have."""
    tokens = backend.encode(before + _JOINT, add_special_tokens=False).tokens
    return any(token.startswith("\u2581") for token in tokens[len(before) > 0 :][:1])


def _ids(backend: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """The methods for batches let go of the interpreter lock, `encode` does not: 9 s for 8 MB."""
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    _give_memory_back(text)
    return ids


def _give_memory_back(text: str) -> None:
    """What a long text took stays with the allocator otherwise: half a gigabyte for 8 MB."""
    if len(text) > LONG_TEXT:
        give_memory_back()
