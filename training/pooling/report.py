"""What is written of an adapter that pools: report.json, plots, report.html and the model card README.md."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.html_report import pooling_page
from ..evaluation.plots import SERIES, TEXT, Plot, loss_plot
from ..evaluation.report import warnings_in_card, write_files
from ..evaluation.verdict import COMPARED
from ..metrics_file import METRICS_FILE, read_metrics

_WHAT = {
    "embed": "An embedding LoRA: it makes vectors of texts, near each other where a text answers the other",
    "rerank": "A re-ranking LoRA: it scores documents for a query, each pair in one pass",
    "classify": "A classification LoRA: it answers all of its questions about a text in one pass",
}
_CLASS = {"embed": "AutoModel", "rerank": "AutoModelForSequenceClassification"}


def write_pooling_report(directory: Path, report: dict[str, Any]) -> None:
    """Write all of them into `directory`."""
    plots = list(_plots(report, read_metrics(directory / METRICS_FILE)))
    tables = list(_tables(report))
    page = pooling_page(directory.name, f"{_WHAT[report['adapter_type']]}.", report, _tiles(report), plots, tables)
    write_files(directory, report, plots, page, pooling_card(directory.name, report))


def pooling_card(name: str, report: Mapping[str, Any]) -> str:
    """The card in Markdown; every number is of report.json."""
    kind = report["adapter_type"]
    tables = "\n".join(_markdown(*table) for table in _tables(report))
    labels = "" if kind == "embed" else f", num_labels={report['num_outputs']}"
    return f"""---
library_name: peft
---
# {name}

{_WHAT[kind]}. Any tool loads it as a plain PEFT
adapter, on `{_CLASS.get(kind, _CLASS["rerank"])}.from_pretrained(BASE{labels})`; pooling ({report["pooling"]}) and
prefixes are in `pooling_config.json`, which specserve reads.{_otherwise(report)}

{warnings_in_card(report)}Measured on {report["rows"]} held-out rows, {report["dtype"]} on {report["hardware"]}.

{tables}
{"".join(f"![{plot.title}](plots/{plot.name}.png){chr(10)}" for plot in _plots(report, ()))}
`specserve eval DIR` measures this again; `run.yaml` is the run that made it, `report.html` the same with more plots.
"""


def _otherwise(report: Mapping[str, Any]) -> str:
    if report["adapter_type"] == "embed" or report["pooling"] == "last":
        return ""
    return " The class of transformers pools by the last token, so its outputs are others."


Table = tuple[str, list[str], list[list[str]]]  # title, columns, rows


def _tables(report: Mapping[str, Any]) -> Iterator[Table]:
    others = [name for name in COMPARED if name in report]
    names = [name for name in report["task"] if name != "main"]
    yield (
        _searched(report),
        ["metric", "this adapter", *(COMPARED[name] for name in others)],
        [[name, _shown(report["task"][name]), *(_shown(report[other][name]) for other in others)] for name in names],
    )
    if report.get("by_dimensions"):
        sizes = report["by_dimensions"]
        rows = [[size, *(_shown(values[name]) for name in names)] for size, values in sizes.items()]
        yield "Shorter embeddings", ["dimensions", *names], rows
    if report.get("questions"):
        columns = ["rows", "accuracy", "micro_f1", "macro_f1", "calibration_error"]
        rows = [[name, *(_shown(values[c]) for c in columns)] for name, values in report["questions"].items()]
        yield "Questions", ["question", *columns], rows


def _searched(report: Mapping[str, Any]) -> str:
    if "searched_documents" in report:
        return f"Search over {report['searched_documents']} documents"
    return "Held-out rows"


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _markdown(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return f"{title}:\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"


def _tiles(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    labels = {
        "recall@1": "of the searches find their document first",
        "recall@10": "find it among the first ten",
        "first_is_best": "of the queries have the best document first",
        "mrr": "mean reciprocal rank",
        "micro_f1": "micro F1 over all labels",
        "accuracy": "of the answers are right as a whole",
        "calibration_error": "expected calibration error",
    }
    task = report["task"]
    return [(label, f"{task[name]:.1%}" if name != "mrr" else f"{task[name]:.2f}") for name, label in labels.items()
            if name in task]  # fmt: skip


def _plots(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> Iterator[Plot]:
    task = report["task"]
    others = [name for name in COMPARED if name in report]
    names = [name for name in task if name not in ("main", "calibration_error")]
    caption = f"Held-out rows{', beside the ' + COMPARED[others[0]] if others else ''}."
    bars = {"this adapter": [task[name] for name in names]}
    bars |= {COMPARED[other]: [report[other][name] for name in names] for other in others[:1]}
    yield Plot("metrics", "Metrics", caption, _bars(names, bars))
    if report.get("questions"):
        bins = [b for values in report["questions"].values() for b in values["reliability"]]
        caption = "How often a label held, by the chance that it was given; on the line, chances come true."
        yield Plot("reliability", "Chances and what came true", caption, _reliability(bins))
    if metrics:
        yield loss_plot(metrics)


def _bars(names: Sequence[str], series: Mapping[str, Sequence[float]]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        width = 0.8 / len(series)
        for idx, (label, values) in enumerate(series.items()):
            places = [place + width * idx - 0.4 + width / 2 for place in range(len(names))]
            bars = axes.bar(places, values, width * 0.95, color=SERIES[idx], label=label)
            axes.bar_label(bars, fmt="{:.2f}", padding=2, color=TEXT)
        axes.set_xticks(range(len(names)), names)
        axes.set(ylim=(0, 1.08))
        axes.grid(axis="x", visible=False)
        if len(series) > 1:
            axes.legend(frameon=False)

    return draw


def _reliability(bins: Sequence[tuple[float, float, int]]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        most = max(num for *_, num in bins)
        axes.plot([0, 1], [0, 1], color=TEXT, linewidth=0.8, linestyle="dashed")
        sizes = [6 + 120 * num / most for *_, num in bins]
        axes.scatter([b[0] for b in bins], [b[1] for b in bins], s=sizes, color=SERIES[0], alpha=0.6)
        axes.set(xlabel="chance", ylabel="share that held", xlim=(0, 1.02), ylim=(0, 1.02))

    return draw
