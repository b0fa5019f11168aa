"""Deltas of one sequence as the items of a response, and as the events that build the same items.

Owns the items and their order: reasoning, text and calls as they come out of `ChatAnswer`. An item is closed when the
next one begins or the output ends, and what is done is never touched again. Events leave before anything is changed, or
hold copies, so that they may be written later.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Iterator
from typing import Any

import msgspec

from ...chat.answer import ChatAnswer
from ...chat.tools.events import Arguments, CallStart, Content, Reasoning
from ...messages import Delta
from ..generation.job import Job
from ..openai.response_types import TokenLogprob
from ..openai.responses import chat_logprobs
from .response_types import (
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    FunctionCallItem,
    ItemAdded,
    ItemDone,
    ItemStatus,
    MessageItem,
    OutputItem,
    OutputTextPart,
    PartAdded,
    PartDone,
    ReasoningDelta,
    ReasoningDone,
    ReasoningItem,
    ReasoningTextPart,
    TextDelta,
    TextDone,
)


class Output:
    """What has come of a job's only sequence; `feed` gives the events of a delta."""

    def __init__(self, job: Job, include_reasoning: bool):
        self._job = job
        self._answer = ChatAnswer(job.tools, job.thinking, include_reasoning)
        self._has_logprobs = job.requests[0].sampling.logprobs is not None
        self._pieces = _TokenPieces(job)
        self.items: list[OutputItem] = []
        self._item: OutputItem | None = None  # the last one, while it is open
        self._events: list[Event] = []
        self._scored: list[TokenLogprob] = []  # of tokens whose text has not come yet
        self.num_reasoning_tokens = 0
        self._num_undecided = 0  # tokens that are reasoning if a block begins with them

    def feed(self, delta: Delta) -> list[Event]:
        is_last = delta.finish_reason is not None
        if self._has_logprobs or self._answer.phase != "answer":
            pieces = list(self._pieces.of(delta))
        else:
            pieces = [delta]
        for idx, piece in enumerate(pieces):
            self._answer.feed(piece.text, is_last and idx == len(pieces) - 1)
            self._count(len(piece.token_ids))
            scored = self._scores(piece)
            for event in self._answer.events():
                match event:
                    case Reasoning(text):
                        self._reasoning(text)
                    case Content(text):
                        self._text(text, scored)
                        scored = []
                    case CallStart(index, name):
                        self._call(index, name)
                    case Arguments(_, text):
                        self._arguments(text)
        if is_last:
            self._end(delta.finish_reason == "length")
        events, self._events = self._events, []
        return events

    def abandon(self) -> None:
        """Nothing more comes; what is open stays as it is."""
        if self._item is not None:
            self._item.status, self._item = "incomplete", None

    def _count(self, num_tokens: int) -> None:
        """Reasoning are all tokens before the answer's first, the markers included."""
        if self._answer.phase == "thinking":
            self.num_reasoning_tokens += self._num_undecided + num_tokens
            self._num_undecided = 0
        elif self._answer.phase == "open":
            self._num_undecided += num_tokens
        else:
            self._num_undecided = 0

    def _scores(self, piece: Delta) -> list[TokenLogprob]:
        """Log-probabilities that belong to the text that came with these tokens; others wait for theirs."""
        if not self._has_logprobs:
            return []
        if piece.logprobs is not None:
            scores = chat_logprobs(self._job.tokenizer, piece.token_ids, piece.logprobs)
            self._scored += msgspec.convert(scores, list[TokenLogprob])
        events = self._answer.events()
        if not events and self._answer.phase != "thinking":
            return []
        scored, self._scored = self._scored, []
        return scored

    # -- items

    def _reasoning(self, text: str) -> None:
        item = self._item
        if not isinstance(item, ReasoningItem):
            item = ReasoningItem(id=new_id("rs"), status="in_progress", content=[ReasoningTextPart()])
            self._open(item, ReasoningItem(id=item.id, status="in_progress"))
            self._emit(PartAdded(**self._place(item), part=ReasoningTextPart()))
        item.content[0].text += text
        self._emit(ReasoningDelta(**self._place(item), delta=text))

    def _text(self, text: str, scored: list[TokenLogprob]) -> None:
        item = self._item
        if not isinstance(item, MessageItem):
            item = MessageItem(id=new_id("msg"), status="in_progress", content=[OutputTextPart()])
            self._open(item, MessageItem(id=item.id, status="in_progress"))
            self._emit(PartAdded(**self._place(item), part=OutputTextPart()))
        if not text:
            return
        part = item.content[0]
        part.text += text
        part.logprobs += scored
        self._emit(TextDelta(**self._place(item), delta=text, logprobs=scored))

    def _call(self, index: int, name: str) -> None:
        call_id = self._answer.call_id(index)
        item = FunctionCallItem(id=new_id("fc"), status="in_progress", call_id=call_id, name=name)
        self._open(item, msgspec.structs.replace(item))

    def _arguments(self, text: str) -> None:
        item = self._item
        assert isinstance(item, FunctionCallItem)
        item.arguments += text
        self._emit(ArgumentsDelta(**self._place(item), delta=text))

    def _open(self, item: OutputItem, shown: OutputItem) -> None:
        """`shown` is the item without what it will hold."""
        self._close("completed")
        self._item = item
        self.items.append(item)
        self._emit(ItemAdded(output_index=len(self.items) - 1, item=shown))

    def _close(self, status: ItemStatus) -> None:
        item, self._item = self._item, None
        if item is None:
            return
        item.status = status
        place = self._place(item)
        match item:
            case FunctionCallItem():
                self._emit(ArgumentsDone(**place, arguments=item.arguments))
            case ReasoningItem(content=[part]):
                self._emit(ReasoningDone(**place, text=part.text), PartDone(**place, part=part))
            case MessageItem(content=[part]):
                self._emit(TextDone(**place, text=part.text, logprobs=part.logprobs), PartDone(**place, part=part))
        self._emit(ItemDone(output_index=len(self.items) - 1, item=item))

    def _end(self, is_cut: bool) -> None:
        """Close what is open; an answer that says nothing is an empty text."""
        if not self.items:
            self._text("", [])
        if isinstance(self._item, FunctionCallItem):
            is_cut = not self._answer.is_called  # a stop string may have cut it off, and a limit may come behind it
        self._close("incomplete" if is_cut else "completed")

    def _place(self, item: OutputItem) -> dict[str, Any]:
        return {"output_index": len(self.items) - 1, "item_id": item.id}

    def _emit(self, *events: Event) -> None:
        self._events += events


class _TokenPieces:
    """Deltas as pieces of one token each, with the text that it brought: the same however many tokens came together.

    Of a token that a stop string cut off whole there is no log-probability, and of an end none. Where a tool's adapter
    goes on with a sequence of its own, a delta stays whole.
    """

    def __init__(self, job: Job):
        request = job.requests[0]
        is_one_sequence = job.tools is None or not job.tools.switching
        self._detokenizer = (
            job.tokenizer.detokenizer(request.prompt_token_ids, request.sampling.skip_special_tokens)
            if is_one_sequence
            else None
        )
        self._waiting: deque[tuple[Delta, int]] = deque()  # whose texts have not come whole, and what is left of them

    def of(self, delta: Delta) -> Iterator[Delta]:
        if self._detokenizer is None:
            yield delta
            return
        num_texts = len(delta.token_ids) - delta.num_silent
        for idx, token in enumerate(delta.token_ids[:num_texts]):
            scores = None if delta.logprobs is None else [delta.logprobs[idx]]
            piece = Delta(delta.request_id, [token], logprobs=scores)
            self._waiting.append((piece, len(self._detokenizer.push(token)[0])))
        start = 0
        while self._waiting:
            piece, text_len = self._waiting[0]
            text = delta.text[start : start + text_len]
            if text_len and not text:
                break
            start += len(text)
            self._waiting[0] = (Delta(delta.request_id, []), text_len - len(text))
            if len(text) == text_len:
                self._waiting.popleft()
            yield msgspec.structs.replace(piece, text=text)
        rest = delta.text[start:]
        if delta.finish_reason is not None:
            unread = [token for piece, _ in self._waiting for token in piece.token_ids]
            yield Delta(delta.request_id, unread + delta.token_ids[num_texts:], rest)
        elif rest:
            yield Delta(delta.request_id, [], rest)


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
