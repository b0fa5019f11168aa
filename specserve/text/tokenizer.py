"""Text to token ids and back, for the server: chat templates, plain encoding, and the bytes of single tokens.

Owns one model's (or adapter's) tokenizer. Special tokens are control characters: a template may write them, a user's
message may not. A message that spells one is encoded as the letters it consists of.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..adapter_files import read_texts
from ..errors import AdapterError, ModelError, UserError
from ..memory import give_memory_back
from .bounds import BYTE_OF, TokenBound
from .chat_templates import may_render_here
from .detokenizer import Detokenizer
from .hidden_chat import HiddenChat, Marks
from .template_worker import MAX_RENDERED_BYTES, TemplateJob

LONG_TEXT = 256 * 1024  # characters; tokenising a longer one leaves its memory behind unless it is asked back
ROLES = ("system", "developer", "user", "assistant", "tool")


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
        self._literal = Tokenizer.from_str(self._backend.to_str())
        self._literal.encode_special_tokens = True  # special tokens in the text are encoded as letters
        added = self._tokenizer.added_tokens_decoder.items()
        self._special_ids = {idx for idx, token in added if token.special}
        self._specials = {token.content: idx for idx, token in added if token.special and token.content}
        self._template: Any = self._tokenizer.chat_template
        self.template_name = "the chat template"
        self.is_template_trusted = trusted and may_render_here(self._template)

    @property
    def chat_template(self) -> object:
        """The template's text; None without one."""
        return self._template

    @property
    def has_chat_template(self) -> bool:
        return self._template is not None

    def for_adapter_in(self, directory: Path) -> TextTokenizer:
        """The tokenizer that requests for the adapter in `directory` get."""
        text_hash, files = read_texts(directory, directory.name)
        return self if text_hash is None else self.for_adapter(directory.name, files)

    def for_adapter(self, name: str, files: Mapping[str, bytes]) -> TextTokenizer:
        """The tokenizer that the adapter `name` brings in `files`, or this one with its chat template."""
        if "tokenizer.json" in files:
            with tempfile.TemporaryDirectory() as directory:
                for file, content in files.items():
                    (Path(directory) / file).write_bytes(content)
                try:
                    own = TextTokenizer(Path(directory), trusted=False)
                except ModelError as error:
                    message = f"adapter {name!r}: {str(error).replace(directory, 'it')}"
                    raise AdapterError(message) from None
            if own.vocab_size != self.vocab_size:
                raise UserError(
                    f"adapter {name!r} brings a tokenizer of {own.vocab_size} tokens, the base model has "
                    f"{self.vocab_size}; a resized vocabulary is not supported",
                    code="invalid_adapter",
                )
            own._bring_template(own._template, self, name)
            return own
        template = None
        try:
            if "chat_template.jinja" in files:
                template = files["chat_template.jinja"].decode("utf-8")
            elif "tokenizer_config.json" in files:
                config = json.loads(files["tokenizer_config.json"])
                template = config.get("chat_template") if isinstance(config, dict) else None
        except (ValueError, RecursionError) as error:
            raise AdapterError(f"adapter {name!r}: its chat template cannot be read: {error}") from None
        if not isinstance(template, str):
            return self
        other = copy.copy(self)
        other._bring_template(template, self, name)
        return other

    def _bring_template(self, template: Any, base: TextTokenizer, adapter: str) -> None:
        """Use an adapter's template: a stranger's program, unless it is the model's own."""
        self._template = template
        self.template_name = f"the chat template of adapter {adapter!r}"
        self.is_template_trusted = template == base._template and base.is_template_trusted

    @property
    def vocab_size(self) -> int:
        return self._backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens in it are recognised, as in a prompt written by hand."""
        return _ids(self._backend, text, add_special_tokens)

    def encode_literal(self, text: str) -> list[int]:
        """Token ids of `text` with special tokens read as plain letters."""
        return _ids(self._literal, text, add_special_tokens=False)

    def check_len(self, texts: Sequence[str], max_tokens: int, param: str) -> None:
        """Refuse, by their bytes alone, texts that have more than `max_tokens` tokens however they are tokenised."""
        if (least := sum(map(self._bound.min_num_tokens, texts))) > max_tokens:
            num_bytes = sum(len(text.encode()) for text in texts)
            raise UserError(
                f"{param}: {num_bytes} bytes of text are at least {least} tokens; the context holds {max_tokens}",
                param=param,
                code="context_length_exceeded",
            )

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

    def detokenizer(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """The text that follows `prompt_ids` a token at a time, special tokens written out."""
        return Detokenizer(self._backend, prompt_ids, skip_special_tokens=False)

    def added_tokens(self, texts: Collection[str]) -> tuple[dict[str, int], tuple[int, ...]]:
        """({text: id} of those of `texts` that are one added token each, the ids of others that are not special).

        An added token is never encoded or generated in pieces.
        """
        added = self._tokenizer.added_tokens_decoder.items()
        named = {token.content: idx for idx, token in added if token.content in texts}
        return named, tuple(sorted(idx for idx, token in added if token.content not in texts and not token.special))

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
        chat = self.hidden_chat(messages, add_generation_prompt, continue_final, tools)
        return self.chat_ids(chat, self.render_chat(chat), max_tokens)

    def hidden_chat(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool = True,
        continue_final: bool = False,
        tools: list[dict[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> HiddenChat:
        """The conversation to render. Special tokens that messages, tool calls, tools or variables spell are letters:
        marks stand for them while it renders. Raises `UserError` for a variable that would replace a special token."""
        for name in variables or ():
            if name in self._tokenizer.special_tokens_map:
                raise UserError(
                    f"chat_template_kwargs.{name} would replace a token of the model; leave it out",
                    param="chat_template_kwargs",
                )
        spells = any(special in message["content"] for message in messages for special in self._specials)
        marks = Marks()
        hidden: list[dict[str, Any]] = [
            {**self.hide({**message, "content": ""}, marks), "content": message["content"]} for message in messages
        ]
        hidden_tools = self.hide(tools, marks)
        hidden_variables = self.hide(dict(variables or {}), marks)
        plain = hidden == list(messages) and hidden_tools == tools and hidden_variables == (variables or {})
        if plain and not spells and not continue_final:
            return HiddenChat(hidden, tools, add_generation_prompt, marks, None, hidden_variables)
        for message in hidden:
            message["content"] = marks.new(message["content"])
        last_mark = hidden[-1]["content"] if continue_final else None
        return HiddenChat(hidden, hidden_tools, add_generation_prompt, marks, last_mark, hidden_variables)

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
                f"{self.template_name} refuses these messages: it makes {num_chars} characters of text; at most "
                f"{MAX_RENDERED_BYTES} are allowed",
                param="messages",
                code="chat_template_failed",
            )
        if max_tokens is not None:
            self.check_len(texts, max_tokens, "messages")
        return self.encode_marked(rendered, chat.marks)

    def template_job(self, chat: HiddenChat, timeout_s: float) -> TemplateJob:
        """What another process needs to render `chat` as `render` would. Raises `UserError`."""
        variables = {**self._tokenizer.special_tokens_map, **chat.variables}
        messages = [{key: item for key, item in message.items() if item is not None} for message in chat.messages]
        template = self._template_for(chat.tools)
        return TemplateJob(template, messages, chat.tools, chat.add_generation_prompt, variables, timeout_s)

    def encode_marked(self, rendered: str, marks: Marks) -> list[int]:
        """Token ids of a rendered template: its special tokens are tokens, what `marks` stand for are letters."""
        ids: list[int] = []
        for text, is_marked in marks.parts(rendered):
            ids += self.encode_literal(text) if is_marked else self.encode(text, add_special_tokens=False)
        return ids

    def hide(self, value: Any, marks: Marks) -> Any:
        """`value` with a mark for every special token that a text in it, or a key, spells."""
        if isinstance(value, dict):
            return {self.hide(key, marks): self.hide(item, marks) for key, item in value.items()}
        if isinstance(value, list):
            return [self.hide(item, marks) for item in value]
        if isinstance(value, str):
            for special in self._specials:
                if special in value:
                    value = value.replace(special, marks.of(special))
        return value

    def render_chat(self, chat: HiddenChat) -> str:
        return self.render(chat.messages, chat.add_generation_prompt, chat.tools, chat.variables)

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        add_generation_prompt: bool,
        tools: list[dict[str, Any]] | None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The conversation's text through the chat template. Raises `UserError` when that refuses the messages."""
        template = self._template_for(tools)
        try:
            # transformers renders in an immutable sandbox: templates come with models and adapters.
            rendered: Any = self._tokenizer.apply_chat_template(
                list(messages),
                tools=tools,  # type: ignore[arg-type]
                chat_template=template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **(variables or {}),
            )
        except Exception as error:  # a template is a program of its own: it may raise anything
            raise UserError(f"{self.template_name} refuses these messages: {error}", param="messages") from None
        return str(rendered)

    def _template_for(self, tools: list[dict[str, Any]] | None) -> str:
        """The template's text; a model may have several, one of them for tools."""
        if self._template is None:
            raise UserError("this model has no chat template; use /v1/completions", param="messages")
        if isinstance(self._template, str):
            return self._template
        try:
            return str(self._tokenizer.get_chat_template(None, tools))  # type: ignore[arg-type]
        except ValueError as error:
            raise UserError(f"{self.template_name} cannot be used: {error}", param="messages") from None


def _ids(backend: Tokenizer, text: str, add_special_tokens: bool) -> list[int]:
    """The methods for batches let go of the interpreter lock, `encode` does not: 9 s for 8 MB."""
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    _give_memory_back(text)
    return ids


def _give_memory_back(text: str) -> None:
    """What a long text took stays with the allocator otherwise: half a gigabyte for 8 MB."""
    if len(text) > LONG_TEXT:
        give_memory_back()
