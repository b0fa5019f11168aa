"""A new head for an adapter, or for the bare base, fitted to what it served: `specserve refit`.

The served outputs are the targets (self-distillation on real traffic). Some of them are held out; the new head is
written only where it foresees more of these than the old one does. The LoRA stays as it is, byte for byte. All is done
on a copy of one state of the directory, and nothing is written if that has changed by then. The head's two files are
replaced while the directory may be served: whoever reads it in between sees the old pair or refuses it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from ..adapter_files import CONFIG_FILE, HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE, WEIGHTS_FILE, open_adapter
from ..drafters.head import WEIGHT_NAMES
from ..drafters.head_files import (
    BARE_BASE,
    FORMAT_VERSION,
    HeadError,
    LookaheadConfig,
    read_config,
    read_head,
    write_head,
)
from ..drafting.serving_log import Served as ServedOutput
from ..drafting.serving_log import read_served
from ..errors import UserError
from ..file_hash import file_hash
from ..file_lock import FileLock
from ..model.config import ModelConfig
from ..model.fingerprint import base_fingerprint, tokenizer_fingerprint
from .data.dataset import Example
from .evaluation.answers import Served, answer
from .finish import CALIBRATION_ROWS, check_head, rewrite_acceptance
from .head_fit import anchors_of, collect_states, collect_teacher, expected_tokens, fit_head, new_head, with_jumps
from .head_module import LookaheadHead, common_prefix_len, task_vocab
from .lora_files import share_files
from .lora_model import CausalModel, LoraModel, arithmetic
from .preflight import check_adapter
from .run_config import HeadConfig, LoraConfig

_HELD_OUT = 5  # one in so many outputs
_LEAST_OUTPUTS = 64  # fewer held out tell no better head from a worse one
_BATCH_TOKENS = 2048
_MOST_TOKENS = 200_000  # of outputs: their hidden states are held in memory

OldHead = tuple[LookaheadConfig, dict[str, torch.Tensor]]  # tensors [1, ...] without padding


@dataclass(frozen=True, slots=True)
class Refitted:
    """Tokens that a forward gives by the head alone, on outputs that were held out; None without an old head."""

    num_outputs: int
    before: float | None
    after: float
    is_written: bool


def refit(
    directory: Path, model_dir: Path, log: Path, *, key: str | None, max_outputs: int, epochs: int, head: HeadConfig
) -> Refitted:
    """Fit a head to what the LoRA in `directory`, or the bare base, served by `log`, and write it if it is better.

    `head` says what there is no old head to say of. Raises `UserError` for what the user can fix.
    """
    with _held(directory), tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / directory.resolve().name
        state = _copied(directory, copy)
        is_adapter = (copy / CONFIG_FILE).is_file()
        if not is_adapter and not (copy / HEAD_CONFIG_FILE).is_file():
            raise UserError(f"{directory} holds neither an adapter nor a head of the bare base", param="directory")
        if is_adapter:
            check_adapter(copy, model_dir, "directory")
        lora_hash = file_hash(copy / WEIGHTS_FILE) if is_adapter else BARE_BASE
        served_by = lora_hash if is_adapter else base_fingerprint(model_dir)
        examples = _examples(
            _outputs(log, served_by, key, directory, ModelConfig.from_dir(model_dir).vocab_size), max_outputs
        )
        old = _old_head(copy, model_dir, lora_hash)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tap_layer = old[0].tap_layer if old is not None else head.tap_layer
        dtype = arithmetic("auto", device)
        model: CausalModel
        if is_adapter:
            model = LoraModel(model_dir, LoraConfig(adapter=str(copy)), dtype, device, tap_layer)
        else:
            model = CausalModel(model_dir, dtype, device, tap_layer)
        config, module, before, after = _fitted(model, old, examples, epochs, head)
        if before is not None and after <= before:
            return Refitted(len(examples), before, after, False)
        lookahead = msgspec.structs.replace(
            config,
            base_hash=base_fingerprint(model_dir),
            tokenizer_hash=tokenizer_fingerprint(model_dir),
            lora_hash=lora_hash,
        )
        del model
        lookahead = _with_record(copy, model_dir, lookahead, module, examples[::_HELD_OUT])
        _replace(directory, state, lookahead, module)
        return Refitted(len(examples), before, after, True)


def _fitted(
    model: CausalModel,
    old: OldHead | None,
    examples: Sequence[Example],
    epochs: int,
    settings: HeadConfig,
) -> tuple[LookaheadConfig, LookaheadHead, float | None, float]:
    """The new head and its configuration, and what old and new foresee of the held-out outputs."""
    torch.manual_seed(0)
    copy_start = common_prefix_len(examples)
    if old is not None:
        sizes = old[0]
        settings = msgspec.structs.replace(
            settings,
            hidden_size=sizes.state_size,
            copy_window=sizes.copy_window,
            draft_len=sizes.draft_len,
        )
    held_out, learned = examples[::_HELD_OUT], [e for idx, e in enumerate(examples) if idx % _HELD_OUT]
    settings = with_jumps(settings, learned, copy_start)  # unless the run's file says it
    states = {name: collect_states(model, part, _BATCH_TOKENS) for name, part in (("old", held_out), ("new", learned))}

    def foreseen(head: LookaheadHead, start: int, jumps: bool | None) -> float:
        last, tapped, starts = states["old"]
        as_drafted = msgspec.structs.replace(settings, copy_jumps=jumps)
        anchors = anchors_of(head, as_drafted, held_out, starts, start)
        return expected_tokens(head, last, tapped, anchors)

    vocab, before = task_vocab(learned, settings.vocab_size), None
    if old is not None:
        known = old[0].vocab
        before = foreseen(_module(model, settings, known, old), old[0].copy_start, old[0].copy_jumps)
        vocab = sorted({*vocab, *known}) if len({*vocab, *known}) <= settings.vocab_size else vocab
    # An old head that has come to a bad place stays near it, and a new one has seen nothing else than these outputs.
    candidates = [_module(model, settings, vocab, first) for first in ([None, old] if old is not None else [None])]
    for head in candidates:
        last, tapped, starts = states["new"]
        anchors = anchors_of(head, settings, learned, starts, copy_start)
        teacher = None if settings.loss == "ce" else collect_teacher(model, head, last)
        fit_head(head, settings, last, tapped, anchors, epochs, 0, teacher)
        check_head(head, settings.lr)
    jumps = settings.copy_jumps
    after, head = max(((foreseen(head, copy_start, jumps), head) for head in candidates), key=lambda pair: pair[0])
    fitted = LookaheadConfig(
        format_version=FORMAT_VERSION,
        base_hash="",
        tokenizer_hash="",
        lora_hash="",
        hidden_size=model.hidden_size,
        state_size=settings.hidden_size,
        tap_layer=model.tap_layer,
        draft_len=settings.draft_len,
        copy_window=settings.copy_window,
        copy_start=copy_start,
        copy_jumps=bool(settings.copy_jumps),
        vocab=head.vocab,
    )
    return fitted, head, before, after


def _module(model: CausalModel, settings: HeadConfig, vocab: Sequence[int], old: OldHead | None) -> LookaheadHead:
    """A head over `vocab`; it may begin as an old one, in which new words are what "another token" is."""
    if old is None:
        return new_head(model, settings, vocab)
    head = LookaheadHead(model.hidden_size, settings.hidden_size, vocab, settings.copy_window)
    known, tensors = old[0].vocab, old[1]
    place = {token: idx for idx, token in enumerate(known)}
    rows = torch.tensor([place.get(token, len(known)) for token in vocab] + [len(known)])
    with torch.no_grad():
        for name, parameter in head.named_parameters():
            value = tensors[name]
            if name == "embed":
                value = value[:, rows]
            elif name == "out_bias":
                value = value[..., rows]
            parameter.copy_(value)
    return head.to(model.device)


def _old_head(directory: Path, model_dir: Path, lora_hash: str) -> OldHead | None:
    """Configuration and tensors [1, ...] without padding; None where there is none that fits.

    Raises `UserError` for a head of another base model, which is not this one's to replace.
    """
    config_path, weights_path = directory / HEAD_CONFIG_FILE, directory / HEAD_WEIGHTS_FILE
    if not config_path.is_file() or not weights_path.is_file():
        return None
    model, base_hash = ModelConfig.from_dir(model_dir), base_fingerprint(model_dir)
    try:
        if read_config(config_path).base_hash != base_hash:
            raise UserError(
                f"its head belongs to another base model than {model_dir}; name that (--model)", param="model"
            )
        read = read_head(
            config_path,
            weights_path,
            weights_hash=file_hash(weights_path),
            lora_hash=lora_hash,
            base_hash=base_hash,
            tokenizer_hash=tokenizer_fingerprint(model_dir),
            hidden_size=model.hidden_size,
            num_layers=model.num_layers,
            vocab_size=model.vocab_size,
        )
    except HeadError:
        return None
    tensors = {name: getattr(read.weights, name) for name in WEIGHT_NAMES}
    num = len(read.config.vocab)
    keep = torch.tensor([*range(num), tensors["embed"].shape[1] - 1])  # the padding lies before "another token"
    return read.config, tensors | {"embed": tensors["embed"][:, keep], "out_bias": tensors["out_bias"][..., keep]}


def _outputs(log: Path, weights_hash: str, key: str | None, directory: Path, vocab_size: int) -> list[ServedOutput]:
    try:
        found = read_served(log, weights_hash, key, vocab_size)
    except OSError as error:
        raise UserError(f"cannot read the serving log {log}: {error.strerror or error}", param="serving-log") from None
    distinct = list({(tuple(one.prompt), tuple(one.output)): one for one in found}.values())
    if len(distinct) < _LEAST_OUTPUTS:
        whose = f" of key {key!r}" if key else ""
        raise UserError(
            f"{log} has {len(distinct)} different outputs{whose} of {directory}; {_LEAST_OUTPUTS} are the least that a "
            "head is fitted to: let `specserve serve --serving-log` keep more",
            param="serving-log",
        )
    return distinct


def _examples(outputs: Sequence[ServedOutput], max_outputs: int) -> list[Example]:
    """The newest that fit into memory."""
    found, num_tokens = [], 0
    for number, one in enumerate(reversed(outputs[-max_outputs:]), 1):
        num_tokens += len(one.output)
        if num_tokens > _MOST_TOKENS:
            break
        mask = [False] * len(one.prompt) + [True] * len(one.output)
        found.append(Example(one.prompt + one.output, mask, number))
    return found


def _with_record(
    copy: Path, model_dir: Path, config: LookaheadConfig, head: LookaheadHead, held_out: Sequence[Example]
) -> LookaheadConfig:
    """`config` with a record of acceptance, made with the new head beside the copy of what it drafts for."""
    write_head(copy, config, head.tensors())
    asked = held_out[:CALIBRATION_ROWS]
    longest = max(len(example.tokens) for example in asked)
    served = Served.of(model_dir, copy, batch=8, max_len=longest + 1)
    most = max(len(example.completion) for example in asked)
    answer(served.engine, served.adapter_hash, [e.prompt for e in asked], most, desc="answers for the record")
    lookahead = served.lookahead
    if lookahead is None or lookahead.error:
        raise UserError(f"the new head is refused: {lookahead.error if lookahead else 'no files'}")
    rewrite_acceptance(copy, lookahead.acceptance.dump())
    return read_config(copy / HEAD_CONFIG_FILE)


def _replace(directory: Path, state: str, config: LookaheadConfig, head: LookaheadHead) -> None:
    """Write the head where everything is as it was copied."""
    try:
        if _copied(directory, None) != state:
            raise UserError(f"{directory} has changed meanwhile; its head is left as it was", param="directory")
        write_head(directory, config, head.tensors())
        share_files(directory)
    except OSError as error:
        raise UserError(f"cannot write to {directory}: {error.strerror or error}", param="directory") from None


def _copied(directory: Path, copy: Path | None) -> str:
    """The hash of one state of `directory`, which is copied to the new directory `copy`, if that is given."""
    with open_adapter(directory, directory.resolve().name) as files:
        if copy is not None:
            copy.mkdir()
            for name, path in files.paths.items():
                shutil.copyfile(path, copy / name)
        return files.content_hash


@contextmanager
def _held(directory: Path) -> Iterator[None]:
    """One refit at a time in a directory; the kernel lets go of it however the process ends."""
    with FileLock(directory) as lock:
        if not lock.take():
            raise UserError(f"another refit is at work in {directory}; wait for it", param="directory")
        yield
