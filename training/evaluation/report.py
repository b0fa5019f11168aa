"""report.json, plots/*.png, report.html and the model card README.md of a lookahead LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from ..metrics_file import METRICS_FILE, read_metrics
from .html_report import Kind, html_report, kind_of
from .plots import Plot, plots_of


def write_report(directory: Path, report: dict[str, Any], examples: Sequence[dict[str, Any]]) -> None:
    """Write all of them; the loss is plotted from the run's metrics.jsonl where there is one.

    `examples` are answers with the traces of their tokens, for report.html.
    """
    plots = plots_of(report, read_metrics(directory / METRICS_FILE))
    page = html_report(directory.name, report, plots, examples)
    write_files(directory, report, plots, page, model_card(directory.name, report))


def write_files(directory: Path, report: dict[str, Any], plots: Sequence[Plot], page: str, card: str) -> None:
    """The files of a report, of any task."""
    (directory / "report.json").write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")
    (directory / "plots").mkdir(exist_ok=True)
    for plot in plots:
        plot.save(directory / "plots" / f"{plot.name}.png")
    (directory / "report.html").write_text(page, encoding="utf-8")
    (directory / "README.md").write_text(card, encoding="utf-8")


_LORA = """A lookahead LoRA: a plain PEFT LoRA, and beside it a small head and a task history that draft its next
tokens. Any tool loads the LoRA alone; specserve uses the rest to answer faster with the same tokens."""
_LORA_ALONE = """A plain PEFT LoRA, which any tool loads. It has no lookahead head yet: what drafts for it is text that
repeats. `specserve train RUN_FILE --adapter DIR --head-only` trains one."""
_BASE_HEAD = """A lookahead head of the base model itself, without a LoRA: it drafts the next tokens of requests without
adapter, which are answered faster with the same tokens (`specserve serve --base-head DIR`). A task metric is the base
model's."""
_KINDS: dict[Kind, str] = {"lora": _LORA, "lora alone": _LORA_ALONE, "base head": _BASE_HEAD}


def model_card(name: str, report: dict[str, Any]) -> str:
    """The card in Markdown; every number is of report.json."""
    metrics = [f"| {key} | {value:.4f} |\n" for key, value in report["task"].items() if key != "main"]
    task = "".join(["| task metric | |\n|---|---|\n", *metrics, "\n"]) if metrics else ""
    speed = "\n".join(
        f"| {batch} | {v['tokens_per_s_without_drafts']} | {v['tokens_per_s']} | {v['ratio']} | {v['decode_ratio']} |"
        for batch, v in report["speed"].items()
    )
    sources = ", ".join(f"{key} {value}" for key, value in sorted(report["accepted_by_source"].items())) or "none"
    return f"""---
library_name: {"specserve" if report.get("is_base_head") else "peft"}
---
# {name}

{_KINDS[kind_of(report)]}

{warnings_in_card(report)}Measured on {report["rows"]} held-out rows, greedy, {report["dtype"]} on {report["hardware"]}.

{task}\
Tokens a verification: **{report["mean_accepted_length"]}** at batch 8, {report["mean_accepted_length_batch_1"]} at 1.
Answers equal with and without drafts: {report["answers_equal_with_and_without_drafts"]:.1%}{_rounding(report)}.
Accepted drafts by source: {sources}.

| | tokens/s without drafts | with | ratio | ratio of decoding alone |
|---|---|---|---|---|
{speed}

![tokens a verification](plots/accepted_length.png)
![share of verifications that reach a position](plots/reached_by_position.png)

`specserve eval DIR` measures this again; `run.yaml` is the run that made it. `report.html` shows more: answers, and
where each of their tokens came from.
"""


def warnings_in_card(report: Mapping[str, Any]) -> str:
    return "".join(f"> **Warning:** {text}.\n>\n" for text in report["warnings"]) + ("\n" if report["warnings"] else "")


def _rounding(report: dict[str, Any]) -> str:
    if report["answers_equal_with_and_without_drafts"] == 1.0 or report["dtype"] in ("float32", "fp32"):
        return ""
    return f" ({report['dtype']} rounds a row a little differently beside others)"
