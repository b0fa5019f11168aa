"""What `specserve chat` says beside the answers: its commands, an answer's figures, the engine's counters."""

from __future__ import annotations

from typing import Any

from ..log_lines import one_line

HELP = """\
/adapter [NAME]   talk to that adapter, or to the base model; without a name, list them
/system [TEXT]    set the system message, or take it away; both begin the conversation anew
/reset            begin the conversation anew
/schema [FILE]    answers are JSON of the schema in FILE; without a file, free text again
/off, /on         without drafts, and with them again
/rejected         show wrong drafts, or no longer
/stats            what the engine has done
/quit             leave, as Ctrl-D does
//...             a message that begins with a slash
A line that ends in a backslash goes on. Ctrl-C stops an answer, or clears the line."""


def figures(usage: dict[str, Any], seconds: float, first_s: float | None, finish_reason: str | None) -> str:
    """The line below an answer; `usage` is empty where it was stopped, and `first_s` None where nothing came."""
    first = "" if first_s is None else f", the first after {first_s:.2f} s"
    num = usage.get("completion_tokens")
    if num is None:
        return f"stopped after {seconds:.2f} s{first}"
    length = (usage.get("speculation") or {}).get("mean_accepted_length")
    accepted = f", {length:.2f} tokens a forward" if length else ""
    cut = "; cut at the limit of tokens" if finish_reason == "length" else ""
    return f"{num} tokens, {num / max(seconds, 1e-9):.1f} tokens/s{accepted}{first}{cut}"


def stats_lines(stats: dict[str, Any]) -> str:
    """The answer of GET /v1/stats in a few lines."""
    engine, requests, tokens, kv = (stats.get(name, {}) for name in ("engine", "requests", "tokens", "kv"))
    lines = [
        f"{stats.get('model')} ({engine.get('dtype')}, {engine.get('device')}, kernels {engine.get('kernels')}), "
        f"{engine.get('status')} for {engine.get('uptime_s', 0):.0f} s",
        f"{requests.get('running')} running, {requests.get('waiting')} waiting; KV cache "
        f"{100 * kv.get('used_ratio', 0):.1f}% in use",
        f"{tokens.get('prompt')} prompt tokens ({tokens.get('cached_prompt')} cached), {tokens.get('generated')} "
        f"generated, {tokens.get('accepted')} of {tokens.get('drafted')} drafts kept",
    ]
    for entry in stats.get("speculation", {}).get("by_adapter", []):
        length = entry["generated"] / max(1, entry["verifications"])
        lines.append(f"  {entry['model']}: {entry['generated']} tokens, {length:.2f} a forward")
    return "\n".join(one_line(line) for line in lines)
