"""One turn of the assistant as token ids: the prompt that the server makes before it, and the answer up to its stop.

The chat template decides both. An answer is what the template writes behind the generation prompt, up to and including
the token that ends the turn; so tool calls and channels need no rules of their own, and neither do templates that trim.
Thoughts need one where the template opens a block for them in the prompt, or drops them, and never writes them
(DeepSeek-R1, QwQ, Magistral): they are written as the family's models do (chat/thinking_marks.py). Owns the refusal of
what cannot be told: a template that leaves out part of a message, writes no end of turn, or ends it with a token at
which serving does not stop.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from ...chat.thinking_marks import MARK_TOKENS, closed_marks, known_marks, opened_marks
from ...chat.tools.definitions import Tool
from ...chat.tools.formats import choose_format
from ...chat.tools.prompt import ChatMessage, for_template
from ...errors import UserError
from ...text.hidden_chat import Marks
from ...text.tokenizer import TextTokenizer
from .answers import REASONING_FIELDS, Answer, apart, missing, unique

_MAX_OPENING = 64  # characters of a prompt's end
_MAX_SHOWN = 40
_LEFT_OUT = "the chat template leaves out the message's {}, so it would not be learned; leave it out of the row too"


@dataclass(frozen=True, slots=True)
class Turn:
    """`answer` ends with the token at which the server stops, and holds no other such."""

    prompt: list[int]
    answer: list[int]


@dataclass(frozen=True, slots=True)
class _Written:
    """A conversation whose answer begins at `start`; of the `answer`, the template was `given` this much."""

    text: str
    start: int
    answer: Answer
    given: Answer


class TurnEncoder:
    """Makes turns with one model's template; `eos_token_ids` are where its server stops."""

    def __init__(self, tokenizer: TextTokenizer, eos_token_ids: Collection[int]):
        if tokenizer.template.text is None:
            raise UserError(
                "the model has no chat template, so rows cannot be written as conversations; put a "
                "chat_template.jinja into its directory",
                param="model",
            )
        self._tokenizer = tokenizer
        self._format = choose_format(tokenizer.template.text)
        self._known = known_marks(tokenizer.template.text, tokenizer.added_tokens(MARK_TOKENS)[0])
        texts = {tokenizer.token_text(token): token for token in sorted(eos_token_ids)}
        self._eos = {text: token for text, token in texts.items() if text}  # some lists name ids beyond the tokenizer
        self._specials = {**tokenizer.special_tokens, **self._eos}
        self._any_eos, self._any_special = _any_of(self._eos), _any_of(self._specials)
        self._special_run = re.compile(rf"(?:(?:{self._any_special.pattern})\s*)+")
        # What ends an answer that holds these, and what of it the template writes with the next message alone.
        self._ends: dict[tuple[bool, bool, int, bool], tuple[str, str]] = {}

    def turn(self, history: Sequence[ChatMessage], answer: Answer, tools: Sequence[Tool] = ()) -> Turn:
        """`answer` after `history`, messages as `chat.messages.chat_messages` makes them.

        Raises `UserError` for what cannot be told.
        """
        before, definitions = for_template(history, tools, self._format)
        prompt = self._tokenizer.encode_chat(before, True, False, definitions)
        marks = Marks()
        asked = self._render(before, True, definitions, marks)
        written = self._written(history, answer, tools, asked, marks)
        start, given = written.start, written.given
        kind = (bool(given.message["content"]), bool(given.reasoning), len(given.calls), bool(tools))
        if kind not in self._ends:
            self._ends[kind] = self._end(history, given, tools)
        end, unwritten = self._ends[kind]
        whole = written.text + unwritten
        stop = self._any_eos.search(whole, start)
        # A message may spell the opening of a block that the prompt has opened already: "<think>".
        shown_from = max(0, start - _MAX_OPENING)
        if left_out := missing(written.answer, whole[shown_from:], marks):
            raise UserError(_LEFT_OUT.format(left_out))
        is_cut = stop is None or missing(written.answer, whole[shown_from : stop.start()], marks) is not None
        if stop is None or stop[0] != end or is_cut:
            raise UserError(
                f"the chat template writes {stop[0] if stop else 'no eos token'!r} where this message's text ends or "
                f"before; others end with {end!r}"
            )
        ids = self._tokenizer.encode_marked(whole[: stop.end()], marks)
        if ids[: len(prompt)] == prompt:
            ids = ids[len(prompt) :]
        else:  # letters of prompt and answer would become one token, which no server can split
            ids = self._tokenizer.encode_marked(whole[start : stop.end()], marks, whole[:start])
        if ids[-1] != self._eos[stop[0]] or any(token in self._eos.values() for token in ids[:-1]):
            raise UserError(f"the message spells {stop[0]!r}, which ends answers but is no special token of the model")
        return Turn(prompt, ids)

    def _written(
        self, history: Sequence[ChatMessage], answer: Answer, tools: Sequence[Tool], asked: str, marks: Marks
    ) -> _Written:
        """The conversation with the answer behind `asked`, the prompt; its thoughts as the model's family has them."""
        for known in self._known:
            if known.start in self._specials and answer.message["content"].lstrip().startswith(known.start):
                answer = apart(answer, known)  # which would be letters in a content
        closed = closed_marks(asked, self._known)
        if closed is not None and (answer.reasoning or closed.start in answer.message["content"]):
            raise UserError(
                "the prompt that a server makes of the messages before closes the block of thoughts "
                f"({asked[asked.rindex(closed.start) :]!r}), so no answer thinks; leave the reasoning out of the row "
                "too, or train with a template that lets answers think",
                param="model",
            )
        whole = self._render_answer(history, answer, tools, marks)
        start = self._start(history, answer, tools, asked, whole, marks)
        opened = opened_marks(asked, self._known) if start is None else None
        if opened is None and not self._drops_thoughts(history, answer, tools, whole, marks):
            return _Written(whole, self._found(start, asked), answer, answer)
        block = opened or self._known[0]
        opening = asked[asked.rindex(block.start) :] if opened else ""
        bare = asked.removesuffix(opening)
        start = self._start(history, answer, tools, bare, whole, marks) if opened else None
        own = "" if start is None else whole[start:].lstrip()
        if start is not None and own.startswith(block.start):  # it writes the block otherwise than it opens it
            said = opening + own[len(block.start) :].lstrip()
            return _Written(whole[:start] + said, start + len(opening), answer, answer)
        if missing(answer, whole, marks) == "content":
            answer = apart(answer, block)
        given = Answer({key: value for key, value in answer.message.items() if key not in REASONING_FIELDS})
        whole = self._render_answer(history, given, tools, marks)
        start = self._found(self._start(history, given, tools, bare, whole, marks), asked)
        if not opened and (not answer.reasoning or whole[start:].lstrip().startswith(block.start)):
            return _Written(whole, start, answer, given)
        thoughts = self._tokenizer.template.hide(answer.reasoning or "", marks)
        said = opening + block.closing(thoughts, opening)
        return _Written(whole[:start] + said + whole[start:], start + len(opening), answer, given)

    def _drops_thoughts(
        self, history: Sequence[ChatMessage], answer: Answer, tools: Sequence[Tool], whole: str, marks: Marks
    ) -> bool:
        """Whether the template leaves out the answer's reasoning, or a text that may begin with it."""
        if not self._known:
            return False
        if not answer.reasoning:
            return missing(answer, whole, marks) == "content"
        stand_in = answer.stand_in()
        return str(stand_in.reasoning) not in self._render_answer(history, stand_in, tools, Marks())

    def _end(self, history: Sequence[ChatMessage], answer: Answer, tools: Sequence[Tool]) -> tuple[str, str]:
        """The token that ends such an answer, in the first special ones behind all of its texts, and what `_ends` says.

        GLM's models end with the token that begins the user's next message.
        """
        stand_in = answer.stand_in()
        text = self._render_answer(history, stand_in, tools, Marks())
        behind = 0
        for name, piece in stand_in.pieces():
            if piece not in text:
                raise UserError(_LEFT_OUT.format(name))
            behind = max(behind, text.rindex(piece) + len(piece))
        found = self._any_special.search(text, behind)
        if found is None:
            return self._next_beginning(history, stand_in, tools, text[behind:])
        run = self._special_run.match(text, found.start())
        assert run is not None
        end = self._any_eos.search(text, run.start(), run.end())  # behind others: Command's ends the response before
        if end is None:
            token = self._specials[found[0]]
            known = ", ".join(f"{token} {text!r}" for text, token in self._eos.items()) or "none"
            raise UserError(
                f"the chat template ends the assistant's message with {found[0]!r} (id {token}), where the server "
                f"would not stop: the model's eos_token_id is {known}; add {token} in its generation_config.json",
                param="model",
            )
        return end[0], ""

    def _next_beginning(
        self, history: Sequence[ChatMessage], stand_in: Answer, tools: Sequence[Tool], rest: str
    ) -> tuple[str, str]:
        """As `_end`, where the next message may begin with the end; `rest` is written behind the answer's texts."""
        following: list[ChatMessage] = [{"role": "user", "content": unique()}]
        try:
            longer = self._render_answer(history, stand_in, tools, Marks(), following)
        except UserError:  # no message may follow
            longer = ""
        *_, (_, last) = stand_in.pieces()
        _, _, behind = longer.partition(last)
        found = self._any_eos.search(behind) if behind.startswith(rest) else None
        if found is None or behind[len(rest) : found.start()].strip():
            raise UserError(
                "the chat template writes no special token behind the assistant's message, so an answer would have no "
                "end; let it write one of the model's eos tokens there",
                param="model",
            )
        return found[0], behind[len(rest) : found.end()]

    def _start(
        self,
        history: Sequence[ChatMessage],
        answer: Answer,
        tools: Sequence[Tool],
        asked: str,
        whole: str,
        marks: Marks,
    ) -> int | None:
        """Where the answer starts in a rendering, which may begin otherwise than the prompt; None: nowhere.

        Some drop earlier reasoning; Mistral's write the system message before the last message alone, where that is
        the user's. Theirs open an answer with nothing: it begins behind the message before it.
        """
        if whole.startswith(asked):
            return len(asked)
        before, definitions = for_template(history, tools, self._format)
        closed = self._render(before, False, definitions, marks)
        opening = asked[len(os.path.commonprefix([asked, closed])) :]
        if not opening and (last := self._tokenizer.template.hide(before[-1]["content"], marks).strip()):
            opening = asked[max(0, asked.rfind(last)) :]
        other = self._render_answer(history, answer.stand_in(), tools, marks)
        found = os.path.commonprefix([whole, other]).rfind(opening) if opening else -1
        return found + len(opening) if found >= 0 else None

    def _found(self, start: int | None, asked: str) -> int:
        if start is None:
            raise UserError(
                f"the chat template asks for an answer with {asked[-_MAX_SHOWN:]!r} but does not write the assistant's "
                "message that way, so what an answer is cannot be told; train with a template that does",
                param="model",
            )
        return start

    def _render_answer(
        self,
        history: Sequence[ChatMessage],
        answer: Answer,
        tools: Sequence[Tool],
        marks: Marks,
        following: Sequence[ChatMessage] = (),
    ) -> str:
        messages, definitions = for_template([*history, answer.message], tools, self._format)
        if answer.reasoning is not None:
            messages[-1] |= dict.fromkeys(REASONING_FIELDS, answer.reasoning)
        return self._render([*messages, *following], False, definitions, marks)

    def _render(
        self, messages: list[ChatMessage], is_prompt: bool, definitions: list[dict[str, Any]] | None, marks: Marks
    ) -> str:
        hide = self._tokenizer.template.hide
        return self._tokenizer.template.render(hide(messages, marks), is_prompt, hide(definitions, marks))


def _any_of(texts: Collection[str]) -> re.Pattern[str]:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
