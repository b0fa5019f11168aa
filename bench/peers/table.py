"""The table of all cases and peers, as printed and as recorded."""

from __future__ import annotations

import statistics
from typing import Any

from .. import common
from .cases import Cell
from .columns import Peer


def report(cells: list[Cell], peers: list[Peer]) -> list[dict[str, Any]]:
    """Print the table and return it with every round's figures."""
    print(
        f"\n{'case':<14} {'batch':>5}  {'peer':<22} {'dtype':<7} {'tokens/s':>9} {'min-max':>15} {'decode':>9} "
        f"{'specserve/peer':>15} {'min-max':>13} {'same text':>9}"
    )
    summary = []
    for cell in cells:
        case = cell.adapters
        rows: dict[str, Any] = {}
        base = cell.tokens_per_s.get("specserve")
        for peer in peers:
            values = cell.tokens_per_s.get(peer.name)
            if values is None:
                continue
            speed, decode = common.spread(values), common.spread(cell.decode_tokens_per_s[peer.name])
            same = statistics.mean(cell.equal_share[peer.name])
            rows[peer.name] = {
                "tokens_per_s": speed,
                "decode_tokens_per_s": decode,
                "common_prefix_share": round(same, 3),
                "rounds": [round(value, 2) for value in values],
                "decode_rounds": [round(value, 2) for value in cell.decode_tokens_per_s[peer.name]],
            }
            text = ""
            if base is not None and peer.name != "specserve":
                ratio = common.spread([ours / theirs for ours, theirs in zip(base, values, strict=True)])
                rows[peer.name]["specserve_over_it"] = ratio
                text = f"{ratio['median']:>15.2f} {ratio['min']:>6.2f}-{ratio['max']:<6.2f}"
            print(
                f"{case:<14} {cell.batch:>5}  {peer.name:<22} {peer.dtype:<7} {speed['median']:>9.1f} "
                f"{speed['min']:>7.1f}-{speed['max']:<7.1f} {decode['median']:>9.1f} {text:<29} {same:>9.0%}"
            )
        summary.append({"adapters": case, "batch": cell.batch, "peers": rows})
    return summary
