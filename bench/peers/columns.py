"""The columns of the table: which peers there are, in which dtype, and the processes that answer for them.

A peer that does not start is left out, with its reason. specserve has a column without drafts and one with, the same
for each quantization; a peer that is offered several dtypes is measured in the one that was faster in a short probe.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .setup import Setup
from .worker import Worker, WorkerError

PEERS = ("specserve", "transformers", "vllm", "llamacpp")


@dataclass(slots=True)
class Peer:
    """A column of the table: who answers requests without adapters, and who those with."""

    name: str
    dtype: str
    mode: str
    plain: Worker
    lora: Worker | None  # None: it cannot mix adapters in a batch
    max_batch: int | None = None

    def worker(self, has_loras: bool, batch: int) -> Worker | None:
        if self.max_batch is not None and batch > self.max_batch:
            return None
        return self.lora if has_loras else self.plain


def _faster_dtype(setup: Setup, peer: str) -> tuple[str, Worker]:
    """Start `peer` without adapters in each dtype and keep the faster one; both speeds go into the results.

    Batch 1 decides where it differs twofold, else the geometric mean of batch 1 and 8.
    """
    best: tuple[str, Worker, list[float]] | None = None
    for dtype in setup.dtypes:
        try:
            worker = setup.start(peer, dtype, with_lora=False)
            setup.probe(worker, 1)  # warm-up
            speeds = [setup.probe(worker, 1)]
            if best is None or speeds[0] > best[2][0] / 2:
                setup.probe(worker, 8)
                speeds.append(setup.probe(worker, 8))
        except WorkerError as error:
            print(f"{peer} in {dtype} left out: {error}")
            setup.probes.append({"peer": peer, "dtype": dtype, "error": str(error).partition("; see")[0]})
            continue
        print(f"  {peer} {dtype}: {', '.join(f'{speed:.1f}' for speed in speeds)} tokens/s at batch 1, 8 (probe)")
        setup.probes.append({"peer": peer, "dtype": dtype, "tokens_per_s": [round(speed, 2) for speed in speeds]})
        if best is None or (len(speeds) == 2 and math.prod(speeds) > math.prod(best[2])):
            if best is not None:
                best[1].close()
            best = dtype, worker, speeds
        else:
            worker.close()
    if best is None:
        raise WorkerError(f"{peer} starts in no dtype")
    return best[0], best[1]


def _specserve(name: str, worker: Worker, with_drafts: bool) -> list[Peer]:
    dtype = worker.info["dtype"]
    return [Peer(name, dtype, "off", worker, worker)] + [
        Peer(f"{name}+drafts", dtype, "auto", worker, worker)
    ] * with_drafts


def _form(gguf: str) -> str:
    """Q4_1 of Model.Q4_1.gguf."""
    return Path(gguf).stem.rpartition(".")[2]


def _start(setup: Setup, name: str, with_drafts: bool) -> list[Peer]:
    """The columns of a peer. Raises `WorkerError` when it does not start."""
    if name == "specserve":
        worker = setup.start(name, "auto", with_lora=True)
        peers = _specserve(name, worker, with_drafts)
        for quantization in setup.quantizations:
            worker = setup.start(name, "auto", with_lora=True, quantization=quantization)
            peers += _specserve(f"{name} {quantization}", worker, with_drafts)
        return peers
    if name == "llamacpp":
        return [
            Peer(f"{name} {_form(gguf)}", "gguf", "off", setup.start(name, "gguf", False, gguf=gguf), None, max_batch=1)
            for gguf in setup.ggufs
        ]
    dtype, plain = _faster_dtype(setup, name)
    try:
        return [Peer(name, dtype, "off", plain, setup.start(name, dtype, with_lora=True))]
    except WorkerError as error:
        print(f"{name} with adapters left out: {error}")
        return [Peer(name, dtype, "off", plain, None)]


def start_peers(setup: Setup, names: Sequence[str], with_drafts: bool) -> tuple[list[Peer], dict[str, str]]:
    """All columns, and why a peer has none."""
    peers: list[Peer] = []
    left_out = {name: reason for name in names if (reason := setup.missing(name))}
    for name, reason in left_out.items():
        print(f"{name} left out: {reason}")
    for name in names:
        if name in left_out:
            continue
        try:
            peers += _start(setup, name, with_drafts)
        except WorkerError as error:
            print(f"{name} left out: {error}")
            left_out[name] = str(error).partition("; see")[0]
    return peers, left_out
