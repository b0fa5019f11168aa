"""What a lookahead LoRA is worth: its task metric and its speed on held-out rows, through the real engine.

The same prompts are answered with drafts and without in one process. Writes report.json, report.html, plots,
examples.json and the model card; `specserve eval DIR` does it again for a finished directory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ...adapter_files import CONFIG_FILE
from ...errors import UserError
from ...model.config import ModelConfig
from ...model.store import resolve_model
from ...text.special_tokens import eos_token_ids
from ...text.tokenizer import TextTokenizer
from ..data.dataset import Example, read_rows, tokenize
from ..metrics_file import METRICS_FILE, read_metrics
from ..preflight import check_held_out
from ..run_config import RunConfig
from ..run_file import RUN_FILE, began_on, load_run
from .answers import Answers, Served, answer, hardware_of
from .examples import shaded_answers, write_examples
from .report import write_report
from .task_metrics import task_metrics
from .verdict import steps_warning, warnings_of

SINGLE_ROWS = 12  # prompts that are also answered one at a time


def evaluate_directory(
    directory: str | Path, data: Path | None = None, rows: int | None = None, *, max_tokens: int = 512
) -> dict[str, Any]:
    """Evaluate the lookahead LoRA, or the base's head, in `directory` on `data`; returns the report.

    data: default: the held-out rows of its run. Those of a head may lack their answers: what is drafted is the base's.
    """
    directory = Path(directory)
    run_file = directory / RUN_FILE
    if not run_file.is_file() and data is None:
        raise UserError(f"{directory} has no run.yaml that names held-out rows; give --data FILE", param="data")
    config = load_run(run_file, [], {}) if run_file.is_file() else None
    if data is None:
        if config is None or not config.data.eval:
            raise UserError(f"{run_file} names no held-out rows (data.eval); give --data FILE", param="data")
        data = Path(config.data.eval)
    model_dir = resolve_model(config.model if config is not None else "")
    tokenizer = TextTokenizer(model_dir).for_adapter_in(directory).on(began_on(directory))
    system = config.data.system if config is not None else None
    held_out = read_rows(data, rows, may_be_open=not (directory / CONFIG_FILE).is_file())
    examples = tokenize(held_out, tokenizer, eos_token_ids(model_dir), system)
    check_held_out(examples, str(data), ModelConfig.from_dir(model_dir))
    longest = max(len(example.prompt) for example in examples)
    served = Served.of(model_dir, directory, batch=8, max_len=longest + max_tokens + 1)
    engine = served.engine
    prompts = [example.prompt for example in examples]
    open_lines = {row.line for row in held_out if row.is_open}
    gold = {
        idx: tokenizer.decode(example.completion, skip_special_tokens=True)
        for idx, example in enumerate(examples)
        if example.line not in open_lines
    }

    runs: dict[str, dict[str, Answers]] = {"batch 1": {}, "batch 8": {}}
    single = prompts[:SINGLE_ROWS]
    for name, chosen, batch in (("batch 1", single, 1), ("batch 8", prompts, 8)):
        for mode in ("off", "auto"):
            desc = f"{'answers one at a time' if batch == 1 else 'answers, 8 at a time'}, drafts {mode}"
            runs[name][mode] = answer(
                engine, served.adapter_hash, chosen, max_tokens, mode=mode, batch=batch, desc=desc
            )
    drafted, plain = runs["batch 8"]["auto"], runs["batch 8"]["off"]
    same = [a.tokens == b.tokens for a, b in zip(drafted.answers, plain.answers, strict=True)]
    report: dict[str, Any] = {
        "rows": len(examples),
        "data": str(data),
        "hardware": hardware_of(engine),
        "dtype": engine.info.dtype,
        "task": _task(plain, gold),
        "task_with_drafts": _task(drafted, gold),
        "answers_equal_with_and_without_drafts": sum(same) / len(same),
        "mean_accepted_length": round(drafted.mean_accepted_length, 3),
        "mean_accepted_length_batch_1": round(runs["batch 1"]["auto"].mean_accepted_length, 3),
        "drafts_accepted": round(
            drafted.accepted_by_source.total() / max(1, sum(a.drafted for a in drafted.answers)), 3
        ),
        "accepted_by_source": dict(drafted.accepted_by_source),
        **_endless(drafted, examples, max_tokens),
        "reached_by_position": _reached(drafted),
        "accepted_length_histogram": dict(sorted(Counter(n for a in drafted.answers for n in a.step_lens).items())),
        "speed": {name: _speed(modes["off"], modes["auto"]) for name, modes in runs.items()},
        "lookahead": msgspec.to_builtins(served.info),
        "is_base_head": served.adapter_hash is None,
    }
    steps = [values["step"] for values in read_metrics(directory / METRICS_FILE)]
    optimizer = (config or RunConfig()).optimizer
    report["steps"] = max(steps, default=None)
    report["warnings"] = [*steps_warning(report["steps"], optimizer.min_steps), *warnings_of(report)]
    write_report(directory, report, shaded_answers(engine, served.adapter_hash, examples, tokenizer, max_tokens))
    write_examples(directory, held_out, system)
    return report


def _task(answers: Answers, gold: Mapping[int, str]) -> dict[str, float]:
    """Metrics of the answers whose rows have one, by index; none where no row has."""
    return task_metrics([answers.answers[idx].text for idx in gold], list(gold.values())) if gold else {}


def _endless(answers: Answers, examples: Sequence[Example], max_tokens: int) -> dict[str, float]:
    """Of all answers and of all accepted drafts, the share of answers at the limit where no wanted one goes so far."""
    pairs = zip(answers.answers, examples, strict=True)
    endless = [a for a, e in pairs if a.finish_reason == "length" and len(e.completion) < max_tokens]
    accepted = sum(sum(a.accepted_by_source.values()) for a in endless)
    return {
        "answers_without_end": round(len(endless) / len(examples), 4),
        "accepted_in_answers_without_end": round(accepted / max(1, answers.accepted_by_source.total()), 4),
    }


def _reached(answers: Answers) -> list[float]:
    """Share of verifications in which draft 1, 2, ... was accepted."""
    lens = [n for a in answers.answers for n in a.step_lens]
    return [round(sum(n > k for n in lens) / max(1, len(lens)), 4) for k in range(1, max(lens, default=1))]


def _speed(off: Answers, auto: Answers) -> dict[str, float]:
    def rate(answers: Answers) -> float:
        return answers.num_tokens / answers.seconds

    def decode_rate(answers: Answers) -> float:
        return answers.decode_tokens / max(1e-9, answers.decode_seconds)

    return {
        "tokens_per_s_without_drafts": round(rate(off), 1),
        "tokens_per_s": round(rate(auto), 1),
        "ratio": round(rate(auto) / rate(off), 3),
        "decode_tokens_per_s_without_drafts": round(decode_rate(off), 1),
        "decode_tokens_per_s": round(decode_rate(auto), 1),
        "decode_ratio": round(decode_rate(auto) / max(1e-9, decode_rate(off)), 3),
    }
