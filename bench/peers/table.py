"""The table of all cases and peers, as printed and as recorded.

A rate that a round does not have is NaN: it is left out of medians and ratios, and null among the recorded rounds.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

from .. import common
from .cases import Cell
from .columns import Peer

OURS = "specserve"


def report(cells: list[Cell], peers: list[Peer]) -> list[dict[str, Any]]:
    """Print the table and return it with every round's figures."""
    print(
        f"\n{'case':<14} {'batch':>5}  {'peer':<22} {'dtype':<7} {'tokens/s':>9} {'specserve/it':>20} {'prompts':>9} "
        f"{'specserve/it':>20} {'decode':>9} {'specserve/it':>20} {'same text':>9}"
    )
    summary = [_cell(cell, peers) for cell in cells]
    ours = [peer.name for peer in peers if peer.name.startswith(f"{OURS} ") and "+" not in peer.name]
    for cell, row in zip(cells, summary, strict=True):
        for name in ours:  # quantized columns against what others quantize
            ratios = {
                other: _ratio(cell.decode_tokens_per_s, name, other) for other in row["peers"] if OURS not in other
            }
            for other, ratio in ratios.items():
                if ratio:
                    row["peers"][name].setdefault("decode_over", {})[other] = ratio
                    print(f"{cell.adapters}, batch {cell.batch}: {name} decodes {ratio['median']:.2f}x {other}")
    return summary


def _cell(cell: Cell, peers: list[Peer]) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    figures = {"": cell.tokens_per_s, "prompt_": cell.prompt_tokens_per_s, "decode_": cell.decode_tokens_per_s}
    for peer in peers:
        if peer.name not in cell.tokens_per_s:
            continue
        row = rows[peer.name] = {}
        text = ""
        for prefix, values in figures.items():
            rounds = values.get(peer.name)
            if rounds is None:
                text += f"{'':>31}"
                continue
            row[f"{prefix}rounds"] = [None if math.isnan(value) else round(value, 2) for value in rounds]
            if not (known := [value for value in rounds if not math.isnan(value)]):
                text += f"{'NaN':>10}{'':>21}"
                continue
            speed, ratio = common.spread(known), _ratio(values, OURS, peer.name)
            row[f"{prefix}tokens_per_s"] = speed
            text += f"{speed['median']:>10.1f} "
            if ratio:
                row[f"specserve_over_it{'_' * bool(prefix)}{prefix.rstrip('_')}"] = ratio
                text += f"{ratio['median']:>8.2f} {ratio['min']:>5.2f}-{ratio['max']:<5.2f}"
            else:
                text += f"{'':>20}"
        row["common_prefix_share"] = round(statistics.mean(cell.equal_share[peer.name]), 3)
        print(
            f"{cell.adapters:<14} {cell.batch:>5}  {peer.name:<22} {peer.dtype:<7}{text} "
            f"{row['common_prefix_share']:>9.0%}"
        )
    return {"adapters": cell.adapters, "batch": cell.batch, "peers": rows}


def _ratio(values: dict[str, list[float]], ours: str, peer: str) -> dict[str, float] | None:
    """Of rates round by round; None for the peer itself, and where there is no round in which both have one."""
    if ours == peer or ours not in values or peer not in values:
        return None
    ratios = [a / b for a, b in zip(values[ours], values[peer], strict=True)]
    known = [ratio for ratio in ratios if not math.isnan(ratio)]
    return common.spread(known) if known else None
