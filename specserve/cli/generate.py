"""`specserve generate`: one prompt through an engine in this process, printed as it comes.

Owns reading the prompt and the closing line of figures. The engine is the one that serves; there is no second path.
"""

from __future__ import annotations

import shlex
import sys
import time
from pathlib import Path
from typing import IO, TYPE_CHECKING

import msgspec

from ..config import EngineConfig
from ..errors import UserError, from_info
from ..messages import Delta, GenerateRequest, RequestFailed, SamplingParams, Speculation, Usage
from ..model.store import is_hub_id, resolve_model
from ..terminal import ColourChoice, wants_colour
from .shading import Shading

if TYPE_CHECKING:
    from ..text.tokenizer import TextTokenizer


class GenerateOptions(msgspec.Struct, frozen=True):
    """The flags of `generate` that are not settings of the engine."""

    adapter: Path | None = None
    chat: bool | None = None  # None: if the tokenizer has a chat template
    system: str | None = None
    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    ignore_eos: bool = False
    trace: bool = False
    rejected: bool = False
    color: ColourChoice = "auto"


def refuse_prompt_as_model(model: str, stdin: IO[str]) -> None:
    """Raise `UserError` where a text stands in the place of MODEL; one word is a hub id if a prompt is piped in."""
    is_path = not model or model.endswith(".gguf") or Path(model).expanduser().exists()
    looks_like_id = is_hub_id(model) and ("/" in model or not stdin.isatty())
    if not is_path and not looks_like_id:
        raise UserError(
            f"{model!r} stands in the place of MODEL, and there is no such model; give the prompt with -p: "
            f"specserve generate -p {shlex.quote(model)}",
            param="model",
        )


def read_prompt(prompt: str | None, prompt_file: Path | None, stdin: IO[str]) -> str:
    """The prompt from --prompt, --prompt-file or, when neither is given, standard input."""
    if prompt is not None and prompt_file is not None:
        raise UserError("give the prompt once: --prompt or --prompt-file")
    if prompt_file is not None:
        try:
            prompt = prompt_file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {prompt_file}: {getattr(error, 'strerror', None) or error}") from None
    if prompt is None:
        if stdin.isatty():
            print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
        try:
            prompt = stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not UTF-8 text: {error}") from None
    if not prompt:
        raise UserError("the prompt is empty; give --prompt, --prompt-file or text on standard input")
    return prompt


def generate_text(config: EngineConfig, prompt: str, options: GenerateOptions) -> None:
    """Print the completion of `prompt` on stdout and the figures on stderr; raises `UserError`."""
    from ..engine.engine import Engine
    from ..server.served_engine import with_base_head
    from ..text.known_tokens import check_known
    from ..text.tokenizer import TextTokenizer
    from ..text.traced_text import TracedText

    if options.rejected and not options.trace:
        raise UserError("--rejected shows the wrong drafts of a trace; add --trace")
    model_dir = resolve_model(config.model, config.revision)
    tokenizer = TextTokenizer(model_dir)
    token_ids = encode_prompt(tokenizer, prompt, options)
    engine = Engine(with_base_head(config), model_dir)
    check_known(token_ids, tokenizer, engine.info.vocab_size)
    adapter = engine.load_adapter(options.adapter.name, str(options.adapter)) if options.adapter else None
    room = engine.info.max_model_len - len(token_ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(token_ids)} tokens and the context {engine.info.max_model_len}; shorten the prompt"
        )
    request = GenerateRequest(
        request_id="cli",
        prompt_token_ids=token_ids,
        sampling=SamplingParams(
            max_tokens=min(options.max_tokens, room),
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            stop=options.stop,
            seed=options.seed,
            ignore_eos=options.ignore_eos,
        ),
        adapter_hash=adapter.content_hash if adapter else None,
        speculation=Speculation(max_draft_tokens=config.max_draft_tokens, trace=options.trace),
    )
    traced = TracedText(tokenizer.detokenizer(token_ids, request.sampling.skip_special_tokens))
    shading = Shading(wants_colour(sys.stdout, choice=options.color), options.rejected)
    start_s = time.perf_counter()
    engine.add_request(request)
    while engine.has_work():
        for event in engine.step():
            if isinstance(event, RequestFailed):
                raise from_info(event.error)
            assert isinstance(event, Delta)  # nothing is pooled here
            text = shading.text(traced.told(event).trace or ()) if options.trace else event.text
            print(text, end="", flush=True)
            if event.usage is not None:
                print(flush=True)
                if options.trace:
                    print(shading.legend(), file=sys.stderr)
                print(figures(event.usage, time.perf_counter() - start_s), file=sys.stderr)


def figures(usage: Usage, seconds: float) -> str:
    """The closing line: "64 tokens in 1.60 s, 40.0 tokens/s, 2.13 tokens a step; prompt 12 tokens"."""
    rate = usage.completion_tokens / max(seconds, 1e-9)
    accepted_len = usage.completion_tokens / max(usage.num_forwards, 1)
    return (
        f"{usage.completion_tokens} tokens in {seconds:.2f} s, {rate:.1f} tokens/s, {accepted_len:.2f} tokens a step; "
        f"prompt {usage.prompt_tokens} tokens"
    )


def encode_prompt(base: TextTokenizer, prompt: str, options: GenerateOptions) -> list[int]:
    """Token ids of the prompt, inside the chat template where that is wanted; an adapter's own tokenizer wins."""
    tokenizer = base
    if options.adapter is not None:
        tokenizer = tokenizer.for_adapter_in(options.adapter)
    chat = options.chat if options.chat is not None else tokenizer.template.text is not None
    if not chat:
        if options.system is not None:
            raise UserError("--system needs the chat template; leave out --raw, or put the text into the prompt")
        return tokenizer.encode(prompt)
    if tokenizer.template.text is None:
        raise UserError("the model has no chat template; use --raw")
    messages = [{"role": "user", "content": prompt}]
    if options.system is not None:
        messages.insert(0, {"role": "system", "content": options.system})
    return tokenizer.encode_chat(messages)
