"""The plots of a report: as PNG files for the model card, and as SVG for report.html, which follows light and dark.

Owns what is drawn and its colours. In SVG, colours are CSS: what is drawn in `TEXT` takes the page's own colour, a
series its variable, so that one drawing serves both themes. Text stays text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT, SERIES = "#404040", ("#2a78b8", "#c8641e")  # in PNG; in SVG the page's
_CSS = {TEXT: "currentColor", SERIES[0]: "var(--series-1)", SERIES[1]: "var(--series-2)"}
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), TEXT),
}
_MOST_BARS = 32  # of a histogram: what is beyond is in the last
BATCH_LABELS = {"batch 1": "one at a time", "batch 8": "eight at a time"}


@dataclass(frozen=True, slots=True)
class Plot:
    """`name` is the PNG's; `caption` says in a sentence what is to be seen, for those who do not see it too."""

    name: str
    title: str
    caption: str
    draw: Callable[[Any], None]

    def save(self, path: Path) -> None:
        self._figure("png", path)

    def svg(self) -> str:
        """For a page that has --series-1 and --series-2; without what would clash with another one in it."""
        out = io.StringIO()
        self._figure("svg", out)
        text = out.getvalue()
        for colour, css in _CSS.items():
            text = text.replace(colour, css)
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r'(width|height)="[\d.]+pt" ?', "", text, count=2)  # as wide as the page lets it be
        return text.replace("<svg ", f'<svg role="img" aria-label="{self.title}" ', 1)

    def _figure(self, kind: str, out: Any) -> None:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        with matplotlib.rc_context({**_STYLE, "svg.hashsalt": self.name}):
            figure = Figure(figsize=(6, 3.2), layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            axes.grid(axis="y", alpha=0.25, linewidth=0.6)
            self.draw(axes)
            axes.set_title(self.title, fontsize=11.5)
            is_svg = kind == "svg"
            figure.savefig(out, format=kind, dpi=130, transparent=is_svg, metadata={"Date": None} if is_svg else None)


def plots_of(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[Plot]:
    """Of a report, and of its run's metrics.jsonl if there is one."""
    reached: list[float] = report["reached_by_position"]
    histogram = {int(length): num for length, num in report["accepted_length_histogram"].items()}
    first = f"the first in {reached[0]:.0%}" if reached else "none was"
    caption = f"Share of verifications in which the first, second, ... draft was right; {first}."
    plots = [Plot("reached_by_position", "Drafts accepted at least so far", caption, _positions(reached))]
    mean = sum(length * num for length, num in histogram.items()) / max(1, sum(histogram.values()))
    caption = f"How many tokens a verification gave, its own one included: {mean:.2f} in the mean."
    plots.append(Plot("accepted_length", "Tokens a verification", caption, _histogram(histogram)))
    caption = "Tokens a second with drafts and without, prompts included, on the same prompts."
    plots.append(Plot("speed", "Speed", caption, _speed(report["speed"])))
    if metrics:
        plots.append(loss_plot(metrics))
    return plots


def loss_plot(metrics: Sequence[Mapping[str, Any]]) -> Plot:
    """Of the lines of metrics.jsonl, with the head's loss where there is one."""
    first, last = metrics[0]["loss"], metrics[-1]["loss"]
    caption = f"Loss of the LoRA from {first:.2f} to {last:.2f} over {metrics[-1]['step']} steps"
    with_head = ", and of its head" if any("head_loss" in values for values in metrics) else ""
    return Plot("loss", "Loss", f"{caption}{with_head}.", _loss(metrics))


def _positions(reached: Sequence[float]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        axes.bar(range(1, len(reached) + 1), reached, color=SERIES[0])
        axes.set(xlabel="draft position", ylabel="share of verifications", ylim=(0, 1))
        axes.xaxis.get_major_locator().set_params(integer=True)

    return draw


def _histogram(histogram: Mapping[int, int]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        longest = max(histogram, default=1)
        lengths = range(1, min(longest, _MOST_BARS) + 1)
        heights = [histogram.get(length, 0) for length in lengths]
        heights[-1] += sum(num for length, num in histogram.items() if length > lengths[-1])
        axes.bar(lengths, heights, color=SERIES[0])
        more = f" (the last bar: {lengths[-1]} or more)" if longest > lengths[-1] else ""
        axes.set(xlabel=f"tokens{more}", ylabel="verifications")
        axes.xaxis.get_major_locator().set_params(integer=True)

    return draw


def _speed(speed: Mapping[str, Mapping[str, float]]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for side, (key, label) in enumerate(
            (("tokens_per_s_without_drafts", "without drafts"), ("tokens_per_s", "with"))
        ):
            places = [place + 0.4 * side - 0.2 for place in range(len(speed))]
            bars = axes.bar(
                places, [values[key] for values in speed.values()], 0.38, color=SERIES[1 - side], label=label
            )
            axes.bar_label(bars, fmt="{:.0f}", padding=2, color=TEXT)
        axes.set_xticks(range(len(speed)), [BATCH_LABELS.get(name, name) for name in speed])
        axes.set(ylabel="tokens a second")
        axes.margins(y=0.15)
        axes.grid(axis="x", visible=False)
        axes.legend(frameon=False)

    return draw


def _loss(metrics: Sequence[Mapping[str, Any]]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        from matplotlib.ticker import LogLocator, NullLocator

        axes.plot([m["step"] for m in metrics], [m["loss"] for m in metrics], color=SERIES[0], label="LoRA")
        with_head = [m for m in metrics if "head_loss" in m]
        if with_head:
            axes.plot(
                [m["step"] for m in with_head], [m["head_loss"] for m in with_head], color=SERIES[1], label="head"
            )
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(frameon=False)

    return draw
