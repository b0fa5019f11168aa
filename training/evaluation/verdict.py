"""What a finished run came to, in a few sentences: its task metric, its speed, and what speaks against it.

Reads a report (evaluate.py) and the number of steps; knows nothing of models. A speed is only worth what the answers
are: drafts that were accepted in answers that never end are repetition, and are counted apart.
"""

from __future__ import annotations

from typing import Any

_LOW_VALID_JSON = 0.9
_LOW_FIELD_MATCH = 0.5
_LOW_ROUGE_L = 0.15
_MOST_ENDLESS = 0.05  # share of answers
_MOST_REPEATED = 0.2  # share of accepted drafts
# Parts of a report that hold the same metrics of something else.
COMPARED = {
    "base": "base model without it",
    "as_given": "order of the rows",
    "uncalibrated": "before calibration",
}


def summary_of(report: dict[str, Any]) -> list[str]:
    """Task metric, what it is to be compared with, and speed, as far as they were measured; a line each."""
    lines = [f"task, on {report['rows']} held-out rows: {_shown(report['task'])}"] if report["task"] else []
    lines += [f"{what}: {_shown(report[name])}" for name, what in COMPARED.items() if name in report]
    if "speed" not in report:
        return lines
    speed = [
        f"{batch}: {v['tokens_per_s']:.0f} tokens/s with drafts, {v['tokens_per_s_without_drafts']:.0f} without "
        f"({v['ratio']:.2f}x)"
        for batch, v in report["speed"].items()
    ]
    return [*lines, f"speed, {'; '.join(speed)}"]


def _shown(task: dict[str, float]) -> str:
    return ", ".join(f"{key} {value:.3f}" for key, value in task.items() if key != "main")


def steps_warning(num_steps: int | None, least: int) -> list[str]:
    """What to say of a run of so few steps; None: not known, or none were taken."""
    if num_steps is None or num_steps >= least:
        return []
    return [
        f"only {num_steps} optimizer steps were taken ({least} is the least that usually does): give more rows, raise "
        "optimizer.epochs, or lower optimizer.batch_tokens"
    ]


def warnings_of(report: dict[str, Any]) -> list[str]:
    """What is wrong with the answers that were measured."""
    is_base_head = report.get("is_base_head")  # nothing is wanted of its answers: the rows' were not learned
    found = [] if is_base_head else _task_warnings(report["task"])
    if report["answers_without_end"] > _MOST_ENDLESS:
        why = ": they are long, or loop" if is_base_head else ", to which no wanted one goes: they probably loop"
        found.append(f"{report['answers_without_end']:.0%} of the answers do not end before the limit of tokens{why}")
    if report["accepted_in_answers_without_end"] > _MOST_REPEATED:
        share, sources = report["accepted_in_answers_without_end"], report["accepted_by_source"]
        copied = sources.get("ngram", 0) / max(1, sum(sources.values()))
        found.append(
            f"{'most' if share > 0.5 else 'part'} of the speed is that of repetition: {share:.0%} of the accepted "
            f"drafts are in answers that do not end, {copied:.0%} copy the answer's own text (n-gram)"
        )
    if found and not is_base_head:
        is_given = report.get("steps", 0) is None  # no step of a run: it came as it is, perhaps for a head of its own
        found.append(
            "these are the LoRA's own answers, which no head changes: what trained it has to learn more"
            if is_given
            else "train on more rows or for more steps (optimizer.epochs), and look at --check-data"
        )
    return found


def _task_warnings(task: dict[str, float]) -> list[str]:
    found = []
    if task.get("valid_json", 1.0) < _LOW_VALID_JSON:
        found.append(f"only {task['valid_json']:.0%} of the answers are valid JSON, as all of the wanted ones are")
    elif task.get("field_match", 1.0) < _LOW_FIELD_MATCH:
        found.append(f"only {task['field_match']:.0%} of the fields are right")
    if task.get("rouge_l", 1.0) < _LOW_ROUGE_L:
        found.append(f"the answers have little in common with the wanted ones (ROUGE-L {task['rouge_l']:.2f})")
    return found
